"""What every lesson has to keep to, with the rules of grain.py. That it runs: test_runs.py."""

import ast
import builtins
import itertools
import json
import re
import symtable
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import nbformat
import pytest
from grain import code
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course import notebooks
from course.notebooks import tags
from labkit import files
from labkit.errors import InputError
from labkit.lesson import parameters

LESSONS = [pytest.param(path, id=path.stem) for path in notebooks.all_lessons()]
REQUIRED_TAGS = ("header", "parameters", "setup", "predict", "stable", "exercise", "check", "measure", "finish")
REQUIRED_PARAMETERS = ("PRESET", "DEVICE", "SEED", "RESULTS_DIR")
FOLDER = re.compile(r"(?<![\w.+/-])/(?:work|tmp|root|home|Users|usr|var|opt|mnt|private)/\w|\b[A-Z]:\\\\?Users")
UNIT = (
    r"(?:[mµun]s|[kMGTP]?(?:B|FLOP|OP|FLOPS|OPS)/s|[GT]?FLOPS|TOPS|(?:tokens?|images?|samples?|requests?|steps?)/s|W|J)"
)
TYPED = re.compile(
    rf"\d[\d.,]*\s*(?:[{chr(0x2013)}-]\s*\d[\d.,]*\s*)?(?:{UNIT}(?![\w/])"
    r"|(?:x|×|times|%|percent|per cent)\s+(?:faster|slower|quicker|speed|smaller|larger|higher|lower|less|more))"
    r"|speed-?ups?\s+of\s+(?:about\s+)?\d"
)
CITED = re.compile(r"\[[^\[\]]*\b(?:19|20)\d\d[a-z]?\]")
PAPER = re.compile(r"([A-Z][\w'’-]+)(?:,? (?:and )?[A-Z][\w'’-]+)* (?:et al\.|and [A-Z][\w'’-]+),? \(?((?:19|20)\d\d)")
WHERE_FROM = '  # not found? Do not pip install it: see "Where to run it" in the README'
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")


def read(lesson: Path) -> NotebookNode:
    """As it is: nbformat.read would give new ids to cells that share one."""
    return nbformat.v4.reads(lesson.read_text(encoding="utf-8"))


def outputs(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, NotebookNode]]:
    return ((cell, output) for cell in code(notebook) for output in cell.outputs)


# rules: each yields a sentence for everything in the notebook that breaks it ------------------------


def is_valid(notebook: NotebookNode) -> Iterator[str]:
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "a cell id is missing or there twice"
        return  # validate() would repair that
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield error.message


def is_tidy(notebook: NotebookNode) -> Iterator[str]:
    """Kernelspec python3, no metadata of one machine or one run."""
    if nbformat.writes(notebooks.tidied(notebook)) != nbformat.writes(notebook):
        yield "holds metadata that changes from run to run; run `./lab test tests/notebooks/test_lessons.py --fix`"


def opens_with_its_title(notebook: NotebookNode) -> Iterator[str]:
    if notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        yield "the first cell is not a title (# ...)"


def has_its_parameters(notebook: NotebookNode) -> Iterator[str]:
    known = parameters.read(notebook)
    yield from (f"the parameters cell has no {name}" for name in REQUIRED_PARAMETERS if name not in known)


def has_its_tags(notebook: NotebookNode) -> Iterator[str]:
    there = list(itertools.chain.from_iterable(map(tags, notebook.cells)))
    yield from (f"no cell is tagged {tag}" for tag in REQUIRED_TAGS if tag not in there)
    for cell in notebook.cells:
        if "stable" in tags(cell) and "nbval-check-output" not in tags(cell):
            yield f"{cell.id} is stable, so nbval has to check it: tag it nbval-check-output"


def has_short_cells(notebook: NotebookNode) -> Iterator[str]:
    lines = {cell.id: len(cell.source.splitlines()) for cell in code(notebook)}
    yield from (f"{cell_id} has {count} lines; at most 30" for cell_id, count in lines.items() if count > 30)


def uses_its_answers(notebook: NotebookNode) -> Iterator[str]:
    """After its check lab.answer binds each exercise's function, or the worked one, to a name that the lesson uses."""
    try:
        tasks = notebooks.exercises(notebook)
    except InputError as error:
        yield str(error)
        return
    cells = code(notebook)
    for task in tasks:
        check = next(place for place, cell in enumerate(cells) if cell.id == task.cell_id) + 1
        bound = [(place, name) for place, cell in enumerate(cells) for name in answers(cell, task) if place >= check]
        if not bound:
            yield f"exercise {task.id}: no cell below its check says name = lab.answer({task.id!r}, {task.function})"
        elif not any(name in names_read(cell) for place, name in bound for cell in cells[place + 1 :]):
            yield f"exercise {task.id}: no cell uses {bound[0][1]}, so the lesson is the same without the answer"


def answers(cell: NotebookNode, task: notebooks.Exercise) -> Iterator[str]:
    """The names that a cell binds to lab.answer of this exercise."""
    for node in ast.parse(cell.source).body:
        match node:
            case ast.Assign(
                [ast.Name(name)], ast.Call(ast.Attribute(attr="answer"), [ast.Constant(id), ast.Name(function)])
            ):
                if (id, function) == (task.id, task.function):
                    yield name


def names_read(cell: NotebookNode) -> set[str]:
    nodes = ast.walk(ast.parse(cell.source))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def was_run_from_top_to_bottom(notebook: NotebookNode) -> Iterator[str]:
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"the execution counts are {counts}; run it with `./lab run NN --record`"


def shows_no_error(notebook: NotebookNode) -> Iterator[str]:
    for cell, output in outputs(notebook):
        if output.output_type == "error" and "raises-exception" not in tags(cell):
            yield f"{cell.id} shows {output.ename}"


def names_no_folder_of_a_machine(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        shown = [cell.source, *(_text_of(output) for output in cell.get("outputs", []))]
        yield from (f"{cell.id}: {hit[0]}..." for text in shown if (hit := FOLDER.search(text)))


def _text_of(output: NotebookNode) -> str:
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return json.dumps({**output, "data": data})


def describes_its_pictures(notebook: NotebookNode) -> Iterator[str]:
    for cell, output in outputs(notebook):
        for kind in output.get("data", {}):
            if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt", "").strip():
                yield f"{cell.id}: an {kind} without alt text; show it with lab.show(fig, alt=...)"
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=.?\w)", cell.source):
            yield f"{cell.id}: a picture without alt text"


def types_no_measured_number(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type != "markdown" or "cited" in tags(cell) or CITED.search(cell.source):
            continue
        yield from (
            f"{cell.id}: {hit[0]!r} is typed; render it, or cite it [Author 2024]"
            for hit in TYPED.finditer(cell.source)
        )


def has_working_local_links(notebook: NotebookNode) -> Iterator[str]:
    """A file beside the notebook, or a heading of it; addresses of the world need a network to be tried."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = {title.strip().replace(" ", "-") for text in texts for title in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in itertools.chain.from_iterable(map(LINK.findall, texts)):
        if re.match(r"https?:|mailto:|data:|attachment:", target):
            continue
        path, _, heading = target.partition("#")
        if path and not (files.NOTEBOOKS / path).exists():
            yield f"there is no {path}, which is linked"
        if heading and not path and heading not in headings:
            yield f"there is no heading #{heading}, which is linked"


def lists_the_papers_it_cites(notebook: NotebookNode) -> Iterator[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    body, _, references = text.partition("## References")
    entries = re.split(r"\n[*-] | · ", references)
    for name, year in sorted(set(PAPER.findall(body))):
        if not any(re.search(rf"\b{re.escape(name)}\b", entry) and year in entry for entry in entries):
            yield f"{name} {year} is cited and not among the references"


def says_where_labkit_comes_from(notebook: NotebookNode) -> Iterator[str]:
    """In a package index that name is another project's, and who has the notebook alone sees the failing line."""
    for cell in notebook.cells:
        if re.search(r"\blabkit\[|pip install '?labkit", cell.source):
            yield f"{cell.id} asks a package index for labkit; ./lab setup --with installs what is optional"
        if cell.cell_type == "code" and re.search(r"^import labkit$", cell.source, re.MULTILINE):
            yield f"{cell.id} says import labkit; put {WHERE_FROM!r} behind it"


# Not the `_` of an interactive shell, which any earlier test of the same process may have left there.
PYTHONS_OWN = {name for name in dir(builtins) if name != "_"}


def stores_over_no_builtin(notebook: NotebookNode) -> Iterator[str]:
    """A cell that stores `id` takes Python's function from the cells below, and from those above when run again."""
    for cell in code(notebook):
        stored = globals_stored(symtable.symtable(cell.source, cell.id, "exec"))
        for name in sorted(stored & PYTHONS_OWN):
            yield f"{cell.id} stores {name} over Python's own; give it another name"


def globals_stored(scope: symtable.SymbolTable) -> set[str]:
    """The global names that a scope, or a function in it with `global`, assigns, imports or defines."""
    is_module = scope.get_type() == "module"
    names = {
        symbol.get_name()
        for symbol in scope.get_symbols()
        if (symbol.is_assigned() or symbol.is_imported()) and (is_module or symbol.is_declared_global())
    }
    return names.union(*map(globals_stored, scope.get_children()))


RULES = [
    is_valid,
    is_tidy,
    opens_with_its_title,
    has_its_parameters,
    has_its_tags,
    has_short_cells,
    uses_its_answers,
    was_run_from_top_to_bottom,
    shows_no_error,
    names_no_folder_of_a_machine,
    describes_its_pictures,
    types_no_measured_number,
    has_working_local_links,
    lists_the_papers_it_cites,
    says_where_labkit_comes_from,
    stores_over_no_builtin,
    *grain.RULES,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("lesson", LESSONS)
def test_lesson(lesson: Path, rule: Callable):
    assert list(rule(read(lesson))) == []


@pytest.mark.parametrize("lesson", LESSONS)
def test_lesson_is_in_canonical_form(lesson: Path, pytestconfig: pytest.Config):
    """Byte for byte as nbformat writes it, tidied; with --fix the file is rewritten."""
    wanted = nbformat.writes(notebooks.tidied(read(lesson))) + "\n"
    if pytestconfig.getoption("--fix") and lesson.read_text(encoding="utf-8") != wanted:
        files.write_text(lesson, wanted)
    assert lesson.read_text(encoding="utf-8") == wanted, "run ./lab test tests/notebooks/test_lessons.py --fix"


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_outputs_of_a_lesson_are_small(lesson: Path):
    assert sum(len(json.dumps(output)) for _, output in outputs(read(lesson))) <= 500_000


# the rules themselves ------------------------------------------------------------------------------


def proper_lesson() -> NotebookNode:
    """The least notebook that keeps every rule."""
    literals = 'PRESET = "class"\nDEVICE = "auto"\nSEED = 0\nRESULTS_DIR = "runs"'
    described = {"image/png": {"alt": "a line", "type": 10.0}}
    picture = new_output("display_data", data={"image/png": "aaaa"}, metadata=described)

    def cell(source: str, *tags: str) -> NotebookNode:
        return new_code_cell(source, metadata={"tags": [*tags]}, outputs=[picture] if "idea" in tags else [])

    cells = [new_markdown_cell("# Title\n\nTerms: [glossary](glossary.md)", metadata={"tags": ["header"]})]
    cells += [cell(literals, "parameters"), cell("1", "setup")]
    cells.append(cell("\n".join(f'lab.predict("{name}", ..., unit="x")' for name in "abc"), "predict"))
    cells.append(new_markdown_cell("Look."))
    cells.append(cell("lab.show(fig, alt='A line', table=rows)", "idea", "hide-input"))
    cells.append(cell('lab.say("line", f"It ends at {x}.")\nlab.table(rows)\nlab.say("rows", "Four rows.")'))
    for number in (1, 2, 3):
        card = f"### Exercise {number} · Twice\n\n*Difficulty {number + 1} of 5 · 5 minutes*"
        cells += [new_markdown_cell(card), cell("def double(x): return 2 * x", "exercise")]
        cells += [cell(f'lab.check("01.{number}", double)', "check"), new_markdown_cell("Go on.")]
        cells += [cell(f'twice = lab.answer("01.{number}", double)')]
    cells.append(cell("x = x\n" * 20 + "y = twice(twice(x))", "measure"))
    cells += [cell("plan = None", "challenge"), new_markdown_cell("The end.")]
    cells += [
        cell('lab.claim("1.1", 2)\nlab.claims("1.1", "1.2")', "finish"),
        cell("1", "stable", "nbval-check-output"),
    ]
    notebook = new_notebook(cells=[*cells, new_markdown_cell("A sentence."), new_markdown_cell("Another one.")])
    for count, cell in enumerate(code(notebook), start=1):
        cell.execution_count = count
    return notebooks.tidied(notebook)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_proper_lesson_keeps_every_rule(rule: Callable):
    assert list(rule(proper_lesson())) == []


def breaks(change: Callable[[NotebookNode], object]) -> set[str]:
    """Names of the rules that the changed lesson breaks."""
    notebook = proper_lesson()
    change(notebook)
    return {rule.__name__ for rule in RULES if list(rule(notebook))}


def _say(text: str) -> Callable[[NotebookNode], None]:
    return lambda notebook: setattr(notebook.cells[-1], "source", text)


def _print(text: str) -> Callable[[NotebookNode], None]:
    return lambda notebook: code(notebook)[-1].outputs.append(new_output("stream", text=text))


def _add(cell: NotebookNode) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells.append(cell)


def _replace(notebook: NotebookNode, old: str, new: str) -> None:
    for cell in code(notebook):
        cell.source = cell.source.replace(old, new)


def _say_of(notebook: NotebookNode, card: str, old: str, new: str) -> None:
    (cell,) = (cell for cell in notebook.cells if card in cell.source)
    cell.source = cell.source.replace(old, new)


def _unset(notebook: NotebookNode, tag: str) -> None:
    for cell in notebook.cells:
        if tag in tags(cell):
            cell.metadata.tags = [other for other in tags(cell) if other != tag]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda n: n.cells[-1].update(id=n.cells[-2].id), "is_valid"),
        (lambda n: n.cells[-1].update(cell_type="poem"), "is_valid"),
        (lambda n: n.metadata.kernelspec.update(name="my-env"), "is_tidy"),
        (lambda n: n.cells[1].metadata.update(execution={"iopub.status.idle": "2025-01-01"}), "is_tidy"),
        (lambda n: code(n)[3].metadata.pop("jupyter"), "is_tidy"),
        (lambda n: n.cells.insert(0, n.cells.pop(2)), "opens_with_its_title"),
        (lambda n: n.cells[1].update(source="PRESET = 'class'"), "has_its_parameters"),
        *((lambda n, tag=tag: _unset(n, tag), "has_its_tags") for tag in REQUIRED_TAGS if tag != "parameters"),
        (lambda n: _unset(n, "nbval-check-output"), "has_its_tags"),
        (lambda n: n.cells[3].update(source="1\n" * 31), "has_short_cells"),
        (lambda n: _replace(n, "twice = lab.answer", "twice = print"), "uses_its_answers"),
        (lambda n: _replace(n, "twice(twice(x))", "double(double(x))"), "uses_its_answers"),
        (lambda n: _replace(n, 'lab.answer("01.1"', 'lab.answer("01.2"'), "uses_its_answers"),
        (lambda n: n.cells[3].update(execution_count=None), "was_run_from_top_to_bottom"),
        (_add(new_code_cell("1", execution_count=1)), "was_run_from_top_to_bottom"),
        (
            lambda n: n.cells[3].outputs.append(new_output("error", ename="E", evalue="", traceback=[])),
            "shows_no_error",
        ),
        (_print("/usr/lib/x.py:3: Warning"), "names_no_folder_of_a_machine"),
        (_print("C:\\Users\\ann"), "names_no_folder_of_a_machine"),
        (_say("It lies in /tmp/results."), "names_no_folder_of_a_machine"),
        (lambda n: code(n)[3].outputs[0].metadata.clear(), "describes_its_pictures"),
        (_say("![](figure.png)"), "describes_its_pictures"),
        (_say('<img src="a.png">'), "describes_its_pictures"),
        (_say("See [lesson 99](99_nothing.ipynb)."), "has_working_local_links"),
        (_say("See [above](#nowhere)."), "has_working_local_links"),
        (_say("As Nobody et al. 2019 show."), "lists_the_papers_it_cites"),
        (_say("(Some and Body 2020)\n\n## References\n\n* Some, Body 2021, *Other*"), "lists_the_papers_it_cites"),
        (lambda n: _replace(n, "lab.say(", "print("), "reads_its_results"),
        (lambda n: _replace(n, 'lab.say("rows"', 'print("rows"'), "reads_its_results"),
        (_add(new_code_cell("lab.beside('x')")), "reads_its_results"),
        (lambda n: n.cells.insert(3, new_code_cell("1")), "has_words_between_its_cells"),
        (lambda n: _replace(n, "A line", "A line" * 20), "has_narrow_lines"),
        (lambda n: _unset(n, "idea"), "pictures_an_idea"),
        (lambda n: code(n)[3].outputs.clear(), "pictures_an_idea"),
        (lambda n: _unset(n, "hide-input"), "pictures_an_idea"),
        (lambda n: code(n)[3].outputs[0].metadata["image/png"].update(type=9.9), "has_type_for_a_phone"),
        (lambda n: _say_of(n, "Exercise 3", "Difficulty 4", "Difficulty 3"), "has_its_exercises"),
        (lambda n: _unset(n, "exercise"), "has_its_exercises"),
        (lambda n: n.cells[0].update(source="# Title"), "links_the_glossary"),
        (lambda n: _unset(n, "challenge"), "has_one_challenge"),
        (lambda n: code(n)[0].metadata.tags.append("challenge"), "has_one_challenge"),
        (lambda n: _replace(n, 'lab.predict("a", ...', 'lab.predict("a", 2.0'), "asks_for_predictions"),
        (lambda n: _replace(n, 'lab.predict("a", ..., unit="x")', "1"), "asks_for_predictions"),
        (lambda n: _replace(n, "lab.claims(", "print("), "shows_its_claims_once"),
        (lambda n: _replace(n, '"1.2")', '"1.2", "1.3", "1.4", "1.5", "1.6")'), "shows_its_claims_once"),
        (lambda n: _replace(n, "plan = None", "rows = [{'limiter': 'memory'}]"), "types_no_limiter"),
        (lambda n: _replace(n, '"Four rows."', '"The time stays flat."'), "types_no_limiter"),
        (lambda n: _replace(n, "x = x", "ax.plot(x)"), "shows_ideas"),
        (lambda n: _replace(n, "x = x", "lab.record('x', x)"), "shows_ideas"),
        (_say("Optional: `labkit" + "[engines]`"), "says_where_labkit_comes_from"),
        (_say("Give `pip install labkit`."), "says_where_labkit_comes_from"),
        (_add(new_code_cell("import torch\nimport labkit")), "says_where_labkit_comes_from"),
        (lambda n: _replace(n, "x = x", "for id in [1]: pass"), "stores_over_no_builtin"),
        (lambda n: _replace(n, "x = x", "from math import pow"), "stores_over_no_builtin"),
        (lambda n: _replace(n, "y =", "def y():\n    global format\n    format ="), "stores_over_no_builtin"),
        (_say("It took 3.5 ms."), "types_no_measured_number"),
        (_say("It streams 3.35 TB/s here."), "types_no_measured_number"),
        (_say("About `40 tokens/s`."), "types_no_measured_number"),
        (_say("It is 1.7x faster."), "types_no_measured_number"),
        (_say("That is 2–3 times slower."), "types_no_measured_number"),
        (_say("A speed-up of about 4."), "types_no_measured_number"),
        (_say("It runs 30 % faster."), "types_no_measured_number"),
    ],
)
def test_what_breaks_a_rule_is_found(change: Callable, rule: str):
    assert rule in breaks(change)


@pytest.mark.parametrize(
    "text",
    [
        "An H100 streams 3.35 TB/s [NVIDIA H100 datasheet 2023].",
        "Section 3 has 4 exercises, 35 to 60 cells and 7 B parameters.",
        "$2 \\cdot 4096^2$ FLOPs; 16 GB; 12 % sparsity; 3 steps; a batch of 8.",
        "![A line that rises](data:image/png;base64,aaaa)",
        "See https://example.org/home/page and data/tmp/x.",
        "See [the claims](claims.toml) and [the top](#Title).",
        "Han et al. 2015; Some and Body (2020).\n\n## References\n\nHan, Pool 2015, *A* · A. Some, B. Body (2020): *B*",
    ],
)
def test_what_is_allowed_is_let_through(text: str):
    assert breaks(_say(text)) == set()


@pytest.mark.parametrize(
    "source",
    [
        'lab.say("x", f"It is limited by {limit}.", flat and "It stays flat.")',
        'word = {"memory": "memory-bound", "compute": "compute-bound"}[limit]',
        'rows = [{"limited by": "flat" if ratio < 1.1 else "rising", "flat": 1}]',
    ],
)
def test_a_limiter_that_is_computed_is_let_through(source: str):
    assert breaks(lambda notebook: _replace(notebook, "plan = None", source)) == set()


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\nx = torch.ones(2)", {"plumbing": 1, "ideas": 1}),
        ("rows = []\nfor x in xs:\n    rows.append({\n        'x': x,\n    })", {"plumbing": 5, "ideas": 0}),
        ("for x in xs:\n    y = f(x)\n    rows += [y]\n    z = y", {"plumbing": 1, "ideas": 3}),
        ("fig, ax = plt.subplots()\nax.plot(x)\nfig.axes[0].set(xlabel='x')", {"plumbing": 3, "ideas": 0}),
        ("_ = lab.compare('a', f, g)\nlab.record('a', 1)\nlab.say('a', 'b')", {"plumbing": 1, "ideas": 2}),
        ("def f(x):\n    rows = []\n    return rows", {"plumbing": 0, "ideas": 3}),
    ],
)
def test_lines_are_counted_by_what_their_statement_does(source: str, lines: dict[str, int]):
    pairs = [pair for statement in ast.parse(source).body for pair in grain.counted(statement)]
    assert {kind: sum(count for name, count in pairs if name == kind) for kind in lines} == lines
