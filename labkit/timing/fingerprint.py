"""Fingerprint of a machine: the facts behind a result. Also the device, threads and memory of this process.

The facts follow pyperf's metadata. A fingerprint names no host, user or folder. Reading the facts leaves random state,
threads and precision settings unchanged.
"""

import contextlib
import os
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from labkit.errors import InputError
from labkit.show import counted

KiB, MiB, GiB = 2**10, 2**20, 2**30

# CPU instructions that decide how fast inference runs, and the names of the flags on Linux and macOS.
FEATURES = {
    "avx2": {"avx2", "avx2_0"},
    "avx512": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16", "bf16", "feat_bf16"},
    "fp16": {"avx512_fp16", "asimdhp", "feat_fp16"},
    "amx": {"amx_tile"},
    "neon": {"asimd", "neon", "advsimd"},
    "i8mm": {"i8mm", "feat_i8mm"},
    "sve": {"sve"},
}
FEATURES_IN_LABEL = ("avx512", "vnni", "bf16", "amx", "i8mm")

# Words of CPU model names that distinguish no model.
COMMON_WORDS = r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|\b\d+th gen\b|@.*|\bwith .*graphics\b"


# --- the record -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Describe the CUDA device in use; `memory` and `l2` in bytes, as the driver reports the sizes."""

    name: str
    count: int
    memory: int
    l2: int
    multiprocessors: int
    capability: str
    driver: str | None
    cuda: str | None

    @property
    def label(self) -> str:
        """Return a line for tables and captions."""
        memory = f"{self.memory / GiB:.0f} GiB"
        return f"{self.name}, {memory}, driver {self.driver}, CUDA {self.cuda}"


@dataclass(frozen=True)
class Machine:
    """Facts about a machine that influence a result. All sizes are in bytes.

    device: "cpu" or "cuda", the device of the fingerprint, named by `slug` and `label`.
    affinity: numbers of the logical cores of this process.
    threads: threads of torch.
    features: names from FEATURES.
    caches: size of an instance of each level ("L1d", "L2", "L3"), as a core sees the cache.
    cache_counts: number of instances of each level among the cores of `affinity`.
    last_level_cache: total size of all last-level caches of the cores of `affinity`.
    memory: limit of the process.
    virtualised: None if the machine does not tell.
    """

    device: str
    cpu: str
    arch: str
    physical_cores: int
    logical_cores: int
    affinity: tuple[int, ...]
    threads: int
    features: tuple[str, ...]
    caches: Mapping[str, int]
    cache_counts: Mapping[str, int]
    last_level_cache: int
    memory: int
    virtualised: bool | None
    gpu: Gpu | None
    os: str
    python: str
    torch: str
    transformers: str | None
    float32_matmul_precision: str

    @property
    def cores(self) -> int:
        """Return the number of physical cores that this process may use."""
        return min(self.physical_cores, len(self.affinity))

    @property
    def caches_in_all(self) -> dict[str, int]:
        """Return the bytes that fit into the caches of all threads together, by level.

        A private cache counts once per thread, a shared cache once per instance.
        """
        totals = {}
        for level, size in self.caches.items():
            instances_in_use = min(self.threads, self.cache_counts[level])
            totals[level] = size * instances_in_use
        return totals

    @property
    def slug(self) -> str:
        """Return a folder name for results: the GPU, or the CPU model and the number of cores."""
        if self.device == "cuda" and self.gpu:
            return _slug(self.gpu.name)
        return f"{_slug(self.cpu)}-{self.cores}c"

    @property
    def label(self) -> str:
        """Return a line for tables and captions, such as "AMD EPYC, 2 cores, avx512 vnni, 16 GiB"."""
        if self.device == "cuda" and self.gpu:
            return self.gpu.label
        features = [name for name in self.features if name in FEATURES_IN_LABEL]
        parts = [
            self.cpu,
            counted(self.cores, "core"),
            " ".join(features) or self.arch,
            f"{self.memory / GiB:.0f} GiB",
        ]
        if self.virtualised:
            parts.append("virtual machine")
        return ", ".join(parts)

    def to_dict(self) -> dict:
        """Return plain values for JSON, with `slug` and `label`; those for each kind of device here under "devices"."""
        devices = {}
        for kind in ("cpu", "cuda") if self.gpu else ("cpu",):
            machine = replace(self, device=kind)
            devices[kind] = {"slug": machine.slug, "label": machine.label}
        return {**asdict(self), "slug": self.slug, "label": self.label, "devices": devices}


def _slug(name: str) -> str:
    """Return the distinguishing words of a model name in lower case, joined by hyphens."""
    distinguishing = re.sub(COMMON_WORDS, " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", distinguishing).strip("-") or "unknown"


def fingerprint(device: str | torch.device = "auto") -> Machine:
    """Take the fingerprint of the machine as this process sees it.

    device: device as for `torch_device`.
    Raises InputError for an unusable device.
    """
    target = torch_device(device)
    cpu = _cpu()
    affinity = _affinity()
    caches = _linux_caches(affinity) or _macos_caches(affinity)
    return Machine(
        device=target.type,
        cpu=cpu.model,
        arch=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or len(affinity),
        logical_cores=psutil.cpu_count() or len(affinity),
        affinity=affinity,
        threads=torch.get_num_threads(),
        features=tuple(name for name, spellings in FEATURES.items() if spellings & cpu.flags),
        caches=caches.sizes,
        cache_counts=caches.counts,
        last_level_cache=caches.last_level,
        memory=memory_bytes(),
        virtualised=cpu.virtualised,
        gpu=_gpu(target) if torch.cuda.is_available() else None,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_installed_version("transformers"),
        float32_matmul_precision=_matmul_precision(),
    )


# --- what this process may use ----------------------------------------------------------------------------------------


def torch_device(device: str | torch.device | None = "auto") -> torch.device:
    """Return the torch device of a name.

    device: "cpu", "cuda", "cuda:N" or a torch.device. "auto" and None mean the environment variable LABKIT_DEVICE if
        set, otherwise CUDA if torch finds a device, otherwise the CPU.
    Raises InputError for any other name, and for a GPU that torch does not see.
    """
    requested = device
    if device is None:
        requested = "auto"
    elif isinstance(device, torch.device):
        requested = str(device)
    override = os.environ.get("LABKIT_DEVICE") if requested == "auto" else None
    name = override or requested
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        origin = "LABKIT_DEVICE" if override else "device"
        raise InputError(f"{origin} is {name!r}; choose auto, cpu, cuda or cuda:N.")
    target = torch.device(name)
    if target.type == "cuda":
        _check_gpu(target)
    return target


def _check_gpu(target: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = target.index or 0
    if number >= count:
        seen = f"torch sees {count} of them" if count else "torch sees no CUDA device here"
        raise InputError(f"The device {target} is not there ({seen}); choose auto or cpu, or fix the driver.")


def threads() -> int:
    """Return the number of threads to compute with: OMP_NUM_THREADS if set, otherwise the usable physical cores.

    A container's CPU quota lowers the number of usable cores.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    cores = fingerprint("cpu").cores
    quota_us, _, period_us = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota_us.isdigit():  # "max": no quota
        return cores
    quota = int(quota_us) // int(period_us)
    return max(1, min(cores, quota))


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let torch compute on `number` threads while the block runs, and then on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_bytes() -> int:
    """Return the bytes of memory that this process may use: the machine's total, or a container's limit."""
    total = psutil.virtual_memory().total
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _affinity() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(psutil.cpu_count()))


# --- facts from the operating system ----------------------------------------------------------------------------------


class _Cpu(NamedTuple):
    """Model name, feature flags, and virtualisation (None if the machine does not tell)."""

    model: str
    flags: set[str]
    virtualised: bool | None


def _cpu() -> _Cpu:
    facts = _linux_cpu_facts()
    if not facts:
        return _macos_cpu()
    flags = facts.get("flags") or facts.get("features", "")  # the names on x86 and on Arm
    flags = set(flags.lower().split())
    virtualised = "hypervisor" in flags or "hypervisor vendor" in facts
    only_x86_has_the_flag = platform.machine() == "x86_64"
    return _Cpu(
        model=facts.get("model name") or platform.machine(),
        flags=flags,
        virtualised=virtualised if virtualised or only_x86_has_the_flag else None,
    )


def _linux_cpu_facts() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo and lscpu, names in lower case; empty on other systems."""
    facts: dict[str, str] = {}
    lines = _read("/proc/cpuinfo") + _output("lscpu")  # lscpu knows the names of Arm cores
    for line in lines.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    return facts


def _macos_cpu() -> _Cpu:
    listing = _output("sysctl", "hw.optional").lower()  # lines such as "hw.optional.arm.FEAT_BF16: 1"
    flags = set(re.findall(r"(\w+): 1$", listing, re.MULTILINE))
    model = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return _Cpu(model or platform.machine(), flags, virtualised=None)


class _Caches(NamedTuple):
    """Sizes of an instance and numbers of instances by level, and the total size of the last level, in bytes."""

    sizes: dict[str, int]
    counts: dict[str, int]
    last_level: int


def _linux_caches(affinity: Sequence[int]) -> _Caches | None:
    """Read the caches of the cores `affinity` from sysfs; None on other systems."""
    sizes: dict[str, int] = {}
    instances: dict[str, dict[str, int]] = defaultdict(dict)  # level -> {cores that share an instance: size}
    for core in affinity:
        folders = Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*")
        for folder in sorted(folders):
            level, kind, size = (_read(folder / fact).strip() for fact in ("level", "type", "size"))
            if kind == "Instruction" or not re.fullmatch(r"\d+K", size):
                continue
            name = f"L{level}d" if kind == "Data" else f"L{level}"
            nbytes = int(size.removesuffix("K")) * KiB
            sizes.setdefault(name, nbytes)
            sharing_cores = _read(folder / "shared_cpu_list")
            instances[name][sharing_cores] = nbytes
    if not instances:
        return None
    last_level = instances[max(instances)]  # L3 > L2 > L1d
    counts = {name: len(sizes_by_cores) for name, sizes_by_cores in instances.items()}
    return _Caches(sizes, counts, sum(last_level.values()))


def _macos_caches(affinity: Sequence[int]) -> _Caches:
    sizes = {}
    for name, key in (("L1d", "hw.l1dcachesize"), ("L2", "hw.l2cachesize")):
        size = _output("sysctl", "-n", key).strip()
        if size.isdigit():
            sizes[name] = int(size)
    counts = {name: len(affinity) if name == "L1d" else 1 for name in sizes}  # an L2 serves a cluster of cores
    return _Caches(sizes, counts, max(sizes.values(), default=0))


def _gpu(target: torch.device) -> Gpu:
    in_use = target if target.type == "cuda" else torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(in_use)
    driver = re.search(r"\d{3}\.\d+(\.\d+)?", _read("/proc/driver/nvidia/version"))
    return Gpu(
        name=properties.name,
        count=torch.cuda.device_count(),
        memory=properties.total_memory,
        l2=properties.L2_cache_size,
        multiprocessors=properties.multi_processor_count,
        capability=f"{properties.major}.{properties.minor}",
        driver=driver.group() if driver else None,
        cuda=torch.version.cuda or torch.version.hip,
    )


def _installed_version(name: str) -> str | None:
    versions = [package.version for package in distributions(name=name)]
    return versions[0] if versions else None


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends have different settings
        return "mixed"


def _read(path: str | Path) -> str:
    """Return the text of a file, or "" if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Return the output of a command in English, or "" if it is missing or hangs."""
    english = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, env=english).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
