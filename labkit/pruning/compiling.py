"""labkit's own C++: compiled once, on first use, into the user's cache, and loaded.

Whoever has no compiler gets the same results from slower code, and is told so once.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from labkit import files

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas")
THREADS = (("-fopenmp",), ())  # the second where the compiler has no OpenMP: one thread
ISAS = ("generic", "avx2", "avx512")  # the instruction sets that the sources distinguish, by their number there


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library of csrc/<name>.cpp, or None where it cannot be compiled: then a warning says why, once."""
    try:
        return ctypes.CDLL(str(_compiled(SOURCES / f"{name}.cpp")))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"labkit's {name}.cpp could not be compiled ({reason}), so slower code is used: install g++ or clang++, "
            "or name one in the environment variable CXX.",
            stacklevel=4,
        )
        return None


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, or the first one on the PATH; FileNotFoundError where there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(named[0]):
            raise FileNotFoundError(f"CXX names {named[0]}, which is no program here")
        return named
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("there is no g++, clang++ or c++ on the PATH")


def _compiled(source: Path) -> Path:
    """The shared library for this source, compiler and machine; compiled unless the cache has it."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = "\0".join([source.read_text(), version, *command, *FLAGS, platform.system(), platform.machine()])
    target = files.cache_dir() / "kernels" / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(command, source, target)
    return target


def _compile(command: list[str], source: Path, target: Path) -> None:
    """Compiles beside `target` and moves into place: a second process that does the same at once harms nothing."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for threads in THREADS:
            whole = [*command, *FLAGS, *threads, "-o", str(built), str(source)]
            done = subprocess.run(whole, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.replace(built, target)
                return
    error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    raise subprocess.SubprocessError(f"{command[0]} failed: {error}")
