"""System calls without a function in Python, through the C library; Linux only."""

import ctypes

SET_PDEATHSIG, SET_KEEPCAPS, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 8, 22, 38  # operations of prctl: linux/prctl.h


def prctl(operation: int, *arguments: int | bytes) -> int:
    """Change a property of the process; returns 0, or -1 for a refusal."""
    values = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    return ctypes.CDLL(None).prctl(ctypes.c_ulong(operation), *values)


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call by number, the arguments integers, bytes (as a pointer) or None (the null pointer)."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return ctypes.CDLL(None).syscall(ctypes.c_long(number), *values)


def capset(header: bytes, data: bytes) -> int:
    """Set the capabilities of the process from the two structures of the interface (linux/capability.h)."""
    return ctypes.CDLL(None).capset(header, data)
