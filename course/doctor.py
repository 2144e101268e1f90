"""The checks of `./lab doctor`: a table of functions; each returns a description and a remedy.

A remedy is given only for a fault within the user's reach: a machine without a GPU or a compiler is a good machine. The
checks read, start a kernel, and a CUDA kernel if a GPU is present, and change no file.
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
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from course import hosted, notebooks
from labkit import files
from labkit.data import fetch
from labkit.errors import LabError

SMOKE_MEMORY = 4e9  # bytes that a lesson at `smoke` may use
_OTHER_KIND = {"arm64": ("avx2", "avx512", "vnni", "amx"), "x86_64": ("neon", "i8mm", "sve")}  # instructions of another
SHOWN = ("torch", "torchvision", "transformers", "numpy", "papermill", "nbval")  # packages, with their version
_USED = re.compile(r"\b(?:models|datasets)\.([a-z]\w+)|\btokenizer\(\"(\w+)\"")

CheckResult = tuple[str, str]  # what was seen, and what is to be done: "" where nothing is


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    name  name of the check, for example "memory"
    good  True if the check found no fault
    text  the description, and the remedy for a fault
    """

    name: str
    good: bool
    text: str


def findings() -> Iterator[Finding]:
    """Make all checks in order, the lessons last; an error during a check is a finding too."""
    checks = dict(CHECKS)
    for path in notebooks.all_lessons():
        checks[f"lesson {path.stem[:2]}"] = partial(lesson, path)
    for name, check in checks.items():
        try:
            seen, to_do = check()
        except (LabError, OSError, ImportError, RuntimeError) as error:
            seen, to_do = "", f"{type(error).__name__}: {error}"
        text = "; ".join(filter(None, (seen, to_do)))
        yield Finding(name, not to_do, text)


def report() -> dict[str, Any]:
    """Make all checks, for scripts: {"good": bool, "findings": [{name, good, text}], "machine": fingerprint}."""
    from labkit.timing.machine import fingerprint

    rows = [asdict(finding) for finding in findings()]
    return {"good": all(row["good"] for row in rows), "findings": rows, "machine": fingerprint().to_dict()}


# Python and packages --------------------------------------------------------------------------------


def _python() -> CheckResult:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    to_do = "" if good else "install Python 3.11, 3.12 or 3.13, remove .venv, then ./lab setup"
    return f"{sys.version.split()[0]}, {sys.executable}", to_do


def _packages() -> CheckResult:
    lacking = missing()
    if lacking:
        how = "./lab setup" if files.COMMAND == "./lab" else files.set_up_with("course")
        return f"missing: {', '.join(map(str, lacking))}", f"run {how}"
    installed = [name for name in SHOWN if find_spec(name)]
    return ", ".join(f"{name} {version(name)}" for name in installed), ""


def missing() -> list[Requirement]:
    """List the course's requirements not met by the current Python."""
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["course"]
    return [Requirement(line) for line in hosted.missing(lines)]


def _torch() -> CheckResult:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return f"{torch.__version__}, {build} build", ""


# the machine ----------------------------------------------------------------------------------------


def _cpu() -> CheckResult:
    """Name the CPU, and the instructions for fast inference present and absent, of all that the architecture has."""
    from labkit.timing.machine import FEATURES, fingerprint

    machine = fingerprint("cpu")
    kind = "arm64" if machine.arch.lower() in ("arm64", "aarch64") else "x86_64"
    possible = [name for name in FEATURES if name not in _OTHER_KIND[kind]]
    present = [name for name in possible if name in machine.features]
    absent = [name for name in possible if name not in machine.features]
    seen = f"{machine.cpu}, {machine.arch}: "
    seen += " ".join(present) if present else "none of the instructions looked for"
    if absent:
        seen += f"; not {' '.join(absent)}"
    return seen, ""


def _device() -> CheckResult:
    """Describe the GPU, the driver and torch's CUDA; the remedy is for a GPU that torch cannot use."""
    import torch

    driver, newest_cuda = _nvidia_versions()
    if torch.cuda.is_available():
        seen = "; ".join(_describe_gpu(index) for index in range(torch.cuda.device_count()))
        try:
            torch.ones(1, device="cuda").add(1).item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return seen, f"it computes nothing ({reason}); install a torch built for it"
        return f"{seen}; driver {driver or 'unknown'} for CUDA up to {newest_cuda or 'unknown'}", ""
    if not driver:
        return "cpu (no CUDA device is visible to torch; every lesson runs without one)", ""
    seen = f"nvidia-smi shows a GPU (driver {driver}, CUDA up to {newest_cuda})"
    return seen, _why_torch_has_no_gpu(torch.version.cuda, newest_cuda)


def _nvidia_versions() -> tuple[str, str]:
    """Ask nvidia-smi for the driver's version and the newest CUDA of the driver; "" if unknown."""
    output = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    driver = re.search(r"Driver Version: *([\d.]+)", output)
    cuda = re.search(r"CUDA Version: *([\d.]+)", output)
    return driver[1] if driver else "", cuda[1] if cuda else ""


def _describe_gpu(index: int) -> str:
    import torch

    gpu = torch.cuda.get_device_properties(index)
    capability = f"{gpu.major}.{gpu.minor}"
    return f"cuda:{index} {gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {capability}"


def _why_torch_has_no_gpu(torch_cuda: str | None, driver_cuda: str) -> str:
    """Name the remedy for a GPU seen by nvidia-smi but not by torch.

    torch_cuda   the CUDA that torch was built for, None for the CPU build
    driver_cuda  the newest CUDA that the driver serves, "" if unknown
    """
    if not torch_cuda:
        return "but torch is the CPU build; remove .venv and run ./lab setup without --cpu"
    if driver_cuda and _major(driver_cuda) < _major(torch_cuda):
        return f"but torch is built for CUDA {torch_cuda}; bring the driver up to date"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"but torch cannot use it: CUDA_VISIBLE_DEVICES is {hidden!r}; unset it"
    return "but torch cannot use it: restart, or reinstall the driver"


def _major(version_text: str) -> int:
    return int(version_text.split(".")[0])


def _compiler() -> CheckResult:
    """Name the compiler for labkit's C++; a machine without a compiler has no sparse kernel, and slower N:M masks."""
    lost = "the sparse CPU kernel is left out and large N:M masks are slower"
    command = _compiler_command()
    if not command:
        return f"none ({lost}; install g++ or clang++, or name one in CXX)", ""
    return f"{command}; {_sparse_kernel()}", ""


def _sparse_kernel() -> str:
    """Name the variant of the sparse kernel that this machine takes, by the race that the first product runs too."""
    from labkit.storage import native, sell

    if not native.is_compiled("sparse_linear"):
        return "the sparse kernel is compiled on first use"
    seconds = sell.race()
    fastest_first = sorted(seconds, key=seconds.__getitem__)
    times = [f"{fetch} {seconds[fetch] * 1e3:.1f} ms" for fetch in fastest_first]
    best = native.isas("sparse_linear")[-1]
    return f"the sparse kernel is that for {best}, weights {', '.join(times)}"


def _compiler_command() -> str:
    from labkit.storage import native

    with contextlib.suppress(OSError):
        return " ".join(native.compiler())
    return ""


def _threads() -> CheckResult:
    import torch

    has_affinity = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = torch.get_num_threads()
    seen = f"torch uses {threads}, this process may use {allowed} of {os.cpu_count()} cores"
    return seen, f"set OMP_NUM_THREADS={allowed}" if threads > allowed else ""


def _memory() -> CheckResult:
    memory = psutil.virtual_memory()
    seen = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if memory.available >= SMOKE_MEMORY:
        return seen, ""
    return seen, f"a lesson may need {SMOKE_MEMORY / 1e9:.0f} GB, so close other programs first"


def _disk() -> CheckResult:
    """Compare the free disk space with the files still to be fetched, and as much again for files made from them."""
    folder = files.cache_dir()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    to_fetch = [asset.bytes for asset in fetch.assets().values() if asset.state != "ready"]
    needed = 2 * sum(to_fetch)
    free = shutil.disk_usage(existing).free
    seen = f"{free / 1e9:.1f} GB free for {folder}"
    if free >= needed and os.access(existing, os.W_OK):
        return seen, ""
    gigabytes = f"{needed / 1e9:.1f} GB"
    return seen, f"it must be writable with {gigabytes} free: fix that, or set LABKIT_CACHE to another folder"


# runtimes -------------------------------------------------------------------------------------------


def _engines() -> CheckResult:
    """List the runtimes ready for a model; without any, lesson 07 runs on torch's kernels."""
    from labkit.deploy import engines

    return _readiness(engines.available())


def _language() -> CheckResult:
    """List the runtimes ready for a language model."""
    from labkit.deploy import language

    return _readiness(language.available())


def _readiness(states: dict[str, str]) -> CheckResult:
    """Describe runtimes, from name -> "ready" or a sentence that ends with the way to install; no remedy is given."""
    ready = [name for name, state in states.items() if state == "ready"]
    names_by_remedy: dict[str, list[str]] = {}
    for name, state in states.items():
        if state != "ready":
            how_to_install = state.rpartition(": ")[2].rstrip(".")
            names_by_remedy.setdefault(how_to_install, []).append(name)
    seen = [f"{', '.join(ready) or 'none'} ready"]
    for how, names in names_by_remedy.items():
        seen.append(f"not {', '.join(names)}, which nothing needs ({how})")
    return "; ".join(seen), ""


def _targets() -> CheckResult:
    """List the systems of labkit/deploy/targets.toml, of which some run on the machine or can be compiled for."""
    from labkit.deploy import targets

    systems = targets.by_status()
    seen = ", ".join(systems["runs"]) or "none"
    if systems["half"]:
        seen += f"; half of {', '.join(systems['half'])}"
    return f"{seen}; {len(systems['absent'])} are not here", ""


def _kernel() -> CheckResult:
    """Start the kernel of the lessons and wait for an answer."""
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


# data and lessons -----------------------------------------------------------------------------------


def _data() -> CheckResult:
    """Compare the sizes of committed and fetched files with data/manifest.toml."""
    assets, models = fetch.assets(), len(fetch.models())
    good = f"{len(assets) - models} committed files and {models} fetched models, sizes as in data/manifest.toml"
    return _lacking(assets.values()) or (good, "")


def _lacking(assets: Iterable[fetch.Asset]) -> CheckResult | None:
    """List the missing and damaged assets, with commands for bringing back all of them; None if all are ready."""
    lacking = [asset for asset in assets if asset.state != "ready"]
    if not lacking:
        return None
    committed = [asset.name for asset in lacking if asset.kind == "committed"]
    fetched = [asset.name for asset in lacking if asset.kind == "fetched"]
    commands = []
    if committed:
        commands.append(files.restore(committed))
    if fetched:
        commands.append(f"{files.COMMAND} data fetch {' '.join(fetched)}")
    seen = ", ".join(f"{asset.name} ({asset.state})" for asset in lacking)
    return f"lacks {seen}", f"run {' and '.join(commands)}"


def lesson(path: Path) -> CheckResult:
    """Check the needs of a lesson: the data and models named in its code, and the row "Needs" of its header.

    path  path of the lesson's notebook
    """
    import torch

    cells = notebooks.read(path).cells
    lacking = _lacking(_assets_used(cell.source for cell in cells if cell.cell_type == "code"))
    if lacking:
        return lacking
    row = re.search(r"^\| Needs \| (.+?) \|$", cells[0].source, re.MULTILINE)
    needs = row[1].lower() if row else ""
    seen = "all there"
    if "compiler" in needs and not _compiler_command():
        seen += "; without a compiler it takes its slower path"
    if re.search(r"\ba gpu\b", needs) and not torch.cuda.is_available():
        seen += "; what needs a GPU is left out"
    return seen, ""


def _assets_used(sources: Iterable[str]) -> list[fetch.Asset]:
    """List the assets behind the functions called in a lesson: `models.NAME`, `datasets.NAME`, `tokenizer("NAME")`."""
    code = "\n".join(sources)
    functions = {match[1] or match[2] for match in _USED.finditer(code)}
    used = []
    for name, asset in fetch.assets().items():
        stem = _stem(name)
        if any(function.startswith(stem) for function in functions):
            used.append(asset)
    return used


def _stem(entry: str) -> str:
    """Find the first part of the names of the functions for an entry of data/manifest.toml.

    "checkpoints/resnet-..." -> "resnet"; a file in a folder -> the folder in the singular; else the entry.
    """
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
