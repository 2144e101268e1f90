"""What this machine can reach: the ceilings of its roofline, measured, and its bandwidth at each level of the caches.

Ceilings after the roofline model (Williams, Waterman and Patterson 2009) and STREAM (McCalpin 1995): the best of many
calls, since a ceiling is a maximum. It leaves random state, threads and precision settings as they were, and does not
count what a model needs: that is labkit.roofline. The fingerprint and the catalogue of devices are found here too.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from labkit import clocks, environment
from labkit.devices import DEVICES, Device, lookup
from labkit.errors import InputError
from labkit.fingerprint import Gpu, Machine, fingerprint, memory_bytes, torch_device

__all__ = ["DEVICES", "PRODUCTS", "Ceilings", "Device", "Gpu", "Machine"]
__all__ += ["bandwidth_sweep", "ceilings", "datasheet_ceilings", "fingerprint", "lookup"]

KiB, MiB, GiB = 2**10, 2**20, 2**30

# What a product needs to run at the rate of its type: CUDA compute capability, and whether CPUs are tried.
PRODUCTS = {
    "fp32": ((5, 0), True),
    "tf32": ((8, 0), False),
    "bf16": ((8, 0), True),
    "fp16": ((7, 0), True),
    "int8": ((7, 5), True),
    "fp8": ((8, 9), False),
}
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 4096, 8192)}
ROUNDS = 3  # of every call at least, however short the budget

_LEFT_OUT = "{} has no ceiling: even a small product takes too long here"

Key = tuple[str, int]
Calls = dict[Key, Callable[[], object]]


@dataclass(frozen=True)
class Ceilings:
    """The roofs of one device: `flops` in FLOP/s (OP/s for int8) by dtype, `bandwidth` in B/s.

    `how` is "measured" or "datasheet". `bandwidths` has the best of each kind of access and `sides` the side of the
    square product that gave each peak, where measured. `Ceilings(**ceilings.to_dict())` reads one back.
    """

    device: str
    how: str
    flops: Mapping[str, float]
    bandwidth: float
    bandwidths: Mapping[str, float] = field(default_factory=dict)
    sides: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def ridge(self, dtype: str) -> float:
        """The arithmetic intensity in FLOP/B where the compute roof of this type meets the bandwidth roof."""
        if dtype not in self.flops:
            have = ", ".join(self.flops)
            raise InputError(f"there is no {dtype!r} ceiling for {self.device}: choose one of {have}.")
        return self.flops[dtype] / self.bandwidth

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def datasheet_ceilings(name: str) -> Ceilings:
    """The dense peaks and the bandwidth of a device in the catalogue. Raises InputError for a name it does not have."""
    device = lookup(name) if isinstance(name, str) else None
    if device is None:
        have = ", ".join(DEVICES)
        raise InputError(f"{name!r} is not in the catalogue of devices: choose one of {have}, or call ceilings().")
    return Ceilings(device.name, "datasheet", dict(device.flops), device.bandwidth)


def ceilings(
    device: str | torch.device | None = None, *, dtypes: Iterable[str] | None = None, budget_s: float = 6.0
) -> Ceilings:
    """Measure the roofs of this machine in about `budget_s` seconds: matrix product per dtype, bandwidth.

    Products are square, of random normal numbers, of a few sizes; `dtypes` (default: all of PRODUCTS that run here).
    Bandwidth is the best of copy (2n bytes), triad (3n) and read (n) over fp32 arrays of at least four times the last
    cache, counted as STREAM does: the lines that a CPU reads only to overwrite them are left out. All take turns until
    the budget is spent, so that a neighbour who comes and goes spoils rounds and not a roof; `warnings` names one who
    stayed. Random state, precision settings and thread count are as before afterwards.

    Raises InputError for a dtype that is unknown or does not run here, and for a device that is not there.
    """
    target = torch_device(device)
    wanted = _dtypes(dtypes, target)
    _positive_budget(budget_s)
    machine = fingerprint(target)
    before, deadline = environment.snapshot(target), time.perf_counter() + budget_s
    with torch.inference_mode():
        products, too_slow = _products(wanted, target, longest_s=budget_s / 40)
        if dtypes is not None and too_slow:
            raise InputError(f"{too_slow[0]} products do not run in useful time on {machine.label}: leave them out.")
        streams, moved = _streams(machine, target)
        seconds = _in_turns(products | streams, target, deadline)
    machine_doubts = _doubts(target, before, environment.snapshot(target))
    del products, streams  # the operands, gigabytes on a GPU
    if target.type == "cuda":
        torch.cuda.empty_cache()

    flops = {(name, side): 2 * side**3 / min(taken) for (name, side), taken in seconds.items() if name in PRODUCTS}
    best = {name: max((key for key in flops if key[0] == name), key=flops.__getitem__) for name, _ in flops}
    bandwidths = {name: moved[name, size] / min(seconds[name, size]) for name, size in moved}
    return Ceilings(
        device=machine.gpu.name if target.type == "cuda" else f"{machine.cpu}, {machine.threads} threads",
        how="measured",
        flops={name: flops[key] for name, key in best.items()},
        bandwidth=max(bandwidths.values()),
        bandwidths=bandwidths,
        sides={name: side for name, side in best.values()},
        warnings=(*machine_doubts, *_spread([seconds[key] for key in moved]), *(_LEFT_OUT.format(n) for n in too_slow)),
    )


def bandwidth_sweep(
    device: str | torch.device | None = None, *, sizes: Iterable[int] | None = None, budget_s: float = 2.0
) -> list[tuple[int, float]]:
    """Bandwidth in B/s against working set in bytes, smallest first: each cache level shows as a plateau.

    On a CPU the working set is one array, cut among the threads, that each reads over and over: a single call of torch
    loops over it until 256 MiB are read, so that neither Python nor the start of threads counts (a call to torch alone
    takes a microsecond, as long as reading 200 KiB from a first-level cache). With T threads the private caches count
    T times. On CUDA it is an array read and another written, in CUDA graphs of many calls; a gap of a microsecond or
    two between kernels remains, so that sets under some 16 MiB show launches rather than the cache.

    `sizes` in bytes, default 16 KiB to 256 MiB on a CPU, 4 MiB to 1 GiB on CUDA. Raises InputError for sizes that are
    too small to cut (under 4 KiB a thread), more than an eighth of the memory, or none at all.
    """
    target = torch_device(device)
    _positive_budget(budget_s)
    on_cpu, threads = target.type == "cpu", torch.get_num_threads()
    smallest = threads * 4 * KiB if on_cpu else MiB
    largest = (memory_bytes() if on_cpu else torch.cuda.get_device_properties(target).total_memory) // 8
    if sizes is None:
        usual = (2**power for power in (range(14, 29) if on_cpu else range(22, 31)))
        sizes = [size for size in usual if smallest <= size <= largest]
    sizes = sorted(set(sizes))
    if not sizes or not all(isinstance(size, int) and smallest <= size <= largest for size in sizes):
        raise InputError(f"sizes has to be whole numbers of bytes between {smallest} and {largest} here, got {sizes}.")
    deadline = time.perf_counter() + budget_s
    with torch.inference_mode():
        buffer = torch.ones(sizes[-1] // 4, device=target)
        walk = _read_over_and_over if on_cpu else _copy_over_and_over
        walks = {("walk", size): walk(buffer, size, threads) for size in sizes}
        seconds = _in_turns({key: call for key, (call, _) in walks.items()}, target, deadline)
    return [(size, moved / min(seconds["walk", size])) for (_, size), (_, moved) in walks.items()]


def _in_turns(calls: Calls, target: torch.device, deadline: float) -> dict[Key, list[float]]:
    """Seconds of every call, one call each in turn until the deadline, after a first one that does not count."""
    clock = clocks.choose(target, "hot", False, None)
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        clock.block(call, 1)
    while time.perf_counter() < deadline or len(next(iter(seconds.values()))) < ROUNDS:
        for key, call in calls.items():
            seconds[key].append(clock.block(call, 1)[0])
    return seconds


def _products(names: Sequence[str], target: torch.device, longest_s: float) -> tuple[Calls, list[str]]:
    """Products of the sizes that take at most `longest_s` a call, and the dtypes that have none."""
    smallest, *larger = SIDES[target.type]
    calls, too_slow = {}, []
    for name in names:
        probe = {(name, smallest): _product(name, smallest, target)}
        try:
            seconds = min(_in_turns(probe, target, deadline=0.0)[name, smallest])
        except RuntimeError:  # this build of torch has no kernel for it
            seconds = float("inf")
        if seconds > longest_s:
            too_slow.append(name)
            continue
        calls |= probe
        fitting = [side for side in larger if seconds * (side / smallest) ** 3 <= longest_s]
        calls |= {(name, side): _product(name, side, target) for side in fitting}
    return calls, too_slow


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
        x, weight, one = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn), torch.ones((), device=target)
        return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)
    x, weight = (t.to(torch.bfloat16 if name == "bf16" else torch.float16) for t in (x, weight))
    out = torch.empty_like(x)
    return lambda: torch.mm(x, weight.t(), out=out)


def _streams(machine: Machine, target: torch.device) -> tuple[Calls, dict[Key, int]]:
    """Copy, triad and read over arrays that no cache holds, and the bytes that each moves."""
    on_cpu = target.type == "cpu"
    usual = max(64 * MiB, 4 * machine.last_level_cache) if on_cpu else GiB
    size = min(usual, (machine.memory if on_cpu else machine.gpu.memory) // 16, 2 * GiB)
    a, b, out = (torch.ones(size // 4, device=target) for _ in range(3))
    calls = {
        ("copy", size): lambda: out.copy_(a),
        ("triad", size): lambda: torch.add(a, b, alpha=3.0, out=out),
        ("read", size): lambda: a.sum(),
    }
    return calls, {("copy", size): 2 * a.nbytes, ("triad", size): 3 * a.nbytes, ("read", size): a.nbytes}


def _read_over_and_over(buffer: torch.Tensor, size: int, threads: int) -> tuple[Callable[[], object], int]:
    """Sum an array of `size` bytes, again and again in one call; thread i keeps to the i-th part of it."""
    part, times = size // 4 // threads, max(1, 256 * MiB // size)
    again = buffer[: threads * part].view(threads, 1, part).expand(threads, times, part)  # [threads, times, part]
    return lambda: again.sum((1, 2)), 4 * again.numel()


def _copy_over_and_over(buffer: torch.Tensor, size: int, threads: int) -> tuple[Callable[[], object], int]:
    """Scale one half of `size` bytes into the other, many times in one CUDA graph."""
    half, times = size // 8, max(1, 256 * MiB // size)
    source, out = buffer[:half], buffer[half : 2 * half]

    def copies() -> None:
        for _ in range(times):
            torch.mul(source, 1.5, out=out)

    return clocks.choose(buffer.device, "hot", True, None).prepare(copies), 8 * half * times


def _doubts(target: torch.device, before: environment.Snapshot, after: environment.Snapshot) -> list[str]:
    """What else went on meanwhile: other programs on a CPU, throttling of a GPU."""
    if target.type == "cuda":
        throttled = environment.throttling((before, after))
        return [f"{throttled}: measure again when it is cool"] if throttled else []
    cores = environment.foreign_cores(before, after) or 0.0
    busy = f"other programs kept {cores:.1f} cores busy: measure again when the machine is quiet"
    return [busy] if cores > 0.15 else []


def _spread(streams: Iterable[Sequence[float]]) -> list[str]:
    ratio = max(statistics.median(seconds) / min(seconds) for seconds in streams)
    shared = f"the median stream took {ratio:.1f} times as long as the best: others use this memory, measure again"
    return [shared] if ratio > 1.3 else []


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


def _dtypes(dtypes: Iterable[str] | None, target: torch.device) -> list[str]:
    if target.type == "cpu":
        possible = [name for name, (_, on_cpu) in PRODUCTS.items() if on_cpu]
    else:
        capability = torch.cuda.get_device_capability(target)
        possible = [name for name, (needed, _) in PRODUCTS.items() if capability >= needed]
    wanted = possible if dtypes is None else list(dtypes)
    if not wanted or not set(wanted) <= set(possible):
        raise InputError(f"dtypes has to be some of {', '.join(possible)} on this device, got {dtypes!r}.")
    return wanted


def _positive_budget(budget_s: float) -> None:
    if not (isinstance(budget_s, (int, float)) and 0 < budget_s < float("inf")):
        raise InputError(f"budget_s has to be a number of seconds above 0, got {budget_s!r}: 3 to 10 is usual.")
