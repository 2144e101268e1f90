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

ALL_NAMES_ALIKE = "one of each"  # the edge at which every text is "1"
COUNTED = (  # nouns that a sentence counts
    "alarms|answers|blocks|builds|bytes|calls|cells|channels|codes|combinations|comparisons|copies|devices|draws|faults|"
    "forecasts|guesses|images|intervals|kernels|layers|operators|outputs|points|queries|requests|rows|rules|seeds|"
    "sequences|spans|steps|sums|systems|texts|threads|times|tokens|values|versions|weights|windows"
)
A_ONE = r"(?<!batch )(?<!section )(?<![oO]f )(?<![\d.,/+-])\b1"  # no name, and no sum
OF_SOME = r"(?: of (?:the )?\d[\d,]*)?"
RATIO = r"(?! (?:as|fewer|less|the|that|smaller|labkit))"  # "1 times as fast" is a rounded ratio, no count
PLURAL_OF_ONE = re.compile(rf"{A_ONE} (?:(?!all )[a-z]+ )?(?:{COUNTED})\b{RATIO}")
VERB_OF_SEVERAL = re.compile(
    rf"{A_ONE}{OF_SOME}(?: (?:[a-z]+ )?(?:{COUNTED}))? "
    "(?:are|have|do|get|give|lose|lie|declare|exceed|reach|gain|run)\\b"
)
NOTHING_LISTED = re.compile(r":\s*[.;,)]|\(\s*[.;,]|\s[.;:!?)](?!\d)|\s,|\s\s|^\s|\s$")
MINUS_OF_ZERO = re.compile(r"(?<![\w.)^-])-0(?:\.0+)?(?!\.?\d)")
CUT_FROM_ITS_UNIT = re.compile(r"(?:at both ends|no interval) (?:%|points|dB|ms|times|tokens|of)(?!\w)")
INTERVAL_OF_NONE = re.compile(r"interval (?:of )?no interval")
SMALL_LETTER = re.compile(r"^(?!labkit )[a-z]+ ")
DIFFERENCE_IN_TIMES = re.compile(rf"\bby {NUMBER} times\b")

# Lists, counts and ranges that no run changes: a list that is never empty, a number that is never one.
FIXED = {
    ("00", "coverage-show"): "the settings of a record",
    ("00", "ladder"): "simulated tests of one seed",
    ("00", "promise-say"): "simulated tests of one seed",
    ("00", "sweep-show"): "simulated tests of one seed",
    ("00", "wrong-result"): "three benchmarks on a simulated machine",
    ("02", "promise-say"): "the network of a record",
    ("03", "plans-answer"): "points lost, with their interval",
    ("03", "scan-figure"): "the images of validation",
    ("04", "challenge-show"): "the test texts",
    ("05", "calibration-say"): "lengths of text",
    ("05", "challenge-show"): "three recipes",
    ("05", "pattern-show"): "a row of eight weights",
    ("06", "challenge-say"): "recipes, and the test images",
    ("06", "child-table"): "the sums of a product",
    ("06", "db-show"): "sources",
    ("07", "first-answer"): "the images of a record",
    ("07", "granularity-read"): "two networks",
    ("07", "nearest-picture"): "a drawing of four weights",
    ("07", "repairs-read"): "the images of a preset",
    ("07", "result-read"): "the draws of a record",
    ("07", "scan-figure"): "the weights of ResNet-20",
    ("07", "size-figure"): "sizes of calibration of a preset",
    ("08", "edge-picture-read"): "a weight in a drawing",
    ("08", "first-read"): "steps of a preset",
    ("08", "losing"): "widths of a record",
    ("08", "loss-read"): "the steps of a record",
    ("08", "result-read"): "the steps of a record",
    ("08", "staircase-picture"): "the jumps of a drawing",
    ("09", "gain-figure"): "three layers and numbers of tokens",
    ("09", "kv-figure"): "the context of a record",
    ("10", "answer"): "steps of a record",
    ("10", "challenge-show"): "steps of a record",
    ("10", "first-show"): "steps of a record",
    ("10", "parts-read"): "steps of a record",
    ("10", "rate-table"): "steps of a record",
    ("10", "teachers-table"): "steps and images of a record",
    ("11", "copying-read"): "texts and tokens of a preset",
    ("11", "heavy-read"): "named models",
    ("11", "latent-run"): "the sizes of a named model",
    ("11", "pages-picture-read"): "a drawing of two tables",
    ("11", "pays-read"): "the texts of a record",
    ("11", "serving-table"): "the settings of a record",
    ("11", "step-read"): "lengths of text",
    ("11", "timeline-figure"): "the requests of a record",
    ("12", "challenge-say"): "two jobs of thousands of images",
    ("12", "gantt"): "a drawing of three ways",
    ("12", "graphs-table"): "the operators of ResNet-20",
    ("12", "judge-table"): "queries of a preset",
    ("12", "targets"): "a catalogue of systems",
    ("12", "traffic-table"): "the kernels of ResNet-20",
    ("13", "bytes-table"): "the bytes of a file",
    ("13", "gate-real"): "versions of a record",
    ("13", "healed"): "the steps of a record",
    ("13", "lookup"): "the passages of a preset",
    ("13", "plans-say"): "two digits of a number of requests",
    ("13", "result-say"): "the seeds of a record",
}


# rules: each yields what is silly in a sentence -----------------------------------------------------------------------


def has_no_interval_with_equal_ends(said: Said) -> Iterator[str]:
    if said.edge == ALL_NAMES_ALIKE:
        return
    for text in said.sentences:
        for hit in EQUAL_ENDS.finditer(text):
            ends = [end for end in hit.groups() if end is not None]
            if float(ends[0].replace(",", "")) == float(ends[-1].replace(",", "")):
                yield hit[0]
        if may_change(said):
            yield from (hit[0] for hit in BETWEEN.finditer(text) if hit[1] == hit[2])


def prints_no_undefined_number(said: Said) -> Iterator[str]:
    return hits(UNDEFINED, said)


def repeats_no_clause(said: Said) -> Iterator[str]:
    return (hit for hit in hits(REPEATED, said) if re.search(r"\d", hit) and said.edge != ALL_NAMES_ALIKE)


def does_not_contradict_itself(said: Said) -> Iterator[str]:
    return hits(CONTRADICTION, said)


def counts_no_part_of_one(said: Said) -> Iterator[str]:
    return hits(OF_ONE, said) if counts_one(said, "one row") else iter(())


def has_no_plural_of_one(said: Said) -> Iterator[str]:
    return hits(PLURAL_OF_ONE, said) if counts_one(said, "one row", ALL_NAMES_ALIKE) else iter(())


def has_no_verb_of_several_for_one(said: Said) -> Iterator[str]:
    return hits(VERB_OF_SEVERAL, said) if counts_one(said, "one row", ALL_NAMES_ALIKE) else iter(())


def lists_something(said: Said) -> Iterator[str]:
    """Only of defined numbers: no undefined stand-in is equal to another."""
    return hits(NOTHING_LISTED, said) if may_change(said) and said.edge != "undefined" else iter(())


def prints_no_minus_before_a_zero(said: Said) -> Iterator[str]:
    return hits(MINUS_OF_ZERO, said)


def leaves_no_unit_behind_an_interval(said: Said) -> Iterator[str]:
    return hits(CUT_FROM_ITS_UNIT, said)


def names_no_interval_that_is_none(said: Said) -> Iterator[str]:
    return hits(INTERVAL_OF_NONE, said) if may_change(said) else iter(())


def begins_with_a_capital(said: Said) -> Iterator[str]:
    return hits(SMALL_LETTER, said) if said.edge != "nothing" else iter(())


def tells_no_difference_in_times(said: Said) -> Iterator[str]:
    return hits(DIFFERENCE_IN_TIMES, said)


def hits(silly: re.Pattern[str], said: Said) -> Iterator[str]:
    for text in said.sentences:
        yield from (hit[0] for hit in silly.finditer(text))


def may_change(said: Said) -> bool:
    return (said.lesson, said.cell) not in FIXED


def counts_one(said: Said, *edges_with_one: str) -> bool:
    """Elsewhere a stand-in's number is no count."""
    return may_change(said) and said.edge in edges_with_one


RULES = [
    has_no_interval_with_equal_ends,
    prints_no_undefined_number,
    repeats_no_clause,
    does_not_contradict_itself,
    counts_no_part_of_one,
    has_no_plural_of_one,
    has_no_verb_of_several_for_one,
    lists_something,
    prints_no_minus_before_a_zero,
    leaves_no_unit_behind_an_interval,
    names_no_interval_that_is_none,
    begins_with_a_capital,
    tells_no_difference_in_times,
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
        ("What buys most is AMX, at 4.65, no difference that can be told.", does_not_contradict_itself),
        ("0 of 1 recorded ones differ from yours.", counts_no_part_of_one),
        ("The fit turns at 1 rows.", has_no_plural_of_one),
        ("One call raises 1 false alarms.", has_no_plural_of_one),
        ("1 of 12 comparisons declare a difference.", has_no_verb_of_several_for_one),
        ("1 of 1,000 images get another class.", has_no_verb_of_several_for_one),
        ("Of 9 ways to run a model 1 are ready here.", has_no_verb_of_several_for_one),
        ("The largest: .", lists_something),
        ("Of the three:  pass it.", lists_something),
        ("The pages  are stored once.", lists_something),
        ("The loss falls by -0.0 dB.", prints_no_minus_before_a_zero),
        ("They are off by -0 % of it.", prints_no_minus_before_a_zero),
        ("So 99 at both ends % of the step is not explained.", leaves_no_unit_behind_an_interval),
        ("D is no interval times what it was.", leaves_no_unit_behind_an_interval),
        ("It gains +1.8 points, 95 % interval no interval.", names_no_interval_that_is_none),
        ("in ResNet-20 at most 2.8 (conv).", begins_with_a_capital),
        ("It is faster by 1.00 times.", tells_no_difference_in_times),
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
        "1 of 12 comparisons declares a difference; 1 row is left, and 11 rows are not.",
        "It takes 1 times as long; the ridge of batch 1 lies at 0.0, and -0.05 is below.",
        "labkit takes the file of fp32. int4 is next (no interval): time.time() says 88 to 89 %.",
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
        ("a hair below zero", "a over b: 0.0 points (-0.001 to +0.000), not told apart. Rows."),
        ("one of each", "a over b: +1.0 points (+1.0 at both ends), better. Rows."),
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
