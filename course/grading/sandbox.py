"""A process that runs somebody else's code: limits, no network, no files but its own, no further processes.

What Linux offers a program without a helper is used: rlimits, a network namespace, Landlock (Linux 5.13; Salaün 2021,
kernel documentation "Landlock: unprivileged access control") and, where we are root, a user that owns nothing.
It does not bound what a bug of the kernel lets through, and on other systems only the limits are left: `shut` says
what was done. For more, run the whole grading in a container.
"""

import ctypes
import os
import re
import resource
import signal
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from labkit import files

LARGEST_FILE = 64 << 20  # bytes
OPEN_FILES = 64
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 1, 8, 38
_CAP_DAC_READ_SEARCH = 1 << 2
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_EXECUTE, _WRITE, _READ, _READ_DIR = 1, 2, 4, 8
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # ABI -> all rights on files
_OF_A_FILE = _EXECUTE | _WRITE | _READ | 1 << 14 | 1 << 15  # the rest makes sense for folders only
_TCP, _SCOPES = 0b11, 0b11  # bind and connect (ABI 4); abstract sockets and signals (ABI 6)


def shut(own: Path, *, seconds: float, memory: int) -> list[str]:
    """Shut this process in: it may write to `own`, take `memory` bytes more than now, `seconds` of CPU; never undone.

    Returns one phrase a measure, for the people who read the result. To be called before any foreign code, in a process
    with a single thread.
    """
    taken = address_space()  # read now: Landlock hides /proc
    os.chdir(own)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["HOME"] = str(own)
    done = [_leave_the_network(), _become_nobody(own)]
    done += _landlock(own) or _may_not_read_more()
    _limit(resource.RLIMIT_AS, taken + memory)
    _limit(resource.RLIMIT_CPU, int(seconds) + 2)
    _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit(resource.RLIMIT_NPROC, 1)  # no thread and no process besides this one
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which forgets it
    return [*filter(None, done), "limits on time, memory, files and processes"]


def address_space() -> int:
    """Bytes of address space that this process has taken; 0 where the system does not say."""
    with suppress(OSError, TypeError):
        return int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return 0


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # macOS knows no limit of the address space
        resource.setrlimit(kind, (value, value))


def _become_nobody(own: Path) -> str:
    """Where we are root: a user and group that no account has, others for each process, and none of root's powers.

    One is left until Landlock stands, and bounded by it: to read Python and its packages where only root may.
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        return ""
    nobody = (1 << 30) + os.getpid()
    os.chown(own, nobody, nobody)
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    _call("prctl", _PR_SET_KEEPCAPS, 1)
    os.setresuid(nobody, nobody, nobody)
    _have_powers(_CAP_DAC_READ_SEARCH)
    return "as a user who owns nothing"


def _may_not_read_more() -> list[str]:
    """Without Landlock the rights of the user are all that protects files, so nothing is added to them."""
    _have_powers(0)
    return []


def _have_powers(bits: int) -> None:
    if sys.platform == "linux":
        header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=IIIIII", bits, bits, 0, 0, 0, 0)
        ctypes.CDLL(None).capset(header, data)  # version 3 of the interface; effective, permitted, inheritable


def _leave_the_network() -> str:
    """A network namespace of its own has no interface that is up; elsewhere Python's sockets are told to refuse."""
    flags = _CLONE_NEWNET | _CLONE_NEWIPC | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)
    if sys.platform == "linux" and _call("unshare", flags) == 0:
        return "no network (its own namespace)"

    def refuse(*_):
        raise OSError("there is no network while answers are graded")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        setattr(socket.socket, name, refuse)
    return "network refused in Python only"


def _landlock(own: Path) -> list[str]:
    """Read what Python needs, write to `own` alone; TCP and signals to other processes where the kernel can."""
    if sys.platform != "linux" or (abi := _syscall(_LANDLOCK_CREATE, None, 0, 1)) < 1:
        return []
    rights = _FILES[max(known for known in _FILES if known <= abi)]
    asked = struct.pack("=QQQ", rights, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    rules = _syscall(_LANDLOCK_CREATE, asked, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    if rules < 0:
        return []
    _allow(rules, own, rights & ~_EXECUTE)
    for place in _readable():
        _allow(rules, place, rights & (_READ | _READ_DIR))
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        _allow(rules, Path(device), rights & (_READ | _WRITE))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        return []
    os.close(rules)
    return ["no files but its own (Landlock)"]


def _readable() -> Iterable[Path]:
    """Python, its packages, labkit with its data; neither the lessons with their answers nor anybody's home."""
    yield from (Path(place) for place in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ssl"))
    yield from (Path(place) for place in ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"))  # torch asks
    yield from (Path(place) for place in sys.path if "-packages" in place)
    yield from (files.ROOT / "labkit", files.DATA, files.cache_dir())


def _allow(rules: int, place: Path, rights: int) -> None:
    with suppress(OSError):  # what is not there needs no rule
        handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= _OF_A_FILE
        _syscall(_LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)


def _call(name: str, *arguments: int) -> int:
    return getattr(ctypes.CDLL(None), name)(*(ctypes.c_ulong(one) for one in arguments))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    values = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return ctypes.CDLL(None).syscall(ctypes.c_long(number), *values)
