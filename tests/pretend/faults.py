"""Faults that only a device shows: edits as people make them by mistake, at places that a call of labkit reaches.

No fault is what a card takes too: an index on the CPU, a number without dimensions, a move to where a tensor is.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch


@dataclass(frozen=True)
class Fault:
    """An edit of a file: the text at [start, end) becomes `new`."""

    kind: str
    file: str
    line: int
    start: int
    end: int
    new: str

    def plant(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]

    def __str__(self) -> str:
        module = self.file.rpartition("labkit/")[2]
        return f"{self.kind}, labkit/{module}:{self.line}: {self.new.strip()}"


class Reached:
    """What a call reaches in labkit, for sys.settrace."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.lines: set[tuple[str, int]] = set()
        self.tensors: dict[tuple[str, int], torch.dtype] = {}  # of the device, by the assignment's first line
        self._names: dict[str, dict[int, tuple[str, int]]] = {}
        self._latest: dict[FrameType, int] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Follow the frames of labkit."""
        file = frame.f_code.co_filename
        if not file.startswith(self.folder):
            return None
        if file not in self._names:
            self._names[file] = dict(assigned_names(ast.parse(Path(file).read_text(encoding="utf-8"))))
        return self._follow

    def _follow(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        done = self._latest.get(frame)
        if done in self._names[file]:
            name, first_line = self._names[file][done]
            value = frame.f_locals.get(name)
            if type(value) is torch.Tensor and value.is_cuda and value.dim() and value.layout is torch.strided:
                self.tensors[file, first_line] = value.dtype
        if event == "return":
            self._latest.pop(frame, None)
        else:
            self._latest[frame] = frame.f_lineno
            self.lines.add((file, frame.f_lineno))
        return self._follow


def assigned_names(tree: ast.Module) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield each line of a statement `name = value`, with the name and the statement's first line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            for line in range(node.lineno, node.end_lineno + 1):
                yield line, (node.targets[0].id, node.lineno)


def possible(file: str, reached: Reached) -> list[Fault]:
    """List the faults that can be planted in a file, at places that were reached."""
    source = Path(file).read_text(encoding="utf-8")
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and (file, node.lineno) in reached.tensors:
            faults += _after_assignment(file, source, node, reached.tensors[file, node.lineno])
        if isinstance(node, ast.Call) and (file, node.lineno) in reached.lines:
            faults += _in_call(file, source, node)
    return faults


def _after_assignment(file: str, source: str, node: ast.Assign, dtype: torch.dtype) -> Iterator[Fault]:
    """The tensor is read with numpy, is brought to the CPU, or becomes float64."""
    name = node.targets[0].id
    edits = {"a .numpy() too many": f"{name}.detach().numpy()"}
    if dtype is torch.bool:
        edits["a mask on the CPU"] = f"{name} = {name}.cpu()"
    if dtype.is_floating_point:
        edits["a tensor on the CPU"] = f"{name} = {name}.cpu()"
    if dtype is torch.float32:
        edits["a float64"] = f"{name} = {name}.double()"
    end = _offset(source, node.end_lineno, node.end_col_offset)
    indent = "\n" + " " * node.col_offset
    for kind, statement in edits.items():
        yield Fault(kind, file, node.lineno, end, end, indent + statement)


def _in_call(file: str, source: str, node: ast.Call) -> Iterator[Fault]:
    """A generator is made on the device, for numbers that are drawn on the CPU."""
    if ast.unparse(node) == "torch.Generator()":
        start = _offset(source, node.lineno, node.col_offset)
        end = _offset(source, node.end_lineno, node.end_col_offset)
        edited = 'torch.Generator("cuda" if torch.cuda.is_available() else "cpu")'
        yield Fault("a generator of the other device", file, node.lineno, start, end, edited)


def _offset(source: str, line: int, column: int) -> int:
    """Translate a place of Python's syntax tree, in bytes of a line, to a place in the text."""
    lines = source.splitlines(keepends=True)
    before = sum(map(len, lines[: line - 1]))
    return before + len(lines[line - 1].encode()[:column].decode())


def reached_by(call: Callable[[], Any], folder: Path) -> Reached:
    """Run a call, and return what it reaches of labkit in this folder."""
    reached = Reached(folder)
    sys.settrace(reached.trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return reached
