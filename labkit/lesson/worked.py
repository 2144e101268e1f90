"""The worked answers of the exercises, so that a lesson goes on with one where the learner has none yet.

They stand in the lessons between nbgrader's markers. A class's release has lessons without them and one file,
answers.json, instead: packed, so that nobody reads an answer by accident, and no secret.
"""

import ast
import base64
import inspect
import json
import sys
import zlib
from collections.abc import Callable, Mapping

from labkit import files

MARKERS = BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
PACKED = "answers.json"


def answer(exercise: str, fn: Callable) -> Callable | None:
    """The worked answer that is called like the learner's `fn`, or None where there is none beside this labkit.

    It is made in a copy of the namespace that `fn` is from, so it uses the learner's imports and helpers and changes
    none of them. Where the learner's has a name of its own, as a lambda has, it is the last function of the cell.
    """
    source = _source(exercise)
    if source is None:
        return None
    space = dict(getattr(inspect.unwrap(fn), "__globals__", vars(sys.modules["__main__"])))
    exec(compile(source, f"<worked answer {exercise}>", "exec", dont_inherit=True), space)
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return space[name if (name := getattr(fn, "__name__", "")) in names else names[-1]]


def without_markers(source: str) -> str:
    """An exercise's cell with its answer, as a reader sees it."""
    return "\n".join(line for line in source.splitlines() if line.strip() not in MARKERS)


def packed(sources: Mapping[str, str]) -> str:
    """The text of answers.json for the worked answers' sources by exercise."""
    return json.dumps(
        {exercise: base64.b64encode(zlib.compress(source.encode())).decode() for exercise, source in sources.items()},
        indent=1,
    )


def _source(exercise: str) -> str | None:
    """The exercise's cell with its answer: the k-th of the lesson's that are tagged `exercise`."""
    lesson, _, k = exercise.partition(".")
    for path in files.NOTEBOOKS.glob(f"{lesson}_*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if "exercise" in cell["metadata"].get("tags", ())]
        if int(k) <= len(sources) and BEGIN in sources[int(k) - 1]:
            return without_markers(sources[int(k) - 1])
    store = files.NOTEBOOKS / PACKED
    texts = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    return zlib.decompress(base64.b64decode(texts[exercise])).decode() if exercise in texts else None
