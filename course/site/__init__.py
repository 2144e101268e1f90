"""The web site: lessons, claims and measured machines, built by Sphinx and readable without a network.

The sources are the files of the folder course/site and the notebooks with the stored outputs; no lesson is executed.
`lay_out` copies the sources for Sphinx, laid out as in the repository, so that links between lessons hold, and adds the
pages made from records.
"""

import functools
import html
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat

from course import headlines, notebooks, report, results
from course.formulas import mathml
from course.results import RANGES, RunColumn, side_by_side
from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import claims
from labkit.lesson.claims import Claim
from labkit.lesson.records import MIME

SOURCES = Path(__file__).parent
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml", "ziamath")  # the extra "site"
FONT = "STIXTwoMath-Regular.ttf"  # without a font for formulas, which Linux often lacks, brackets stay small


def build(out: Path, folders: Sequence[Path] = ()) -> Path:
    """Build the site, whole or not at all; returns the path of the first page.

    out      folder of the site, replaced if it holds a site already
    folders  folders of the user's runs; missing folders are passed over

    Raises InputError if Sphinx is not installed or `out` cannot be written, and DataError with Sphinx's words if a page
    is at fault; a warning of Sphinx is an error.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"The site needs {', '.join(missing)}; `./lab site` installs it, elsewhere: pip install -e '.[site]'."
        )
    if out.exists() and not _may_be_replaced(out):
        raise InputError(f"{out} holds something else than a site, and would be replaced; give another folder.")
    with files.refused(f"The site cannot be written to {out}", "fix that first"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            work = Path(folder)
            lay_out(work / "source", folders)
            _sphinx(work / "source", work / "html", work / "doctrees")
            if out.exists():
                out.rename(work / "before")
            (work / "html").rename(out)
    return out / "index.html"


def _may_be_replaced(out: Path) -> bool:
    """Return True for a site or an empty folder."""
    is_site = (out / "index.html").exists()
    is_empty = out.is_dir() and not any(out.iterdir())
    return is_site or is_empty


def serve(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Make a server of `folder` for this machine only; InputError if the port is taken.

    folder  the site
    port    port, 0 for any free port
    """
    handler = functools.partial(_Quiet, directory=str(folder))
    with files.refused(f"Port {port} is not free", "give another, or 0: --port 0"):
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A handler that prints no line per request."""

    def log_message(self, *_: object) -> None:
        pass


def _sphinx(source: Path, pages: Path, doctrees: Path) -> None:
    options = ["--builder", "html", "--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", doctrees]
    command = [sys.executable, "-m", "sphinx", *options, source, pages]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        output = done.stdout.decode(errors="replace")
        words = output.replace(f"{source}{os.sep}", "").strip()
        raise DataError(f"The site was not built; fix what Sphinx says, then try again:\n{words}")


# sources ------------------------------------------------------------------------------------------


def lay_out(source: Path, folders: Sequence[Path] = ()) -> None:
    """Fill a new folder with the input of Sphinx.

    source   the folder
    folders  folders of the user's runs
    """
    shutil.copytree(SOURCES, source, ignore=shutil.ignore_patterns("__*__*"))
    for page in source.glob("*.md"):  # links lead through the repository, whose folders lie beside the pages here
        files.write_text(page, _read(page).replace("](../../", "]("))
    font = Path(find_spec("ziamath").origin).parent / "fonts" / FONT  # the package itself, which draws, is not used
    shutil.copy(font, source / "static")
    titles = {}
    for path in notebooks.all_lessons():
        notebook = notebooks.read(path)
        titles[int(path.stem[:2])] = notebooks.title(notebook)
        files.write_text(source / "notebooks" / path.name, nbformat.writes(readable(notebook)))
    syllabi = sorted(files.NOTEBOOKS.glob("syllabi/**/*.md"), key=lambda path: (len(path.parts), path.name))
    for path in [*syllabi, files.NOTEBOOKS / "glossary.md"]:
        files.write_text(source / _place(path), _read(path))

    columns, problems = _columns(folders)
    files.write_text(source / "claims.md", "\n\n".join(_claims_page(columns, titles)))
    files.write_text(source / "machines.md", "\n\n".join(_machines_page(columns, problems)))
    contents = _contents([_place(path) for path in syllabi])
    home = _read(source / "index.md").replace("<!-- lessons -->", _table_of_lessons())
    home = home.replace("<!-- results -->", headlines.markdown("static", "notebooks"))
    files.write_text(source / "index.md", home.replace("<!-- contents -->", contents))


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _place(page: Path) -> str:
    """Name a page of the folder notebooks/ within the site's sources."""
    return f"notebooks/{page.relative_to(files.NOTEBOOKS).as_posix()}"


def _table_of_lessons() -> str:
    """Read the table of lessons from the README."""
    between_markers = re.search(r"(?s)<!-- lessons: .*?-->(.*)<!-- /lessons -->", _read(files.ROOT / "README.md"))
    return between_markers[1]


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Make a copy of a lesson for reading: figures with alt text, folded answers and set-up, formulas as MathML."""
    copy = notebooks.tidied(notebook)
    cells = []
    for cell in copy.cells:
        cells += _readable_cell(cell)
    copy.cells = cells
    return copy


def _readable_cell(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Change a cell for reading, and put the stub of an exercise before the folded answer."""
    if cell.cell_type != "code":
        cell.source = re.sub(r"<details>.*?</details>", _with_formulas, cell.source, flags=re.DOTALL)
        return [cell]
    for output in cell.outputs:
        _make_readable_(output)
    stub = notebooks.without_solution(cell.source)
    is_exercise = stub != cell.source
    if is_exercise or "setup" in notebooks.tags(cell):
        cell.metadata.tags = [*notebooks.tags(cell), "hide-input"]
    if not is_exercise:
        return [cell]
    cell.source = notebooks.without_markers(cell.source)
    cell.metadata.mystnb = {"code_prompt_show": "Show a worked answer", "code_prompt_hide": "Hide the worked answer"}
    return [nbformat.v4.new_code_cell(stub, id=f"{cell.id}-stub"), cell]


def _make_readable_(output: nbformat.NotebookNode) -> None:
    """Remove the run record from a cell's output, and give a figure its alt text."""
    data = output.get("data", {})
    data.pop(MIME, None)
    if "image/png" in data:
        description = output.metadata.get("image/png", {})
        output.data = {"text/html": _picture(data["image/png"], description)}


def _picture(png: str, description: Mapping[str, Any]) -> str:
    """Write a figure as HTML, since myst-nb has a single alt text for all figures of a cell.

    png          the picture, base64
    description  "alt" and "width", as noted by labkit.show; on a phone a figure shrinks to the page
    """
    alt = html.escape(description.get("alt", ""))
    width = description.get("width", "")
    png = png.replace("\n", "")
    return f'<img alt="{alt}" width="{width}" src="data:image/png;base64,{png}">'


def _with_formulas(folded: re.Match[str]) -> str:
    """Typeset the formulas of HTML in Markdown, which Sphinx passes on without a change."""
    return re.sub(r"\$([^$]+)\$", lambda formula: mathml(formula[1]), folded[0])


# generated pages ----------------------------------------------------------------------------------


def _columns(folders: Sequence[Path]) -> tuple[list[RunColumn], list[str]]:
    """Make a column for each of the user's results and recorded runs, and a sentence for each unreadable result."""
    recorded, problems = results.recorded_runs()
    with_results = [folder for folder in folders if any(folder.rglob("record.json"))]
    if not with_results:
        return side_by_side([], recorded), problems
    mine, unreadable = results.collect(with_results)
    return side_by_side(mine, recorded), [*problems, *unreadable]


def _claims_page(columns: Sequence[RunColumn], titles: Mapping[int, str]) -> Iterator[str]:
    """Yield the paragraphs of the page on claims. `titles` are those of the lessons, by number."""
    yield (
        "# Widespread claims, tested\n\nThe course tests the claims of one written guide to inference optimisation; "
        "sections are the guide's. Each claim stands with the range of values that would confirm it. *Contradicted* "
        "means that the value measured, with its interval, lies outside; *not settled here*, that it rests on less "
        "training than the claim needs. Where a quantity was exchanged after a value was known, the entry says when, "
        f"from what and why. {RANGES}"
    )
    tables = report.template().module
    claims_by_section: dict[int, list[Claim]] = {}
    for claim in claims.load().values():
        claims_by_section.setdefault(claim.section, []).append(claim)
    for section, claims_of_section in claims_by_section.items():
        columns_of_lesson = [column for column in columns if int(column.record.lesson) == section]
        yield f"## {titles.get(section, f'Section {section}')}"
        yield _html(tables.claims_table(claims_of_section, columns_of_lesson))


def _machines_page(columns: Sequence[RunColumn], problems: Sequence[str]) -> Iterator[str]:
    """Yield the paragraphs of the page on machines, with a sentence for each unreadable result at the end."""
    tables = report.template().module
    yield "# Your machine beside the recorded ones"
    if any(column.here for column in columns):
        yield f"Your runs stand first. {RANGES}"
    else:
        yield (
            "There is no run of yours yet. `./lab run 00` measures lesson 00 on your machine; build the site again, "
            f"and your numbers stand beside these. {RANGES}"
        )
    yield f"## Machines\n\n{_html(tables.machines_table(columns))}"
    for lesson in sorted({column.record.lesson for column in columns}):
        columns_of_lesson = [column for column in columns if column.record.lesson == lesson]
        title = columns_of_lesson[0].record.title
        yield f"## {lesson} · {title}\n\n{_html(tables.measurements_table(columns_of_lesson))}"
    for problem in problems:
        yield _html(f"<p>{html.escape(problem)}</p>")


def _contents(syllabi: Sequence[str]) -> str:
    """Write the site's table of contents in MyST. `syllabi` are the pages for a class."""
    parts = {
        "Lessons": ["notebooks/[0-9]*", "notebooks/glossary"],
        "Results": ["claims", "machines"],
        "In practice": ["where_to_run", "your_model"],
    }
    if syllabi:
        parts["For a class"] = [name.removesuffix(".md") for name in syllabi]
    trees = []
    for caption, pages in parts.items():
        listed = "\n".join(pages)
        trees.append(f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```")
    return "\n\n".join(trees)


def _html(tables: str) -> str:
    """Wrap HTML as a block of Markdown."""
    return f"```{{raw}} html\n{tables}\n```"
