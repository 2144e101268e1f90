"""Records side by side: the user's own runs first, then the recorded ones, each a column of the page's tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from course.page import text
from course.results import Result
from labkit import show
from labkit.records import RunRecord

PRESETS = ("smoke", "class", "full")  # from the smallest


@dataclass(frozen=True)
class Column:
    """A record as one column of a table. `here` tells the user's runs from the recorded ones, `changed` says how its
    parameters differ from the lesson's own ("RATIO 0.7")."""

    record: RunRecord
    here: bool
    changed: str = ""

    @property
    def machine(self) -> str:
        return ", ".join(self.record.machine.get("label", self.record.device).split(", ")[:2])

    @property
    def run(self) -> str:
        """Whose run it is, at what preset, with which parameters."""
        return ", ".join(filter(None, ["your run" if self.here else "recorded", self.record.preset, self.changed]))

    @property
    def heading(self) -> str:
        return f"{text(self.machine)}<br><small>{text(self.run)}</small>"


def side_by_side(results: Iterable[Result], recorded: Iterable[RunRecord]) -> list[Column]:
    """One column for each lesson, machine and preset of the user's results (oldest first), then the recorded ones.

    The newest run with the lesson's own parameters counts, as the recorded ones have those; else the newest one.
    """
    found: dict[tuple, Column] = {}
    for result in results:
        if record := result.record:
            key = (record.lesson, record.machine.get("slug"), record.preset)
            column = Column(record, True, ", ".join(f"{name} {value}" for name, value in result.changed.items()))
            if not column.changed or key not in found or found[key].changed:
                found[key] = column
    own = sorted(found.values(), key=lambda column: column.record.lesson)
    return [*own, *(Column(one, False) for one in recorded)]


def quantity(value: Any, unit: str) -> str:
    return text(show.quantity(value, unit))


def valued(value: Any, unit: str, ci95: Any) -> str:
    """A value with its interval, as HTML."""
    if not ci95:
        return quantity(value, unit)
    bounded = all(isinstance(end, int | float) for end in ci95)  # a record writes infinity as a text
    words = show.interval(ci95, unit) if bounded else "too few samples for an interval"
    return f"{quantity(value, unit)} <small>({text(words)})</small>"
