"""What the lessons say at the edges of what can be measured: equal sides, zero, one row, nothing, infinite, undefined.

Every argument of every `lab.say` is rendered there (edges.py) and read by RULES. The list of all sentences is written
to build/sentences/<lesson>.txt, for a person to read.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import edges
import nbformat
import pytest
from edges import EDGES, Said
from nbformat.v4 import new_code_cell, new_notebook

from course import notebooks
from labkit import files

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:\s?(?:%|x|dB|ms|µs|s|points))?"
NO_DIGIT = r"(?!\d|\.\d)"
EQUAL_ENDS = re.compile(rf"(?<![\d.])({NUMBER}){UNIT} to ({NUMBER}){NO_DIGIT}|\[({NUMBER}), ({NUMBER})\]")
BETWEEN = re.compile(rf"\bbetween ({NUMBER}){UNIT}(?: \([^)]*\))? and ({NUMBER}){NO_DIGIT}")
UNDEFINED = re.compile(r"(?<![a-z])(?:nan|inf)(?![a-wyz])", re.IGNORECASE)
REPEATED = re.compile(r"([^<>;:,]{16,}),? and \1")
CLAIM = r"(?:faster|slower|fastest|buys most|gains most|times as fast)"
DENIAL = r"(?:no difference|equally fast|cannot be told|not told apart)"
WITHIN = r"(?:[^.;:]|\.(?=\d))*"  # a clause
CONTRADICTION = re.compile(rf"\b{CLAIM}\b{WITHIN}\b{DENIAL}\b|\b{DENIAL}\b{WITHIN}\b{CLAIM}\b")
OF_ONE = re.compile(r"(?<![\d.,])[01] of 1(?![\d.,])")

# Drawings and tables of fixed content: their counts and ranges do not depend on a run.
FIXED = {
    ("01", "fits-say"): "named models",
    ("01", "fleet-table"): "the rows of a fleet",
    ("02", "mask-figure"): "a drawing of 24 weights",
    ("02", "cpu-say"): "kernels, batches and sparsities",
    ("03", "pareto-read"): "budgets and rules",
    ("04", "head-picture-show"): "the heads of a drawing",
    ("06", "probe-table"): "the kernels of torch",
    ("11", "blocks-read"): "the blocks of a length",
    ("12", "load-read"): "servers and loads",
    ("13", "gate-table"): "versions",
}


# rules: each yields what is silly in a sentence -----------------------------------------------------------------------


def has_no_interval_with_equal_ends(said: Said) -> Iterator[str]:
    for text in said.sentences:
        for hit in EQUAL_ENDS.finditer(text):
            ends = [end for end in hit.groups() if end is not None]
            if float(ends[0].replace(",", "")) == float(ends[-1].replace(",", "")):
                yield hit[0]
        if (said.lesson, said.cell) not in FIXED:
            yield from (hit[0] for hit in BETWEEN.finditer(text) if hit[1] == hit[2])


def prints_no_undefined_number(said: Said) -> Iterator[str]:
    for text in said.sentences:
        yield from (hit[0] for hit in UNDEFINED.finditer(text))


def repeats_no_clause(said: Said) -> Iterator[str]:
    for text in said.sentences:
        yield from (hit[0] for hit in REPEATED.finditer(text) if re.search(r"\d", hit[0]))


def does_not_contradict_itself(said: Said) -> Iterator[str]:
    for text in said.sentences:
        yield from (hit[0] for hit in CONTRADICTION.finditer(text))


def counts_no_part_of_one(said: Said) -> Iterator[str]:
    """Only with one row: elsewhere a stand-in's number is no count."""
    if said.edge == "one row" and (said.lesson, said.cell) not in FIXED:
        for text in said.sentences:
            yield from (hit[0] for hit in OF_ONE.finditer(text))


RULES = [
    has_no_interval_with_equal_ends,
    prints_no_undefined_number,
    repeats_no_clause,
    does_not_contradict_itself,
    counts_no_part_of_one,
]


@pytest.mark.parametrize("lesson", notebooks.all_lessons(), ids=lambda path: path.stem)
def test_no_sentence_is_silly_at_an_edge(lesson: Path):
    said, never = rendered(lesson)
    lines = [f"{one.cell} [{one.edge}]: {' '.join(one.sentences)}" for one in said]
    files.write_text(files.ROOT / "build" / "sentences" / f"{lesson.stem}.txt", "\n".join(lines) + "\n")
    assert never == []
    silly = []
    for one in said:
        for rule in RULES:
            silly += [f"{one.cell}, {one.edge}: {hit!r}, by {rule.__name__}" for hit in rule(one)]
    assert silly == []


def rendered(lesson: Path) -> tuple[list[Said], list[str]]:
    """Return all sentences of a lesson, and the arguments of lab.say that no edge could render."""
    notebook = nbformat.v4.reads(lesson.read_text(encoding="utf-8"))
    said, never = [], []
    for cell in filter(edges.says, notebook.cells):
        saying, failures = edges.SayingCell(notebook, cell), []
        for name, edge in EDGES.items():
            groups, failed = saying.sentences(edge)
            said += [Said(lesson.stem[:2], cell.id, name, group) for group in groups]
            failures.append(set(failed))
        never += [f"{cell.id}: {argument}" for argument in set.intersection(*failures)]
    return said, never


# the rules and the stand-ins themselves -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("It takes 0.93x to 0.93x of the time.", has_no_interval_with_equal_ends),
        ("It gains 1.05 [1.05, 1.05].", has_no_interval_with_equal_ends),
        ("From 1.0 to 1.00 ms.", has_no_interval_with_equal_ends),
        ("They lie between 1.80 and 1.80.", has_no_interval_with_equal_ends),
        ("It is 0.00x to inf x.", prints_no_undefined_number),
        ("It is NaN times as fast.", prints_no_undefined_number),
        (
            "It is 11.78 (11.5 to 12.0) times as fast as eager and 11.78 (11.5 to 12.0) times as fast as eager.",
            repeats_no_clause,
        ),
        ("What buys most is AMX, by 4.65 times, no difference that can be told.", does_not_contradict_itself),
        ("0 of 1 recorded intervals do not overlap yours.", counts_no_part_of_one),
    ],
)
def test_what_is_silly_is_found(text: str, rule):
    assert list(rule(Said("00", "cell", "one row", [text])))
    others = [other for other in RULES if other is not rule]
    assert not any(list(other(Said("00", "cell", "one row", [text]))) for other in others)


@pytest.mark.parametrize(
    "text",
    [
        "It takes 0.931x to 0.934x of the time.",
        "It is 1.8 times as fast (1.6 to 2.0 over 5 processes), and no slower with 2 rows.",
        "1 of 12 layers and 10 of 14 heads changed.",
        "The first is 2.0 times as fast; for the second no difference can be told: it is finance.",
    ],
)
def test_what_is_fine_is_let_through(text: str):
    assert not any(list(rule(Said("00", "cell", "one row", [text]))) for rule in RULES)


CELL = """
gap = difference("a", "b")
word = "better" if gap[1] > 0 else "not told apart"
lab.say("gap", f"a over b: {gap[0]:+.1f} points ({show.interval(gap[1:], form='+.1f')}), {word}.", rows and "Rows.")
"""


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        ("equal sides", "a over b: +1.0 points (+1.0 at both ends), better. Rows."),
        ("close ends", "a over b: +0.9 points (+0.931 to +0.934), better. Rows."),
        ("zero", "a over b: +0.0 points (+0.0 at both ends), not told apart. Rows."),
        ("nothing", "a over b: +0.0 points (+0.0 at both ends), not told apart."),
        ("no interval", "a over b: +1.8 points (no interval), not told apart. Rows."),
        ("undefined", "Rows."),
    ],
)
def test_a_cell_is_rendered_at_an_edge_without_what_it_measured(edge: str, words: str):
    cell = new_code_cell(CELL)
    (sentences,), failed = edges.SayingCell(new_notebook(cells=[cell]), cell).sentences(EDGES[edge])
    assert (" ".join(sentences), failed) == (words, [])
