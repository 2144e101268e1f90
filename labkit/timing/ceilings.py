"""Measure the ceilings of this machine: matrix products of each type, memory bandwidth, bandwidth of each cache level.

Ceilings follow the roofline model (Williams, Waterman and Patterson 2009) and STREAM (McCalpin 1995). Measuring leaves
random state, threads and precision settings unchanged.
"""

import functools
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.show import counted
from labkit.timing import clocks, interference, stats
from labkit.timing.clocks import Sample
from labkit.timing.fingerprint import Machine, fingerprint, memory_bytes, torch_device
from labkit.timing.interference import Snapshot
from labkit.timing.roofs import PRODUCTS, Ceilings
from labkit.timing.rounds import EnoughRounds, Turn, fastest_s, take_turns

KiB, MiB, GiB = 2**10, 2**20, 2**30

SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 4096, 8192)}  # of the square matrices
CONVOLUTION = 0  # the convolution's place among the sides
CONVOLUTION_FLOPS = 2 * 128 * 128 * 3 * 3 * 56 * 56
ROUNDS = 6  # of every call at least, however short the budget: fewer give no interval
LONGEST_S = 0.025  # of a product, for budgets under 2 s: 1024 x 1024 in fp32 on a core of 2020
LONGEST_SHARE = 0.05  # of a budget under half a second, the longest that a product may take
SMALLEST_MAY_TAKE = 6  # times the longest time, or LONGEST_S: a slow type should have a ceiling, too
REPETITIONS = 10  # of each ceiling, if the budget allows: the best of the rounds in each counts
STREAM_BYTES = GiB // 3  # of a streamed array, at most, in a second of the budget
PARTS = 16  # of the streamed arrays on a CPU, a call each: a short call is more often undisturbed
SLOW_STREAM = 1.3  # median over least seconds of a stream, from which other programs use the memory
SWEEP_ROUNDS = 2  # at least, of which the faster counts
SWEEP_BYTES = 256 * MiB  # to read or write in a call of the bandwidth sweep

Call = Callable[[], object]


class Key(NamedTuple):
    """Name of a product's type or of a stream, and the side of the matrices or the part of the arrays."""

    name: str
    size: int


class Workload(NamedTuple):
    """A call to be timed, and its amount of work: FLOPs of a product, bytes of a stream."""

    call: Call
    amount: int


Workloads = dict[Key, Workload]


# --- the roofs --------------------------------------------------------------------------------------------------------


def ceilings(device: str | torch.device | None = None, *, budget_s: float = 6.0) -> Ceilings:
    """Measure the roofs of this machine: matrix products of each type, and memory bandwidth.

    Products are square, of random normal numbers, of a few sizes, in every type of PRODUCTS that runs on the device. In
    fp32, a CPU's 3x3 convolution is tried as well, because a convolution may be faster than any product.

    Bandwidth is the best of copy (2n bytes), triad (3n) and read (n) over three fp32 arrays, two and a half times the
    last cache together. As in STREAM, the lines that a CPU reads only to overwrite are not counted.

    A budget too short for such arrays takes shorter arrays, which a cache may hold, and the ceilings get a warning.

    Calls alternate until the budget is spent, in ten repetitions if time allows and in six at least. The best call of a
    repetition gives a value, and the ceiling is the best of the values: a disturbance only lowers a rate, and a rate
    reached once can be reached. The range goes down to the low end of the median's 95 % interval, the usual rate.

    The range tells how steady a ceiling is here and now, not what another process or hour would find. On machines that
    share a host with others, bandwidth was seen to move by a factor of two within a day, and both kinds of roof within
    a minute. Take a share of the roof with the highest ceilings that any process of the machine reached: a lower one
    was measured at a slower moment, and flatters the share. If a result lies above its roof, measure the
    roofs again (`Ceilings.raised`) before looking for another cause.

    device: device as for `torch_device`.
    budget_s: seconds for the whole measurement, about.
    Raises InputError for an unusable device or budget.
    """
    target = torch_device(device)
    clocks.check_budget(budget_s)
    machine = fingerprint(target)
    before = interference.snapshot(target)
    deadline = time.perf_counter() + budget_s
    with torch.inference_mode():
        longest_s = max(budget_s / 80, min(LONGEST_S, LONGEST_SHARE * budget_s))
        products, warnings = _products(target, longest_s)
        clocks.evictor.cache_clear()  # its array is as large as the arrays of the streams
        nbytes = _array_bytes(machine, target)
        affordable = max(MiB, int(STREAM_BYTES * budget_s))
        if affordable < nbytes:
            warnings.append("the arrays were short, and a cache may have held them: raise budget_s")
        streams = _streams(min(nbytes, affordable), target)
        workloads = products | streams
        samples = _in_turns(workloads, target, ROUNDS, deadline)
    after = interference.snapshot(target)
    by_cpu = _judged_by_cpu_time(machine, target, before, after)
    seconds = {}
    for key, of_call in samples.items():
        seconds[key] = [sample.by(by_cpu) for sample in of_call]
    warnings += _interference(target, before, after, _seconds_by_stream(seconds, streams))
    best_rates = _best_rates(seconds, workloads)
    stream_rates = {name: best_rates.pop(name) for name in dict.fromkeys(key.name for key in streams)}
    del products, streams, workloads  # the operands, gigabytes on a GPU
    if target.type == "cuda":
        torch.cuda.empty_cache()
    roofs = {name: _roof(rates) for name, rates in best_rates.items()}
    bandwidth = _roof(_highest(stream_rates.values()))
    return Ceilings(
        device=_device_name(machine, target),
        flops={name: roof.best for name, roof in roofs.items()},
        bandwidth=bandwidth.best,
        warnings=tuple(warnings),
        flops_range={name: (roof.low, roof.best) for name, roof in roofs.items()},
        bandwidth_range=(bandwidth.low, bandwidth.best),
        streams={name: max(rates) for name, rates in stream_rates.items()},
    )


def _in_turns(workloads: Workloads, target: torch.device, rounds: int, deadline: float) -> dict[Key, list[Sample]]:
    """Time every call once in each round until the deadline, in `rounds` at least, after an untimed call of each."""
    clock = clocks.choose(target)
    calls = {key: workload.call for key, workload in workloads.items()}
    for call in calls.values():
        clock.block(call, 1)
    every_call = [Turn(key) for key in calls]
    return take_turns(clock, calls, itertools.repeat(every_call), EnoughRounds(rounds, deadline))


def _judged_by_cpu_time(machine: Machine, target: torch.device, before: Snapshot, after: Snapshot) -> bool:
    """Return True if CPU time counts, as in `bench` for a single thread while other programs compete for the cores."""
    load = interference.foreign_cores(before, after) or 0.0
    is_disturbed = load > interference.FOREIGN_CORES
    return is_disturbed and target.type == "cpu" and machine.threads == 1


def _best_rates(seconds: Mapping[Key, Sequence[float]], workloads: Workloads) -> dict[str, list[float]]:
    """Return the best rate of each repetition, by type and by stream, in FLOP/s and B/s."""
    rates_by_name: dict[str, list[list[float]]] = defaultdict(list)  # of each call of a type or a stream
    for key, times in seconds.items():
        rounds_per_repetition = max(1, len(times) // REPETITIONS)
        fastest = stats.block_minima(times, rounds_per_repetition)
        rates_by_name[key.name].append([workloads[key].amount / least for least in fastest])
    return {name: _highest(rates_of_calls) for name, rates_of_calls in rates_by_name.items()}


def _highest(rates_of_calls: Iterable[Sequence[float]]) -> list[float]:
    """Return the highest rate of each repetition."""
    return [max(repetition) for repetition in zip(*rates_of_calls, strict=True)]


class _Roof(NamedTuple):
    best: float
    low: float  # end of the median's interval


def _roof(rates: Sequence[float]) -> _Roof:
    _, low, _ = stats.median_ci(rates)
    return _Roof(max(rates), low)


def _seconds_by_stream(seconds: Mapping[Key, Sequence[float]], streams: Workloads) -> list[list[float]]:
    """Return the times of copy, triad and read, of all parts together."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for key in streams:
        by_name[key.name] += seconds[key]
    return list(by_name.values())


def _interference(
    target: torch.device, before: Snapshot, after: Snapshot, seconds_by_stream: Sequence[Sequence[float]]
) -> list[str]:
    """Return a warning for each disturbance: other programs on a CPU, throttling of a GPU, memory in use."""
    warnings = []
    throttled = interference.throttling((before, after))
    if target.type == "cuda" and throttled:
        warnings.append(f"{throttled}: measure again when it is cool")
    load = interference.foreign_cores(before, after) or 0.0
    if target.type == "cpu" and load > interference.FOREIGN_CORES:
        warnings.append(f"other programs kept {load:.1f} cores busy: measure again when the machine is quiet")
    spread = max(statistics.median(seconds) / min(seconds) for seconds in seconds_by_stream)
    if spread > SLOW_STREAM:
        warnings.append(f"the median stream took {spread:.1f} times as long as the best")
    return warnings


def _device_name(machine: Machine, target: torch.device) -> str:
    if target.type == "cuda":
        return machine.gpu.name
    return f"{machine.cpu}, {counted(machine.threads, 'thread')}"


# --- products ---------------------------------------------------------------------------------------------------------


def _products(target: torch.device, longest_s: float) -> tuple[Workloads, list[str]]:
    """Make products of each type that runs on `target`, of all sizes that take at most `longest_s` seconds per call.

    The smallest size may take six times as long. In fp32 on a CPU a convolution is added (side CONVOLUTION): torch.mm
    is MKL's, which on some makes of CPU runs slower code than the convolution of oneDNN.

    Returns the products, and a warning for each type without any.
    """
    smallest, *larger = SIDES[target.type]
    clock = clocks.choose(target)
    workloads: Workloads = {}
    warnings = []
    for name in PRODUCTS:
        if not _runs_on(target, name):
            continue
        probe = _product(name, smallest, target)
        try:
            seconds = fastest_s(probe, clock, ROUNDS)
        except RuntimeError:  # this build of torch has no kernel for the type
            seconds = float("inf")
        if seconds > SMALLEST_MAY_TAKE * max(longest_s, LONGEST_S):
            warnings.append(f"{name} has no ceiling: even a small product takes too long here")
            continue
        workloads[Key(name, smallest)] = Workload(probe, 2 * smallest**3)
        fitting = [side for side in larger if seconds * (side / smallest) ** 3 <= longest_s]
        for side in fitting:
            workloads[Key(name, side)] = Workload(_product(name, side, target), 2 * side**3)
        if name == "fp32" and target.type == "cpu" and 1024 in fitting:
            workloads[Key(name, CONVOLUTION)] = Workload(_convolution(), CONVOLUTION_FLOPS)
    return workloads, warnings


def _runs_on(target: torch.device, name: str) -> bool:
    capability, is_tried_on_cpu = PRODUCTS[name]
    if target.type == "cpu":
        return is_tried_on_cpu
    return torch.cuda.get_device_capability(target) >= capability


def _product(name: str, side: int, target: torch.device) -> Call:
    """Make a linear layer's product x W^T, both [side, side], of random normal numbers from a generator of its own."""
    generator = torch.Generator(target).manual_seed(0)
    x = torch.randn(side, side, device=target, generator=generator)
    weight = torch.randn(side, side, device=target, generator=generator)
    if name == "fp32":
        return _fp32_product(x, weight, precision="ieee")
    if name == "tf32":
        return _fp32_product(x, weight, precision="tf32")
    if name == "int8":
        return _int8_product(x, weight)
    if name == "fp8":
        return _fp8_product(x, weight)
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    return _half_product(x.to(dtype), weight.to(dtype))


def _fp32_product(x: Tensor, weight: Tensor, precision: str) -> Call:
    out = torch.empty_like(x)

    def product() -> None:
        with _fp32_as(precision):
            torch.mm(x, weight.t(), out=out)

    return product


def _half_product(x: Tensor, weight: Tensor) -> Call:
    out = torch.empty_like(x)
    return lambda: torch.mm(x, weight.t(), out=out)


def _int8_product(x: Tensor, weight: Tensor) -> Call:
    x, weight = _as_int8(x), _as_int8(weight)
    out = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    return lambda: torch._int_mm(x, weight.t(), out=out)


def _as_int8(tensor: Tensor) -> Tensor:
    """Round normal numbers to integers, of which few reach the limits."""
    return tensor.mul(40).clamp(-128, 127).to(torch.int8)


def _fp8_product(x: Tensor, weight: Tensor) -> Call:
    scale = torch.ones((), device=x.device)
    x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(x, weight.t(), scale, scale, out_dtype=torch.bfloat16)


def _convolution() -> Call:
    """Make a 3x3 convolution of 128 channels, x [1, 128, 56, 56], channels last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 56, 56, generator=generator)
    weight = torch.randn(128, 128, 3, 3, generator=generator)
    x = x.to(memory_format=torch.channels_last)
    weight = weight.to(memory_format=torch.channels_last)
    return lambda: torch.conv2d(x, weight, padding=1)


@contextmanager
def _fp32_as(precision: str) -> Iterator[None]:
    """Compute fp32 products in "ieee" or "tf32" precision, and restore the previous setting afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


# --- streams ----------------------------------------------------------------------------------------------------------


def _array_bytes(machine: Machine, target: torch.device) -> int:
    """Return the bytes of each of three arrays that no cache holds.

    On a CPU the three together are two and a half times the last cache, of which two cores of a server may see half a
    gigabyte.
    """
    if target.type == "cpu":
        nbytes = max(128 * MiB, 5 * machine.last_level_cache // 6)
        memory = machine.memory
    else:
        nbytes = GiB
        memory = machine.gpu.memory
    return min(nbytes, memory // 16, 2 * GiB)


def _streams(nbytes: int, target: torch.device) -> Workloads:
    """Make copy, triad and read over three arrays of `nbytes` bytes.

    On a CPU a call streams a part of the arrays; before the part comes again, all other parts have passed through the
    cache. All reads come in a row: after a copy or a triad the last cache is full of written lines, and a read that
    displaces written lines waits for the write to memory, bytes that nobody counts.
    """
    parts = PARTS if target.type == "cpu" else 1
    a, b, out = (torch.ones(nbytes // 4, device=target).chunk(parts) for _ in range(3))
    part_bytes = a[0].nbytes
    streams: Workloads = {}
    for number, array in enumerate((*a, *b, *out)):
        streams[Key("read", number)] = Workload(array.sum, part_bytes)
    for number, (source, destination) in enumerate(zip(a, out, strict=True)):
        copy = functools.partial(destination.copy_, source)
        streams[Key("copy", number)] = Workload(copy, 2 * part_bytes)
    for number, (x, y, destination) in enumerate(zip(a, b, out, strict=True)):
        triad = functools.partial(torch.add, x, y, alpha=3.0, out=destination)
        streams[Key("triad", number)] = Workload(triad, 3 * part_bytes)
    return streams


# --- bandwidth of the cache levels ------------------------------------------------------------------------------------


def bandwidth_sweep(device: str | torch.device | None = None, *, budget_s: float = 2.0) -> list[tuple[int, float]]:
    """Measure bandwidth against the working set: each cache level shows as a plateau.

    On a CPU the working set is an array, cut among the threads; each thread reads its part over and over. A single call
    of torch loops until 256 MiB are read, so that neither Python nor the start of threads counts (a call to torch alone
    takes a microsecond, as long as reading 200 KiB from a first-level cache). With T threads the private caches count T
    times (`Machine.caches_in_all`).

    On CUDA an array is read and another array is written, in CUDA graphs of many calls. A gap of a microsecond or two
    between kernels remains, so that sets under some 16 MiB show launches rather than the cache.

    Sizes run from 16 KiB (4 KiB a thread at least) to 256 MiB on a CPU, from 4 MiB to 1 GiB on CUDA, an eighth of the
    memory at most.

    device: device as for `torch_device`.
    budget_s: seconds for the whole measurement.
    Returns (bytes of the working set, B/s) for each size, smallest first. Raises InputError for an unusable device or
    budget.
    """
    target = torch_device(device)
    clocks.check_budget(budget_s)
    threads = torch.get_num_threads()
    sizes = _sweep_sizes(target, threads)
    deadline = time.perf_counter() + budget_s
    with torch.inference_mode():
        buffer = torch.ones(sizes[-1] // 4, device=target)
        walk = _read_over_and_over if target.type == "cpu" else _copy_over_and_over
        walks = {Key("walk", size): walk(buffer, size, threads) for size in sizes}
        samples = _in_turns(walks, target, SWEEP_ROUNDS, deadline)
    bandwidths = []
    for key, workload in walks.items():
        fastest = min(sample.seconds for sample in samples[key])
        bandwidths.append((key.size, workload.amount / fastest))
    return bandwidths


def _sweep_sizes(target: torch.device, threads: int) -> list[int]:
    if target.type == "cpu":
        memory = memory_bytes()
        powers = range(14, 29)
    else:
        memory = torch.cuda.get_device_properties(target).total_memory
        powers = range(22, 31)
    smallest, largest = threads * 4 * KiB, memory // 8
    return [2**power for power in powers if smallest <= 2**power <= largest]


def _read_over_and_over(buffer: Tensor, size: int, threads: int) -> Workload:
    """Sum an array of `size` bytes many times in a call; each thread keeps to its part of the array."""
    part = size // 4 // threads  # numbers of a thread
    times = max(1, SWEEP_BYTES // size)
    by_thread = buffer[: threads * part].view(threads, 1, part)
    repeated = by_thread.expand(threads, times, part)  # a view: the same memory, `times` times

    def read() -> Tensor:
        return repeated.sum((1, 2))

    return Workload(read, 4 * repeated.numel())


def _copy_over_and_over(buffer: Tensor, size: int, threads: int) -> Workload:
    """Scale a half of `size` bytes into the other half, many times in a CUDA graph."""
    half = size // 8  # numbers of fp32
    times = max(1, SWEEP_BYTES // size)
    source, out = buffer[:half], buffer[half : 2 * half]
    graph = torch.cuda.CUDAGraph()
    side_stream = torch.cuda.Stream(buffer.device)

    def copies() -> None:
        for _ in range(times):
            torch.mul(source, 1.5, out=out)

    with torch.cuda.device(buffer.device):
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # lazy set-up must be over before a capture, and off the default stream
            copies()
        torch.cuda.current_stream().wait_stream(side_stream)
        with torch.cuda.graph(graph):
            copies()
    return Workload(graph.replay, 8 * half * times)
