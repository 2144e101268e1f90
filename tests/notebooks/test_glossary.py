"""The glossary: terms in order, one sentence each, and every term in the text of the lesson that it names."""

import re

from course import notebooks
from labkit import files


def terms() -> list[tuple[str, str, str]]:
    text = (files.NOTEBOOKS / "glossary.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d\d) \|$", text, re.MULTILINE)


def plain(text: str) -> str:
    return re.sub(r"[-\s]+", " ", text.lower())


def test_every_term_has_one_sentence_and_stands_in_order():
    names = [term.lower() for term, _, _ in terms()]
    assert len(names) >= 60 and names == sorted(set(names))
    assert [meaning for _, meaning, _ in terms() if not re.fullmatch(r"[A-Z][^.]*\.", meaning)] == []


def test_every_term_occurs_in_the_lesson_that_it_names():
    lessons = {
        path.stem[:2]: plain(" ".join(cell.source for cell in notebooks.read(path).cells))
        for path in notebooks.all_lessons()
    }
    absent = [(term, lesson) for term, _, lesson in terms() if not occurs(term, lessons[lesson])]
    assert absent == []


def occurs(term: str, text: str) -> bool:
    """By its beginning without what stands in brackets, so that plurals count; 'decoding' also as 'decode'."""
    stem = re.sub(r"( point| front| pruning|ing)?$", "", plain(re.sub(r" \(.*\)", "", term)))
    return re.search(rf"\b{re.escape(stem)}", text) is not None
