"""What a lesson can be run with: the literals of its cell tagged `parameters`, read without executing it, and checked.

papermill alone accepts unknown names and passes "2" as text; here a value takes its default's type or is refused. The
cell's metadata may bound one: {"labkit": {"ranges": {"RATIO": [0.1, 0.9], "CRITERION": ["l1", "taylor"]}}}.
"""

import ast
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from labkit.errors import InputError

PRESETS = ("smoke", "class", "full")  # from the smallest
_EVERYWHERE = {"PRESET": PRESETS, "SEED": (0, 2**32 - 1)}  # what every lesson's session takes
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", list: "a list"}


@dataclass(frozen=True)
class Parameter:
    """One name of the parameters cell. `allowed` holds (lowest, highest) of a number, or the choices of a text."""

    name: str
    default: Any
    allowed: tuple = ()

    def convert(self, value: Any) -> Any:
        """`value`, or the text of it, in the default's type; InputError where it has another, or is out of range."""
        kind = list if isinstance(self.default, tuple) else type(self.default)
        annotation = Any if self.default is None else kind
        if kind is list and self.default:
            annotation = list[type(self.default[0])]
        try:
            plain = value if kind is str else _literal(value)
            json.dumps(plain, allow_nan=False)  # it has to reach the notebook and the record as it is
            plain = list(plain) if kind is list and isinstance(plain, tuple) else plain
            plain = TypeAdapter(annotation).validate_python(plain, strict=True)
        except (ValidationError, ValueError, TypeError, RecursionError):
            expected = f"give {_WORDS.get(kind, 'a literal')}, like its default {self.default!r}."
            raise InputError(f"{self.name} cannot be {value!r}; {expected}") from None
        is_range = len(self.allowed) == 2 and all(isinstance(bound, int | float) for bound in self.allowed)
        for element in plain if isinstance(plain, list) else [plain]:
            if is_range and not self.allowed[0] <= element <= self.allowed[1]:
                lowest, highest = self.allowed
                raise InputError(f"{self.name} cannot be {element!r}; give a number from {lowest} to {highest}.")
            if self.allowed and not is_range and element not in self.allowed:
                raise InputError(
                    f"{self.name} cannot be {element!r}; choose one of {', '.join(map(str, self.allowed))}."
                )
        return plain


def read(notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """The lesson's parameters by name, in the order of the cell; InputError where a line is not NAME = literal."""
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"The notebook has {len(cells)} cells tagged `parameters`; tag exactly one code cell so.")
    try:
        statements = ast.parse("".join(cells[0]["source"])).body  # in a file a list of lines
    except SyntaxError as error:
        raise InputError(f"The parameters cell is not Python (line {error.lineno}: {error.msg}); fix it.") from None
    defaults = dict(map(_assignment, statements))
    ranges = cells[0]["metadata"].get("labkit", {}).get("ranges", {})
    for name in ranges:
        _require_known(name, defaults)
    allowed = {**_EVERYWHERE, **ranges}
    return {name: Parameter(name, value, tuple(allowed.get(name, ()))) for name, value in defaults.items()}


def bind(parameters: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the lesson gets them: known names, each of its default's type and within its range; else InputError.

    Text is read as the default's type, so that the command line and a caller from Python share one rule.
    """
    for name in values:
        _require_known(name, parameters)
    return {name: parameters[name].convert(value) for name, value in values.items()}


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    """NAME = literal or NAME: type = literal. The annotation is for the reader; the default's type is what counts."""
    try:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                return name, ast.literal_eval(statement.value)
        raise ValueError
    except (ValueError, TypeError):
        line = ast.unparse(statement)
        raise InputError(f"The parameters cell holds `{line}`; write each of its lines as NAME = literal.") from None


def _require_known(name: str, parameters: Mapping[str, Any]) -> None:
    if name not in parameters:
        near = difflib.get_close_matches(name.upper(), parameters, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(parameters)}."
        raise InputError(f"This lesson has no parameter {name}; {hint}")


def _literal(value: Any) -> Any:
    """The Python value that a text stands for; text that stands for none, and what is no text, as it is."""
    words = {"true": True, "false": False, "nan": math.nan, "inf": math.inf}
    if not isinstance(value, str):
        return value
    if value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
