"""A child process that runs somebody else's code and can harm nothing: the child computes and replies with text.

Four walls stand around the child:

1. seccomp (course.seccomp): the few system calls of computing are allowed, and all others refused, so that a door
   thought of by nobody, or opened by a later kernel, is shut. Files are opened for reading only.
2. Landlock (course.landlock): of all files only Python and labkit can be read.
3. Limits on time, memory, files and processes.
4. If the grader is root, the child belongs to a user without any property.

Why not a sandbox from elsewhere: an answer has to be a fork of a process with torch already imported, or a class would
take an hour. bubblewrap, firejail and nsjail start a new program each time. User namespaces are refused to ordinary
users in most containers and on recent Ubuntu.

If a wall is missing, `shut_in` says which walls stand. Without Landlock an answer may read all files of the grader's
account, and tell their content in the reply; changing files and telling anybody else stay refused. Outside Linux on
x86-64 and 64-bit ARM only the limits are left. A fault of the kernel is beyond all walls: for more, run the whole
grading in a container.
"""

import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from course import landlock, seccomp, syscalls
from course.landlock import NEWEST_ABI
from labkit import files

MEMORY = 1 << 30  # bytes beyond what Python and torch have taken already
LARGEST_REPLY = 4096  # bytes
_LIMITS = {
    resource.RLIMIT_FSIZE: 0,  # no file may grow: the disk is for all
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_NPROC: 1,  # no thread and no process besides this one
    resource.RLIMIT_CORE: 0,
}
_CAPABILITY_VERSION = 0x20080522  # version 3 of the interface
_CAP_DAC_READ_SEARCH = 1 << 2
_NOBODY = 1 << 30  # above the number of any account


class Stopped(Exception):
    """The child was ended, or died."""


def run(work: Callable[[], str], *, seconds: float, newest_abi: int = NEWEST_ABI) -> tuple[str, str]:
    """Call a function in a shut-in child process.

    work        function to call, without arguments
    seconds     limit on the wall time
    newest_abi  the newest version of Landlock to use, 0 for none

    Returns the walls in words, and the text returned by `work`, cut to LARGEST_REPLY bytes. Raises Stopped, with a
    sentence, if no reply came in time, or a reply not from `work`. The calling process must have a single thread.
    """
    receiver, sender = os.pipe()
    keeper = os.getpid()
    seal = os.urandom(16)  # before the result: what `work` itself writes to the pipe is no reply
    child = os.fork()
    if child == 0:
        try:
            _be_child(work, sender, keeper, seal, seconds, newest_abi)
        finally:
            os._exit(0)
    os.close(sender)
    try:
        reply = _read(receiver, time.monotonic() + seconds)
    finally:
        os.close(receiver)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if reply is None:
        raise Stopped(f"stopped after {seconds:g} s: an endless loop, or far slower than needed")
    measures, _, sealed = reply.partition(b"\n")
    if not sealed:
        how = _how_it_ended(status)
        raise Stopped(f"its process ended ({how}): it ran into a limit on memory or time, or left Python")
    if not sealed.startswith(seal):
        raise Stopped("its process replied with something else than a result")
    return measures.decode(), sealed.removeprefix(seal).decode(errors="replace")


def _be_child(work: Callable[[], str], sender: int, keeper: int, seal: bytes, seconds: float, newest_abi: int) -> None:
    """Shut the child in, call `work`, and write the walls, the seal and the result to the pipe `sender`."""
    os.setsid()
    _keep_only(sender)
    measures = shut_in(seconds, newest_abi=newest_abi)
    if os.getppid() != keeper:  # it is gone already, and its end will not end us
        return
    os.write(sender, f"{', '.join(measures)}\n".encode())
    result = work().encode(errors="backslashreplace")
    os.write(sender, seal + result[:LARGEST_REPLY])


def _how_it_ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"code {os.WEXITSTATUS(status)}"


def _read(receiver: int, until: float) -> bytes | None:
    """Read the pipe to the end, at most about two replies; None if the end has not come by the time `until`."""
    data = b""
    while len(data) <= 2 * LARGEST_REPLY:
        seconds_left = max(until - time.monotonic(), 0)
        readable, _, _ = select.select([receiver], [], [], seconds_left)
        if not readable:
            return None
        part = os.read(receiver, LARGEST_REPLY)
        if not part:
            break
        data += part
    return data


def _keep_only(handle: int) -> None:
    """Close every file besides `handle`, and send all printed text to /dev/null."""
    os.closerange(3, handle)
    os.closerange(handle + 1, os.sysconf("SC_OPEN_MAX"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)


# the walls ----------------------------------------------------------------------------------------


def shut_in(seconds: float, memory: int = MEMORY, newest_abi: int = NEWEST_ABI) -> list[str]:
    """Shut the current process in; there is no way back.

    seconds     limit on CPU time
    memory      bytes beyond the present use
    newest_abi  the newest version of Landlock to use, 0 for none

    Returns a phrase per wall. To be called before any foreign code, in a process with a single thread. The order of the
    walls matters: each takes away rights needed to build the walls before.
    """
    address_space = _address_space()
    os.chdir("/")
    measures = []
    if _become_nobody():
        measures.append("as a user who owns nothing")
    reads_only_python = sys.platform == "linux" and landlock.allow_reading(_readable(), newest_abi)
    if not reads_only_python:
        _set_capabilities(0)  # the user's rights are all that protects files then, so nothing is added to them
    _set_limits(seconds, address_space + memory if address_space else None)
    if sys.platform == "linux":
        syscalls.prctl(syscalls.SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which forgets it
    if reads_only_python:
        measures.append("no files but Python's and labkit's (Landlock)")
    else:
        measures.append("files protected by the account's rights only (no Landlock)")
    if seccomp.filter_system_calls():
        measures.append("no network, signals, programs or changes to any file (seccomp)")
    else:
        _refuse_network_in_python()
        measures.append("network refused in Python only")
    measures.append("limits on time, memory, files and processes")
    return measures


def _address_space() -> int | None:
    """Bytes of address space of the process; None outside Linux."""
    if sys.platform != "linux":
        return None
    size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(size[1]) * 1024 if size else None


def _become_nobody() -> bool:
    """Turn root into a user and group without an account, different in each process; False if the user is not root.

    Of root's capabilities a single one is left until Landlock stands, and bounded by Landlock: reading Python and
    packages that only root may read.
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        return False
    nobody = _NOBODY + os.getpid()
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    syscalls.prctl(syscalls.SET_KEEPCAPS, 1)
    os.setresuid(nobody, nobody, nobody)
    _set_capabilities(_CAP_DAC_READ_SEARCH)
    return True


def _set_capabilities(bits: int) -> None:
    """Set the effective and permitted capabilities of the process, and make none inheritable."""
    if sys.platform == "linux":
        header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)  # 0: the current process
        effective = permitted = bits
        low, high = (effective, permitted, 0), (0, 0, 0)  # capabilities 0 to 31, and 32 to 63
        syscalls.capset(header, struct.pack("=IIIIII", *low, *high))


def _readable() -> Iterator[Path]:
    """List what an answer may read: Python, packages, labkit with its data; neither lessons nor anybody's home."""
    yield from map(Path, (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"))
    yield from map(Path, ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"))  # torch asks
    yield from map(Path, ("/dev/null", "/dev/zero", "/dev/urandom"))
    yield from (Path(place) for place in sys.path if "-packages" in place)
    yield from (files.ROOT / "labkit", files.DATA, files.cache_dir())


def _set_limits(seconds: float, address_space: int | None) -> None:
    """Lower the limits of the process on CPU time and, in bytes, on address space, and those in _LIMITS."""
    limits = {**_LIMITS, resource.RLIMIT_CPU: int(seconds) + 2}
    if address_space:
        limits[resource.RLIMIT_AS] = address_space
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        with suppress(ValueError, OSError):  # macOS does not know all of them
            resource.setrlimit(kind, (most, most))


def _refuse_network_in_python() -> None:
    def refuse(*_: object) -> None:
        raise OSError("there is no network while answers are graded")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        setattr(socket.socket, name, refuse)
