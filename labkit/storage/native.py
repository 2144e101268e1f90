"""Compile and load labkit's own C++ (csrc/), on first use, into the user's cache; call its N:M kernel.

Without a compiler a warning says so once, and slower code gives the same results. CPU only, for inference only. The
sources csrc/sparse_linear.cpp, csrc/nm_mask.cpp and csrc/int4_linear.cpp say how the kernels work and why they are
fast; `sell` has the layout of the first, `int4` that of the last.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor

from labkit import files
from labkit.errors import InputError

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas")
EXACT = {"int4_linear": ("-ffp-contract=off",)}  # further flags of sources whose results are the same bits everywhere
THREADS = (("-fopenmp",), ())  # the second where the compiler has no OpenMP: one thread
ISAS = ("generic", "avx2", "avx512")  # the instruction sets that the sources distinguish, by their number there
_INT, _INDEX, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
ARGUMENTS = {
    "sparse_linear": [_INT] * 4 + [_INDEX] * 4 + [_POINTER, _INDEX] + [_POINTER] * 7,
    "nm_mask": [_INT] * 5 + [_INDEX, _POINTER, _POINTER],
    "int4_linear": [_INT] * 2 + [_INDEX] * 4 + [_POINTER] * 4,
}
NM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = "The weight holds NaN, which has no rank: look for the step that it comes from."

# --- compiling --------------------------------------------------------------------------------------------------------


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """Return the library of csrc/<name>.cpp, compiled if the cache lacks it.

    Returns None where compiling fails; a warning gives the reason, once.
    """
    try:
        path = _compiled(SOURCES / f"{name}.cpp")
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        cure = "install g++ or clang++, or name one in the environment variable CXX"
        if getattr(error, "errno", None):  # the system's: the cache cannot be written
            cure = "name a folder that can be written in LABKIT_CACHE, or fill that one before it is made read-only"
        warnings.warn(
            f"labkit's {name}.cpp could not be compiled ({reason}), so slower code is used: {cure}.", stacklevel=4
        )
        return None
    getattr(library, name).argtypes = ARGUMENTS[name]
    return library


@functools.cache
def best_isa(name: str) -> int:
    """Return the number in `ISAS` of the best instruction set that the compiled csrc/<name>.cpp can use here."""
    return getattr(load(name), f"{name}_best_isa")()


def isas(name: str) -> tuple[str, ...]:
    """Return the instruction sets that csrc/<name>.cpp can use here, the best last; empty without a compiler."""
    return ISAS[: best_isa(name) + 1] if load(name) else ()


def compiler() -> list[str]:
    """Return the command of the C++ compiler: the variable CXX, or the first of g++, clang++ and c++ on the PATH.

    Raises FileNotFoundError if there is no compiler.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    choices = [command] if command else [["g++"], ["clang++"], ["c++"]]
    for program, *options in choices:
        if path := shutil.which(program):
            return [path, *options]
    missing = command[0] if command else "g++, clang++ or c++"
    raise FileNotFoundError(f"there is no {missing} on the PATH")


def is_compiled(name: str) -> bool:
    """Return True if the cache has the library of csrc/<name>.cpp for this compiler and machine."""
    try:
        return _library(SOURCES / f"{name}.cpp").exists()
    except (OSError, subprocess.SubprocessError):
        return False


def _library(source: Path) -> Path:
    """Return the place of the shared library for this source, compiler and machine."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    machine = (platform.system(), platform.machine())
    key = "\0".join([source.read_text(), version, *command, *_flags(source), *machine])
    digest = hashlib.sha256(key.encode()).hexdigest()
    return files.cache_dir() / "kernels" / f"{source.stem}-{digest[:16]}.so"


def _flags(source: Path) -> tuple[str, ...]:
    return (*FLAGS, *EXACT.get(source.stem, ()))


def _compiled(source: Path) -> Path:
    """Return the shared library for this source, compiler and machine; compile it unless the cache has it."""
    target = _library(source)
    if target.exists():
        return target
    command = compiler()
    with files.replacing(target) as partial:  # a second process that does the same at once harms nothing
        for threads in THREADS:
            compilation = [*command, *_flags(source), *threads, "-o", str(partial), str(source)]
            done = subprocess.run(compilation, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                return target
        error_lines = [line for line in done.stderr.splitlines() if "error" in line]
        error = error_lines[0] if error_lines else done.stderr.strip()
        raise subprocess.SubprocessError(f"{command[0]} failed: {error}")


# --- nm_mask ----------------------------------------------------------------------------------------------------------


def nm_takes(groups: Tensor) -> bool:
    """Return True if there is compiled code for the N:M mask of groups [..., m], as the groups lie in memory."""
    if groups.device.type != "cpu" or groups.dtype not in NM_DTYPES or not groups.is_contiguous():
        return False
    library = load("nm_mask")
    if library is None:
        return False
    isa, m = best_isa("nm_mask"), groups.shape[-1]
    return bool(library.nm_mask_takes(isa, groups.element_size(), m))


def nm_largest(groups: Tensor, n: int, out: Tensor) -> None:
    """Write into `out` which n of each group of weights are largest in magnitude; of equal weights, the first.

    groups: [..., m], accepted by `nm_takes`.
    out: bool [..., m], contiguous.
    Uses torch.get_num_threads() threads. Raises InputError for NaN.
    """
    size = groups.element_size()
    kernel = load("nm_mask").nm_mask
    largest = kernel(
        best_isa("nm_mask"),
        torch.get_num_threads(),
        size,
        n,
        groups.shape[-1],
        groups.numel(),
        groups.data_ptr(),
        out.data_ptr(),
    )
    # As bit patterns, magnitudes are ordered like whole numbers, and NaN lies above infinity.
    infinity = torch.tensor(torch.inf, dtype=groups.dtype)
    pattern = infinity.view(torch.int16 if size == 2 else torch.int32)
    if largest > int(pattern):
        raise InputError(NAN)
