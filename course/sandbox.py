"""A child process that runs somebody else's code and can harm nothing: it computes and replies with text.

What Linux offers without a helper program is used: limits, a seccomp filter, Landlock (Linux 5.13; Salaün 2021, kernel
documentation "Landlock: unprivileged access control") and, where we are root, a user that owns nothing. It does not
bound what a bug of the kernel lets through, and elsewhere only the limits are left: `shut_in` says what was done.
For more, run the whole grading in a container.
"""

import ctypes
import os
import platform
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from labkit import files

MEMORY = 1 << 30  # bytes beyond what Python and torch have taken already
LARGEST_REPLY = 4096  # bytes
_LIMITS = {
    resource.RLIMIT_FSIZE: 0,  # no file may grow: the disk is for all
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_NPROC: 1,  # no thread and no process besides this one
    resource.RLIMIT_CORE: 0,
}
_SYSTEM_CALLS = {  # refused: name -> number on x86_64, on aarch64
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, what seccomp calls it
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CAP_DAC_READ_SEARCH = 1 << 2
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_WRITE, _READ, _READ_DIR = 2, 4, 8
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # ABI -> all rights on files


class Stopped(Exception):
    """The process was ended, or died."""


def run(work: Callable[[], str], *, seconds: float) -> tuple[str, str]:
    """Call `work` in a shut-in child; what shut it in, and what it returned, cut to LARGEST_REPLY.

    To be called in a process with a single thread. Stopped, with a sentence, where no reply came within `seconds`.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            _keep_only(sender)
            os.write(sender, f"{', '.join(shut_in(seconds))}\n".encode())
            os.write(sender, work().encode(errors="backslashreplace")[:LARGEST_REPLY])
        finally:
            os._exit(0)
    os.close(sender)
    try:
        reply = _read(receiver, time.monotonic() + seconds)
    finally:
        os.close(receiver)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if reply is None:
        raise Stopped(f"stopped after {seconds:g} s: an endless loop, or far slower than needed")
    measures, _, text = reply.decode(errors="replace").partition("\n")
    if not text:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        raise Stopped(f"its process ended ({how}): it ran into a limit on memory or time, or left Python")
    return measures, text


def shut_in(seconds: float, memory: int = MEMORY) -> list[str]:
    """Shut this process in, with `memory` bytes more than it has now and `seconds` of CPU; it cannot be undone.

    Returns a phrase for each measure. To be called before any foreign code, in a process with a single thread.
    """
    size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text()) if sys.platform == "linux" else None
    os.chdir("/")
    measures = [_become_nobody()]
    landlock = _landlock()
    if not landlock:
        _have_powers(0)  # the user's rights are all that protects files then, so nothing is added to them
    limits = {**_LIMITS, resource.RLIMIT_CPU: int(seconds) + 2}
    if size:
        limits[resource.RLIMIT_AS] = int(size[1]) * 1024 + memory
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(ValueError, OSError):  # macOS does not know all of them
            resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with a reason
    if sys.platform == "linux":
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which forgets it
    measures += [landlock, _filter_system_calls(), "limits on time, memory, files and processes"]
    return list(filter(None, measures))


def _read(receiver: int, until: float) -> bytes | None:
    """All that comes until the other end closes; None where that takes too long."""
    data = b""
    while len(data) <= 2 * LARGEST_REPLY:
        if not select.select([receiver], [], [], max(until - time.monotonic(), 0))[0]:
            return None
        if not (part := os.read(receiver, LARGEST_REPLY)):
            break
        data += part
    return data


def _keep_only(handle: int) -> None:
    """Close every other file. What is printed goes nowhere."""
    os.closerange(3, handle)
    os.closerange(handle + 1, os.sysconf("SC_OPEN_MAX"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)


def _become_nobody() -> str:
    """Where we are root: a user and group that no account has, others for each process, and none of root's powers.

    One is left until Landlock stands, and bounded by it: to read Python and its packages where only root may.
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        return ""
    nobody = (1 << 30) + os.getpid()
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    _call("prctl", _PR_SET_KEEPCAPS, 1)
    os.setresuid(nobody, nobody, nobody)
    _have_powers(_CAP_DAC_READ_SEARCH)
    return "as a user who owns nothing"


def _have_powers(bits: int) -> None:
    if sys.platform == "linux":
        header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=IIIIII", bits, bits, 0, 0, 0, 0)
        ctypes.CDLL(None).capset(header, data)  # version 3 of the interface; effective, permitted, inheritable


def _landlock() -> str:
    """Read what Python needs, and write nothing."""
    if sys.platform != "linux" or (abi := _syscall(_LANDLOCK_CREATE, None, 0, 1)) < 1:
        return ""
    rights = _FILES[max(version for version in _FILES if version <= abi)]
    rules = _syscall(_LANDLOCK_CREATE, struct.pack("=Q", rights), 8, 0)
    for path in _readable():
        _allow(rules, path, _READ | _READ_DIR)
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        _allow(rules, Path(device), _READ | _WRITE)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if rules < 0 or _syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        return ""
    os.close(rules)
    return "no files (Landlock)"


def _readable() -> Iterable[Path]:
    """Python, its packages, labkit with its data; neither the lessons with their answers nor anybody's home."""
    yield from map(Path, (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ssl"))
    yield from map(Path, ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"))  # torch asks
    yield from (Path(place) for place in sys.path if "-packages" in place)
    yield from (files.ROOT / "labkit", files.DATA, files.cache_dir())


def _allow(rules: int, path: Path, rights: int) -> None:
    with suppress(OSError):  # what is not there needs no rule
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= ~_READ_DIR
        _syscall(_LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)


def _filter_system_calls() -> str:
    """No sockets, signals, programs, shared memory or change of another's limits; in Python only where seccomp is not.

    The filter is a program of the Berkeley Packet Filter, an instruction a line: code, jumps if true and false, value.
    """
    if sys.platform == "linux" and platform.machine() in _ARCHITECTURES:
        column, name = _ARCHITECTURES[platform.machine()]
        refused = [numbers[column] for numbers in _SYSTEM_CALLS.values()]
        load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
        program = [(load, 0, 0, 4), (equal, 1, 0, name), (end, 0, 0, 0x80000000)]  # of another architecture: killed
        program += [(load, 0, 0, 0), (at_least, len(refused) + 1, 0, 0x40000000)]  # numbers of x32 are refused
        program += [(equal, len(refused) - place, 0, number) for place, number in enumerate(refused)]
        program += [(end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x00050000 | 1)]  # allowed; EPERM
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
        filtered = struct.pack("@HP", len(program), ctypes.addressof(code))
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if ctypes.CDLL(None).prctl(_PR_SET_SECCOMP, 2, filtered, 0, 0) == 0:
            return "no network, signals or programs (seccomp)"

    def refuse(*_: object) -> None:
        raise OSError("there is no network while answers are graded")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        setattr(socket.socket, name, refuse)
    return "network refused in Python only"


def _call(name: str, *arguments: int) -> int:
    return getattr(ctypes.CDLL(None), name)(*(ctypes.c_ulong(value) for value in arguments))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return ctypes.CDLL(None).syscall(ctypes.c_long(number), *values)
