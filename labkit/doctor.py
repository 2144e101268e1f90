"""What `labkit doctor` looks at: each check is a function that returns one finding with what to do about it.

It reads and starts one kernel, and changes nothing.
"""

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from labkit import paths, store
from labkit.errors import LabError

_GB = 1e9
SMOKE_MEMORY = 4e9  # what a lesson at `smoke` may use


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


def _python() -> tuple[bool, str]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    text = f"{sys.version.split()[0]}, {sys.executable}"
    return good, text if good else f"{text}; install Python 3.11, 3.12 or 3.13, remove .venv, then ./lab setup"


def _packages() -> tuple[bool, str]:
    needed = [
        re.match(r"[\w.-]+", line)[0] for line in importlib.metadata.requires("labkit") or () if "extra" not in line
    ]
    missing = [name for name in needed if not _installed(name)]
    good = f"labkit {importlib.metadata.version('labkit')} and the {len(needed)} packages it needs"
    return not missing, good if not missing else f"missing: {', '.join(missing)}; run ./lab setup"


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _torch() -> tuple[bool, str]:
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return True, f"{torch.__version__}, {build}"


def _device() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return True, "cpu (no CUDA device is visible to torch; every lesson runs without one)"
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return True, "; ".join(f"cuda:{n} {card.name}, {card.total_memory / _GB:.0f} GB" for n, card in enumerate(cards))


def _threads() -> tuple[bool, str]:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"torch uses {torch.get_num_threads()}, this process may use {allowed} cores"
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
    folder = paths.cache_dir()
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
    from labkit.runner import this_interpreter

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


CHECKS = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "device": _device,
    "threads": _threads,
    "memory": _memory,
    "disk": _disk,
    "data": _data,
    "kernel": _kernel,
}
