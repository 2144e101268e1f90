"""What this machine is and what it can reach: its fingerprint, its measured ceilings, and a catalogue of accelerators.

The fingerprint keeps what a result depends on (after pyperf's metadata) and names no host, user or folder. Ceilings
follow the roofline model (Williams, Waterman and Patterson 2009) and STREAM (McCalpin 1995). It leaves random state,
threads and precision settings as they were; what a model needs is counted elsewhere (labkit.roofline).
"""

import functools
import math
import os
import platform
import re
import statistics
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch

from labkit.errors import InputError
from labkit.timing import clocks, stats

KiB, MiB, GiB = 2**10, 2**20, 2**30


# --- the catalogue ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """One accelerator of devices.toml, as a whole chip, or one module where a module is what is sold.

    flops: dense peak by type (fp32, tf32, bf16, fp16, fp8, int8, fp4) in FLOP/s (OP/s for int8); sparse: the 2:4 peaks.
    bandwidth: B/s, decimal. memory: the vendor's GB as 1e9 B. l2: bytes. tdp: W. year: announced. None: not stated.
    evidence: how the peaks are known; known_otherwise: figures that are known in another way.
    """

    name: str
    year: int
    flops: Mapping[str, float]
    sparse: Mapping[str, float]
    bandwidth: float
    memory: float
    l2: float | None
    tdp: float | None
    evidence: str
    known_otherwise: Mapping[str, str]
    source: str


def _device(name: str, row: Sequence) -> Device:
    year, memory, bandwidth, l2, tdp, *peaks, sparse, evidence, known_otherwise, source = row
    types = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4")
    flops = {dtype: 1e12 * peak for dtype, peak in zip(types, peaks, strict=True) if peak}
    doubled = flops.keys() - {"fp32"} if sparse == "all" else sparse.split()
    twice = {dtype: 2 * flops[dtype] for dtype in flops if dtype in doubled}
    capacities = 1e9 * bandwidth, 1e9 * memory, l2 * MiB or None, tdp or None
    return Device(name, year, flops, twice, *capacities, evidence, known_otherwise, source)


_ROWS = tomllib.loads(Path(__file__).with_name("devices.toml").read_text("utf-8"))["devices"]
DEVICES: dict[str, Device] = {name: _device(name, row) for name, row in _ROWS.items()}

# --- the fingerprint --------------------------------------------------------------------------------------------------

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

    `cache_counts` says how many of each the cores that this process may use have among them.
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
        """Physical cores that this process may use."""
        return min(self.physical_cores, len(self.affinity))

    @property
    def caches_in_all(self) -> dict[str, int]:
        """Bytes that fit the caches of all threads together, by level: private ones count once a thread."""
        return {name: size * min(self.threads, self.cache_counts[name]) for name, size in self.caches.items()}

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
        virtual = ", virtual machine" if self.virtualised else ""
        return f"{self.cpu}, {cores}, {' '.join(wide) or self.arch}, {self.memory / GiB:.0f} GiB{virtual}"

    def to_dict(self) -> dict:
        """Plain values for JSON, with slug and label."""
        return {**asdict(self), "slug": self.slug, "label": self.label}


def fingerprint(device: str | torch.device = "auto") -> Machine:
    """The machine as this process sees it, for `device` (see `torch_device`, which also says what is refused)."""
    target = torch_device(device)
    cpu, flags, virtualised = _cpu()
    affinity = tuple(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(psutil.cpu_count()))
    caches, counts, last_level_cache = _caches(affinity)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, and differently
        precision = "mixed"
    return Machine(
        device=target.type,
        cpu=cpu,
        arch=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or len(affinity),
        logical_cores=psutil.cpu_count() or len(affinity),
        affinity=affinity,
        threads=torch.get_num_threads(),
        features=tuple(name for name, spellings in FEATURES.items() if spellings & flags),
        caches=caches,
        cache_counts=counts,
        last_level_cache=last_level_cache,
        memory=memory_bytes(),
        virtualised=virtualised,
        gpu=_gpu(target) if torch.cuda.is_available() else None,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=next((package.version for package in distributions(name="transformers")), None),
        float32_matmul_precision=precision,
    )


def torch_device(device: str | torch.device | None = "auto") -> torch.device:
    """The device as torch names it. "auto" and None: LABKIT_DEVICE where set, else CUDA where torch has it.

    Raises InputError for anything but auto, cpu, cuda and cuda:N, and for a GPU that is not there.
    """
    asked = "auto" if device is None else str(device) if isinstance(device, torch.device) else device
    override = os.environ.get("LABKIT_DEVICE") if asked == "auto" else None
    name = override or asked
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        where = "LABKIT_DEVICE" if override else "device"
        raise InputError(f"{where} is {name!r}; choose auto, cpu, cuda or cuda:N.")
    target = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= count:
        seen = f"torch sees {count} of them" if count else "torch sees no CUDA device here"
        raise InputError(f"The device {name} is not there ({seen}); choose auto or cpu, or fix the driver.")
    return target


def threads() -> int:
    """Physical cores that this process may use, a container's quota included; OMP_NUM_THREADS, where set, wins."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    cores = fingerprint("cpu").cores
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores  # "max": no limit


def memory_bytes() -> int:
    """Bytes that this process may use: the machine's, or the container's limit."""
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    total = psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdigit() else total


def _cpu() -> tuple[str, set[str], bool | None]:
    """The CPU's model name, its feature flags, and whether it is a virtual one (None: cannot be told)."""
    facts: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") + _output("lscpu")).splitlines():  # lscpu knows the names of Arm cores
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    if not facts:  # macOS: hw.optional.arm.FEAT_BF16: 1
        flags = set(re.findall(r"(\w+): 1$", _output("sysctl", "hw.optional").lower(), re.MULTILINE))
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine(), flags, None
    flags = set((facts.get("flags") or facts.get("features", "")).lower().split())
    virtualised = "hypervisor" in flags or "hypervisor vendor" in facts
    certain = virtualised or platform.machine() == "x86_64"  # the others have no flag for it
    return facts.get("model name") or platform.machine(), flags, virtualised if certain else None


def _caches(affinity: Sequence[int]) -> tuple[dict[str, int], dict[str, int], int]:
    """L1d, L2, L3 in bytes as the first core sees them, how many of each `affinity` has, and the last level in all."""
    caches: dict[str, int] = {}
    shared: dict[str, dict[str, int]] = {}  # level -> the cores that share one -> its size
    for core in affinity:
        for index in sorted(Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*")):
            level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and re.fullmatch(r"\d+K", size):
                name = f"L{level}d" if kind == "Data" else f"L{level}"
                caches.setdefault(name, int(size[:-1]) * KiB)
                shared.setdefault(name, {})[_read(index / "shared_cpu_list")] = int(size[:-1]) * KiB
    if shared:
        return caches, {name: len(sizes) for name, sizes in shared.items()}, sum(shared[max(shared)].values())
    for name, key in (("L1d", "hw.l1dcachesize"), ("L2", "hw.l2cachesize")):  # macOS
        size = _output("sysctl", "-n", key).strip()
        caches |= {name: int(size)} if size.isdigit() else {}
    counts = {name: len(affinity) if name == "L1d" else 1 for name in caches}  # an L2 serves a cluster of cores
    return caches, counts, max(caches.values(), default=0)


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


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        english = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, timeout=10, env=english).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _slug(name: str) -> str:
    """Lower-case words of a model name, without what every CPU is called."""
    common = r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|\b\d+th gen\b|@.*|\bwith .*graphics\b"
    plain = re.sub(common, " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


# --- measured ceilings ------------------------------------------------------------------------------------------------

# What a product needs to run at the rate of its type: CUDA compute capability, and whether CPUs are tried.
PRODUCTS = {
    "fp32": ((5, 0), True),
    "tf32": ((8, 0), False),
    "bf16": ((8, 0), True),
    "fp16": ((7, 0), True),
    "int8": ((7, 5), True),
    "fp8": ((8, 9), False),
}
CONVOLUTION_FLOPS = 2 * 128 * 128 * 3 * 3 * 56 * 56
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 4096, 8192)}  # of the square products
ROUNDS = 6  # of every call at least, however short the budget: fewer give no interval
LONGEST_S = 0.025  # that a product may take however short the budget: 1024 x 1024 in fp32 on a core of 2020
REPETITIONS = 10  # of each ceiling, where the budget allows: the best of the rounds in each counts

PARTS = 16  # of the arrays that are streamed on a CPU, a call each: a short call is more often left undisturbed

Calls = dict[tuple[str, int], Callable[[], object]]  # by what is done, and its size or which part it is of


@dataclass(frozen=True)
class Ceilings:
    """The roofs of this machine: `flops` in FLOP/s (OP/s for int8) by type, `bandwidth` in B/s.

    warnings: what spoiled the measurement, one phrase each; empty where nothing did.
    flops_range, bandwidth_range: (low, high), from the low end of the median's 95 % interval to the best; they hold for
    the process and the minute in which they were measured, and other moments may lie outside.
    """

    device: str
    flops: Mapping[str, float]
    bandwidth: float
    warnings: tuple[str, ...] = ()
    flops_range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bandwidth_range: tuple[float, float] | None = None

    def ridge(self, dtype: str) -> float:
        """The arithmetic intensity in FLOP/B where the compute roof of this type meets the bandwidth roof."""
        return peak(self, dtype) / self.bandwidth

    def raised(self, again: "Ceilings") -> "Ceilings":
        """The higher of each roof, with its range, of these and of `again`, measured at another moment.

        What disturbs a measurement only lowers a roof, and may last longer than measuring it: whatever was seen to be
        reached can be reached. The warnings are those of both. Raises InputError for the roofs of another device.
        """
        if again.device != self.device:
            raise InputError(f"these are roofs of {self.device}, those of {again.device}: raise roofs of one device.")
        flops, flops_range = dict(self.flops), dict(self.flops_range)
        for name, rate in again.flops.items():
            if rate > flops.get(name, 0.0):
                flops[name] = rate
                flops_range[name] = again.flops_range.get(name, (-math.inf, math.inf))
        higher = max(self, again, key=lambda roofs: roofs.bandwidth)
        return Ceilings(
            device=self.device,
            flops=flops,
            bandwidth=higher.bandwidth,
            warnings=tuple(dict.fromkeys((*self.warnings, *again.warnings))),
            flops_range=flops_range,
            bandwidth_range=higher.bandwidth_range,
        )


def peak(roofs: Ceilings | Device, dtype: str) -> float:
    """The compute roof in FLOP/s of one type; InputError where there is none."""
    if dtype not in roofs.flops:
        name = roofs.device if isinstance(roofs, Ceilings) else roofs.name
        raise InputError(f"there is no {dtype!r} ceiling for {name}: choose one of {', '.join(sorted(roofs.flops))}.")
    return roofs.flops[dtype]


def ceilings(device: str | torch.device | None = None, *, budget_s: float = 6.0) -> Ceilings:
    """Measure the roofs of this machine in about `budget_s` seconds: matrix product per type, bandwidth.

    Products are square, of random normal numbers, of a few sizes, in every type of PRODUCTS that runs here. In fp32 a
    CPU's 3x3 convolution is tried as well, since it may be faster than any product.

    Bandwidth is the best of copy (2n bytes), triad (3n) and read (n) over three fp32 arrays, together two and a
    half times the last cache, counted as STREAM does: the lines that a CPU reads only to overwrite them are left
    out. Calls alternate until the budget is spent, in ten repetitions if there is time for them and in six at
    least. A repetition's best call gives one value, and the ceiling is the best of these: a disturbance only lowers
    a rate, and what was reached can be reached. Its range goes down to the low end of the median's 95 % interval:
    what is there most of the time.

    The range says how steady the ceiling is here and now. It does not cover what another process or hour finds: on
    machines that share a host with others, bandwidth was seen to move by a factor of two within a day, and both kinds
    of roof within a minute. A share of the roof is therefore taken with ceilings of the same process, and where a
    result lies above its roof, the roofs are measured again (`Ceilings.raised`) before anything else is blamed.

    device: see `torch_device`. Raises InputError for a device or a budget that cannot be used.
    """
    target = torch_device(device)
    clocks.check_budget(budget_s)
    machine = fingerprint(target)
    before, deadline = clocks.snapshot(target), time.perf_counter() + budget_s
    with torch.inference_mode():
        products, flops, warnings = _products(target, longest_s=max(budget_s / 80, LONGEST_S))
        clocks.evictor.cache_clear()  # as large as the arrays
        streams, moved = _streams(machine, target)
        samples = _in_turns(products | streams, target, deadline)
    after = clocks.snapshot(target)
    # the clock that a single thread's measurements use, too, while others compete for the cores: see labkit.bench
    disturbed = (clocks.foreign_cores(before, after) or 0.0) > clocks.FOREIGN_CORES
    by_cpu = disturbed and target.type == "cpu" and machine.threads == 1
    seconds = {key: [sample[by_cpu] for sample in of_call] for key, of_call in samples.items()}
    by_stream = {name: [s for key in streams if key[0] == name for s in seconds[key]] for name, _ in streams}
    warnings += _interference(target, before, after, list(by_stream.values()))
    work = moved | flops  # of a call, in bytes or FLOPs
    del products, streams  # the operands, gigabytes on a GPU
    if target.type == "cuda":
        torch.cuda.empty_cache()
    rates: dict[str, list[list[float]]] = {}  # by ceiling: for each call that reaches for it, its rates
    for key, times in seconds.items():
        best = stats.block_minima(times, max(1, len(times) // REPETITIONS))
        name = key[0] if key[0] in PRODUCTS else "bandwidth"
        rates.setdefault(name, []).append([work[key] / least for least in best])
    on_threads = f"{machine.threads} thread{'s' * (machine.threads > 1)}"
    repetitions = {name: [max(turn) for turn in zip(*calls, strict=True)] for name, calls in rates.items()}
    roofs = {name: _roof(bests) for name, bests in repetitions.items()}
    bandwidth, *bandwidth_range = roofs.pop("bandwidth")
    return Ceilings(
        device=machine.gpu.name if target.type == "cuda" else f"{machine.cpu}, {on_threads}",
        flops={name: rate for name, (rate, _, _) in roofs.items()},
        bandwidth=bandwidth,
        warnings=tuple(warnings),
        flops_range={name: (low, high) for name, (_, low, high) in roofs.items()},
        bandwidth_range=tuple(bandwidth_range),
    )


def _roof(bests: Sequence[float]) -> stats.Estimate:
    """A ceiling and its range from the best rate of each repetition."""
    _, low, _ = stats.median_ci(bests)
    return max(bests), low, max(bests)


def bandwidth_sweep(device: str | torch.device | None = None, *, budget_s: float = 2.0) -> list[tuple[int, float]]:
    """Bandwidth in B/s against working set in bytes, smallest first: each cache level shows as a plateau.

    On a CPU the working set is one array, cut among the threads, that each reads over and over: a single call of torch
    loops over it until 256 MiB are read, so that neither Python nor the start of threads counts (a call to torch alone
    takes a microsecond, as long as reading 200 KiB from a first-level cache). With T threads the private caches count T
    times (`Machine.caches_in_all`). On CUDA it is an array read and another written, in CUDA graphs of many calls; a
    gap of a microsecond or two between kernels remains, so that sets under some 16 MiB show launches rather than the
    cache.

    The sets run from 16 KiB (4 KiB a thread at least) to 256 MiB on a CPU, from 4 MiB to 1 GiB on CUDA, an eighth of
    the memory at most. Raises InputError for a device or a budget that cannot be used.
    """
    target = torch_device(device)
    clocks.check_budget(budget_s)
    on_cpu, cores = target.type == "cpu", torch.get_num_threads()
    largest = (memory_bytes() if on_cpu else torch.cuda.get_device_properties(target).total_memory) // 8
    sizes = [2**power for power in (range(14, 29) if on_cpu else range(22, 31))]
    sizes = [size for size in sizes if cores * 4 * KiB <= size <= largest]
    deadline = time.perf_counter() + budget_s
    with torch.inference_mode():
        buffer = torch.ones(sizes[-1] // 4, device=target)
        walk = _read_over_and_over if on_cpu else _copy_over_and_over
        walks = {("walk", size): walk(buffer, size, cores) for size in sizes}
        samples = _in_turns({key: call for key, (call, _) in walks.items()}, target, deadline)
    return [(size, moved / min(samples["walk", size])[0]) for (_, size), (_, moved) in walks.items()]


def _in_turns(calls: Calls, target: torch.device, deadline: float) -> dict[tuple[str, int], list[clocks.Seconds]]:
    """Seconds of every call, one call each in turn until the deadline, after a first one that does not count."""
    clock = clocks.choose(target)
    samples: dict[tuple[str, int], list[clocks.Seconds]] = {key: [] for key in calls}
    for call in calls.values():
        clock.block(call, 1)
    while time.perf_counter() < deadline or len(next(iter(samples.values()))) < ROUNDS:
        for key, call in calls.items():
            samples[key].append(clock.block(call, 1))
    return samples


def _products(target: torch.device, longest_s: float) -> tuple[Calls, dict[tuple[str, int], int], list[str]]:
    """Products of the sizes that take at most `longest_s` per call, their FLOPs, and a warning for each type without.

    The smallest may take six times as long: a slow type should have a ceiling, too. In fp32 a CPU's convolution is
    tried as well (side 0): there torch.mm is MKL's, which on some makes runs slower code than oneDNN's convolution.
    """
    smallest, *larger = SIDES[target.type]
    calls: Calls = {}
    warnings = []
    for name, (capability, on_cpu) in PRODUCTS.items():
        if not on_cpu if target.type == "cpu" else torch.cuda.get_device_capability(target) < capability:
            continue
        probe = {(name, smallest): _product(name, smallest, target)}
        try:
            seconds = min(_in_turns(probe, target, deadline=0.0)[name, smallest])[0]
        except RuntimeError:  # this build of torch has no kernel for it
            seconds = float("inf")
        if seconds > 6 * longest_s:
            warnings.append(f"{name} has no ceiling: even a small product takes too long here")
            continue
        calls |= probe
        fitting = [side for side in larger if seconds * (side / smallest) ** 3 <= longest_s]
        calls |= {(name, side): _product(name, side, target) for side in fitting}
        if name == "fp32" and target.type == "cpu" and 1024 in fitting:
            calls[name, 0] = _convolution()
    flops = {(name, side): 2 * side**3 if side else CONVOLUTION_FLOPS for name, side in calls}
    return calls, flops, warnings


def _convolution() -> Callable[[], object]:
    """A 3x3 convolution of 128 channels, [1, 128, 56, 56], channels last."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 128, 56, 56, generator=generator), torch.randn(128, 128, 3, 3, generator=generator)
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    return lambda: torch.conv2d(x, weight, padding=1)


def _product(name: str, side: int, target: torch.device) -> Callable[[], object]:
    """A linear layer's product x W^T, [side, side] each, with a generator of its own."""
    generator = torch.Generator(target).manual_seed(0)
    x, weight = (torch.randn(side, side, device=target, generator=generator) for _ in range(2))
    if name in ("fp32", "tf32"):
        out = torch.empty_like(x)

        def product() -> None:
            with _fp32_as("ieee" if name == "fp32" else "tf32"):
                torch.mm(x, weight.t(), out=out)

        return product
    if name == "int8":
        x, weight = (t.mul(40).clamp(-128, 127).to(torch.int8) for t in (x, weight))
        out = torch.empty(side, side, dtype=torch.int32, device=target)
        return lambda: torch._int_mm(x, weight.t(), out=out)
    if name == "fp8":
        x, weight, unit = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn), torch.ones((), device=target)
        return lambda: torch._scaled_mm(x, weight.t(), unit, unit, out_dtype=torch.bfloat16)
    x, weight = (t.to(torch.bfloat16 if name == "bf16" else torch.float16) for t in (x, weight))
    out = torch.empty_like(x)
    return lambda: torch.mm(x, weight.t(), out=out)


def _streams(machine: Machine, target: torch.device) -> tuple[Calls, dict[tuple[str, int], int]]:
    """Copy, triad and read over arrays that no cache holds, and the bytes that each call moves.

    On a CPU a call streams one part of them; by the time a part comes again, the others have passed through the cache.
    Together the arrays are two and a half times the last cache, of which a server's two cores may see half a gigabyte.
    All reads come in a row: after a copy or a triad the last cache is full of lines that were written, and a read that
    displaces them waits until they are in memory, bytes that nobody counts.
    """
    on_cpu = target.type == "cpu"
    usual = max(128 * MiB, 5 * machine.last_level_cache // 6) if on_cpu else GiB
    size = min(usual, (machine.memory if on_cpu else machine.gpu.memory) // 16, 2 * GiB)
    a, b, out = (torch.ones(size // 4, device=target).chunk(PARTS if on_cpu else 1) for _ in range(3))
    parts = range(len(a))
    calls: Calls = {("read", part): array.sum for part, array in enumerate((*a, *b, *out))}
    calls |= {("copy", part): functools.partial(out[part].copy_, a[part]) for part in parts}
    triad = functools.partial(torch.add, alpha=3.0)
    calls |= {("triad", part): functools.partial(triad, a[part], b[part], out=out[part]) for part in parts}
    times = {"copy": 2, "triad": 3, "read": 1}
    return calls, {(name, part): times[name] * a[0].nbytes for name, part in calls}


def _read_over_and_over(buffer: torch.Tensor, size: int, threads: int) -> tuple[Callable[[], object], int]:
    """Sum an array of `size` bytes, again and again in one call; thread i keeps to the i-th part of it."""
    part, times = size // 4 // threads, max(1, 256 * MiB // size)
    again = buffer[: threads * part].view(threads, 1, part).expand(threads, times, part)  # [threads, times, part]
    return lambda: again.sum((1, 2)), 4 * again.numel()


def _copy_over_and_over(buffer: torch.Tensor, size: int, threads: int) -> tuple[Callable[[], object], int]:
    """Scale one half of `size` bytes into the other, many times in one CUDA graph."""
    half, times = size // 8, max(1, 256 * MiB // size)
    source, out = buffer[:half], buffer[half : 2 * half]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(buffer.device)

    def copies() -> None:
        for _ in range(times):
            torch.mul(source, 1.5, out=out)

    with torch.cuda.device(buffer.device):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy set-up must be over before a capture, and off the default stream
            copies()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            copies()
    return graph.replay, 8 * half * times


def _interference(
    target: torch.device, before: clocks.Snapshot, after: clocks.Snapshot, streams: Sequence[Sequence[float]]
) -> list[str]:
    """What else went on meanwhile: other programs on a CPU, throttling of a GPU, others who use the memory."""
    warnings = []
    if target.type == "cuda" and (throttled := clocks.throttling((before, after))):
        warnings.append(f"{throttled}: measure again when it is cool")
    if target.type == "cpu" and (cores := clocks.foreign_cores(before, after) or 0.0) > clocks.FOREIGN_CORES:
        warnings.append(f"other programs kept {cores:.1f} cores busy: measure again when the machine is quiet")
    spread = max(statistics.median(seconds) / min(seconds) for seconds in streams)
    if spread > 1.3:
        warnings.append(f"the median stream took {spread:.1f} times as long as the best: others use this memory")
    return warnings


@contextmanager
def _fp32_as(precision: str) -> Iterator[None]:
    """Products of fp32 in "ieee" or "tf32" precision, whatever is set; the setting comes back."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting
