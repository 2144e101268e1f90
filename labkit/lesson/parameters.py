"""Parameters of a lesson: names and defaults from the cell tagged `parameters`, and the allowed values.

The cell's metadata bounds a parameter: {"labkit": {"ranges": {"RATIO": [0.1, 0.9], "CRITERION": ["l1", "taylor"]}}}.
papermill alone accepts unknown names and passes "2" as text. In labkit a value from outside takes the right type or is
refused before the notebook runs, and `labkit.start` refuses a value typed into the cell with the same sentence.
"""

import ast
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from labkit import files
from labkit.errors import InputError

PRESETS = ("smoke", "class", "full")  # from the smallest
SMOKE = "smoke tries the code; run class to see"  # all that is said of results at smoke
SEEDS = (0, 2**32 - 1)
_EVERYWHERE = {"PRESET": PRESETS, "SEED": SEEDS}  # what every lesson's session takes
_MISFITS = (ValidationError, ValueError, TypeError, RecursionError)
_SPELLED = {"true": True, "false": False, "nan": math.nan, "inf": math.inf}
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", list: "a list"}


@dataclass(frozen=True)
class Parameter:
    """A name of the parameters cell. `allowed` holds (lowest, highest) of a number, or the choices of a text."""

    name: str
    default: Any
    allowed: tuple = ()

    def convert(self, value: Any) -> Any:
        """Return `value`, or the value that a text stands for, as the lesson gets the parameter.

        The type is that of `allowed`, or, for a parameter without bounds, that of the default.
        Raises InputError for a value of another type, or one that is not allowed.
        """
        if isinstance(self.default, list | tuple):
            return self._convert_list(value)
        plain = value if isinstance(self.default, str) else _literal(value)
        if self.allowed:
            return require_allowed(self.name, plain, self.allowed)
        return self._typed(plain, Any if self.default is None else type(self.default), value)

    def _convert_list(self, value: Any) -> list[Any]:
        plain = _literal(value)
        if isinstance(plain, tuple):
            plain = list(plain)
        annotation = list[type(self.default[0])] if self.default else list
        elements = self._typed(plain, annotation, value)
        if self.allowed:
            for element in elements:
                require_allowed(self.name, element, self.allowed)
        return elements

    def _typed(self, plain: Any, annotation: Any, value: Any) -> Any:
        """Return `plain` in the type `annotation`; InputError, naming the original `value`, if the type differs."""
        try:
            return _typed(plain, annotation)
        except _MISFITS:
            kind = list if isinstance(self.default, tuple) else type(self.default)
            expected = f"give {_WORDS.get(kind, 'a literal')}, like its default {self.default!r}."
            raise InputError(f"{self.name} cannot be {value!r}; {expected}") from None


def require_allowed(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return `value` if the parameter `name` may have it; else raise an InputError that names the allowed values.

    allowed: (lowest, highest) of a number, or the choices of a text; the value has their type.
    A whole number stands for a float, and a text never for a number.
    """
    try:
        plain = _typed(value, type(allowed[0]))
    except _MISFITS:
        plain = None
    is_range = len(allowed) == 2 and all(isinstance(bound, int | float) for bound in allowed)
    if is_range:
        lowest, highest = allowed
        if plain is None or not lowest <= plain <= highest:
            kind = "a whole number" if isinstance(lowest, int) else "a number"
            raise InputError(f"{name} cannot be {value!r}; give {kind} from {lowest} to {highest}.")
    elif plain not in allowed:
        raise InputError(f"{name} cannot be {value!r}; choose one of {', '.join(map(str, allowed))}.")
    return plain


def ranges(lesson: str) -> dict[str, list[Any]]:
    """Find the allowed values of the parameters of a lesson, "00" to "13", by name: [lowest, highest], or the choices.

    The lesson's notebook holds them, in the repository or, in a class's release, beside labkit. {} without a notebook.
    """
    for folder in (files.NOTEBOOKS, files.ROOT):
        for path in sorted(folder.glob(f"{lesson}_*.ipynb")):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            for cell in cells:  # not the source, which a learner may be at work on
                declared = _declared_ranges(cell)
                if declared:
                    return declared
    return {}


def read(notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """Read a notebook's parameters by name, in the order of the cell; InputError for a line that is no NAME = literal.

    notebook: the notebook's JSON, {"cells": [...]}.
    """
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"The notebook has {len(cells)} cells tagged `parameters`; tag exactly one code cell so.")
    try:
        statements = ast.parse("".join(cells[0]["source"])).body  # in a file a list of lines
    except SyntaxError as error:
        raise InputError(f"The parameters cell is not Python (line {error.lineno}: {error.msg}); fix it.") from None
    defaults = dict(_assignment(statement) for statement in statements)
    declared = _declared_ranges(cells[0])
    for name in declared:
        _require_known(name, defaults)
    allowed = {**_EVERYWHERE, **declared}
    return {name: Parameter(name, value, tuple(allowed.get(name, ()))) for name, value in defaults.items()}


def bind(parameters: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values by name to the types and ranges of a lesson's parameters; InputError for an unknown name or value.

    A text is read as the default's type, so that the command line and a caller from Python share a rule.
    """
    for name in values:
        _require_known(name, parameters)
    return {name: parameters[name].convert(value) for name, value in values.items()}


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    """Read NAME = literal or NAME: type = literal. The annotation is for readers; only the literal's type counts."""
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
        hint = f"it has {', '.join(parameters)}."
        near = difflib.get_close_matches(name.upper(), parameters, n=3, cutoff=0.5)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        raise InputError(f"This lesson has no parameter {name}; {hint}")


def _declared_ranges(cell: Mapping[str, Any]) -> dict[str, list[Any]]:
    return cell["metadata"].get("labkit", {}).get("ranges", {})


def _typed(value: Any, annotation: Any) -> Any:
    """Return `value` in the type `annotation`; an error of _MISFITS if the type or JSON, for the record, refuses."""
    json.dumps(value, allow_nan=False)
    return TypeAdapter(annotation).validate_python(value, strict=True)


def _literal(value: Any) -> Any:
    """Return the Python value of a text; a text without a value, and a value of any type but text, unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in _SPELLED:
        return _SPELLED[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
