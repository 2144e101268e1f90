"""Cells of a lesson, run by a test with names of its own in place of what the lesson measured."""

import itertools
import math
import random
import statistics
from functools import cache
from typing import Any

import numpy as np

from course import notebooks
from labkit import show

IMPORTED = {
    "itertools": itertools,
    "math": math,
    "np": np,
    "random": random,
    "show": show,
    "statistics": statistics,
}


@cache
def cells(lesson: str) -> dict[str, str]:
    """The source of each cell of a lesson, by the cell's id."""
    return {cell.id: cell.source for cell in notebooks.read(notebooks.find(lesson)).cells}


def executed(lesson: str, *ids: str, **names: Any) -> dict[str, Any]:
    """The names that cells of a lesson define, run one after another."""
    space = IMPORTED | names
    for cell in ids:
        exec(cells(lesson)[cell], space)
    return space
