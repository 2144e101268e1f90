"""The lessons, the claims that they test and the measured machines as a web site without a network, built by Sphinx.

The sources are this folder's files and the notebooks with their stored outputs; nothing is executed. This module lays
them out for Sphinx as they lie in the repository, so that links between lessons hold, and adds the pages made from
records.
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

from course import notebooks, report, results
from course.results import RunColumn, side_by_side
from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import claims
from labkit.lesson.records import MIME

SOURCES = Path(__file__).parent
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml", "ziamath")  # the extra "site"
FONT = "STIXTwoMath-Regular.ttf"  # without a font for formulas, which Linux often lacks, brackets stay small
UNSTRETCHED = ' stretchy="false"'


def build(out: Path, folders: Sequence[Path] = ()) -> Path:
    """Build the site into `out`, whole or not at all, and return its first page. A warning of Sphinx is an error.

    folders: where the user's own runs are; those that are not there are passed over. InputError where Sphinx is not
    installed or `out` cannot be written, DataError with Sphinx's words where a page is at fault.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"The site needs {', '.join(missing)}; `./lab site` installs it, elsewhere: pip install -e '.[site]'."
        )
    if out.exists() and not (out / "index.html").exists() and (not out.is_dir() or any(out.iterdir())):
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


def serve(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of `folder` on this machine only; port 0 takes any that is free. InputError where the port is taken."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with files.refused(f"Port {port} is not free", "give another, or 0: --port 0"):
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _sphinx(source: Path, pages: Path, doctrees: Path) -> None:
    options = ["--builder", "html", "--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", doctrees]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, source, pages], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        words = done.stdout.decode(errors="replace").replace(f"{source}{os.sep}", "").strip()
        raise DataError(f"The site was not built; fix what Sphinx says, then try again:\n{words}")


# sources ------------------------------------------------------------------------------------------


def lay_out(source: Path, folders: Sequence[Path] = ()) -> None:
    """Fill the new folder `source` with all that Sphinx reads."""
    shutil.copytree(SOURCES, source, ignore=shutil.ignore_patterns("__*__*"))
    for page in source.glob("*.md"):  # links lead through the repository, whose folders lie beside the pages here
        files.write_text(page, page.read_text(encoding="utf-8").replace("](../../", "]("))
    font = Path(find_spec("ziamath").origin).parent / "fonts" / FONT  # the package itself, which draws, is not used
    shutil.copy(font, source / "static")
    for path in notebooks.all_lessons():
        notebook = readable(notebooks.read(path))
        files.write_text(source / "notebooks" / path.name, nbformat.writes(notebook))
    syllabi = sorted(files.NOTEBOOKS.glob("syllabi/**/*.md"), key=lambda path: (len(path.parts), path.name))
    names = [f"notebooks/{path.relative_to(files.NOTEBOOKS).as_posix()}" for path in syllabi]
    for path, name in zip([*syllabi, files.NOTEBOOKS / "glossary.md"], [*names, "notebooks/glossary.md"], strict=True):
        files.write_text(source / name, path.read_text(encoding="utf-8"))

    columns, problems = _columns(folders)
    files.write_text(source / "claims.md", "\n\n".join(_claims_page(columns)))
    files.write_text(source / "machines.md", "\n\n".join(_machines_page(columns, problems)))
    home = (source / "index.md").read_text(encoding="utf-8")
    lessons = re.search(r"(?s)<!-- lessons: .*?-->(.*)<!-- /lessons -->", (files.ROOT / "README.md").read_text("utf-8"))
    home = home.replace("<!-- lessons -->", lessons[1]).replace("<!-- contents -->", _contents(names))
    files.write_text(source / "index.md", home)


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy for reading: figures carry their alt text, answers and set-up are folded, formulas in folded text set."""
    copy = notebooks.tidied(notebook)
    copy.cells = [shown for cell in copy.cells for shown in _readable_cell(cell)]
    return copy


def _readable_cell(cell: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    if cell.cell_type != "code":
        cell.source = re.sub(r"<details>.*?</details>", _with_formulas, cell.source, flags=re.DOTALL)
        yield cell
        return
    folded = "setup" in notebooks.tags(cell)
    stub = notebooks.without_solution(cell.source)
    if stub != cell.source:
        yield nbformat.v4.new_code_cell(stub, id=f"{cell.id}-stub")
        cell.source = notebooks.without_markers(cell.source)
        prompts = {"code_prompt_show": "Show a worked answer", "code_prompt_hide": "Hide the worked answer"}
        cell.metadata.mystnb, folded = prompts, True
    if folded:
        cell.metadata.tags = [*notebooks.tags(cell), "hide-input"]
    for output in cell.outputs:
        data = output.get("data", {})
        data.pop(MIME, None)
        if "image/png" in data:
            output.data = {"text/html": _picture(data["image/png"], output.metadata.get("image/png", {}))}
    yield cell


def _picture(picture: str, described: Mapping[str, Any]) -> str:
    """A figure as HTML, since myst-nb has one alt text for all figures of a cell; on a phone it shrinks to the page."""
    alt, width = html.escape(described.get("alt", "")), described.get("width", "")
    picture = picture.replace("\n", "")
    return f'<img alt="{alt}" width="{width}" src="data:image/png;base64,{picture}">'


def _with_formulas(folded: re.Match[str]) -> str:
    """HTML in Markdown is passed on as it is, so its formulas are typeset here."""
    return re.sub(r"\$([^$]+)\$", lambda formula: mathml(formula[1]), folded[0])


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as MathML; display: "inline" or "block". conf.py calls it too."""
    from latex2mathml.converter import convert

    latex = re.sub(r"(\\[bB]igg?[lr]) *\\[lr]vert", r"\1|", latex)  # the converter has \lvert, but not as a delimiter
    latex = re.sub(r"(\\[dt]?binom) *(\d) *(\d)", r"\1{\2}{\3}", latex)  # and reads 84 as one number after \binom
    latex = re.sub(r"(\\math(?:bb|bf|cal|frak|it|rm|scr|sf|tt)) *([A-Za-z])", r"\1{\2}", latex)  # nor E after \mathbb
    bars = r"<mo([^>]*)>(?=(?:&#x02016;|&#x0007C;|\|)</mo>)"  # browsers space them as infix, and stretch one of two
    close = ' lspace="0" rspace="0"'
    return re.sub(bars, lambda mo: f"<mo{close}{mo[1] or UNSTRETCHED}>", convert(latex, display=display))


# generated pages ----------------------------------------------------------------------------------


def _columns(folders: Sequence[Path]) -> tuple[list[RunColumn], list[str]]:
    recorded, problems = results.recorded_runs()
    folders = [folder for folder in folders if any(folder.rglob("record.json"))]
    mine, unreadable = results.collect(folders) if folders else ([], [])
    return side_by_side(mine, recorded), [*problems, *unreadable]


def _claims_page(columns: Sequence[RunColumn]) -> Iterator[str]:
    yield (
        "# Widespread claims, tested\n\nThe course tests the claims of one written guide to inference optimisation; "
        "sections are the guide's. Each claim stands with the range of values that would confirm it. *Contradicted* "
        "means that the value measured, with its interval, lies outside; *not settled here*, that it rests on less "
        "training than the claim needs. Where a quantity was exchanged after a value was known, the entry says when, "
        "from what and why. A range in brackets is a 95 % interval."
    )
    entries, tables = claims.load().values(), report.template().module
    titles = {int(path.stem[:2]): notebooks.title(notebooks.read(path)) for path in notebooks.all_lessons()}
    for section in dict.fromkeys(claim.section for claim in entries):
        here = [column for column in columns if int(column.record.lesson) == section]
        yield f"## {titles.get(section, f'Section {section}')}"
        yield _html(tables.claims_table([claim for claim in entries if claim.section == section], here))


def _machines_page(columns: Sequence[RunColumn], problems: Sequence[str]) -> Iterator[str]:
    tables = report.template().module
    yield "# Your machine beside the recorded ones"
    if any(column.here for column in columns):
        yield "Your runs stand first. A range in brackets is a 95 % interval."
    else:
        yield (
            "There is no run of yours yet. `./lab run 00` measures lesson 00 on your machine; build the site again, "
            "and your numbers stand beside these. A range in brackets is a 95 % interval."
        )
    yield f"## Machines\n\n{_html(tables.machines_table(columns))}"
    for lesson in sorted({column.record.lesson for column in columns}):
        here = [column for column in columns if column.record.lesson == lesson]
        yield f"## {here[0].record.lesson} · {here[0].record.title}\n\n{_html(tables.measurements_table(here))}"
    yield from (_html(f"<p>{html.escape(problem)}</p>") for problem in problems)


def _contents(syllabi: Sequence[str]) -> str:
    parts = {"Lessons": "notebooks/[0-9]*\nnotebooks/glossary", "Results": "claims\nmachines"}
    parts["In practice"] = "where_to_run\nyour_model"
    if syllabi:
        parts["For a class"] = "\n".join(name.removesuffix(".md") for name in syllabi)
    tree = "```{{toctree}}\n:hidden:\n:glob:\n:caption: {}\n\n{}\n```"
    return "\n\n".join(tree.format(*part) for part in parts.items())


def _html(tables: str) -> str:
    """The HTML as a block of Markdown."""
    return f"```{{raw}} html\n{tables}\n```"
