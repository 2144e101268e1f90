"""A child process that runs somebody else's code and can harm nothing: it computes and replies with text.

Four walls stand around it. A seccomp filter allows the few system calls that computing takes (`ALLOWED`) and refuses
all others, so that a door that nobody thought of, or that a later kernel opens, is shut; no file is opened but for
reading. Landlock (Linux 5.13; Salaün 2021, kernel documentation "Landlock: unprivileged access control") leaves Python
and labkit to read. Limits bound time and memory. Where we are root, the process is that of a user who owns nothing.

Why not a sandbox from elsewhere: an answer has to be a fork of a process that has imported torch already, or a class
would take an hour. bubblewrap, firejail and nsjail start a new program each time. User namespaces are refused to
ordinary users in most containers and on recent Ubuntu. libseccomp is a library of the system that is not everywhere,
and with it the table below would stay: only `_program`, twenty lines, would go.

What is left where a wall is missing: `shut_in` says which stand. Without Landlock an answer may read what the grader's
account may read, and tell it in its reply; it can still change nothing and tell nobody else. On other processors and
systems than Linux on x86-64 or 64-bit ARM only the limits are left. A fault of the kernel is beyond all of this: for
more, run the whole grading in a container.
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from labkit import files

MEMORY = 1 << 30  # bytes beyond what Python and torch have taken already
LARGEST_REPLY = 4096  # bytes
NEWEST_ABI = 6  # the newest version of Landlock that has something for us
_LIMITS = {
    resource.RLIMIT_FSIZE: 0,  # no file may grow: the disk is for all
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_NPROC: 1,  # no thread and no process besides this one
    resource.RLIMIT_CORE: 0,
}
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CAP_DAC_READ_SEARCH = 1 << 2


class Stopped(Exception):
    """The process was ended, or died."""


def run(work: Callable[[], str], *, seconds: float, newest_abi: int = NEWEST_ABI) -> tuple[str, str]:
    """Call `work` in a shut-in child; what shut it in, and what it returned, cut to LARGEST_REPLY.

    To be called in a process with a single thread. newest_abi: the newest version of Landlock to use, 0 for none.
    Stopped, with a sentence, where no reply came within `seconds`, or something else than what `work` returned.
    """
    receiver, sender = os.pipe()
    keeper, seal = os.getpid(), os.urandom(16)  # the seal: what `work` itself writes to the pipe is no reply
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            _keep_only(sender)
            measures = shut_in(seconds, newest_abi=newest_abi)
            if os.getppid() == keeper:  # else it is gone already, and its end will not end us
                os.write(sender, f"{', '.join(measures)}\n".encode())
                os.write(sender, seal + work().encode(errors="backslashreplace")[:LARGEST_REPLY])
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
    measures, _, sealed = reply.partition(b"\n")
    if not sealed:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        raise Stopped(f"its process ended ({how}): it ran into a limit on memory or time, or left Python")
    if not sealed.startswith(seal):
        raise Stopped("its process replied with something else than a result")
    return measures.decode(), sealed.removeprefix(seal).decode(errors="replace")


def shut_in(seconds: float, memory: int = MEMORY, newest_abi: int = NEWEST_ABI) -> list[str]:
    """Shut this process in, with `memory` bytes more than it has now and `seconds` of CPU; it cannot be undone.

    Returns a phrase for each measure. To be called before any foreign code, in a process with a single thread.
    """
    size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text()) if sys.platform == "linux" else None
    os.chdir("/")
    measures = [_become_nobody()]
    landlock = _landlock(newest_abi)
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
    if sys.platform == "linux":
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which forgets it
    measures += [landlock or "files protected by the account's rights only (no Landlock)"]
    measures += [_filter_system_calls(), "limits on time, memory, files and processes"]
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
    os.close(nowhere)


# the user -----------------------------------------------------------------------------------------


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


# files: Landlock ----------------------------------------------------------------------------------


class _Abi(NamedTuple):
    """What a version of Landlock can refuse: bits of rights on files, of TCP, and of reaching beyond the process."""

    files: int
    network: int = 0
    scopes: int = 0


_ABIS = {
    1: _Abi((1 << 13) - 1),
    2: _Abi((1 << 14) - 1),  # and moving a file to another folder
    3: _Abi((1 << 15) - 1),  # and truncating
    4: _Abi((1 << 15) - 1, network=0b11),
    5: _Abi((1 << 16) - 1, network=0b11),  # and ioctl on devices
    6: _Abi((1 << 16) - 1, network=0b11, scopes=0b11),  # and abstract sockets and signals
}
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_CREATE_VERSION = 1  # a flag: answer with the kernel's version
_READ, _READ_DIR = 1 << 2, 1 << 3


def _landlock(newest_abi: int) -> str:
    """Read what Python needs, write nothing, and with a newer kernel connect nowhere and signal nobody."""
    if sys.platform != "linux":
        return ""
    abi = min(_syscall(_LANDLOCK_CREATE, None, 0, _CREATE_VERSION), newest_abi)
    if abi < 1:
        return ""
    attributes = struct.pack("=QQQ", *_ABIS[abi])
    rules = _syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)  # bytes that an old kernel lacks may be zeros
    for path in _readable():
        _allow(rules, path)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if rules < 0 or _syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        return ""
    os.close(rules)
    return "no files but Python's and labkit's (Landlock)"


def _readable() -> Iterator[Path]:
    """Python, its packages, labkit with its data; neither the lessons with their answers nor anybody's home."""
    yield from map(Path, (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"))
    yield from map(Path, ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"))  # torch asks
    yield from map(Path, ("/dev/null", "/dev/zero", "/dev/urandom"))
    yield from (Path(place) for place in sys.path if "-packages" in place)
    yield from (files.ROOT / "labkit", files.DATA, files.cache_dir())


def _allow(rules: int, path: Path) -> None:
    with suppress(OSError):  # what is not there needs no rule
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ | _READ_DIR if stat.S_ISDIR(os.fstat(handle).st_mode) else _READ
        _syscall(_LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)


# system calls: seccomp ----------------------------------------------------------------------------

ALLOWED: dict[str, tuple[int | None, int | None]] = {  # name -> number on x86_64, on aarch64
    # files that are there, to read; writing goes to what is open already
    "open": (2, None), "openat": (257, 56), "close": (3, 57), "fcntl": (72, 25),
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66), "lseek": (8, 62),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "getdents64": (217, 61),
    # memory of its own
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214),
    # signals that it gets, never sends
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    # waiting, clocks that it reads
    "futex": (202, 98), "sched_yield": (24, 124), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "restart_syscall": (219, 128),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # who and what it is
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
    "getcpu": (309, 168), "sched_getaffinity": (204, 123), "arch_prctl": (158, None),
    # its end
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_READING = os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
FLAGS = {"open": (1, _READING), "openat": (2, _READING)}  # name -> an argument, from 0, and the bits that it may have
_F_GETFD, _F_SETFD, _F_GETFL, _F_DUPFD_CLOEXEC = 1, 2, 3, 1030
VALUES = {"fcntl": (1, (_F_GETFD, _F_SETFD, _F_GETFL, _F_DUPFD_CLOEXEC))}  # an argument, and what it may be
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of ALLOWED, seccomp's name for it

_LOAD, _RETURN, _IF_EQUAL, _IF_ANY_BIT = 0x20, 0x06, 0x15, 0x45  # instructions of the Berkeley Packet Filter
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # where a filter finds them; an argument takes 8 bytes, the low 4 first
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM


class _Step(NamedTuple):
    """An instruction, with the labels of the steps that follow if its condition holds and if not ("" the next one)."""

    code: int
    value: int
    then: str = ""
    otherwise: str = ""
    label: str = ""


def _program(machine: str) -> list[_Step]:
    """The filter for a machine: its architecture, then the number of the call, then the argument of some calls."""
    column, architecture = _ARCHITECTURES[machine]
    steps = [_Step(_LOAD, _ARCHITECTURE), _Step(_IF_EQUAL, architecture, otherwise="refuse"), _Step(_LOAD, _NUMBER)]
    for name, numbers in ALLOWED.items():
        if numbers[column] is not None:
            then = name if name in FLAGS or name in VALUES else "allow"
            steps.append(_Step(_IF_EQUAL, numbers[column], then))
    steps.append(_Step(_RETURN, _REFUSE))
    for name, (argument, bits) in FLAGS.items():
        steps.append(_Step(_LOAD, _ARGUMENTS + 8 * argument, label=name))
        steps.append(_Step(_IF_ANY_BIT, ~bits & 0xFFFFFFFF, "refuse", "allow"))
    for name, (argument, values) in VALUES.items():
        steps.append(_Step(_LOAD, _ARGUMENTS + 8 * argument, label=name))
        steps += [_Step(_IF_EQUAL, value, "allow") for value in values]
        steps.append(_Step(_RETURN, _REFUSE))
    steps.append(_Step(_RETURN, _REFUSE, label="refuse"))
    steps.append(_Step(_RETURN, _ALLOW, label="allow"))
    return steps


def _assembled(steps: list[_Step]) -> bytes:
    """The filter as the kernel takes it: 8 bytes a step, a jump as the number of steps that it leaves out."""
    places = {step.label: place for place, step in enumerate(steps) if step.label}

    def left_out(label: str, place: int) -> int:
        return places[label] - place - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", step.code, left_out(step.then, place), left_out(step.otherwise, place), step.value)
        for place, step in enumerate(steps)
    )


def _filter_system_calls() -> str:
    """Allow what computing takes, and refuse all else with EPERM; in Python only where seccomp is not."""
    if sys.platform == "linux" and platform.machine() in _ARCHITECTURES:
        steps = _program(platform.machine())
        code = ctypes.create_string_buffer(_assembled(steps))
        described = struct.pack("@HP", len(steps), ctypes.addressof(code))
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if ctypes.CDLL(None).prctl(_PR_SET_SECCOMP, 2, described, 0, 0) == 0:
            return "no network, signals, programs or changes to any file (seccomp)"

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
