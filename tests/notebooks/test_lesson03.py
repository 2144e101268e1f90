"""What lesson 03 once showed: an interval without an end, and a typed limiter beside a layer that it did not fit."""

import json
import re

import pytest
from grain import code

from course import notebooks

LESSON = notebooks.read(notebooks.find("03"))


def shown(cell) -> str:
    return json.dumps([output.get("data", {}).get("text/plain", output.get("text", "")) for output in cell.outputs])


def test_no_interval_is_without_an_end():
    assert [cell.id for cell in code(LESSON) if re.search(r"\binf\b", shown(cell))] == []


@pytest.mark.parametrize("name", ["limiter", "limited by"])
def test_a_limiter_is_computed_where_it_is_shown(name: str):
    for cell in code(LESSON):
        for value in re.findall(rf"[\"']{name}[\"']: ([^,}}\n]+)", cell.source):
            assert ".limiter" in value or ".limited_by" in value or value.startswith("result("), cell.id
