import re
from dataclasses import replace

import pytest
from test_report import RECORD

from course import swept
from course.points import points, sweeps
from labkit.records import RunRecord


def value(name: str, number: float | str | bool, unit: str = "", ci95: list | None = None, kind: str = "value") -> dict:
    return {"kind": kind, "name": name, "value": number, "unit": unit, "ci95": ci95, "simulated": False}


def run(*entries: dict, seed: int = 0, **parameters: object) -> RunRecord:
    return replace(RECORD, measurements=list(entries), parameters={"SEED": seed, **parameters})


def shown(*records: RunRecord) -> str:
    (sweep,) = sweeps(points(records))
    return swept.swept(sweep)


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_combinations_have_mean_and_interval_over_seeds_and_the_best_is_marked():
    accuracy = {0.3: (90.0, 91.0, 92.0), 0.5: (80.0, 81.0, 82.0)}
    html = shown(
        *(run(value("accuracy", a, "%"), seed=s, RATIO=r) for r, some in accuracy.items() for s, a in enumerate(some))
    )
    said = words(html)
    assert "6 runs at smoke on Test CPU, 2 cores: RATIO 0.3, 0.5." in said
    assert "Seeds 0, 1, 2: means with 95 % intervals over them." in said
    assert "0.3 3 91 % (88.5 % to 93.5 %) best" in said and "0.5 3 81 % (78.5 % to 83.5 %)" in said
    assert html.count(">best<") == 1


@pytest.mark.parametrize(
    ("name", "unit", "best"),
    [
        ("accuracy", "%", "2"),
        ("accuracy lost", "points", "1"),
        ("pruned", "x", "2"),
        ("perplexity", "", "1"),
        ("rows at the turn", "rows", None),
    ],
)
def test_which_way_is_better_comes_from_name_and_unit(name: str, unit: str, best: str | None):
    html = shown(*(run(value(name, float(k), unit, [k - 0.1, k + 0.1]), K=k) for k in (1, 2)))
    row = re.search(r"<tr><th[^>]*>(\d)</th>(?:(?!</tr>).)*>best<", html)
    assert (row and row[1]) == best


def moved(html: str) -> str:
    """The words of the table of combinations, its head included."""
    return words(re.search(r"<table.*?</table>", html, re.DOTALL)[0])


def test_what_the_parameters_do_not_change_is_folded():
    html = shown(*(run(value("accuracy", 90.0, "%"), value("seen", k), K=k) for k in (0, 1)))
    assert "accuracy" not in moved(html) and "seen" in moved(html)
    assert "1 further value " in words(html) and "accuracy 90 % 90 %" in words(html)


def test_a_ratio_moves_when_its_intervals_part_and_runs_alone_do_not_differ_as_much():
    apart = [run(value("pruned", 2.0 + k, "x", [1.9 + k, 2.1 + k], "comparison"), K=k) for k in (0, 1)]
    overlapping = [run(value("pruned", 2.0 + k / 10, "x", [1.5, 2.5], "comparison"), K=k) for k in (0, 1)]
    unknown = [run(value("pruned", 2.0 + k, "x", [0.0, "inf"], "comparison"), K=k) for k in (0, 1)]
    close = [run(value("pruned", 2.0 + k, "x", [1.99 + k, 2.01 + k], "comparison"), K=k) for k in (0, 0.15)]
    assert "pruned" in moved(shown(*apart))
    assert "pruned" not in moved(shown(*overlapping)) + moved(shown(*unknown)) + moved(shown(*close))


def test_times_of_different_runs_are_not_compared():
    times = [run(value("decode", 1.0 + k, "s", [0.9 + k, 1.1 + k], "measurement"), K=k) for k in (0, 1)]
    html = shown(*times)
    assert "decode" not in moved(html) and "decode 1 s (900 ms to 1.10 s)" in words(html) and "best" not in moved(html)


def test_values_of_tables_are_named_by_their_row():
    def table(theory: float) -> dict:
        rows = [{"network": "a", "theory": theory}, {"network": "b", "theory": 3.0}]
        return {"kind": "table", "name": "whole", "unit": "", "rows": rows}

    said = moved(shown(*(run(table(1.0 + k), K=k) for k in (0, 1))))
    assert "whole: theory, network=a" in said and "network=b" not in said


def test_a_value_that_only_some_points_have_leaves_the_others_empty():
    runs = [run(value("a", 1.0), K=1), run(value("a", 2.0), value("b", 3.0), K=2), run(value("a", 2.0), K=3)]
    said = words(shown(*runs))
    assert "K runs a 1 1 1 2 1 2 3 1 2" in said and "b – 3 –" in said


def test_texts_and_failed_values_do_not_break_the_table():
    said = words(shown(*(run(value("method", "auto"), value("a", "nan"), value("good", k == 1), K=k) for k in (0, 1))))
    assert "method" not in said and "good" in said


def test_seeds_alone_make_a_table_without_figures():
    html = shown(*(run(value("accuracy", 90.0 + seed, "%"), seed=seed) for seed in range(3)))
    assert "<img" not in html and "1 value value mean accuracy 91 % (88.5 % to 93.5 %)" in words(html)


def test_a_figure_along_the_parameter_that_is_a_number():
    runs = [
        run(value("accuracy", 90 + 10 * (how == "taylor") - ratio, "%"), seed=0, CRITERION=how, RATIO=ratio)
        for how in ("l1", "taylor")
        for ratio in (0.3, 0.5)
    ]
    html = shown(*runs)
    assert (
        "accuracy (%) against RATIO for 4 points of the sweep; the best is 99.7 % at RATIO 0.3, CRITERION taylor."
        in html
    )
    assert html.count("<img") == html.count("<figure>") == html.count("Description and numbers") == 1


def test_a_trade_off_that_the_parameters_change_is_drawn_and_one_that_they_do_not_is_not():
    def table(name: str, accuracy: float) -> dict:
        return {
            "kind": "table",
            "name": name,
            "unit": "",
            "rows": [{"cut": "a", "MACs left": 0.5, "accuracy": accuracy}],
        }

    html = shown(*(run(table("moved", 0.9 - k / 10), table("still", 0.9), K=k) for k in (0, 1)))
    assert "“moved”" in html and "“still”" not in html


def test_hostile_parameters_and_names_are_escaped():
    hostile = "<script>alert(1)</script>"
    assert "<script" not in shown(*(run(value(hostile, float(k)), HOW=f"{hostile}{k}") for k in (0, 1)))
