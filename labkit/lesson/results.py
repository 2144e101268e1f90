"""Results: the numbers, texts and tables of a session by name, each number beside the prediction."""

from typing import Any, get_args

from labkit import show
from labkit.errors import InputError
from labkit.lesson import records
from labkit.lesson.predictions import Predictions
from labkit.lesson.records import RecordedTable, RecordedValue, Role
from labkit.timing.bench import Comparison, Measurement


class Results:
    """The results of a session by name, in the order of the first recording; a second recording replaces the first.

    judges: True if results are a yardstick for predictions.
    """

    def __init__(self, judges: bool) -> None:
        self.by_name: dict[str, RecordedValue | RecordedTable] = {}
        self.predictions = Predictions(judges)

    def add_table(self, table: RecordedTable) -> None:
        """Keep a table under its name."""
        self.by_name[table.name] = table

    def add_value(self, **fields: Any) -> None:
        """Keep a value under the value's name, and complete the prediction of the same name.

        fields: fields of records.RecordedValue.
        Raises InputError, before a change, for an interval without two ends, an unknown role, and a unit that does not
        compare with the prediction's.
        """
        name, ci95, role = fields["name"], fields.get("ci95"), fields["role"]
        if ci95 is not None and len(ci95) != 2:
            raise InputError(f"The interval of {name!r} is {ci95!r}; give (low, high).")
        if role not in get_args(Role):
            raise InputError(f"The role of {name!r} is {role!r}; choose one of {', '.join(get_args(Role))}.")
        value = RecordedValue(**records.plain(fields))
        self.predictions.complete(value)
        self.by_name[name] = value

    def add_measurement(self, name: str, timing: Measurement) -> None:
        """Keep a timing: the median in seconds with the interval, samples included."""
        self.add_value(
            kind="measurement",
            name=name,
            value=timing.median_s,
            unit="s",
            ci95=timing.ci95_s,
            processes=len(timing.processes),
            process_value=timing.process_median_s if timing.processes else None,
            role="cost",
            clock=True,
            detail=timing.to_dict(),
        )

    def add_comparison(self, name: str, comparison: Comparison) -> None:
        """Keep a comparison: the speed-up with interval and verdict, pairs included."""
        self.add_value(
            kind="comparison",
            name=name,
            value=comparison.speedup,
            unit="x",
            ci95=comparison.ci95,
            processes=len(comparison.processes),
            process_value=comparison.process_speedup if comparison.processes else None,
            role="quality",
            clock=True,
            verdict=comparison.verdict,
            detail=comparison.to_dict(),
        )

    def number(self, name: str) -> RecordedValue:
        """Return the value called `name`; InputError, naming all values, for an unknown name and for a table."""
        value = self.by_name.get(name)
        if isinstance(value, RecordedValue):
            return value
        names = [key for key, entry in self.by_name.items() if isinstance(entry, RecordedValue)]
        listed = ", ".join(names) or "nothing"
        raise InputError(f"There is no number called {name!r} to show; measured so far: {listed}.")


def single_value(name: str, value: Any) -> bool | int | float | str:
    """Return a number of Python, numpy or torch as a plain number, a text unchanged; InputError for the rest."""
    plain = value if isinstance(value, str | bool) else show.number(value)
    if plain is None:
        kind = type(value).__name__
        raise InputError(f"{name!r} is a {kind}; record a number, a text or a list of dicts (one a row).")
    return plain


def check_name(name: Any) -> None:
    """Raise InputError unless `name` is a text with a visible character."""
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"The name is {name!r}; give what is measured as a short text, like 'decode speed'.")
