"""Faults that only a device shows, planted in a copy of labkit: where they can stand, and what they do there.

A fault is an edit as people make it by mistake, at a place that `calls` reach with tensors of the device.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

MAKERS = ("zeros", "ones", "full", "empty", "arange", "eye", "tensor", "linspace", "as_tensor")  # of torch


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
        return f"{self.kind}: {self.file}:{self.line} {self.new.strip()!r}"


class Assignments:
    """The lines of labkit that give a name a tensor of the device with dimensions, for sys.settrace."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.reached: set[tuple[str, int]] = set()
        self.on_device: set[tuple[str, int]] = set()
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
                self.on_device.add((file, first_line))
        if event == "return":
            self._latest.pop(frame, None)
        else:
            self._latest[frame] = frame.f_lineno
            self.reached.add((file, frame.f_lineno))
        return self._follow


def assigned_names(tree: ast.Module) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield each line of a statement `name = value`, with the name and the statement's first line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            for line in range(node.lineno, node.end_lineno + 1):
                yield line, (node.targets[0].id, node.lineno)


def possible(file: str, source: str, reached: set[int], on_device: set[int]) -> list[Fault]:
    """List the faults that can be planted on the lines that were reached.

    on_device: first lines of the statements that gave a name a tensor of the device.
    """
    tree = ast.parse(source)
    faults = []
    for node in ast.walk(tree):
        if getattr(node, "lineno", None) in on_device and isinstance(node, ast.Assign):
            faults += _after_assignment(file, source, node)
        if isinstance(node, ast.Call) and reached & set(range(node.lineno, node.end_lineno + 1)):
            faults += _in_call(file, source, node)
    return faults


def _after_assignment(file: str, source: str, node: ast.Assign) -> Iterator[Fault]:
    """The tensor is read with numpy, is brought to the CPU, or becomes float64."""
    name = node.targets[0].id
    end = _offset(source, node.end_lineno, node.end_col_offset)
    indent = "\n" + " " * node.col_offset
    for kind, statement in {
        "a .numpy() too many": f"{name}.detach().numpy()",
        "a tensor brought to the CPU": f"{name} = {name}.cpu()",
        "a float64": f"{name} = {name}.double() if {name}.is_floating_point() else {name}",
    }.items():
        yield Fault(kind, file, node.lineno, end, end, indent + statement)


def _in_call(file: str, source: str, node: ast.Call) -> Iterator[Fault]:
    """The device is forgotten, or a generator is made on it for numbers of the CPU."""
    start = _offset(source, node.lineno, node.col_offset)
    end = _offset(source, node.end_lineno, node.end_col_offset)
    called = ast.unparse(node.func)
    without = [keyword for keyword in node.keywords if keyword.arg != "device"]
    if called in [f"torch.{maker}" for maker in MAKERS] and len(without) < len(node.keywords):
        edited = ast.unparse(ast.Call(node.func, node.args, without))
        yield Fault("a tensor made on the CPU", file, node.lineno, start, end, edited)
    if called == "torch.Generator" and not node.args:
        edited = 'torch.Generator("cuda" if torch.cuda.is_available() else "cpu")'
        yield Fault("a generator of the wrong device", file, node.lineno, start, end, edited)
    if called.endswith(".to") and len(node.args) == 1 and ast.unparse(node.args[0]).endswith("device"):
        yield Fault("a tensor left on the CPU", file, node.lineno, start, end, ast.unparse(node.func.value))


def _offset(source: str, line: int, column: int) -> int:
    """Translate a place of Python's syntax tree, in bytes of a line, to a place in the text."""
    lines = source.splitlines(keepends=True)
    before = sum(map(len, lines[: line - 1]))
    return before + len(lines[line - 1].encode()[:column].decode())


def by_kind(faults: list[Fault]) -> dict[str, list[Fault]]:
    """Sort the faults, so that a seed draws the same, and part them by kind."""
    parted = defaultdict(list)
    for fault in sorted(faults, key=lambda fault: (fault.file, fault.start, fault.kind)):
        parted[fault.kind].append(fault)
    return dict(parted)


def reached_by(call: Any, folder: Path) -> Assignments:
    """Run a call, and see where labkit, in this folder, has tensors of the device."""
    assignments = Assignments(folder)
    sys.settrace(assignments.trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return assignments
