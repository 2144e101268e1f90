"""The web site, built once from the repository without a network and then opened in a real browser, page by page."""

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course import notebooks, site
from labkit import claims, files
from labkit.errors import DataError, InputError

missing = [name for name in site.NEEDED if site.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(missing), reason=f"{missing} not installed; ./lab site --help installs them")

PHONE = (360, 740)
LOOK = """({
    language: document.documentElement.lang,
    headings: [...document.querySelectorAll("h1")].filter(one => one.checkVisibility()).length,
    width: document.scrollingElement.scrollWidth,
    links: [...document.querySelectorAll("a[href]")].map(link => link.href),
    ids: [...document.querySelectorAll("[id]")].map(one => one.id),
    undescribed: [...document.images].filter(image => !image.alt.trim()).map(image => image.src),
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    flat: [...document.querySelectorAll("math")].filter(one => one.checkVisibility())
        .filter(one => one.getBoundingClientRect().height < 5).map(one => one.textContent),
    formulas: document.querySelectorAll("math").length,
    unset: [...document.querySelectorAll("math")].map(one => one.textContent).filter(text => text.includes("\\\\")),
    font: document.fonts.check("16px 'STIX Two Math'"),
})"""


@dataclass
class Page:
    """What the browser found on a page."""

    seen: dict
    errors: list[str]
    requests: list[str]
    nameless: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str]) -> Path:
    """The site with one run of the user's own, made of a recorded one."""
    folder = tmp_path_factory.mktemp("site")
    own = folder / "runs" / "01_own"
    own.mkdir(parents=True)
    shutil.copy(next(files.RECORDED.glob("*/01.json")), own / "record.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", offline["PYTHONPATH"])
        return site.build(folder / "html", [folder / "runs"]).parent


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    server = site.serve(built, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pages(built: Path, address: str, chromium) -> dict[str, Page]:
    """Every page, as the browser of a phone found it."""
    chromium.resize(*PHONE)
    found = {}
    for file in sorted(built.rglob("*.html")):
        if "_static" not in file.parts:
            name = file.relative_to(built).as_posix()
            chromium.errors.clear()
            chromium.requests.clear()
            chromium.open(address + name)
            found[name] = Page(chromium.run(LOOK), list(chromium.errors), list(chromium.requests), chromium.nameless())
    return found


def faults(pages: dict[str, Page], name: str) -> dict[str, list]:
    """The pages on which a list is not empty."""
    return {page: here for page, one in pages.items() if (here := one.seen.get(name, getattr(one, name, None)))}


@needs_sphinx
def test_every_lesson_and_generated_page_is_there(pages: dict[str, Page]):
    wanted = {f"notebooks/{path.stem}.html" for path in notebooks.all_lessons()}
    syllabi = files.NOTEBOOKS.glob("syllabi/**/*.md")
    wanted |= {path.relative_to(files.ROOT).with_suffix(".html").as_posix() for path in syllabi}
    assert wanted | {"index.html", "claims.html", "machines.html", "search.html"} <= set(pages)


@needs_sphinx
def test_no_page_complains_or_asks_outside(pages: dict[str, Page], address: str):
    assert faults(pages, "errors") == {}
    asked = {url for page in pages.values() for url in page.requests if not url.startswith(("data:", "blob:"))}
    assert len(asked) > len(pages)
    assert {url for url in asked if not url.startswith(address)} == set()


@needs_sphinx
def test_no_link_or_anchor_is_broken(pages: dict[str, Page], built: Path, address: str):
    broken = []
    for name, page in pages.items():
        for link in page.seen["links"]:
            target, anchor = urldefrag(urljoin(address + name, link))
            if not target.startswith(address):
                continue
            file = unquote(urlparse(target).path).lstrip("/") or "index.html"
            if not (built / file).is_file() or (anchor and unquote(anchor) not in pages[file].seen["ids"]):
                broken.append((name, link))
    assert broken == []


@needs_sphinx
def test_every_page_fits_a_phone(pages: dict[str, Page]):
    assert {name: page.seen["width"] for name, page in pages.items() if page.seen["width"] > PHONE[0]} == {}


@needs_sphinx
def test_every_image_loads_and_has_its_description(pages: dict[str, Page]):
    assert faults(pages, "broken") == {}
    assert faults(pages, "undescribed") == {}


@needs_sphinx
def test_formulas_are_set(pages: dict[str, Page]):
    for path in notebooks.all_lessons():
        if any("$" in cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"):
            page = pages[f"notebooks/{path.stem}.html"]
            assert page.seen["formulas"] > 0, path.stem
            assert page.seen["font"], path.stem
    assert faults(pages, "flat") == {}
    assert faults(pages, "unset") == {}  # a command that the converter did not know


@needs_sphinx
def test_a_screen_reader_finds_language_heading_and_names(pages: dict[str, Page]):
    assert {page.seen["language"] for page in pages.values()} == {"en-GB"}
    assert {name: page.seen["headings"] for name, page in pages.items() if page.seen["headings"] != 1} == {}
    assert faults(pages, "nameless") == {}


@needs_sphinx
def test_the_first_key_offers_the_way_to_the_content(pages: dict[str, Page], address: str, chromium):
    chromium.open(address + "claims.html")
    for kind in ("keyDown", "keyUp"):
        chromium.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert chromium.run("document.activeElement.getAttribute('href')") == "#main-content"


@needs_sphinx
def test_search_works_without_a_network(address: str, chromium):
    chromium.open(address + "search.html?q=roofline")
    chromium.run("""new Promise(done => {
        const look = n => n && !document.querySelector('#search-results li') ? setTimeout(look, 50, n - 1) : done();
        look(100);
    })""")
    assert chromium.run("document.querySelectorAll('#search-results li').length") > 0


# what the pages say -------------------------------------------------------------------------------


class Text(HTMLParser):
    """The words of a page's article, without scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words, self.inside = [], []
        article = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        self.feed(article)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def __str__(self) -> str:
        return " ".join("".join(self.words).split())


@needs_sphinx
def test_figures_carry_the_alt_text_of_the_notebook(built: Path):
    for path in notebooks.all_lessons():
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        wanted = [one.metadata["image/png"]["alt"] for one in outputs if "image/png" in one.get("data", {})]
        page = (built / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        images = re.findall(r'<img alt="([^"]*)"', page)
        unescaped = [unescape(image) for image in images]
        assert [alt for alt in unescaped if alt in wanted] == wanted


@needs_sphinx
def test_answers_are_folded_behind_the_stub(built: Path):
    page = (built / "notebooks" / f"{notebooks.find('03').stem}.html").read_text(encoding="utf-8")
    unfolded = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert "copy.deepcopy((conv" not in re.sub(r"<[^>]+>", "", unfolded)
    assert "copy.deepcopy((conv" in re.sub(r"<[^>]+>", "", page)
    assert "NotImplementedError" in unfolded
    assert "SOLUTION" not in page


@needs_sphinx
def test_every_claim_has_a_verdict_or_says_what_is_missing(built: Path):
    page = (built / "claims.html").read_text(encoding="utf-8")
    row = re.compile(r'<tr[^>]*>\s*<th[^>]*><span id="claim-([\d.]+)">.*?</tr>', re.DOTALL)
    rows = {match[1]: match[0] for match in row.finditer(page)}
    assert list(rows) == list(claims.load())
    said = "confirmed|contradicted|inconclusive|not measurable here|not yet measured|needs a document"
    assert [claim for claim, row in rows.items() if not re.search(f'class="badge[^>]*>(?:{said})<', row)] == []


@needs_sphinx
def test_the_user_s_runs_stand_beside_the_recorded_ones(built: Path):
    text = str(Text(built / "machines.html"))
    assert text.index("your run") < text.index("recorded, ")
    assert "There is no run of yours yet" not in text


def test_each_figure_of_a_cell_keeps_its_own_alt_text():
    figure = lambda alt: new_output("display_data", {"image/png": "aa"}, metadata={"image/png": {"alt": alt}})  # noqa: E731
    cell = new_code_cell("draw()", outputs=[figure("one"), new_output("stream"), figure('"two"')])
    (shown,) = site.readable(new_notebook(cells=[cell])).cells
    pictures = [output.data["text/html"] for output in shown.outputs if "data" in output]
    assert [re.match('<img alt="([^"]*)" src="data:image/png;base64,aa">', one)[1] for one in pictures] == [
        "one",
        "&quot;two&quot;",
    ]


@needs_sphinx
@pytest.mark.parametrize("latex", [r"\bigl\lvert x\bigr\rvert", r"\lVert w_i \rVert_1", r"\lvert x \rvert"])
def test_bars_of_a_formula_are_known_and_close(latex: str):
    made = site.mathml(latex)
    assert "\\" not in made
    assert made.count('<mo lspace="0" rspace="0"') == 2


@needs_sphinx
@pytest.mark.parametrize("plain", [r"\binom84 = 70", r"\binom 8 4 = 70"])
def test_a_digit_is_an_argument_by_itself_as_in_tex(plain: str):
    assert site.mathml(plain) == site.mathml(r"\binom{8}{4} = 70")


# building -----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_lesson) -> Path:
    """A course of one lesson and one syllabus that links to it."""
    folder = tmp_path / "notebooks"
    write_lesson(folder, "1 + 1")
    shutil.copy(files.NOTEBOOKS / "claims.toml", folder)
    (folder / "syllabi" / "notes").mkdir(parents=True)
    (folder / "syllabi" / "notes" / "01.md").write_text("# Notes on lesson 01\n")
    half_day = "# Half a day\n\n[The lesson](../01_small.ipynb), [notes](notes/01.md).\n"
    (folder / "syllabi" / "half_day.md").write_text(half_day)
    (tmp_path / "README.md").write_text("<!-- lessons: -->\n[It](notebooks/01_small.ipynb)\n<!-- /lessons -->\n")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "NOTEBOOKS", folder)
    return folder


@needs_sphinx
def test_syllabi_become_pages(small: Path, tmp_path: Path):
    first = site.build(tmp_path / "out" / "html")
    page = (first.parent / "notebooks" / "syllabi" / "half_day.html").read_text(encoding="utf-8")
    assert 'href="../01_small.html"' in page
    assert 'href="notes/01.html"' in page
    assert "syllabi/half_day.html" in first.read_text(encoding="utf-8")
    assert "There is no run of yours yet" in str(Text(first.with_name("machines.html")))
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["html"]


@needs_sphinx
def test_a_broken_link_stops_the_build_and_leaves_the_old_site(small: Path, tmp_path: Path):
    out = tmp_path / "out" / "html"
    out.mkdir(parents=True)
    (out / "index.html").write_text("the old one")
    (small / "syllabi" / "half_day.md").write_text("# Half a day\n\n[The lesson](../02_missing.ipynb).\n")
    with pytest.raises(DataError, match=r"half_day\.md.*02_missing\.ipynb"):
        site.build(out)
    assert (out / "index.html").read_text() == "the old one"
    assert [one.name for one in out.parent.iterdir()] == ["html"]


@needs_sphinx
def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(InputError, match="holds something else than a site"):
        site.build(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_missing_packages_are_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site, "NEEDED", ("sphinx_of_tomorrow",))
    with pytest.raises(InputError, match=r"sphinx_of_tomorrow; `\./lab site` installs it"):
        site.build(tmp_path / "html")


def test_a_port_that_is_taken_is_said(tmp_path: Path):
    server = site.serve(tmp_path, 0)
    try:
        with pytest.raises(InputError, match=r"is not free .* give another"):
            site.serve(tmp_path, server.server_port)
    finally:
        server.server_close()
