"""What `labkit doctor` looks at: each check is a function that returns one finding with what to do about it.

A finding is bad only where something does not work that would work once it is mended: a machine without a GPU or a
compiler is a good machine. It reads, starts one kernel and one CUDA kernel where there is a GPU, and changes nothing.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
from packaging.requirements import Requirement

from course import needs
from labkit import files, store
from labkit.errors import LabError

_GB = 1e9
SMOKE_MEMORY = 4e9  # what a lesson at `smoke` may use
_ARM_ONLY, _X86_ONLY = ("neon", "i8mm", "sve"), ("avx2", "avx512", "vnni", "amx")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, whether it is good, and what was found or is to be done."""

    name: str
    good: bool
    text: str


def findings() -> Iterator[Finding]:
    """All checks in order; one that cannot be made is a finding too."""
    for name, check in CHECKS.items():
        try:
            yield Finding(name, *check())
        except (LabError, OSError, ImportError, RuntimeError) as error:
            yield Finding(name, False, f"{type(error).__name__}: {error}")
    for one in needs.every():
        yield Finding(f"lesson {one.lesson}", *_lesson(one))


def report() -> dict[str, Any]:
    """All findings as plain values for scripts, with the machine's fingerprint."""
    from labkit.machine import fingerprint

    found = list(findings())
    rows = [asdict(finding) for finding in found]
    return {"good": all(finding.good for finding in found), "findings": rows, "machine": fingerprint().to_dict()}


def _python() -> tuple[bool, str]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    text = f"{sys.version.split()[0]}, {sys.executable}"
    return good, text if good else f"{text}; install Python 3.11, 3.12 or 3.13, remove .venv, then ./lab setup"


def _packages() -> tuple[bool, str]:
    lacking = missing()
    shown = ("torch", "torchvision", "transformers", "numpy", "papermill", "nbval")
    good = ", ".join(f"{name} {version(name)}" for name in shown if _installed(name))
    return not lacking, good if not lacking else f"missing: {', '.join(map(str, lacking))}; run ./lab setup"


def missing() -> list[Requirement]:
    """The course's requirements that this Python does not meet."""
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["course"]]
    return [
        need
        for need in needs
        if not _installed(need.name) or not need.specifier.contains(version(need.name), prereleases=True)
    ]


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _torch() -> tuple[bool, str]:
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return True, f"{torch.__version__}, {build}"


def _cpu() -> tuple[bool, str]:
    """The model, and which instructions for fast inference it has and has not, of those that its kind can have."""
    from labkit.machine import FEATURES, fingerprint

    machine = fingerprint("cpu")
    arm = machine.arch.lower() in ("arm64", "aarch64")
    possible = [name for name in FEATURES if name not in (_X86_ONLY if arm else _ARM_ONLY)]
    lacking = [name for name in possible if name not in machine.features]
    has = " ".join(name for name in possible if name in machine.features) or "none of the instructions looked for"
    return True, f"{machine.cpu}, {machine.arch}: {has}{'; not ' if lacking else ''}{' '.join(lacking)}"


def _device() -> tuple[bool, str]:
    """The GPU, its driver and torch's CUDA; why torch cannot use a GPU that is there."""
    import torch

    driver, speaks = _driver()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        shown = "; ".join(
            f"cuda:{n} {card.name}, {card.total_memory / _GB:.0f} GB, compute capability {card.major}.{card.minor}"
            for n, card in enumerate(cards)
        )
        try:
            torch.ones(1, device="cuda").add(1).item()
        except RuntimeError as error:
            return False, f"{shown}: computes nothing ({str(error).splitlines()[0]}); install a torch built for it"
        return True, f"{shown}; driver {driver or 'unknown'} for CUDA up to {speaks or 'unknown'}"
    if not driver:
        return True, "cpu (no CUDA device is visible to torch; every lesson runs without one)"
    there = f"nvidia-smi shows a GPU (driver {driver}, CUDA up to {speaks})"
    if not torch.version.cuda:
        return False, f"{there}, but torch is the CPU build; remove .venv and run ./lab setup without --cpu"
    if speaks and int(speaks.split(".")[0]) < int(torch.version.cuda.split(".")[0]):
        return False, f"{there}, but torch is built for CUDA {torch.version.cuda}; bring the driver up to date"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f"CUDA_VISIBLE_DEVICES is {hidden!r}; unset it" if hidden is not None else "restart, or reinstall the driver"
    return False, f"{there}, but torch cannot use it: {why}"


def _driver() -> tuple[str | None, str | None]:
    """Version of NVIDIA's driver and the newest CUDA that it serves, from nvidia-smi; None where it says nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
        found = [re.search(rf"{what} Version: *([\d.]+)", said) for what in ("Driver", "CUDA")]
        return tuple(one[1] if one else None for one in found)
    return None, None


def _compiler() -> tuple[bool, str]:
    """What labkit's own C++ is built with."""
    without = "the sparse CPU kernel is left out and large N:M masks are slower"
    return True, _found_compiler() or f"none ({without}; install g++ or clang++, or name one in CXX)"


def _found_compiler() -> str:
    from labkit.pruning import native

    with contextlib.suppress(OSError):
        return " ".join(native.compiler())
    return ""


def _threads() -> tuple[bool, str]:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"torch uses {torch.get_num_threads()}, this process may use {allowed} of {os.cpu_count()} cores"
    good = torch.get_num_threads() <= allowed
    return good, text if good else f"{text}; set OMP_NUM_THREADS={allowed}"


def _memory() -> tuple[bool, str]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free"
    good = memory.available >= SMOKE_MEMORY
    return (
        good,
        text if good else f"{text}; a lesson may need {SMOKE_MEMORY / _GB:.0f} GB, so close other programs first",
    )


def _disk() -> tuple[bool, str]:
    """Room for what is still to be fetched and made, which takes about as much again."""
    folder = files.cache_dir()
    existing = next(place for place in [folder, *folder.parents] if place.exists())
    missing = sum(int(row["bytes"]) for row in store.listing() if row["state"] != "ready")
    free = shutil.disk_usage(existing).free
    text = f"{free / _GB:.1f} GB free for {folder}"
    good = free >= 2 * missing and os.access(existing, os.W_OK)
    cure = (
        f"; it must be writable with {2 * missing / _GB:.1f} GB free: mend that, or set LABKIT_CACHE to another folder"
    )
    return good, text if good else text + cure


def _data() -> tuple[bool, str]:
    """Committed files, and fetched ones, by their hashes."""
    rows = store.listing()
    wrong = [row for row in rows if row["state"] != "ready"]
    fetched = sum(row["kind"] == "fetched" for row in rows)
    if not wrong:
        return (
            True,
            f"{len(rows) - fetched} committed files and {fetched} fetched models, hashes as in data/manifest.toml",
        )
    names = ", ".join(f"{row['name']} ({row['state']})" for row in wrong)
    committed = any(row["kind"] == "committed" for row in wrong)
    return False, f"{names}; run {'git checkout -- data, then ' if committed else ''}./lab data fetch"


def _kernel() -> tuple[bool, str]:
    """Start the kernel that the lessons run in and ask it for an answer."""
    from course.run import this_interpreter

    manager = this_interpreter(blocking=True)(kernel_name="python3")
    manager.start_kernel(stderr=-3)  # subprocess.DEVNULL
    try:
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
        finally:
            client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
    return True, "python3 starts and answers"


def _lesson(one: needs.Needs) -> tuple[bool, str]:
    """What this lesson lacks here; what only makes it faster or fuller is said and is no fault."""
    import torch

    lacking = [name for name in one.entries if not store.is_ready(name)]
    if lacking:
        committed = [name for name in lacking if name not in one.models]
        fetched = [name for name in lacking if name in one.models]
        cures = [f"git checkout -- {' '.join(f'data/{name}' for name in committed)}"] if committed else []
        cures += [f"./lab data fetch {' '.join(fetched)}"] if fetched else []
        return False, f"lacks {', '.join(lacking)}; run {' and '.join(cures)}"
    notes = ["without a compiler it takes its slower path"] if one.compiler and not _found_compiler() else []
    notes += ["what needs a GPU is left out"] if one.gpu and not torch.cuda.is_available() else []
    return True, "; ".join(["all there", *notes])


CHECKS = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "cpu": _cpu,
    "device": _device,
    "compiler": _compiler,
    "threads": _threads,
    "memory": _memory,
    "disk": _disk,
    "data": _data,
    "kernel": _kernel,
}
