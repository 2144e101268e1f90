"""Cells of a lesson, run by a test with names of its own in place of what the lesson measured."""

import ast
import itertools
import math
import random
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from course import notebooks
from labkit import show, stats

IMPORTED = {
    "itertools": itertools,
    "math": math,
    "np": np,
    "random": random,
    "show": show,
    "statistics": statistics,
    "stats": stats,
    "torch": torch,
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


def function(lesson: str, name: str, **names: Any) -> Callable:
    """A function that a lesson defines, with `names` for what its cells have made before."""
    space = IMPORTED | names
    for cell in notebooks.read(notebooks.find(lesson)).cells:
        nodes = ast.parse(cell.source).body if cell.cell_type == "code" else []
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                exec(ast.unparse(node), space)
                return space[name]
    raise LookupError(f"Lesson {lesson} has no function {name}.")
