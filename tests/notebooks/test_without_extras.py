"""What a lesson does where an optional package is missing, which is a fresh `./lab setup`."""

from typing import Any

from lesson_cells import executed

from labkit.lesson.records import cost, result


class Page:
    """A session without LoadGen: as in a real one, a table and a record want rows."""

    said = ""

    def table(self, rows: list[Any], **_: Any) -> None:
        assert rows

    def record(self, _name: str, rows: list[Any], **_: Any) -> None:
        assert rows

    def say(self, _name: str, *sentences: Any) -> None:
        self.said = " ".join(filter(None, sentences))


def test_lesson_12_goes_on_without_loadgen():
    page = Page()
    names = {"lab": page, "verdicts": [], "asked": [(0.3, 1050)], "BOUND_S": 0.015, "cost": cost, "result": result}
    executed("12", "judge-table", **names)
    assert page.said == "No verdict: LoadGen is not here; serving brings it."
