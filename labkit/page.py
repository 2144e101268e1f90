"""Pieces of a self-contained HTML page, and its frame (page.html): no script, no network, both colour schemes, prints.

Headings and cells are given as HTML; `text` makes HTML of anything else. What a page says is report.py's and grading's.
"""

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

_TONES = {
    **dict.fromkeys(("confirmed", "finished", "faster", "passed"), "good"),
    **dict.fromkeys(("contradicted", "failed", "slower", "wrong", "broken", "stopped"), "bad"),
    **dict.fromkeys(("inconclusive", "equivalent", "not done", "missing"), "even"),
}


def whole(title: str, intro: str, body: str) -> str:
    """The page; `intro` and `body` are HTML."""
    frame = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return frame.substitute(title=text(title), intro=intro, body=body)


def text(value: Any) -> str:
    return html.escape(str(value))


def badge(kind: str, words: str) -> str:
    """Told apart by its words, not by colour alone."""
    return f'<span class="badge {_TONES.get(kind, "plain")}">{text(words)}</span>'


def section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = False) -> str:
    """The first cell of each row is its heading."""

    def cells(row: Sequence[str]) -> Iterator[str]:
        yield f'<th scope="row">{row[0]}</th>'
        yield from (f"<td>{cell}</td>" for cell in row[1:])

    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(cells(row))}</tr>" for row in rows)
    framed = f"<table{' class=wide' * wide}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{framed}</div>'
