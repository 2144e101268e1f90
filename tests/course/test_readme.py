"""README and syllabi show what the notebooks and the records say, and nothing else; their links lead somewhere."""

import ast
import re
from functools import reduce
from importlib.machinery import SourceFileLoader
from inspect import signature

import pytest

import labkit
from course import notebooks
from labkit import files

TEXT = (files.ROOT / "README.md").read_text(encoding="utf-8")


readme = SourceFileLoader("readme", str(files.ROOT / ".ci" / "readme")).load_module()


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda path: str(path.relative_to(files.ROOT)))
def test_a_page_shows_what_is_recorded(page):
    text = page.read_text(encoding="utf-8")
    assert text.split(readme.BEGIN)[1].split(readme.END)[0].strip() == readme.part(page).strip(), "run .ci/readme"


def test_everything_outside_the_markers_is_kept_and_lost_ones_are_said(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(readme, "PAGES", {page: ("lesson",)})
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.main()
    before, after = page.read_text().split(readme.part(page))
    assert (before, after) == (f"before\n{readme.BEGIN}\n", f"\n{readme.END}\nafter\n")
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="put <!-- lessons"):
        readme.main()


def test_labkit_in_one_minute_calls_what_there_is():
    code = ast.parse(TEXT.split("```python")[1].split("```")[0])
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if name.startswith("labkit.") and "(" not in name:
            function = reduce(getattr, name.split(".")[1:], labkit)
            signature(function).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    assert len(calls) > 10


TEXTS = [
    *(files.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "course/site/where_to_run.md")),
    *sorted((files.NOTEBOOKS / "syllabi").rglob("*.md")),
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(files.ROOT)))
def test_local_links_lead_somewhere(text):
    targets = re.findall(r"\]\(\s*<?([^)\s>#]+)", text.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"https?:|mailto:", target)]
    assert [target for target in local if not (text.parent / target).exists()] == []


def test_every_lesson_has_its_instructor_notes():
    notes = {path.stem for path in (files.NOTEBOOKS / "syllabi" / "notes").glob("*.md")}
    assert {path.stem[:2] for path in notebooks.all_lessons()} <= notes


@pytest.mark.parametrize("text", sorted((files.NOTEBOOKS / "syllabi").rglob("*.md")), ids=lambda path: path.name)
def test_no_syllabus_types_a_measured_number(text):
    written = text.read_text(encoding="utf-8")
    outside = written.split(readme.BEGIN)[0] + written.split(readme.END)[-1]
    assert not re.findall(r"\d[\d.,]*\s*(?:ms|µs|s|GB/s|GFLOP/s|tokens/s)\b", outside)
    assert not re.findall(r"\d[\d.,]*\s*(?:x|times|%|per cent) (?:faster|slower|speed|smaller)", outside)


@pytest.mark.slow
def test_the_code_of_the_page_on_ones_own_model_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (files.ROOT / "course" / "site" / "your_model.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"(?s)```python\n(.*?)```", page):
        exec(block, names)
    for call in re.findall(r"`((?:ratio|remove|ignore|within_groups|check)=[^`]*)` \|\n", page):
        options = {"ratio": None if call.startswith("remove") else 0.5, **eval(f"dict({call})", names)}
        assert names["channels"].prune(names["model"], names["images"], **options).report is not None
    before, after = names["pruned"].model(names["images"]), names["again"].eval()(names["images"])
    assert (before == after).all()
