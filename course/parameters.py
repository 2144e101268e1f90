"""What a lesson can be run with: the literals of its cell tagged `parameters`, read without executing it, and checked.

papermill alone accepts unknown names and passes "2" as text; here a value takes its default's type or is refused. The
cell's metadata may bound one: {"labkit": {"ranges": {"RATIO": [0.1, 0.9], "CRITERION": ["l1", "taylor"]}}}.
"""

import ast
import difflib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.errors import InputError

PRESETS = ("smoke", "class", "full")
_EVERYWHERE = {"PRESET": PRESETS, "SEED": (0, 2**32 - 1)}  # what every lesson's session takes


@dataclass(frozen=True)
class Parameter:
    """One name of the parameters cell. `allowed` holds (lowest, highest) of a number, or the choices of a text."""

    name: str
    default: Any
    allowed: tuple = ()


def cell_of(notebook: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one cell tagged `parameters` of a notebook (nbformat's, or its plain JSON); InputError for none or more."""
    found = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(found) != 1:
        raise InputError(f"The notebook has {len(found)} cells tagged `parameters`; tag exactly one code cell so.")
    return found[0]


def read(notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """The lesson's parameters by name, in the order of the cell; InputError where a line is not NAME = literal."""
    cell = cell_of(notebook)
    ranges = cell["metadata"].get("labkit", {}).get("ranges", {})
    source = "".join(cell["source"])  # in a file a list of lines
    defaults = dict(_assignment(statement) for statement in _statements(source))
    for name in ranges:
        _known(name, defaults)
    allowed = {**_EVERYWHERE, **ranges}
    return {name: Parameter(name, value, tuple(allowed.get(name, ()))) for name, value in defaults.items()}


def bind(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` as the lesson will get it: known names, each of its default's type and within its range; else InputError.

    Text is read as the default's type, so that the command line and a caller from Python share one rule.
    """
    return {name: _coerce(_known(name, parameters), value) for name, value in given.items()}


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError as error:
        raise InputError(f"The parameters cell is not Python (line {error.lineno}: {error.msg}); mend it.") from None


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    """NAME = literal or NAME: type = literal. The annotation is for the reader; the default's type is what counts."""
    try:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                return name, ast.literal_eval(statement.value)
        raise ValueError
    except (ValueError, TypeError):
        raise InputError(
            f"The parameters cell holds `{ast.unparse(statement)}`; write each of its lines as NAME = literal."
        ) from None


def _known(name: str, known: Mapping[str, Any]) -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}."
    raise InputError(f"This lesson has no parameter {name}; {hint}")


def _coerce(parameter: Parameter, value: Any) -> Any:
    default, name = parameter.default, parameter.name
    kind = list if isinstance(default, tuple) else type(default)
    try:
        plain = _TYPES[kind](value, default)
    except (ValueError, TypeError, SyntaxError, OverflowError):
        raise InputError(f"{name} cannot be {value!r}; give {_WORDS[kind]}, like its default {default!r}.") from None
    for one in plain if isinstance(plain, list) else [plain]:
        _check_range(parameter, one)
    return plain


def _check_range(parameter: Parameter, value: Any) -> None:
    allowed = parameter.allowed
    if not allowed:
        return
    numeric = len(allowed) == 2 and all(isinstance(bound, int | float) for bound in allowed)
    if numeric and not allowed[0] <= value <= allowed[1]:
        raise InputError(f"{parameter.name} cannot be {value!r}; give a number from {allowed[0]} to {allowed[1]}.")
    if not numeric and value not in allowed:
        raise InputError(f"{parameter.name} cannot be {value!r}; choose one of {', '.join(map(str, allowed))}.")


def _bool(value: Any, _default: bool) -> bool:
    text = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in text:
        return text[value.lower()]
    if not isinstance(value, bool):
        raise TypeError
    return value


def _int(value: Any, _default: int) -> int:
    if isinstance(value, bool):
        raise TypeError
    return int(value) if isinstance(value, str) else operator.index(value)


def _float(value: Any, _default: float) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _str(value: Any, _default: str) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _list(value: Any, default: list | tuple) -> list:
    """Each element takes the type of the default's first one."""
    value = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise TypeError
    return [_TYPES[type(default[0])](one, default[0]) if default else _any(one, None) for one in value]


def _any(value: Any, _default: None) -> Any:
    """A parameter whose default is None takes any literal; text that is no literal stays text."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else ast.literal_eval(repr(value))
    except (ValueError, SyntaxError):
        return _str(value, "")


_TYPES = {bool: _bool, int: _int, float: _float, str: _str, list: _list, type(None): _any}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    list: "a list",
    type(None): "a literal",
}
