"""Worked answers of the exercises, so that a lesson can go on before the learner has solved them.

The lessons hold the answers between nbgrader's markers. A class's release has lessons without answers and a file,
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
    """Return the worked answer to an exercise, "01.2"; None if no answer lies beside labkit.

    fn: the learner's function. The worked answer runs in a copy of the namespace of `fn`: imports and helpers are the
        learner's, and stay unchanged. The answer's function of the same name is returned or, if there is none (as for a
        lambda), the last function of its cell.
    """
    source = _source(exercise)
    if source is None:
        return None
    namespace = dict(getattr(inspect.unwrap(fn), "__globals__", vars(sys.modules["__main__"])))
    exec(compile(source, f"<worked answer {exercise}>", "exec", dont_inherit=True), namespace)
    definitions = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in ast.parse(source).body if isinstance(node, definitions)]
    name = getattr(fn, "__name__", "")
    return namespace[name if name in names else names[-1]]


def without_markers(source: str) -> str:
    """Return an exercise's cell with the answer, as a reader sees it."""
    return "\n".join(line for line in source.splitlines() if line.strip() not in MARKERS)


def packed(sources: Mapping[str, str]) -> str:
    """Return the text of answers.json for the sources of worked answers, by exercise."""
    texts = {exercise: _packed(source) for exercise, source in sources.items()}
    return json.dumps(texts, indent=1)


def _source(exercise: str) -> str | None:
    """Find the source of a worked answer: in the lesson's notebook, else in answers.json; None without either."""
    lesson, _, number = exercise.partition(".")
    for path in files.NOTEBOOKS.glob(f"{lesson}_*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        exercises = [cell for cell in cells if "exercise" in cell["metadata"].get("tags", ())]
        if int(number) <= len(exercises):
            source = "".join(exercises[int(number) - 1]["source"])
            if BEGIN in source:
                return without_markers(source)
    store = files.NOTEBOOKS / PACKED
    if not store.exists():
        return None
    texts = json.loads(store.read_text(encoding="utf-8"))
    return _unpacked(texts[exercise]) if exercise in texts else None


def _packed(source: str) -> str:
    return base64.b64encode(zlib.compress(source.encode())).decode()


def _unpacked(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()
