"""The web site, built once from the repository without a network and then opened in a real browser, page by page."""

import re
import shutil
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import get_args
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from refusals import check_refusal

from course import notebooks, site
from course.formulas import mathml
from labkit import files
from labkit.errors import DataError
from labkit.lesson import claims

pytestmark = pytest.mark.slow

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
    headless: [...document.querySelectorAll("thead")].filter(one => one.checkVisibility() && !one.textContent.trim())
        .map(one => one.parentElement.textContent),
    formulas: document.querySelectorAll("math").length,
    unset: [...document.querySelectorAll("math")].map(one => one.textContent).filter(text => text.includes("\\\\")),
    font: document.fonts.check("16px 'STIX Two Math'"),
})"""


@pytest.fixture(scope="module")
def sphinx() -> None:
    if missing := [name for name in site.NEEDED if site.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed; ./lab site --help installs them")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str], sphinx: None) -> Path:
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
def pages(built: Path, address: str, chromium) -> dict[str, dict]:
    """Every page, as the browser of a phone saw it: LOOK, and what it complained of, asked for and could not name."""
    chromium.resize(*PHONE)
    seen = {}
    for file in sorted(built.rglob("*.html")):
        if "_static" not in file.parts:
            name = file.relative_to(built).as_posix()
            chromium.errors.clear()
            chromium.requests.clear()
            chromium.open(address + name)
            seen[name] = chromium.run(LOOK) | {"errors": [*chromium.errors], "requests": [*chromium.requests]}
            seen[name]["nameless"] = chromium.nameless()
    return seen


def faults(pages: dict[str, dict], *names: str) -> list[tuple]:
    """Page and name of the lists that are not empty but should be."""
    return [(page, name, seen[name]) for page, seen in pages.items() for name in names if seen[name]]


def test_every_lesson_and_generated_page_is_there(pages: dict[str, dict]):
    wanted = {f"notebooks/{path.stem}.html" for path in notebooks.all_lessons()}
    syllabi = files.NOTEBOOKS.glob("syllabi/**/*.md")
    wanted |= {path.relative_to(files.ROOT).with_suffix(".html").as_posix() for path in syllabi}
    assert wanted | {"index.html", "claims.html", "machines.html", "search.html"} <= set(pages)


def test_no_page_complains_or_asks_outside(pages: dict[str, dict], address: str):
    assert faults(pages, "errors") == []
    asked = {url for page in pages.values() for url in page["requests"] if not url.startswith(("data:", "blob:"))}
    assert len(asked) > len(pages)
    assert {url for url in asked if not url.startswith(address)} == set()


def test_no_link_or_anchor_is_broken(pages: dict[str, dict], built: Path, address: str):
    broken = []
    for name, page in pages.items():
        for link in page["links"]:
            target, anchor = urldefrag(urljoin(address + name, link))
            if not target.startswith(address):
                continue
            file = unquote(urlparse(target).path).lstrip("/") or "index.html"
            if not (built / file).is_file() or (anchor and unquote(anchor) not in pages[file]["ids"]):
                broken.append((name, link))
    assert broken == []


def test_every_page_fits_a_phone_and_a_screen_reader(pages: dict[str, dict]):
    assert {name: page["width"] for name, page in pages.items() if page["width"] > PHONE[0]} == {}
    assert {page["language"] for page in pages.values()} == {"en-GB"}
    assert {name: page["headings"] for name, page in pages.items() if page["headings"] != 1} == {}
    assert faults(pages, "broken", "undescribed", "headless", "nameless") == []


def test_formulas_are_set(pages: dict[str, dict]):
    for path in notebooks.all_lessons():
        if any("$" in cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"):
            page = pages[f"notebooks/{path.stem}.html"]
            assert page["formulas"] > 0 and page["font"], path.stem
    assert faults(pages, "flat", "unset") == []  # unset: with a command that the converter did not know


def test_the_first_key_offers_the_way_to_the_content(pages: dict[str, dict], address: str, chromium):
    chromium.open(address + "claims.html")
    for kind in ("keyDown", "keyUp"):
        chromium.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert chromium.run("document.activeElement.getAttribute('href')") == "#main-content"


def test_search_works_without_a_network(address: str, chromium):
    chromium.open(address + "search.html?q=roofline")
    chromium.run("""new Promise(done => {
        const look = n => n && !document.querySelector('#search-results li') ? setTimeout(look, 50, n - 1) : done();
        look(100);
    })""")
    assert chromium.run("document.querySelectorAll('#search-results li').length") > 0


# what the pages say -------------------------------------------------------------------------------


def text_of(page: Path) -> str:
    """The words of a page's article."""
    article = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
    return " ".join(re.sub(r"<[^>]+>", " ", article).split())


def test_figures_carry_the_alt_text_of_the_notebook(built: Path):
    for path in notebooks.all_lessons():
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        wanted = [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
        assert wanted
        page = (built / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        images = re.findall(r'<img alt="([^"]*)"', page)
        unescaped = [unescape(image) for image in images]
        assert [alt for alt in unescaped if alt in wanted] == wanted


def test_answers_are_folded_behind_the_stub(built: Path):
    page = (built / "notebooks" / f"{notebooks.find('03').stem}.html").read_text(encoding="utf-8")
    unfolded = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert "copy.deepcopy((conv" not in re.sub(r"<[^>]+>", "", unfolded)
    assert "copy.deepcopy((conv" in re.sub(r"<[^>]+>", "", page)
    assert "NotImplementedError" in unfolded
    assert "SOLUTION" not in page


def test_every_claim_has_a_verdict_or_says_what_is_missing(built: Path):
    page = (built / "claims.html").read_text(encoding="utf-8")
    row = re.compile(r'<tr[^>]*>\s*<th[^>]*><span id="claim-([\d.]+)">.*?</tr>', re.DOTALL)
    rows = {match[1]: match[0] for match in row.finditer(page)}
    assert list(rows) == list(claims.load())
    states = "|".join((*get_args(claims.Verdict), "not yet measured", "needs a document"))
    assert [claim for claim, row in rows.items() if not re.search(f'class="badge[^>]*>(?:{states})<', row)] == []


def test_the_user_s_runs_stand_beside_the_recorded_ones(built: Path):
    text = text_of(built / "machines.html")
    assert text.index("your run") < text.index("recorded, ")
    assert "There is no run of yours yet" not in text


def test_each_figure_of_a_cell_keeps_its_own_alt_text_and_width():
    def figure(alt: str, picture: str) -> NotebookNode:
        described = {"image/png": {"alt": alt, "width": 653}}
        return new_output("display_data", {"image/png": picture}, metadata=described)

    outputs = [figure("one", "aa"), new_output("stream"), figure('"two"', "bb\n")]
    (shown,) = site.readable(new_notebook(cells=[new_code_cell("draw()", outputs=outputs)])).cells
    assert [output.data["text/html"] for output in shown.outputs if "data" in output] == [
        '<img alt="one" width="653" src="data:image/png;base64,aa">',
        '<img alt="&quot;two&quot;" width="653" src="data:image/png;base64,bb">',
    ]


@pytest.mark.parametrize("latex", [r"\bigl\lvert x\bigr\rvert", r"\lVert w_i \rVert_1", r"\lvert x \rvert"])
def test_bars_of_a_formula_are_known_and_close(latex: str, sphinx: None):
    made = mathml(latex)
    assert "\\" not in made
    assert made.count('<mo lspace="0" rspace="0"') == 2


@pytest.mark.parametrize(
    ("plain", "braced"),
    [
        (r"\binom84 = 70", r"\binom{8}{4} = 70"),
        (r"\binom 8 4 = 70", r"\binom{8}{4} = 70"),
        (r"\mathbb E_x\mathcal L(x)", r"\mathbb{E}_x\mathcal{L}(x)"),
        (r"\partial\mathcal L_x", r"\partial\mathcal{L}_x"),
    ],
)
def test_a_character_is_an_argument_by_itself_as_in_tex(plain: str, braced: str, sphinx: None):
    assert mathml(plain) == mathml(braced)


# building -----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_lesson, sphinx: None) -> Path:
    """A course of the lesson that the first page links to, and one syllabus."""
    folder = tmp_path / "notebooks"
    lesson = write_lesson(folder, "1 + 1", name="00_measuring_honestly").name
    for name in ("claims.toml", "glossary.md"):
        shutil.copy(files.NOTEBOOKS / name, folder)
    (folder / "syllabi" / "notes").mkdir(parents=True)
    (folder / "syllabi" / "README.md").write_text("# Teaching with these lessons\n")  # pages link to it
    (folder / "syllabi" / "notes" / "01.md").write_text("# Notes on lesson 01\n")
    half_day = f"# Half a day\n\n[The lesson](../{lesson}), [notes](notes/01.md).\n"
    (folder / "syllabi" / "half_day.md").write_text(half_day)
    (tmp_path / "README.md").write_text(f"<!-- lessons: -->\n[It](notebooks/{lesson})\n<!-- /lessons -->\n")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "NOTEBOOKS", folder)
    return folder


def test_syllabi_become_pages(small: Path, tmp_path: Path):
    first = site.build(tmp_path / "out" / "html")
    page = (first.parent / "notebooks" / "syllabi" / "half_day.html").read_text(encoding="utf-8")
    assert 'href="../00_measuring_honestly.html"' in page
    assert 'href="notes/01.html"' in page
    assert "syllabi/half_day.html" in first.read_text(encoding="utf-8")
    assert "There is no run of yours yet" in text_of(first.with_name("machines.html"))
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["html"]


def test_a_broken_link_stops_the_build_and_leaves_the_old_site(small: Path, tmp_path: Path):
    out = tmp_path / "out" / "html"
    out.mkdir(parents=True)
    (out / "index.html").write_text("the old one")
    (small / "syllabi" / "half_day.md").write_text("# Half a day\n\n[The lesson](../02_missing.ipynb).\n")
    with pytest.raises(DataError, match=r"half_day\.md.*02_missing\.ipynb"):  # in Sphinx's own lines
        site.build(out)
    assert (out / "index.html").read_text() == "the old one"
    assert [one.name for one in out.parent.iterdir()] == ["html"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path, sphinx: None):
    (tmp_path / "thesis.txt").write_text("ten years")
    check_refusal("holds something else than a site", lambda: site.build(tmp_path))
    assert (tmp_path / "thesis.txt").exists()


def test_missing_packages_are_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site, "NEEDED", ("sphinx_of_tomorrow",))
    check_refusal("sphinx_of_tomorrow; `./lab site` installs it", lambda: site.build(tmp_path / "html"))


def test_a_port_that_is_taken_is_said(tmp_path: Path):
    server = site.serve(tmp_path, 0)
    try:
        check_refusal("is not free ... give another", lambda: site.serve(tmp_path, server.server_port))
    finally:
        server.server_close()
