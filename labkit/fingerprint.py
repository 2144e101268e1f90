"""What machine this is: processor, caches, memory, GPU, versions and settings, as far as a result depends on them.

Which facts to keep follows pyperf's metadata. It names no host, user or folder, so that a record can be handed on, and
says None or nothing where the operating system does not tell.
"""

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from labkit.errors import InputError

KiB, GiB = 2**10, 2**30

# Instructions that decide how fast inference runs, and the names that Linux and macOS give them.
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


@dataclass(frozen=True)
class Gpu:
    """The CUDA device in use. `memory` and `l2` in bytes as the driver reports them."""

    name: str
    count: int
    memory: int
    l2: int
    multiprocessors: int
    capability: str
    driver: str | None
    cuda: str | None


@dataclass(frozen=True)
class Machine:
    """What a result depends on. Sizes in bytes; `caches` as one core sees them, `last_level_cache` all that it may use.

    `device` is "cpu" or "cuda": what the fingerprint was taken for, and what `slug` and `label` name.
    `virtualised` is None where it cannot be told.
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
        """Physical cores that this process may use."""
        return min(self.physical_cores, len(self.affinity))

    @property
    def slug(self) -> str:
        """A folder name for results: the GPU, or the CPU model and its cores."""
        if self.device == "cuda" and self.gpu:
            return _slug(self.gpu.name)
        return f"{_slug(self.cpu)}-{self.cores}c"

    @property
    def label(self) -> str:
        """One line for tables and captions."""
        if self.device == "cuda" and self.gpu:
            return f"{self.gpu.name}, {self.gpu.memory / GiB:.0f} GiB, driver {self.gpu.driver}, CUDA {self.gpu.cuda}"
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        wide = [name for name in self.features if name in ("avx512", "vnni", "bf16", "amx", "i8mm")]
        place = ", virtual machine" if self.virtualised else ""
        return f"{self.cpu}, {cores}, {' '.join(wide) or self.arch}, {self.memory / GiB:.0f} GiB{place}"

    def to_dict(self) -> dict:
        """Plain values for JSON, with slug and label."""
        return {**asdict(self), "slug": self.slug, "label": self.label}


def fingerprint(device: str | torch.device | None = None) -> Machine:
    """The machine as this process sees it, for `device` ("cpu", "cuda"; default: CUDA where torch has it).

    Raises InputError for a device that torch does not have.
    """
    target = torch_device(device)
    cpu, flags, virtualised = _cpu()
    affinity = _affinity()
    caches, last_level_cache = _caches(affinity)
    return Machine(
        device=target.type,
        cpu=cpu,
        arch=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or len(affinity),
        logical_cores=psutil.cpu_count() or len(affinity),
        affinity=affinity,
        threads=torch.get_num_threads(),
        features=tuple(name for name, known in FEATURES.items() if known & flags),
        caches=caches,
        last_level_cache=last_level_cache,
        memory=memory_bytes(),
        virtualised=virtualised,
        gpu=_gpu(target) if torch.cuda.is_available() else None,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        float32_matmul_precision=_matmul_precision(),
    )


def torch_device(device: str | torch.device | None = None) -> torch.device:
    """The device to use as torch names it: by default CUDA where torch has it. Raises InputError for any other."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise InputError(f"device has to be 'cpu' or 'cuda', got {device!r}: choose one, or leave it out.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"torch {torch.__version__} sees no device {str(target)!r} here: use 'cpu', or leave it out.")
    return target


def asked_device(asked: str) -> torch.device:
    """A lesson's DEVICE as torch names it. "auto" is LABKIT_DEVICE where set, else CUDA where torch has it.

    Raises InputError for anything but auto, cpu, cuda and cuda:N, and for a GPU that is not there.
    """
    override = os.environ.get("LABKIT_DEVICE") if asked == "auto" else None
    chosen = override or asked
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(chosen, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", chosen):
        where = "LABKIT_DEVICE" if override else "device"
        raise InputError(f"{where} is {chosen!r}; choose auto, cpu, cuda or cuda:N.")
    device = torch.device(chosen)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"torch sees {count} of them" if count else "torch sees no CUDA device here"
        raise InputError(f"The device {chosen} is not there ({there}); choose auto or cpu, or mend the driver.")
    return device


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, and differently
        return "mixed"


def _affinity() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(psutil.cpu_count() or 1))


def _cpu() -> tuple[str, set[str], bool | None]:
    """The CPU's model name, its feature flags, and whether it is a virtual one (None: cannot be told)."""
    facts = _fields(_read("/proc/cpuinfo") + _output("lscpu"))  # lscpu knows the names of Arm cores
    if not facts:  # macOS: hw.optional.arm.FEAT_BF16: 1
        options = _fields(_output("sysctl", "hw.optional"))
        flags = {name.rpartition(".")[2].lower() for name, value in options.items() if value == "1"}
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine(), flags, None
    flags = set((facts.get("flags") or facts.get("features", "")).lower().split())
    virtualised = "hypervisor" in flags or "hypervisor vendor" in facts
    if not virtualised and platform.machine() != "x86_64":  # only x86 has a flag for it
        virtualised = None
    return facts.get("model name") or platform.machine(), flags, virtualised


def _fields(text: str) -> dict[str, str]:
    """The lines "key: value" of a text, keys in lower case; the first of a key holds."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    return fields


def _caches(affinity: Sequence[int]) -> tuple[dict[str, int], int]:
    """L1d, L2, L3 in bytes as the first core sees them; and the last level in all, over the cores of `affinity`."""
    caches: dict[str, int] = {}
    shared: dict[str, dict[str, int]] = {}  # level -> the cores that share one -> its size
    for core in affinity:
        for index in sorted(Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*")):
            level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and re.fullmatch(r"\d+K", size):
                name = f"L{level}d" if kind == "Data" else f"L{level}"
                caches.setdefault(name, int(size[:-1]) * KiB)
                shared.setdefault(level, {})[_read(index / "shared_cpu_list")] = int(size[:-1]) * KiB
    if shared:
        return caches, sum(shared[max(shared)].values())
    for name, key in (("L1d", "hw.l1dcachesize"), ("L2", "hw.l2cachesize")):  # macOS
        size = _output("sysctl", "-n", key).strip()
        caches |= {name: int(size)} if size.isdigit() else {}
    return caches, max(caches.values(), default=0)


def memory_bytes() -> int:
    """Bytes that this process may use: the machine's, or the container's limit."""
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    total = psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpu(target: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(target if target.type == "cuda" else torch.cuda.current_device())
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    english = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, env=english).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _slug(name: str) -> str:
    """Lower-case words of a model name, without what every CPU is called."""
    common = r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|\b\d+th gen\b|@.*|\bwith .*graphics\b"
    plain = re.sub(common, " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"
