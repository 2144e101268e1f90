"""The library of the pretend device: compiled with g++ on first use, into the user's cache, and loaded from there."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
import torchgen
from filelock import FileLock

from labkit import files

SOURCE = Path(__file__).with_name("device.cpp")
TESTED = ("2.13",)  # torch, whose internal interfaces are in use
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w")


class Unavailable(Exception):
    """The pretend device cannot be had here; the message is a sentence that says why."""


def load() -> int:
    """Load the library, compiled if need be, and return how many CUDA kernels it replaced; else Unavailable."""
    if reason := obstacle():
        raise Unavailable(reason)
    torch.ops.load_library(compiled())
    return torch.ops.pretend.install(operators_with_cpu_scalars())


def obstacle() -> str | None:
    """Say in a sentence why there is no pretend device here; None if nothing stands against it."""
    version = torch.__version__
    if torch.version.cuda is None:
        return f"The pretend device needs torch's CUDA build, and torch {version} here is another build."
    if ".".join(version.split(".")[:2]) not in TESTED:
        return f"The pretend device was tested with torch {', '.join(TESTED)}, and not with {version}, which is here."
    if torch.cuda.is_available():
        return "A CUDA device is here, so that none has to be pretended."
    if shutil.which("g++") is None:
        return "The pretend device is compiled with g++, which is not installed here."
    return None


def compiled() -> Path:
    """Compile the library unless it is in the cache for this source and this torch; Unavailable if g++ fails."""
    torch_folder = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + str(torch_folder).encode() + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = files.cache_dir() / "pretend" / f"torch-{torch.__version__}-{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _compile(library, torch_folder)
    return library


def _compile(library: Path, torch_folder: Path) -> None:
    unfinished = library.with_suffix(f".{os.getpid()}")
    headers, libraries = torch_folder / "include", torch_folder / "lib"
    includes = [f"-I{headers}", f"-I{headers}/torch/csrc/api/include"]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    command = ["g++", *FLAGS, *includes, str(SOURCE), "-o", str(unfinished), *links]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["it said nothing"]
        raise Unavailable(f"g++ cannot compile the pretend device: {errors[0]}")
    unfinished.replace(library)


def operators_with_cpu_scalars() -> list[str]:
    """List the operators that take a CPU tensor without dimensions among CUDA tensors.

    native_functions.yaml frees them from the check for one device, which TensorIterator makes for them in its own way.
    """
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    names = []
    for entry in table.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        if re.search(r"^  device_check: NoCheck", entry, flags=re.MULTILINE):
            names.append("aten::" + entry.partition("(")[0])
    return names
