"""Pieces of a self-contained HTML page, and its frame (page.html): no script, no network, both colour schemes, prints.

Headings and cells are given as HTML; `text` makes HTML of anything else. What a page says is report.py's and grading's.
"""

import base64
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

_TONES = {
    **dict.fromkeys(("confirmed", "finished", "faster", "passed"), "good"),
    **dict.fromkeys(("contradicted", "failed", "slower", "wrong", "broken", "stopped"), "bad"),
    **dict.fromkeys(("inconclusive", "equivalent", "not done", "missing", "differs by machine"), "even"),
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
    return f'<section id="{_anchor(title)}"><h2>{text(title)}</h2>{body}</section>'


def contents(titles: Iterable[str]) -> str:
    """Links to the sections of these titles."""
    links = "".join(f'<li><a href="#{_anchor(title)}">{text(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def figure(png: bytes, alt: str, caption: str, data: str, *, width: int) -> str:
    """A picture that is `width` pixels wide where there is room, with its description and its `data` (HTML) folded."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure><img src="{source}" alt="{text(alt)}" width="{width}"><figcaption>{text(caption)}</figcaption>'
        f"{folded('Description and numbers', f'<p>{text(alt)}</p>{scroll(data)}')}</figure>"
    )


def folded(summary: str, body: str, *, unfolded: bool = False) -> str:
    """`summary` and `body` are HTML; without a script a click unfolds it."""
    return f"<details{' open' * unfolded}><summary>{summary}</summary>{body}</details>"


def scroll(body: str) -> str:
    """A box that scrolls sideways by itself, by keyboard too, so that the page does not."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="table">{body}</div>'


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = False, kinds: Sequence[str] | None = None
) -> str:
    """The first cell of each row is its heading; on a phone a row becomes a card, where each cell knows its column's.

    wide: the second column holds sentences. kinds: a class for each row.
    """
    labels = [text(html.unescape(re.sub(r"<[^>]+>", "", heading.replace("<br>", ", ")))) for heading in headings]

    rows = list(rows)

    def cells(row: Sequence[str]) -> Iterator[str]:
        yield f'<th scope="row" data-label="{labels[0]}">{row[0]}</th>'
        yield from (f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels[1:], row[1:], strict=True))

    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    starts = [f'<tr class="{text(kind)}">' for kind in kinds] if kinds else ["<tr>"] * len(rows)
    body = "".join(f"{start}{''.join(cells(row))}</tr>" for start, row in zip(starts, rows, strict=True))
    framed = f'<table class="cards{" wide" * wide}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scroll(framed)
