"""The rules about a lesson's grain: what follows a figure, what is asked, how much of the visible code is ideas.

Each yields a sentence for everything in the notebook that breaks it. They read what a cell says, never how long it is.
"""

import ast
import re
from collections.abc import Iterator
from itertools import groupby

from nbformat import NotebookNode

from course import notebooks
from course.notebooks import tags
from labkit.errors import InputError

SHOWS = {"show", "table", "beside", "challenge"}  # calls of lab that put a figure or a table on the page
PLUMBING = {"record", "table", "show", "claim", "claims", "predict", "check", "finish", "beside", "start"}  # of lab
DRAWING = {"plt", "ax", "axes", "fig", "show"}  # names whose methods draw
ROWS = {"row", "rows", "columns", "table", "alt", "caption", "fig", "ax", "axes"}  # names of what is shown
WIDEST = 95  # characters of a code line that the site shows without scrolling
BRANCHES = (ast.IfExp, ast.BoolOp, ast.Compare, ast.Subscript)
IDEAS = 0.7  # of the visible code lines
SMALLEST_TYPE = 10  # pixels, of a figure that a phone shows 390 px wide
LIMITER = re.compile(r"\b(?:(?:memory|compute|bandwidth)-bound|limited by (?:memory|compute)|flat)\b", re.IGNORECASE)
IN_A_CELL = re.compile(rf"memory|compute|{LIMITER.pattern}", re.IGNORECASE)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lab_calls(node: ast.AST, *names: str) -> list[ast.Call]:
    """The calls lab.<name>(...) within, in the order of the source."""
    calls = [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in names
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "lab"
    ]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def reads_its_results(notebook: NotebookNode) -> Iterator[str]:
    """A figure or a table is followed by lab.say, below it in its cell or in the next code cell."""
    cells = code(notebook)
    for cell, below in zip(cells, [*cells[1:], None], strict=True):
        calls = lab_calls(ast.parse(cell.source), *SHOWS, "say")
        if calls and calls[-1].func.attr != "say" and not (below and lab_calls(ast.parse(below.source), "say")):
            yield f"{cell.id} shows something, and neither it nor the next code cell goes on with lab.say"


def has_words_between_its_cells(notebook: NotebookNode) -> Iterator[str]:
    for kind, group in groupby(notebook.cells, key=lambda cell: cell.cell_type):
        if kind == "code" and len(cells := list(group)) > 3:
            yield f"{cells[3].id} is the fourth code cell in a row; say in between what comes"


def has_narrow_lines(notebook: NotebookNode) -> Iterator[str]:
    for cell in code(notebook):
        wide = [line for line in cell.source.splitlines() if len(line) > WIDEST]
        yield from (f"{cell.id}: {len(line)} characters, at most {WIDEST}: {line.strip()[:40]}..." for line in wide)


def pictures_an_idea(notebook: NotebookNode) -> Iterator[str]:
    ideas = [cell for cell in code(notebook) if "idea" in tags(cell)]
    if not ideas:
        yield "no cell is tagged idea: one that draws an idea from small numbers"
    for cell in ideas:
        drawn = [kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/")]
        if not drawn or "hide-input" not in tags(cell):
            yield f"{cell.id} is tagged idea, and is no figure or not tagged hide-input"


def has_type_for_a_phone(notebook: NotebookNode) -> Iterator[str]:
    for cell in code(notebook):
        for output in cell.outputs:
            pixels = output.get("metadata", {}).get("image/png", {}).get("type", SMALLEST_TYPE)
            if pixels < SMALLEST_TYPE:
                yield f"{cell.id}: type of {pixels} px on a phone, at least {SMALLEST_TYPE}; 6.8 in wide needs 12.6 pt"


def has_its_exercises(notebook: NotebookNode) -> Iterator[str]:
    try:
        points = [task.points for task in notebooks.exercises(notebook)]
    except InputError as error:
        yield str(error)
        return
    if not 3 <= len(points) <= 5:
        yield f"{len(points)} exercises; a lesson has three to five"
    if max(points, default=0) < 4:
        yield "no exercise is of difficulty 4 or 5: one of design or of diagnosis"


def links_the_glossary(notebook: NotebookNode) -> Iterator[str]:
    if not any("(glossary.md)" in cell.source for cell in notebook.cells if "header" in tags(cell)):
        yield "the header does not link the [glossary](glossary.md)"


def has_one_challenge(notebook: NotebookNode) -> Iterator[str]:
    if (count := sum("challenge" in tags(cell) for cell in notebook.cells)) != 1:
        yield f"{count} cells are tagged challenge; one is"


def asks_for_predictions(notebook: NotebookNode) -> Iterator[str]:
    calls = [call for cell in code(notebook) for call in lab_calls(ast.parse(cell.source), "predict")]
    if not 3 <= len(calls) <= 5:
        yield f"{len(calls)} predictions; a lesson asks for three to five"
    for call in calls:
        if not (len(call.args) > 1 and isinstance(call.args[1], ast.Constant) and call.args[1].value is ...):
            yield f"{ast.unparse(call)[:50]} answers itself; write ... for the value"


def shows_its_claims_once(notebook: NotebookNode) -> Iterator[str]:
    calls = [call for cell in code(notebook) for call in lab_calls(ast.parse(cell.source), "claim", "claims")]
    shown = [call for call in calls if call.func.attr == "claims"]
    if calls and (len(shown) != 1 or len(shown[0].args) > 5):
        yield "lab.claims is called once, with at most five claims"


def types_no_limiter(notebook: NotebookNode) -> Iterator[str]:
    """What limits a case comes from roofline.bound: no literal in a table's cell, no fixed sentence that says it."""
    for cell in code(notebook):
        tree = ast.parse(cell.source)
        chosen = {id(part) for node in ast.walk(tree) if isinstance(node, BRANCHES) for part in ast.walk(node)}
        lists = [node for node in ast.walk(tree) if isinstance(node, ast.Dict | ast.Tuple | ast.List)]
        values = [value for node in lists for value in (node.values if isinstance(node, ast.Dict) else node.elts)]
        sentences = [argument for call in lab_calls(tree, "say") for argument in call.args[1:]]
        for node in [*values, *sentences]:
            words = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            typed = LIMITER.search(words) if node in sentences else IN_A_CELL.fullmatch(words)
            if typed and id(node) not in chosen:
                yield f"{cell.id}: {typed[0]!r} is typed; compute it, or say it in a branch"


def shows_ideas(notebook: NotebookNode) -> Iterator[str]:
    """Of the code lines that a reader sees, most are ideas; what only draws, tabulates or records is hidden."""
    lines = {"ideas": 0, "plumbing": 0}
    for cell in code(notebook):
        if not {"hide-input", "setup", "parameters", "exercise"} & {*tags(cell)}:
            for statement in ast.parse(cell.source).body:
                for kind, count in counted(statement):
                    lines[kind] += count
    share = lines["ideas"] / (sum(lines.values()) or 1)
    if share < IDEAS:
        yield f"{share:.0%} of the visible code lines are ideas, at least {IDEAS:.0%}; tag the others hide-input"


def counted(statement: ast.stmt) -> list[tuple[str, int]]:
    """The lines of a statement by kind; of a compound one those of its parts, and its head with most of them."""
    parts = [part for block in ("body", "orelse", "finalbody") for part in getattr(statement, block, [])]
    if parts and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
        inner = [pair for part in parts for pair in counted(part)]
        totals = {kind: sum(count for name, count in inner if name == kind) for kind in ("ideas", "plumbing")}
        return [*inner, (max(totals, key=totals.get), parts[0].lineno - statement.lineno)]
    return [("plumbing" if is_plumbing(statement) else "ideas", statement.end_lineno - statement.lineno + 1)]


def is_plumbing(statement: ast.stmt) -> bool:
    """Imports, what is recorded, shown, asked and checked, calls that draw, and the making of rows for a table."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return True
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    names = {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}
    value = getattr(statement, "value", None)
    function = value.func if isinstance(value, ast.Call) else None
    owner = getattr(function, "value", None)
    while isinstance(owner, ast.Attribute | ast.Subscript | ast.Call):
        owner = owner.func if isinstance(owner, ast.Call) else owner.value
    owner = getattr(owner, "id", "")
    called = getattr(function, "attr", "")
    return bool(names & ROWS) or owner in DRAWING | ROWS or (owner == "lab" and called in PLUMBING)


RULES = [
    reads_its_results,
    has_words_between_its_cells,
    has_narrow_lines,
    pictures_an_idea,
    has_type_for_a_phone,
    has_its_exercises,
    links_the_glossary,
    has_one_challenge,
    asks_for_predictions,
    shows_its_claims_once,
    types_no_limiter,
    shows_ideas,
]
