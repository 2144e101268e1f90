"""Landlock: a process gives up all files outside a list of paths, and can never add to the list.

Landlock is part of Linux since 5.13 (Salaün 2021; kernel documentation "Landlock: unprivileged access control"). A
process makes a set of rules, "below a path, some rights", and then accepts the set for good. Newer versions of the
interface (the ABI) refuse more: moving and truncating files, connecting by TCP, signals to the outside.
"""

import os
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from course import syscalls

NEWEST_ABI = 6  # the newest version of Landlock that has something for us


class _Abi(NamedTuple):
    """The rights that a version of Landlock can refuse, as bits: on files, of TCP, of reaching outside the process."""

    files: int
    network: int = 0
    scopes: int = 0


def _first_bits(count: int) -> int:
    return (1 << count) - 1


_ABIS = {
    1: _Abi(_first_bits(13)),
    2: _Abi(_first_bits(14)),  # and moving a file to another folder
    3: _Abi(_first_bits(15)),  # and truncating
    4: _Abi(_first_bits(15), network=0b11),
    5: _Abi(_first_bits(16), network=0b11),  # and ioctl on devices
    6: _Abi(_first_bits(16), network=0b11, scopes=0b11),  # and abstract sockets and signals
}
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # system calls, with the same numbers on every architecture
_CREATE_VERSION = 1  # a flag: answer with the kernel's version
_RULE_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3


def allow_reading(paths: Iterable[Path], newest_abi: int = NEWEST_ABI) -> bool:
    """Leave the process only reading `paths` and the files below, for ever; a newer kernel refuses TCP and signals too.

    paths       files and folders; a missing path is passed over
    newest_abi  the newest version of Landlock to use, 0 for none

    Returns False if the kernel has no Landlock: nothing is restricted then.
    """
    abi = min(syscalls.syscall(_CREATE, None, 0, _CREATE_VERSION), newest_abi)
    if abi < 1:
        return False
    refused = struct.pack("=QQQ", *_ABIS[abi])
    rules = syscalls.syscall(_CREATE, refused, len(refused), 0)  # bytes that an old kernel lacks may be zeros
    for path in paths:
        _allow(rules, path)
    syscalls.prctl(syscalls.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if rules < 0 or syscalls.syscall(_RESTRICT, rules, 0) != 0:
        return False
    os.close(rules)
    return True


def _allow(rules: int, path: Path) -> None:
    """Add to the set of rules (a file descriptor): `path` and all below may be read."""
    with suppress(OSError):  # a path that is not there needs no rule
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            rights |= _READ_DIR
        rule = struct.pack("=Qi", rights, handle)
        syscalls.syscall(_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0)
        os.close(handle)
