"""Results of timing: a measurement of a callable and a comparison of two, in words and as JSON.

`labkit.bench` makes the results. A printed number has no digit that the interval does not support. A process settles at
a speed of its own, so the interval of a single process holds "within this run". A result that knows several processes
has the median over the processes for its value, and their range for its interval.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from labkit.errors import check_number
from labkit.show import counted, covers, estimate, interval
from labkit.timing import clocks, stats
from labkit.timing.clocks import Clock, Sample
from labkit.timing.rounds import CLAIMABLE

FAULTS = 0.2  # share of the time in page faults that is worth a warning
PLACEMENT = 0.10  # largest difference that the place of each side's data in memory may explain

Verdict = Literal["faster", "slower", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Measurement:
    """Times of a callable.

    name: name of the callable, for printing.
    samples_s: seconds per call in run order, each the mean over `number` calls.
    number: calls in a sample.
    clock: "wall", "cpu", "cuda_event" or "injected".
    cache: "hot" or "cold".
    device: where the work ran.
    threads: threads of torch.
    warnings: a phrase for each reason to doubt the times.
    per_block: samples in a block, of which only the least counts; 1 unless the call was timed beside another.
    processes: medians of several processes in seconds, this result's among them; empty for a single process.
    roof_share: least possible time over `median_s` (`labkit.roofline.placed`); None without a stated work.
    limited_by: "memory" or "compute", the roof that sets the least possible time.
    """

    name: str
    samples_s: tuple[float, ...]
    number: int
    clock: str
    cache: str
    device: str
    threads: int
    warnings: tuple[str, ...] = ()
    per_block: int = 1
    roof_share: float | None = None
    limited_by: str | None = None
    processes: tuple[float, ...] = ()

    @property
    def median_s(self) -> float:
        """Return the median seconds per call, over several processes the median of their medians."""
        return statistics.median(self.processes or (self.process_median_s,))

    @property
    def process_median_s(self) -> float:
        """Return the median seconds per call in this process: of the least times of the blocks, as in a speed-up."""
        return stats.median_ci(stats.block_minima(self.samples_s, self.per_block))[0]

    @property
    def ci95_s(self) -> tuple[float, float]:
        """Return the interval of the median in seconds: the range over processes, or `within_run_s` for a single one.

        Compare two callables with `bench.compare`, never by two of these intervals.
        """
        return _range(self.processes) if self.processes else self.within_run_s

    @property
    def within_run_s(self) -> tuple[float, float]:
        """Return the exact 95 % interval of the median within this run, in seconds; (0, inf) below six samples."""
        _, low, high = stats.median_ci(stats.block_minima(self.samples_s, self.per_block))
        return max(0.0, low), high

    def percentile(self, q: float) -> float:
        """Return the q-th percentile (0 to 100) of the samples in seconds; samples of many calls hide a tail."""
        check_number(q, "q", 0, 100)
        return float(np.percentile(self.samples_s, q))

    @property
    def covers(self) -> str:
        """Say what `ci95_s` covers: "over 5 processes", or "within this run"."""
        return covers(len(self.processes))

    def over_processes(self, others: "Sequence[Measurement]") -> "Measurement":
        """Return the measurement with the median over processes for its value, and the range for its interval.

        others: the same call in other processes.
        """
        everywhere = (self, *others)
        return replace(self, processes=tuple(side.process_median_s for side in everywhere))

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: every sample, and under "result" the statistics, for readers without labkit."""
        result = {"median_s": self.median_s, "ci95_s": _finite(self.ci95_s)}
        return {"kind": "measurement", **_plain(self), "result": result}

    def __str__(self) -> str:
        median, _ = estimate(self.median_s, self.within_run_s, "s")
        here = estimate(self.process_median_s, self.within_run_s, "s")
        intervals = _intervals(here, self.ci95_s, len(self.processes), "s")
        samples = f"{counted(len(self.samples_s), 'sample')} of {counted(self.number, 'call')}"
        how = f"{samples}, {_conditions(self)}"
        line = f"{self.name} {median} [{intervals}; {how}]"
        return line + _roof(self) + _warned(self.warnings)


@dataclass(frozen=True)
class Comparison:
    """Times of two callables, taken in pairs: sample i of the baseline beside sample i of the candidate.

    baseline_first: order in each pair.
    per_block: pairs in a block, of which each side's least time counts.
    foreign_cores: mean load by other programs, in cores; None if the load could not be judged.
    warnings: a phrase for each reason to doubt the ratio.
    pairs_per_build: number of pairs of each build, if the interval is over builds; empty for a single build.
    processes: speed-ups of several processes, this comparison's among them; empty for a single process.
    """

    baseline: Measurement
    candidate: Measurement
    baseline_first: tuple[bool, ...]
    per_block: int
    foreign_cores: float | None = None
    warnings: tuple[str, ...] = ()
    pairs_per_build: tuple[int, ...] = ()
    processes: tuple[float, ...] = ()

    @property
    def speedup(self) -> float:
        """Return the baseline's time over the candidate's time, over several processes the median of their ratios."""
        return statistics.median(self.processes or (self.process_speedup,))

    @property
    def process_speedup(self) -> float:
        """Return the baseline's time over the candidate's time in this process."""
        return self._ratio()[0]

    @property
    def ci95(self) -> tuple[float, float]:
        """Return the interval of the speed-up: the range over processes, or `within_run` for a single process."""
        return _range(self.processes) if self.processes else self.within_run

    @property
    def within_run(self) -> tuple[float, float]:
        """Return the exact 95 % interval of the speed-up within this run, over builds if there are several.

        The interval is (0, inf) below six blocks of pairs or six builds.
        """
        _, low, high = self._ratio()
        return low, high

    @property
    def verdict(self) -> Verdict:
        """Return the claim that the whole interval supports; differences below 1 % (CLAIMABLE) are never claimed."""
        low, high = self.ci95
        least = 1 + CLAIMABLE
        if low > least:
            return "faster"
        if high < 1 / least:
            return "slower"
        if low >= 1 / least and high <= least:
            return "equivalent"
        return "inconclusive"

    @property
    def hint(self) -> str:
        """Return a likely cause of a small claimed difference between sides built once; "" for any other result."""
        is_claimed = self.verdict in ("faster", "slower")
        is_small = abs(math.log(self.speedup)) <= math.log1p(PLACEMENT)
        if is_claimed and is_small and not self.pairs_per_build:
            return "data of each side's own may make this difference by where they lie in memory: compare with builds=8"
        return ""

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Return the warnings of the comparison, then those of each side after its name."""
        of_sides = []
        for side in (self.baseline, self.candidate):
            of_sides += [f"{side.name}: {warning}" for warning in side.warnings]
        return (*self.warnings, *of_sides)

    @property
    def covers(self) -> str:
        """Say what `ci95` covers: "over 5 processes", or "within this run"."""
        return covers(len(self.processes))

    def over_processes(self, others: "Sequence[Comparison]") -> "Comparison":
        """Return the comparison with the median over processes for each value, and the range for each interval.

        others: the same comparison in other processes.
        """
        return replace(
            self,
            baseline=self.baseline.over_processes([other.baseline for other in others]),
            candidate=self.candidate.over_processes([other.candidate for other in others]),
            processes=(self.process_speedup, *(other.process_speedup for other in others)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: every pair, and under "result" the statistics, for readers without labkit."""
        result = {"speedup": self.speedup, "ci95": _finite(self.ci95), "verdict": self.verdict}
        sides = {"baseline": self.baseline.to_dict(), "candidate": self.candidate.to_dict()}
        return {"kind": "comparison", **_plain(self), **sides, "result": result}

    def __str__(self) -> str:
        times = [estimate(side.median_s, side.within_run_s, "s")[0] for side in (self.baseline, self.candidate)]
        names = (self.baseline.name, self.candidate.name)
        sides = " -> ".join(f"{name} {time}" for name, time in zip(names, times, strict=True))
        ratio, _ = estimate(self.speedup, self.within_run, "x")
        here = estimate(self.process_speedup, self.within_run, "x")
        intervals = _intervals(here, self.ci95, len(self.processes), "x")
        builds = f"{len(self.pairs_per_build)} builds, " if self.pairs_per_build else ""
        blocks = counted(len(self.baseline_first) // self.per_block, "block")
        pairs = counted(self.per_block, "pair")
        how = f"{builds}{blocks} of {pairs}, {_conditions(self.baseline)}"
        line = f"{sides}: {ratio} [{intervals}; {how}] {self.verdict}"
        hint = f" - hint: {self.hint}" if self.hint else ""
        return line + _roof(self.baseline, self.candidate) + _warned(self.all_warnings) + hint

    def _ratio(self) -> stats.Estimate:
        baseline_s, candidate_s = self.baseline.samples_s, self.candidate.samples_s
        if self.pairs_per_build:
            return stats.ratio_over_builds(baseline_s, candidate_s, self.per_block, self.pairs_per_build)
        return stats.paired_ratio(baseline_s, candidate_s, self.per_block)


# --- from samples to results ------------------------------------------------------------------------------------------


def measurement(name: str, clock: Clock, samples: Sequence[Sample], number: int, by_cpu: bool) -> Measurement:
    """Make the measurement of a callable, with a warning if its calls spend their time in page faults.

    samples: samples in run order, each of `number` calls.
    by_cpu: True if the second clock of `clock`, CPU time, counts.
    """
    seconds = tuple(sample.by(by_cpu) for sample in samples)
    faults = statistics.fmean(sample.page_faults for sample in samples)
    warnings = []
    if clock.name == "wall" and faults and faults * clocks.fault_s() > FAULTS * statistics.fmean(seconds):
        warnings.append(f"{faults:.0f} page faults per call: memory is mapped anew each time; preallocate outputs")
    return Measurement(
        name=name,
        samples_s=seconds,
        number=number,
        clock=clock.other if by_cpu else clock.name,
        cache=clock.cache,
        device=str(clock.device),
        threads=torch.get_num_threads(),
        warnings=tuple(warnings),
    )


# --- words and JSON ---------------------------------------------------------------------------------------------------


def _plain(result: Measurement | Comparison) -> dict[str, Any]:
    fields = asdict(result)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _finite(interval: tuple[float, float]) -> list[float] | None:
    return list(interval) if math.isfinite(interval[1]) else None  # JSON has no infinity


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _intervals(here: tuple[str, str], ci95: tuple[float, float], processes: int, unit: str) -> str:
    """Say what each interval covers: the range over processes, if any, then this process with its interval."""
    value, within_run = here
    if processes:
        return f"{interval(ci95, unit)} {covers(processes)}; {value} in the last of them, {within_run}"
    return within_run if within_run == "no interval" else f"{within_run} {covers(0)}"


def _conditions(side: Measurement) -> str:
    threads = f", {counted(side.threads, 'thread')}" if side.device == "cpu" else ""
    return f"{side.clock} time, {side.cache}, {side.device}{threads}"


def _roof(*sides: Measurement) -> str:
    """Say each side's share of the roof; "" unless the work of all sides was stated."""
    if any(side.roof_share is None for side in sides):
        return ""
    shares = " and ".join(f"{100 * side.roof_share:.3g} %" for side in sides)
    limits = " and ".join(dict.fromkeys(side.limited_by for side in sides))
    return f", {shares} of the roof, limited by {limits}"


def _warned(warnings: Sequence[str]) -> str:
    return f" - warning: {'; '.join(warnings)}" if warnings else ""
