"""The parameters of a lesson: names and defaults of its cell tagged `parameters`, and the values that each may have.

The cell's metadata bounds a parameter: {"labkit": {"ranges": {"RATIO": [0.1, 0.9], "CRITERION": ["l1", "taylor"]}}}.
papermill alone accepts unknown names and passes "2" as text. Here a value that comes from outside takes the right type
or is refused before the notebook runs, and a value that somebody types into the cell is refused by `labkit.start` with
the same sentence.
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
SEEDS = (0, 2**32 - 1)
_EVERYWHERE = {"PRESET": PRESETS, "SEED": SEEDS}  # what every lesson's session takes
_MISFITS = (ValidationError, ValueError, TypeError, RecursionError)
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", list: "a list"}


@dataclass(frozen=True)
class Parameter:
    """One name of the parameters cell. `allowed` holds (lowest, highest) of a number, or the choices of a text."""

    name: str
    default: Any
    allowed: tuple = ()

    def convert(self, value: Any) -> Any:
        """Read `value`, or the text of it, as the lesson gets it.

        The type is that of `allowed`, or where nothing bounds the parameter that of its default. InputError for a value
        of another type, and for one that is not allowed.
        """
        kind = list if isinstance(self.default, tuple) else type(self.default)
        plain = value if kind is str else _literal(value)
        if self.allowed and kind is not list:
            return require_allowed(self.name, plain, self.allowed)
        annotation = Any if self.default is None else kind
        if kind is list and self.default:
            annotation = list[type(self.default[0])]
        try:
            plain = _typed(list(plain) if kind is list and isinstance(plain, tuple) else plain, annotation)
        except _MISFITS:
            expected = f"give {_WORDS.get(kind, 'a literal')}, like its default {self.default!r}."
            raise InputError(f"{self.name} cannot be {value!r}; {expected}") from None
        if self.allowed:
            for element in plain:
                require_allowed(self.name, element, self.allowed)
        return plain


def require_allowed(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return `value` if the parameter `name` may have it, else raise an InputError that says what is allowed.

    allowed  (lowest, highest) of a number, or the choices of a text; their type is the value's
    A whole number stands for a float, and text never for a number.
    """
    try:
        plain = _typed(value, type(allowed[0]))
    except _MISFITS:
        plain = None
    if len(allowed) == 2 and all(isinstance(bound, int | float) for bound in allowed):
        lowest, highest = allowed
        if plain is None or not lowest <= plain <= highest:
            kind = "a whole number" if isinstance(lowest, int) else "a number"
            raise InputError(f"{name} cannot be {value!r}; give {kind} from {lowest} to {highest}.")
    elif plain not in allowed:
        raise InputError(f"{name} cannot be {value!r}; choose one of {', '.join(map(str, allowed))}.")
    return plain


def ranges(lesson: str) -> dict[str, list[Any]]:
    """Find what the lesson "00" to "13" allows for its parameters, by name: [lowest, highest], or the choices.

    It stands in the lesson's notebook: that of the repository, or in a class's release the copy beside labkit. Empty
    where there is neither.
    """
    for folder in (files.NOTEBOOKS, files.ROOT):
        for path in sorted(folder.glob(f"{lesson}_*.ipynb")):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            for cell in cells:  # not its source, which a learner may be at work on
                if declared := cell["metadata"].get("labkit", {}).get("ranges"):
                    return declared
    return {}


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


def _typed(value: Any, annotation: Any) -> Any:
    """`value` as JSON and the type hold it, since it has to reach the notebook and the record; else one of _MISFITS."""
    json.dumps(value, allow_nan=False)
    return TypeAdapter(annotation).validate_python(value, strict=True)


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
