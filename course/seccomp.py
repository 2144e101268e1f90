"""seccomp: a process gives up all system calls outside a list, and can never add to the list.

The kernel asks a small program before each system call (mode "filter": kernel documentation "Seccomp BPF"). The program
is written in the language of the Berkeley Packet Filter (McCanne & Jacobson 1993) and made here from three tables:

    ALLOWED  the calls needed for computing, with the numbers on each architecture
    FLAGS    calls allowed only if an argument has no bits beyond a mask: files are opened for reading only
    VALUES   calls allowed only if an argument is in a list

Each call outside the tables fails with EPERM. A later kernel's new calls are outside, too.

Why not libseccomp: a library of the system, not installed everywhere. The tables would stay, and only `program` and
`assembled`, thirty lines, would go.
"""

import ctypes
import os
import platform
import struct
import sys
from typing import NamedTuple

from course import syscalls

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
_CALL_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # bytes into the description of a call that a filter gets
_ARGUMENT_BYTES = 8  # of each argument; the low four come first
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
_MODE_FILTER = 2


class Instruction(NamedTuple):
    """An instruction of a filter.

    code       the operation, such as _LOAD or _IF_EQUAL
    value      the operand: a place, a number to compare with, or a result
    then       for a condition: label of the next step if true, "" for the step below
    otherwise  for a condition: label of the next step if false, "" for the step below
    label      name of the step
    """

    code: int
    value: int
    then: str = ""
    otherwise: str = ""
    label: str = ""


def program(machine: str) -> list[Instruction]:
    """Write the filter for a machine, "x86_64" or "aarch64".

    The filter looks at the architecture, since a call's number means nothing without, then at the number of the call,
    then, for the calls in FLAGS and VALUES, at an argument.
    """
    column, architecture = _ARCHITECTURES[machine]
    steps = [
        Instruction(_LOAD, _ARCHITECTURE),
        Instruction(_IF_EQUAL, architecture, otherwise="refuse"),
        Instruction(_LOAD, _CALL_NUMBER),
    ]
    for name, numbers in ALLOWED.items():
        number = numbers[column]
        if number is not None:
            asks_for_an_argument = name in FLAGS or name in VALUES
            steps.append(Instruction(_IF_EQUAL, number, then=name if asks_for_an_argument else "allow"))
    steps.append(Instruction(_RETURN, _REFUSE))
    for name, (argument, bits) in FLAGS.items():
        forbidden_bits = ~bits & 0xFFFFFFFF
        steps.append(Instruction(_LOAD, _place(argument), label=name))
        steps.append(Instruction(_IF_ANY_BIT, forbidden_bits, then="refuse", otherwise="allow"))
    for name, (argument, values) in VALUES.items():
        steps.append(Instruction(_LOAD, _place(argument), label=name))
        for value in values:
            steps.append(Instruction(_IF_EQUAL, value, then="allow"))
        steps.append(Instruction(_RETURN, _REFUSE))
    steps.append(Instruction(_RETURN, _REFUSE, label="refuse"))
    steps.append(Instruction(_RETURN, _ALLOW, label="allow"))
    return steps


def _place(argument: int) -> int:
    return _ARGUMENTS + _ARGUMENT_BYTES * argument


def assembled(steps: list[Instruction]) -> bytes:
    """Translate a filter for the kernel: 8 bytes a step, with each label as the number of steps to jump over."""
    places = {step.label: place for place, step in enumerate(steps) if step.label}

    def jump(label: str, place: int) -> int:
        return places[label] - place - 1 if label else 0

    code = b""
    for place, step in enumerate(steps):
        code += struct.pack("=HBBI", step.code, jump(step.then, place), jump(step.otherwise, place), step.value)
    return code


def filter_system_calls() -> bool:
    """Allow the process the calls in the tables, and refuse all further calls with EPERM, for ever.

    Returns False if there is no seccomp: the system is not Linux, the processor is not in the tables, or the kernel
    refuses the filter. Nothing is restricted then.
    """
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return False
    steps = program(platform.machine())
    code = ctypes.create_string_buffer(assembled(steps))
    description = struct.pack("@HP", len(steps), ctypes.addressof(code))
    syscalls.prctl(syscalls.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return syscalls.prctl(syscalls.SET_SECCOMP, _MODE_FILTER, description, 0, 0) == 0
