"""On PYTHONPATH this cuts a Python off the network: only loopback and Unix sockets connect, only local names resolve.

Jupyter's kernels talk over loopback, so lessons run. A library that opens sockets outside Python is not held back.
"""

import socket

_LOCAL = {None, "", "localhost", "localhost.localdomain", "0.0.0.0", "::", "::1", "ip6-localhost"}


def _refuse_unless_local(host: object) -> None:
    host = host.decode() if isinstance(host, bytes) else host
    if not (host in _LOCAL or str(host).startswith("127.") or host == socket.gethostname()):
        raise OSError(f"the network is blocked: {host!r} was asked for")


def _guarded_method(name: str):
    original = getattr(socket.socket, name)

    def guarded(self, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_unless_local(args[-1][0])  # the address comes last: connect(address), sendto(data, flags, address)
        return original(self, *args)

    return guarded


def _guarded_lookup(name: str):
    original = getattr(socket, name)

    def guarded(host, *args, **kwargs):
        _refuse_unless_local(host)
        return original(host, *args, **kwargs)

    return guarded


for _name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _name, _guarded_method(_name))
for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, _name, _guarded_lookup(_name))
