"""Timings on a page: a line each, or many collected into a folded table."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

from labkit import show
from labkit.timing.bench import Comparison, Measurement


@dataclass(frozen=True)
class TimingRow:
    """A timing in words: a printed line, and the cells of a table's row by column.

    brief: the result with the range over processes, to fold the rest under; "" for a single process.
    roof_shares, warnings: cells of two further columns, which a folded table leaves out if they are empty.
    """

    line: str
    cells: dict[str, str]
    brief: str = ""
    roof_shares: str = ""
    warnings: str = ""


class Timings:
    """The timings of a session: printed at once, or collected inside `fold`."""

    def __init__(self) -> None:
        self._collected: list[TimingRow] | None = None  # a list while a fold is open

    def show_measurement(self, name: str, timing: Measurement) -> None:
        """Show a median time and the interval."""
        cells = {
            "name": name,
            "time": show.quantity(timing.median_s, "s"),
            **_interval(timing.within_run_s, timing.ci95_s, len(timing.processes), "s"),
        }
        brief = _brief(name, timing.median_s, timing.ci95_s, len(timing.processes), "s")
        self.add(TimingRow(str(timing), cells, brief, _roof_shares(timing), "; ".join(timing.warnings)))

    def show_comparison(self, name: str, comparison: Comparison) -> None:
        """Show a speed-up with interval and verdict."""
        baseline, candidate = comparison.baseline, comparison.candidate
        cells = {
            "name": name,
            "baseline": _side("baseline", baseline),
            "candidate": _side("candidate", candidate),
            "ratio": show.quantity(comparison.speedup, "x", show.further_digits(comparison.ci95, "x")),
            **_interval(comparison.within_run, comparison.ci95, len(comparison.processes), "x"),
            "verdict": comparison.verdict,
        }
        line = str(comparison) if self._collected is None else f"{name}: {comparison}"
        brief = _brief(name, comparison.speedup, comparison.ci95, len(comparison.processes), "x")
        warnings = "; ".join(comparison.all_warnings)
        self.add(TimingRow(line, cells, brief, _roof_shares(baseline, candidate), warnings))

    def add(self, row: TimingRow) -> None:
        """Print the line of `row`, or add the row to the open fold."""
        if self._collected is not None:
            self._collected.append(row)
        elif row.brief:
            _show_folded(row.brief, [row])
        else:
            show.emit(row.line)

    @contextmanager
    def fold(self, title: str) -> Iterator[None]:
        """Collect all timings of the block and show a folded table at the end, also after an exception.

        A fold inside a fold has a separate table.
        """
        outer = self._collected
        self._collected = []
        try:
            yield
        finally:
            rows, self._collected = self._collected, outer
            if rows:
                _show_folded(title, rows)


def _show_folded(title: str, rows: Sequence[TimingRow]) -> None:
    has_roofs = any(row.roof_shares for row in rows)
    has_warnings = any(row.warnings for row in rows)
    warnings = "warnings of the last process" if any(row.brief for row in rows) else "warnings"
    table = []
    for row in rows:
        cells = dict(row.cells)
        if has_roofs:
            cells["of the roof"] = row.roof_shares
        if has_warnings:
            cells[warnings] = row.warnings
        table.append(cells)
    text = "\n  ".join([title, *(row.line for row in rows)])
    show.emit(text, f"<details><summary>{escape(title)}</summary>{show.html_table(table)}</details>")


def _brief(name: str, value: float, ci95: tuple[float, float], processes: int, unit: str) -> str:
    """Say a result with its range, "gain: 1.32x (1.28x to 1.35x over 5 processes)"; "" for a single process."""
    if not processes:
        return ""
    number = show.quantity(value, unit, show.further_digits(ci95, unit))
    ends = show.interval(ci95, unit)
    return f"{name}: {number} ({ends} {show.covers(processes)})"


def _side(role: str, timing: Measurement) -> str:
    """Return a side's name and median time: "dense 1.20 ms"; the time alone if the name repeats the side's role."""
    time = show.quantity(timing.median_s, "s")
    return time if timing.name == role else f"{timing.name} {time}".strip()


def _roof_shares(*sides: Measurement) -> str:
    shares = [side.roof_share for side in sides if side.roof_share is not None]
    return " and ".join(f"{100 * share:.3g} %" for share in shares)


def _interval(within_run: tuple[float, float], ci95: tuple[float, float], processes: int, unit: str) -> dict[str, str]:
    """Return the cell of a timing's interval by column: over processes, or within this run for a single process."""
    ends = ci95 if processes else within_run
    return {show.covers(processes): show.interval(ends, unit)}
