"""How much a line of labkit holds, how its docstrings speak, and how much of it a first lesson loads: in figures.

A node is an expression or a statement of Python's syntax tree, counted on the line where it begins. Libraries that read
well, such as equinox, torchao, seaborn and Torch-Pruning, hold 3.5 to 4.9 nodes a line, and 1 to 5 % of the words of
their docstrings are pronouns. `pytest -s tests/test_readability.py` prints the figures room by room.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from labkit.files import ROOT

LABKIT = ROOT / "labkit"
ROOMS = sorted(path for path in LABKIT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())

MOST_NODES = 20  # on a line
MEAN_NODES = 6.5
PRONOUN_SHARE = 0.05
RIDDLE_SHARE = 0.02  # of the docstrings that begin with one of RIDDLES
FIRST_LESSON_LINES = 5600

PRONOUNS = {
    "it", "its", "itself", "they", "them", "their", "theirs", "those", "these", "this", "that", "what", "whatever",
    "which", "whichever", "who", "whom", "whose", "one", "ones", "such", "there", "here", "both", "either", "neither",
    "another", "other", "others", "none", "nothing", "anything", "everything", "something",
}  # fmt: skip
RIDDLES = ("What", "Whether", "Where", "Which", "Those", "Whose")
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Reading:
    """The figures of one file. nodes: {line: nodes that begin on it}, docstrings and tables of data left out."""

    path: Path
    code_lines: int
    all_nodes: int
    nodes: dict[int, int]
    docstrings: tuple[str, ...]


@cache
def read(path: Path) -> Reading:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    described = set(docstring_nodes(tree))
    data = {node for table in tables(tree) for node in ast.walk(table)}
    everywhere, outside_tables = Counter(), Counter()
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr | ast.stmt) or node in described:
            continue
        everywhere[node.lineno] += 1
        if node not in data:
            outside_tables[node.lineno] += 1
    docstrings = tuple(
        filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)))
    )
    return Reading(path, len(code_lines(text, tree)), everywhere.total(), dict(outside_tables), docstrings)


def docstring_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            yield node.body[0]
            yield node.body[0].value


def tables(tree: ast.Module) -> Iterator[ast.AST]:
    """The module's constants: data, which may stand in rows as wide as a line."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id.isupper():
            yield node


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """The lines with code on them; comments, blank lines and docstrings left out."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in docstring_nodes(tree):
        lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def files_of(room: Path) -> list[Path]:
    return [room] if room.is_file() else sorted(room.rglob("*.py"))


def words(docstring: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", docstring)


def share_of_pronouns(docstrings: list[str]) -> float:
    spoken = [word.lower() for docstring in docstrings for word in words(docstring)]
    return sum(word in PRONOUNS for word in spoken) / max(1, len(spoken))


def share_of_riddles(docstrings: list[str]) -> float:
    return sum(docstring.startswith(RIDDLES) for docstring in docstrings) / max(1, len(docstrings))


def test_the_figures_of_every_room():
    print(f"\n{'room':16} code lines  nodes a line  most  pronouns  riddles")
    for room in [LABKIT, *ROOMS]:
        readings = [read(path) for path in files_of(room)]
        lines = sum(reading.code_lines for reading in readings)
        nodes = sum(reading.all_nodes for reading in readings)
        most = max((count for reading in readings for count in reading.nodes.values()), default=0)
        docstrings = [docstring for reading in readings for docstring in reading.docstrings]
        pronouns, riddles = share_of_pronouns(docstrings), share_of_riddles(docstrings)
        mean = nodes / max(1, lines)
        print(f"{room.name:16} {lines:10,} {mean:13.2f} {most:5} {pronouns:9.1%} {riddles:8.1%}")
    everything = [read(path) for path in files_of(LABKIT)]
    docstrings = [docstring for reading in everything for docstring in reading.docstrings]
    assert sum(r.all_nodes for r in everything) <= MEAN_NODES * sum(r.code_lines for r in everything)
    assert share_of_pronouns(docstrings) <= PRONOUN_SHARE
    assert share_of_riddles(docstrings) <= RIDDLE_SHARE


@pytest.mark.parametrize("path", files_of(LABKIT), ids=lambda path: path.relative_to(LABKIT).as_posix())
def test_no_line_holds_too_much(path: Path):
    full = {line: count for line, count in read(path).nodes.items() if count > MOST_NODES}
    assert not full


def test_the_first_lesson_loads_little_of_labkit(tmp_path: Path):
    """Measuring stands on nothing: no tracing, no pruning."""
    code = f"""
import sys, labkit
labkit.start("00", preset="smoke", results_dir={str(tmp_path)!r})
paths = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "labkit" and m.__file__]
print("LOADED", *paths, sep="\\t")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(name) for name in done.stdout.partition("LOADED\t")[2].split("\n")[0].split("\t")}
    rooms = {path.relative_to(LABKIT).parts[0] for path in loaded}
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in loaded)
    print(f"\nlesson 00 loads {lines:,} lines of labkit in {len(loaded)} files")
    assert not rooms & {"graph", "pruning", "quantization", "attention", "deploy"}
    assert lines <= FIRST_LESSON_LINES
