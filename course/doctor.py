"""What `./lab doctor` looks at: a table of checks, each a function that returns what it saw and what is to be done.

Something is to be done only where a thing does not work that would work once it is fixed: a machine without a GPU or a
compiler is a good machine. It reads, starts one kernel and one CUDA kernel where there is a GPU, and changes nothing.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from course import notebooks
from labkit import files
from labkit.data import fetch
from labkit.errors import LabError

SMOKE_MEMORY = 4e9  # bytes that a lesson at `smoke` may use
_OTHER_KIND = {"arm64": ("avx2", "avx512", "vnni", "amx"), "x86_64": ("neon", "i8mm", "sve")}  # instructions of another
SHOWN = ("torch", "torchvision", "transformers", "numpy", "papermill", "nbval")  # packages, with their version
_USED = re.compile(r"\b(?:models|datasets)\.([a-z]\w+)|\btokenizer\(\"(\w+)\"")


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is good, and what was seen or is to be done."""

    name: str
    good: bool
    text: str


def findings() -> Iterator[Finding]:
    """All checks in order, the lessons last; a check that cannot be made is a finding too."""
    lessons = {f"lesson {path.stem[:2]}": partial(lesson, path) for path in notebooks.all_lessons()}
    for name, check in {**CHECKS, **lessons}.items():
        try:
            seen, to_do = check()
        except (LabError, OSError, ImportError, RuntimeError) as error:
            seen, to_do = "", f"{type(error).__name__}: {error}"
        yield Finding(name, not to_do, "; ".join(filter(None, (seen, to_do))))


def report() -> dict[str, Any]:
    """All findings as plain values for scripts, with the machine's fingerprint."""
    from labkit.timing.machine import fingerprint

    rows = [asdict(finding) for finding in findings()]
    return {"good": all(row["good"] for row in rows), "findings": rows, "machine": fingerprint().to_dict()}


# checks: each returns what it saw, and what is to be done ("" where nothing is) --------------------


def _python() -> tuple[str, str]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    to_do = "" if good else "install Python 3.11, 3.12 or 3.13, remove .venv, then ./lab setup"
    return f"{sys.version.split()[0]}, {sys.executable}", to_do


def _packages() -> tuple[str, str]:
    if lacking := missing():
        how = "./lab setup" if files.COMMAND == "./lab" else files.set_up_with("course")
        return f"missing: {', '.join(map(str, lacking))}", f"run {how}"
    shown = [name for name in SHOWN if find_spec(name)]
    return ", ".join(f"{name} {version(name)}" for name in shown), ""


def missing() -> list[Requirement]:
    """The course's requirements that this Python does not meet."""
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = map(Requirement, project["dependencies"] + project["optional-dependencies"]["course"])
    return [need for need in needs if not _meets(need)]


def _meets(need: Requirement) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return need.specifier.contains(version(need.name), prereleases=True)
    return False


def _torch() -> tuple[str, str]:
    import torch

    return f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'} build", ""


def _cpu() -> tuple[str, str]:
    """The model, and which instructions for fast inference it has and has not, of those that its kind can have."""
    from labkit.timing.machine import FEATURES, fingerprint

    machine = fingerprint("cpu")
    kind = "arm64" if machine.arch.lower() in ("arm64", "aarch64") else "x86_64"
    possible = [name for name in FEATURES if name not in _OTHER_KIND[kind]]
    has = [name for name in possible if name in machine.features] or ["none of the instructions looked for"]
    lacks = [name for name in possible if name not in machine.features]
    return f"{machine.cpu}, {machine.arch}: {' '.join(has)}{'; not ' if lacks else ''}{' '.join(lacks)}", ""


def _device() -> tuple[str, str]:
    """The GPU, its driver and torch's CUDA; why torch cannot use a GPU that is there."""
    import torch

    smi = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    versions = [re.search(rf"{what} Version: *([\d.]+)", smi) for what in ("Driver", "CUDA")]
    driver, serves = (match[1] if match else "" for match in versions)
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        seen = "; ".join(
            f"cuda:{index} {gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
            for index, gpu in enumerate(gpus)
        )
        try:
            torch.ones(1, device="cuda").add(1).item()
        except RuntimeError as error:
            return seen, f"it computes nothing ({str(error).splitlines()[0]}); install a torch built for it"
        return f"{seen}; driver {driver or 'unknown'} for CUDA up to {serves or 'unknown'}", ""
    if not driver:
        return "cpu (no CUDA device is visible to torch; every lesson runs without one)", ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.version.cuda:
        to_do = "but torch is the CPU build; remove .venv and run ./lab setup without --cpu"
    elif serves and int(serves.split(".")[0]) < int(torch.version.cuda.split(".")[0]):
        to_do = f"but torch is built for CUDA {torch.version.cuda}; bring the driver up to date"
    elif hidden is not None:
        to_do = f"but torch cannot use it: CUDA_VISIBLE_DEVICES is {hidden!r}; unset it"
    else:
        to_do = "but torch cannot use it: restart, or reinstall the driver"
    return f"nvidia-smi shows a GPU (driver {driver}, CUDA up to {serves})", to_do


def _compiler() -> tuple[str, str]:
    """What labkit's own C++ is built with; without it the sparse kernel is left out and large N:M masks are slower."""
    lost = "the sparse CPU kernel is left out and large N:M masks are slower"
    return _compiler_command() or f"none ({lost}; install g++ or clang++, or name one in CXX)", ""


def _compiler_command() -> str:
    from labkit.storage import native

    with contextlib.suppress(OSError):
        return " ".join(native.compiler())
    return ""


def _engines() -> tuple[str, str]:
    """Which runtimes a model can be prepared for; without them lesson 07 runs on torch's own kernels."""
    from labkit.deploy import engines

    return _readiness(engines.available())


def _language() -> tuple[str, str]:
    """Which runtimes a language model can be prepared for."""
    from labkit.deploy import language

    return _readiness(language.available())


def _readiness(state: dict[str, str]) -> tuple[str, str]:
    lacking: dict[str, list[str]] = {}
    for name, says in state.items():
        if says != "ready":
            lacking.setdefault(says.rpartition(": ")[2].rstrip("."), []).append(name)
    seen = [f"{', '.join(name for name, says in state.items() if says == 'ready') or 'none'} ready"]
    seen += [f"not {', '.join(names)}, which nothing needs ({how})" for how, names in lacking.items()]
    return "; ".join(seen), ""


def _targets() -> tuple[str, str]:
    """Of the systems in labkit/deploy/targets.toml, those that run here and those that can be compiled for."""
    from labkit.deploy import targets

    rows = targets.by_status()
    half = f"; half of {', '.join(rows['half'])}" if rows["half"] else ""
    return f"{', '.join(rows['runs']) or 'none'}{half}; {len(rows['absent'])} are not here", ""


def _threads() -> tuple[str, str]:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seen = f"torch uses {torch.get_num_threads()}, this process may use {allowed} of {os.cpu_count()} cores"
    return seen, f"set OMP_NUM_THREADS={allowed}" if torch.get_num_threads() > allowed else ""


def _memory() -> tuple[str, str]:
    memory = psutil.virtual_memory()
    to_do = f"a lesson may need {SMOKE_MEMORY / 1e9:.0f} GB, so close other programs first"
    seen = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    return seen, to_do if memory.available < SMOKE_MEMORY else ""


def _disk() -> tuple[str, str]:
    """Room for what is still to be fetched and made, which takes about as much again."""
    folder = files.cache_dir()
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    needed = 2 * sum(asset.bytes for asset in fetch.assets().values() if asset.state != "ready")
    free = shutil.disk_usage(existing).free
    to_do = f"it must be writable with {needed / 1e9:.1f} GB free: fix that, or set LABKIT_CACHE to another folder"
    good = free >= needed and os.access(existing, os.W_OK)
    return f"{free / 1e9:.1f} GB free for {folder}", "" if good else to_do


def _data() -> tuple[str, str]:
    """Committed files, and fetched ones, by their sizes."""
    assets, models = fetch.assets(), len(fetch.models())
    good = f"{len(assets) - models} committed files and {models} fetched models, sizes as in data/manifest.toml"
    return _lacking(assets.values()) or (good, "")


def _lacking(assets: Iterable[fetch.Asset]) -> tuple[str, str] | None:
    """Those of the assets that are missing or damaged, and the commands that bring them; None where all are ready."""
    lacking = [asset for asset in assets if asset.state != "ready"]
    names = {kind: [asset.name for asset in lacking if asset.kind == kind] for kind in ("committed", "fetched")}
    needed = [files.restore(names["committed"])] if names["committed"] else []
    if names["fetched"]:
        needed.append(f"{files.COMMAND} data fetch {' '.join(names['fetched'])}")
    seen = ", ".join(f"{asset.name} ({asset.state})" for asset in lacking)
    return (f"lacks {seen}", f"run {' and '.join(needed)}") if lacking else None


def _kernel() -> tuple[str, str]:
    """Start the kernel that the lessons run in and ask it for an answer."""
    from course.child import kernel_manager_class

    manager = kernel_manager_class(blocking=True)(kernel_name="python3")
    manager.start_kernel(stderr=subprocess.DEVNULL)
    try:
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
        finally:
            client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
    return "python3 starts and answers", ""


def lesson(path: Path) -> tuple[str, str]:
    """What a lesson lacks here, by its code (`models.NAME`, `datasets.NAME`) and its header's row "Needs"."""
    import torch

    cells = notebooks.read(path).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    used = {match[1] or match[2] for match in _USED.finditer(code)}
    assets = fetch.assets().items()
    if lacking := _lacking(asset for name, asset in assets if any(word.startswith(_stem(name)) for word in used)):
        return lacking
    needs = re.search(r"^\| Needs \| (.+?) \|$", cells[0].source, re.MULTILINE)
    needs, seen = needs[1].lower() if needs else "", "all there"
    if "compiler" in needs and not _compiler_command():
        seen += "; without a compiler it takes its slower path"
    if re.search(r"\ba gpu\b", needs) and not torch.cuda.is_available():
        seen += "; what needs a GPU is left out"
    return seen, ""


def _stem(entry: str) -> str:
    """What functions for an entry begin with: its folder in the singular, a checkpoint's network, a model's name."""
    folder, slash, file = entry.rpartition("/")
    if folder == "checkpoints":
        return file.partition("-")[0]
    return folder.replace("-", "_").removesuffix("s") if slash else entry


CHECKS = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "cpu": _cpu,
    "device": _device,
    "compiler": _compiler,
    "engines": _engines,
    "language engines": _language,
    "targets": _targets,
    "threads": _threads,
    "memory": _memory,
    "disk": _disk,
    "data": _data,
    "kernel": _kernel,
}
