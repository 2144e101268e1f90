"""What a timing gives: Measurement and Comparison, with their statistics, their one printed line and their JSON.

Value objects after torch.utils.benchmark's Measurement: every sample is kept and each statistic computed from them, so
an old file can be analysed anew. They time nothing, and print no digit that the interval does not support.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from labkit import stats
from labkit.errors import InputError

Verdict = Literal["faster", "slower", "equivalent", "inconclusive"]

SCHEMA = "labkit.bench/1"


@dataclass(frozen=True)
class Measurement:
    """Times of one callable. `samples_s` holds seconds per call in run order, each the mean over `number` calls."""

    name: str
    samples_s: tuple[float, ...]
    number: int
    clock: str  # wall, cpu, cuda_event, cuda_graph or injected
    cache: str  # hot or cold
    device: str
    threads: int
    first_call_s: float  # wall time of the very first call, before any warm-up
    other_clock: str = ""  # the second clock read beside: cpu beside wall, wall beside the others
    other_s: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def median_s(self) -> float:
        """Median seconds per call."""
        return stats.median_ci(self.samples_s)[0]

    @property
    def ci95_s(self) -> tuple[float, float]:
        """Exact 95 % interval of the median within this run; (0, inf) below six samples.

        Another process may settle elsewhere: to compare two callables use compare(), never two of these intervals.
        """
        _, lo, hi = stats.median_ci(self.samples_s)
        return max(0.0, lo), hi

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100) of the samples, in seconds per call; a tail is only seen with number = 1."""
        if not 0 <= q <= 100:
            raise InputError(f"percentile takes a number from 0 to 100, got {q!r}.")
        return float(np.percentile(self.samples_s, q))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: every sample, and under "result" the statistics for readers without labkit."""
        result = {"median_s": self.median_s, "ci95_s": _finite(self.ci95_s)}
        return {"schema": SCHEMA, "kind": "measurement", **_plain(self), "result": result}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Measurement":
        """Read what to_dict() wrote; the statistics are computed anew from the samples."""
        return cls(**_fields(cls, "measurement", record))

    def __str__(self) -> str:
        median, interval = _seconds(self.median_s, self.ci95_s)
        how = f"{_count(len(self.samples_s), 'sample')} of {_count(self.number, 'call')}, {_conditions(self)}"
        return f"{self.name} {median} [{interval}; {how}]{_warned(self.warnings)}"


@dataclass(frozen=True)
class Comparison:
    """Times of two callables taken in pairs: sample i of the baseline beside sample i of the candidate."""

    baseline: Measurement
    candidate: Measurement
    baseline_first: tuple[bool, ...]  # for each pair
    per_block: int  # the least of this many pairs in turn is one value
    min_effect: float
    ceiling: float | None
    fresh: bool
    foreign_cores: float | None  # mean load by other programs; None where it could not be judged
    warnings: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """Baseline time over candidate time."""
        return self._ratio()[0]

    @property
    def ci95(self) -> tuple[float, float]:
        """Exact 95 % interval of the speed-up; (0, inf) with fewer than six blocks."""
        return self._ratio()[1:]

    @property
    def verdict(self) -> Verdict:
        """What the whole interval supports: beyond min_effect on one side, within it on both, or nothing.

        An interval that lies above the ceiling is an error of the benchmark, never a finding: inconclusive.
        """
        (lo, hi), least = self.ci95, 1 + self.min_effect
        if self.ceiling is not None and lo > self.ceiling:
            return "inconclusive"
        if lo > least:
            return "faster"
        if hi < 1 / least:
            return "slower"
        return "equivalent" if lo >= 1 / least and hi <= least else "inconclusive"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: every pair, and under "result" the statistics for readers without labkit."""
        result = {"speedup": self.speedup, "ci95": _finite(self.ci95), "verdict": self.verdict}
        sides = {"baseline": self.baseline.to_dict(), "candidate": self.candidate.to_dict()}
        return {"schema": SCHEMA, "kind": "comparison", **_plain(self), **sides, "result": result}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Comparison":
        """Read what to_dict() wrote; the statistics are computed anew from the pairs."""
        values = _fields(cls, "comparison", record)
        sides = {side: Measurement.from_dict(values[side]) for side in ("baseline", "candidate")}
        return cls(**{**values, **sides})

    def __str__(self) -> str:
        lo, hi = self.ci95
        decimals = _decimals(self.speedup, (hi - lo) / 2)
        times = [f"{side.name} {_seconds(side.median_s, side.ci95_s)[0]}" for side in (self.baseline, self.candidate)]
        blocks = len(self.baseline_first) // self.per_block
        how = f"{_count(blocks, 'block')} of {_count(self.per_block, 'pair')}, {_conditions(self.baseline)}"
        ratio = f"{_number(self.speedup, decimals)}x [{_interval(lo, hi, decimals)}; {how}]"
        return f"{' -> '.join(times)}: {ratio} {self.verdict}{_warned(self.warnings)}"

    def _ratio(self) -> tuple[float, float, float]:
        return stats.paired_ratio(self.baseline.samples_s, self.candidate.samples_s, self.per_block)


def _plain(result: Measurement | Comparison) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(result).items()}


def _finite(interval: tuple[float, float]) -> list[float] | None:
    return list(interval) if math.isfinite(interval[1]) else None


def _fields(cls: type, kind: str, record: Any) -> dict[str, Any]:
    """The constructor's arguments from a record; raises InputError for what is no record of this kind."""
    names = {field.name for field in fields(cls)}
    if (
        not isinstance(record, dict)
        or (record.get("schema"), record.get("kind")) != (SCHEMA, kind)
        or names - set(record)
    ):
        raise InputError(
            f"This is no {kind} as written by to_dict() under schema {SCHEMA}: read the file it came from again."
        )
    return {name: tuple(record[name]) if isinstance(record[name], list) else record[name] for name in names}


def _decimals(value: float, half_width: float) -> int:
    """The decimals to print: the last digit's rounding stays within the half-width. Two to four significant digits."""
    least = 1 - math.floor(math.log10(value))
    if not math.isfinite(half_width):
        return least
    supported = math.ceil(-math.log10(2 * half_width)) if half_width > 0 else least + 2
    return min(max(least, supported), least + 2)


def _number(value: float, decimals: int) -> str:
    return f"{round(value, decimals):.{max(0, decimals)}f}"


def _seconds(value: float, interval: tuple[float, float]) -> tuple[str, str]:
    """A time with its unit, and its interval in the same unit."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if value >= s), ("ns", 1e-9))
    lo, hi = (bound / scale for bound in interval)
    decimals = _decimals(value / scale, (hi - lo) / 2)
    return f"{_number(value / scale, decimals)} {unit}", _interval(lo, hi, decimals)


def _interval(lo: float, hi: float, decimals: int) -> str:
    return f"95% CI {_number(lo, decimals)}, {_number(hi, decimals)}" if math.isfinite(hi) else "no interval"


def _conditions(side: Measurement) -> str:
    threads = f", {_count(side.threads, 'thread')}" if side.device == "cpu" else ""
    return f"{side.clock} time, {side.cache}, {side.device}{threads}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _warned(warnings: Sequence[str]) -> str:
    return f" - warning: {'; '.join(warnings)}" if warnings else ""
