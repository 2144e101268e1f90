"""Roofs of a session: the ceilings of its devices, measured when first asked for, then kept and recorded.

The ceilings themselves come from labkit.machine, the share of a roof from labkit.roofline.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from labkit import show
from labkit.lesson import records
from labkit.lesson.results import Results
from labkit.timing import machine, roofline
from labkit.timing.bench import Comparison, Measurement
from labkit.timing.machine import Ceilings
from labkit.timing.work import Work


class Roofs:
    """The measured ceilings by device and number of threads.

    results: the session's results, which get a table of each device's ceilings.
    budget_s: seconds that a measurement of ceilings may take.
    """

    def __init__(self, results: Results, budget_s: float) -> None:
        self._results = results
        self._budget_s = budget_s
        self._measured: dict[tuple[str, int], Ceilings] = {}
        self._device_peak = 0  # bytes on the GPU up to the last measurement of ceilings

    def of(self, device: str | torch.device, *, again: bool = False) -> Ceilings:
        """Return the ceilings of `device` at the number of threads that torch has now.

        again: True to measure once more and return the higher of each ceiling: a neighbour's load only lowers a
            ceiling.
        """
        name = _device_name(machine.torch_device(device))
        threads = torch.get_num_threads()
        earlier = self._measured.get((name, threads))
        if earlier is not None and not again:
            return earlier
        ceilings = self._measure(name)
        if earlier is not None:
            ceilings = earlier.raised(ceilings)
        self._measured[name, threads] = ceilings
        self._results.add_table(_table(name, threads, ceilings))
        return ceilings

    def peak_device_memory(self) -> int:
        """Return the peak bytes of torch's tensors on the GPU, without the gigabytes that measure ceilings."""
        return max(self._device_peak, torch.cuda.max_memory_allocated())

    def _measure(self, device: str) -> Ceilings:
        self._device_peak = self.peak_device_memory()
        ceilings = machine.ceilings(device, budget_s=self._budget_s)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        return ceilings

    def place(self, comparison: Comparison, work: Sequence[Work], dtypes: Sequence[str]) -> Comparison:
        """Return the comparison with each side's share of the roof.

        work: work of a call of the baseline and of a call of the candidate.
        dtypes: types of the baseline's and of the candidate's arithmetic, such as ("fp32", "int8").
        A side above a roof without an excuse shows that the roofs were measured in a bad moment: the roofs are
        measured once more.
        """
        device = comparison.baseline.device
        sides = _placed(comparison, work, dtypes, self._highest(device))
        if any(_is_above_a_low_roof(side) for side in sides):
            self.of(device, again=True)
            sides = _placed(comparison, work, dtypes, self._highest(device))
        baseline, candidate = sides
        return replace(comparison, baseline=baseline, candidate=candidate)

    def _highest(self, device: str) -> Ceilings:
        """Return the ceilings, in a recording's last process the highest of all: a rate reached once can be reached."""
        ceilings = self.of(device)
        if records.OTHERS not in os.environ:
            return ceilings
        from labkit.lesson.other_processes import raised

        name = _device_name(machine.torch_device(device))
        return raised(ceilings, _table_name(name, torch.get_num_threads()))


def _placed(
    comparison: Comparison, work: Sequence[Work], dtypes: Sequence[str], ceilings: Ceilings
) -> list[Measurement]:
    return [
        roofline.placed(comparison.baseline, work[0], ceilings, dtypes[0]),
        roofline.placed(comparison.candidate, work[1], ceilings, dtypes[1]),
    ]


def _is_above_a_low_roof(side: Measurement) -> bool:
    """Return True if a side beats a roof without an excuse: the compute roof, or the memory roof with cold caches.

    With hot caches a side may beat the memory roof, since the data may sit in a cache.
    """
    if side.roof_share is None or side.roof_share <= 1:
        return False
    return side.limited_by == "compute" or side.cache == "cold"


def _device_name(device: torch.device) -> str:
    return f"{device.type}:{device.index}" if device.index else device.type  # "cuda" stands for "cuda:0"


def _table(device: str, threads: int, ceilings: Ceilings) -> records.RecordedTable:
    rows = [_row(dtype, "FLOP/s", rate, ceilings.flops_range.get(dtype)) for dtype, rate in ceilings.flops.items()]
    rows.append(_row("bandwidth", "B/s", ceilings.bandwidth, ceilings.bandwidth_range))
    columns = {unit: records.quality(unit, clock=True, low="low", high="high") for unit in ("FLOP/s", "B/s")}
    return records.table(_table_name(device, threads), rows, ("ceiling",), columns, device=device)


def _table_name(device: str, threads: int) -> str:
    return f"ceilings of {device}, {show.counted(threads, 'thread')}"


def _row(ceiling: str, unit: str, rate: float, ends: tuple[float, float] | None) -> dict[str, Any]:
    low, high = ends or (None, None)
    return {"ceiling": ceiling, unit: rate, "low": low, "high": high}
