"""Sentences of the lessons at the edges of what can be measured, without a measurement.

A lesson's sentences stand in its cells: the arguments of `lab.say`, computed from results of the cells above. Here each
argument is evaluated alone, with the words of its cell and the short functions of words above. Every name that needs a
measurement is a `StandIn`: a number, a row, a table and an object at once, all of whose numbers lie at one edge. A
sentence then says arbitrary things of its subject, and prints numbers, intervals and verdicts as a page would.
"""

import ast
import builtins
import dis
import itertools
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

from nbformat import NotebookNode

from course.notebooks import tags
from labkit import show

LONGEST_HELPER = 14  # lines
LOW = re.compile(r"low|least|fewest")
HIGH = re.compile(r"high|most(?!ly)")
PAIR = re.compile(r"ends|ci95|^ci$|_ci$|between")


@dataclass(frozen=True)
class Edge:
    """Numbers of every result, and the rows of every table.

    value, low, high: a result and the ends of its interval.
    rows: number of rows.
    verdict: the verdict of every comparison.
    text: the text of every result where a text is wanted; empty for its name.
    """

    value: float
    low: float
    high: float
    rows: int = 2
    verdict: str = "inconclusive"
    text: str = ""


EDGES = {
    "equal sides": Edge(1.0, 1.0, 1.0, verdict="equivalent"),
    "no difference": Edge(1.01, 0.97, 1.04),
    "close ends": Edge(0.9325, 0.9312, 0.9338, verdict="slower"),
    "a gain": Edge(11.78, 11.52, 12.03, verdict="faster"),
    "zero": Edge(0.0, 0.0, 0.0),
    "a hair below zero": Edge(-0.0004, -0.0008, -0.0002),
    "one row": Edge(1.8, 1.6, 2.0, rows=1, verdict="faster"),
    "one of each": Edge(1.0, 1.0, 1.0, rows=1, verdict="equivalent", text="1"),
    "nothing": Edge(0.0, 0.0, 0.0, rows=0),
    "no interval": Edge(1.8, 0.0, math.inf),
    "infinite": Edge(math.inf, math.inf, math.inf, verdict="faster"),
    "undefined": Edge(math.nan, math.nan, math.nan),
}


class Said(NamedTuple):
    """What a cell says of a result at an edge: the sentences of the page."""

    lesson: str
    cell: str
    edge: str
    sentences: list[str]


class StandIn(str):
    """A result at an edge: a text where a text is wanted, else a number, a row, a table, or a function of results."""

    edge: Edge
    number: float
    name: str

    def __new__(cls, edge: Edge, name: str, number: float | None = None) -> "StandIn":
        new = super().__new__(cls, edge.verdict if name == "verdict" else edge.text or f"<{name}>")
        new.edge, new.name = edge, name
        new.number = _number(edge, name) if number is None else float(number)
        return new

    def part(self, name: str) -> "StandIn":
        return StandIn(self.edge, name)

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return self.part(name)

    def __getitem__(self, key: Any) -> "StandIn":
        if isinstance(key, slice):
            return self.part("ends" if key.start == 1 else self.name)
        if isinstance(key, str) and not isinstance(key, StandIn):
            return self.part(key)
        if isinstance(key, int):
            names = ("low", "high") if PAIR.search(self.name) else (self.name, "low", "high")
            return self.part(names[min(key, len(names) - 1)])
        return self.part(self.name)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "StandIn":
        return self.part(self.name)

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __len__(self) -> int:
        return self.edge.rows

    def __bool__(self) -> bool:
        return bool(self.number) if self.name == "compared" else self.edge.rows > 0

    def __contains__(self, _: object) -> bool:
        return self.edge.rows > 0

    def __iter__(self) -> Iterator["StandIn"]:
        triple = [self.part(self.name), self.part("low"), self.part("high")]
        wanted = _wanted(sys._getframe(1), is_pair=PAIR.search(self.name) is not None)
        if wanted == 2:
            return iter(triple[1:])
        if wanted is not None:
            return iter([*triple, *[self.part(self.name)] * wanted][:wanted])
        return iter([self.part(self.name)] * self.edge.rows)

    def keys(self) -> list["StandIn"]:
        return [self.part(f"name {number}") for number in range(self.edge.rows)]

    def values(self) -> list["StandIn"]:
        return [self.part(self.name)] * self.edge.rows

    def items(self) -> list[tuple["StandIn", "StandIn"]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def get(self, *_: Any) -> "StandIn":
        return self.part(self.name)

    def count(self, *_: Any, **__: Any) -> "StandIn":
        return self.part("count")

    def __format__(self, form: str) -> str:
        if not form or form[-1].isdigit():
            return str(self)
        if form[-1] in "d,x":
            whole = round(self.number) if math.isfinite(self.number) else self.number
            return format(whole, form.replace("d", ""))
        return format(self.number, form)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, str) and not isinstance(other, StandIn):
            return str.__eq__(self, other)
        return StandIn(self.edge, "compared", self.number == _plain(other))

    def __ne__(self, other: object) -> Any:
        return not self == other

    def __hash__(self) -> int:
        return hash(str(self))

    def __float__(self) -> float:
        return self.number

    def __int__(self) -> int:
        return int(self.number) if math.isfinite(self.number) else 0

    __index__ = __int__

    def __round__(self, *digits: int) -> float | int:
        return round(self.number, *digits) if math.isfinite(self.number) else self.number


def _number(edge: Edge, name: str) -> float:
    if LOW.search(name):
        return edge.low
    return edge.high if HIGH.search(name) else edge.value


def _plain(value: Any) -> Any:
    return value.number if isinstance(value, StandIn) else value


def _wanted(frame: FrameType, is_pair: bool) -> int | None:
    """Return how many values the caller takes from a result, as in `value, low, high = result`; None for a loop."""
    code, at = frame.f_code.co_code, frame.f_lasti
    instruction = dis.opname[code[at]]
    if instruction == "UNPACK_SEQUENCE":
        return code[at + 1]
    if instruction in ("UNPACK_EX", "LIST_EXTEND", "CALL_FUNCTION_EX"):
        return 2 if is_pair else 3
    return None


def _computed(stand_in: StandIn, function: Callable, left: Any, right: Any) -> StandIn:
    try:
        number = function(left, right)
    except (ZeroDivisionError, OverflowError):
        number = math.inf if left else math.nan
    except TypeError:  # of other things than numbers
        number = math.nan
    return StandIn(stand_in.edge, stand_in.name, abs(number) if isinstance(number, complex) else number)


def _add_operators() -> None:
    def binary(function: Callable) -> None:
        def forward(self: StandIn, other: Any) -> Any:
            if isinstance(other, str) and not isinstance(other, StandIn):
                return other * int(self) if function is operator.mul else str(self) + other
            return _computed(self, function, self.number, _plain(other))

        def reflected(self: StandIn, other: Any) -> Any:
            if isinstance(other, str) and not isinstance(other, StandIn):
                return other * int(self) if function is operator.mul else other + str(self)
            return _computed(self, function, _plain(other), self.number)

        name = function.__name__.strip("_")
        setattr(StandIn, f"__{name}__", forward)
        setattr(StandIn, f"__r{name}__", reflected)

    def comparison(function: Callable) -> None:
        def compared(self: StandIn, other: Any) -> StandIn:
            return StandIn(self.edge, "compared", function(self.number, _plain(other)))

        setattr(StandIn, f"__{function.__name__}__", compared)

    def unary(function: Callable) -> None:
        def changed(self: StandIn) -> StandIn:
            return StandIn(self.edge, self.name, function(self.number))

        setattr(StandIn, f"__{function.__name__.strip('_')}__", changed)

    for function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod):
        binary(function)
    for function in (operator.pow, operator.matmul, operator.and_, operator.or_):
        binary(function)
    for function in (operator.lt, operator.le, operator.gt, operator.ge):
        comparison(function)
    for function in (operator.neg, operator.abs):
        unary(function)
    StandIn.__invert__ = lambda self: self


_add_operators()


class Names(dict):
    """The names of a cell: its own, `math`, `show` and `itertools`, sizes, built-in functions; else stand-ins."""

    def __init__(self, edge: Edge, sizes: Mapping[str, int]) -> None:
        super().__init__(math=math, itertools=itertools, show=show, __builtins__=builtins, **sizes)
        self.edge = edge

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return StandIn(self.edge, name)


def says(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "lab.say(" in cell.source


class Argument(NamedTuple):
    """An argument of lab.say: a list of the sentences as code, and the source."""

    code: CodeType
    source: str


class SayingCell:
    """A cell that calls lab.say, compiled once for all edges."""

    def __init__(self, notebook: NotebookNode, cell: NotebookNode) -> None:
        statements = ast.parse(cell.source).body
        self._helpers = helpers(notebook, cell)
        self._above = [_compiled(statement) for statement in statements if not _calls_of_say(statement)]
        calls = itertools.chain.from_iterable(map(_calls_of_say, statements))
        self._calls = [[_argument(argument) for argument in call.args[1:]] for call in calls]
        self._sizes = sizes(tuple(other.source for other in notebook.cells if other.cell_type == "code"))

    def sentences(self, edge: Edge) -> tuple[list[list[str]], list[str]]:
        """Return what is said at an edge, a list for each call of lab.say, and the arguments that cannot be rendered.

        Where the names that the cell computes from stand-ins do not do, they become stand-ins themselves.
        """
        of_words, of_cell, of_none = (Names(edge, self._sizes) for _ in range(3))
        for helper in self._helpers:
            _run(helper, of_words)
            _run(helper, of_cell)
        for statement in self._above:
            _run(statement, of_cell)
        said, failed = [], []
        for arguments in self._calls:
            texts = []
            for argument in arguments:
                try:
                    texts += _rendered(argument.code, [of_cell, of_words, of_none])
                except LookupError:
                    failed.append(argument.source)
            if texts:
                said.append(show.defined(texts))
        return said, failed


@cache
def sizes(code: tuple[str, ...]) -> dict[str, int]:
    """Return the whole numbers that a lesson sets once, of preset class: no result can change them."""
    nodes = list(itertools.chain.from_iterable(map(ast.walk, map(ast.parse, code))))
    stored = Counter(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    chosen = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            chosen |= _numbers(node.targets[0], node.value)
    return {name: number for name, number in chosen.items() if stored[name] == 1}


def _numbers(target: ast.expr, value: ast.expr) -> dict[str, int]:
    """Return the names of an assignment, such as `a, b = 1, lab.by_preset(2, 3, 4)`, with their whole numbers."""
    pairs = [(target, value)]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=False))
    numbers = {ast.unparse(name): _of_class(number) for name, number in pairs}
    return {name: number for name, number in numbers.items() if isinstance(number, int)}


def _of_class(value: ast.expr) -> Any:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "lab.by_preset":
        value = value.args[1]
    return value.value if isinstance(value, ast.Constant) else None


def helpers(notebook: NotebookNode, cell: NotebookNode) -> list[CodeType]:
    """Return the short functions above a cell, in cells that are hidden or make words."""
    functions = []
    for above in itertools.takewhile(lambda other: other.id != cell.id, notebook.cells):
        if above.cell_type == "code" and ("hide-input" in tags(above) or "show.told" in above.source):
            functions += _short_functions(above.source)
    return functions


@cache
def _short_functions(source: str) -> list[CodeType]:
    """Return the short functions of a cell, which every cell below it asks for."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return [_compiled(node) for node in functions if node.end_lineno - node.lineno < LONGEST_HELPER]


def _compiled(statement: ast.stmt) -> CodeType:
    return compile(ast.Module([statement], []), "<cell>", "exec")


def _argument(argument: ast.expr) -> Argument:
    listed = ast.Expression(ast.List([argument], ast.Load()))  # a list, for an argument with a star
    return Argument(compile(ast.fix_missing_locations(listed), "<sentence>", "eval"), ast.unparse(argument))


def _run(statement: CodeType, names: Names) -> None:
    """Run a statement; its names stay stand-ins if it needs more than stand-ins."""
    with suppress(Exception):
        exec(statement, names)


def _calls_of_say(statement: ast.stmt) -> list[ast.Call]:
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "lab.say"]


def _rendered(code: CodeType, namespaces: list[Names]) -> list[str]:
    """Return the sentences of an argument, by the first names that can make them; LookupError by none."""
    for names in namespaces:
        with suppress(Exception):
            texts = eval(code, names)
            return [str(text) for text in texts if text]
    raise LookupError
