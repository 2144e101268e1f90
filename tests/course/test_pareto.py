import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import RECORD

from course import pareto, pareto_figure, results
from course.pareto import Spot, TradeOff
from course.points import Point, points
from labkit import stats
from labkit.records import RunRecord

INF = math.inf
POINT = Point((RECORD,))


def run(*rows: dict, seed: int = 0, **parameters: object) -> RunRecord:
    table = {"kind": "table", "name": "cuts", "unit": "", "simulated": False, "rows": list(rows)}
    return replace(RECORD, measurements=[table], parameters={"SEED": seed, **parameters})


def spot(cost: float, quality: float) -> Spot:
    return Spot(POINT, "", {}, (cost, -INF, INF), (quality, -INF, INF), 1)


def trade_off(spots: list[Spot], more: bool = True) -> TradeOff:
    return TradeOff("01", "cuts", "size", "MB", "accuracy", "%", more, False, tuple(spots))


def of(*records: RunRecord) -> list[TradeOff]:
    return pareto.trade_offs(points(records))


CUT = {"cut": "half", "MACs left": 0.5, "accuracy (%)": 90.0, "low": 88.0, "high": 92.0}


# the front ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int]], more: bool):
    spots = [spot(*pair) for pair in values]
    front = [(one.cost[0], one.quality[0]) for one in trade_off(spots, more).front(spots)]
    sign = 1 if more else -1

    def beaten(pair: tuple[int, int]) -> bool:
        return any(
            c <= pair[0] and sign * q >= sign * pair[1] and (c, q) != pair for c, q in values
        )  # no dearer, no worse, and not the same

    assert front == sorted({pair for pair in values if not beaten(pair)})


def test_of_equal_spots_one_is_on_the_front():
    spots = [spot(1, 2), spot(1, 2)]
    assert len(trade_off(spots).front(spots)) == 1


# which columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "axis", "cost"),
    [
        ({"cut": "a", "MACs left": 0.25, "accuracy": 0.9}, ("share of the dense model's MACs", ""), 0.25),
        (
            {"cut": "a", "parameters removed": 0.25, "perplexity": 30},
            ("share of the dense model's parameters", ""),
            0.75,
        ),
        ({"cut": "a", "speed-up": 4.0, "accuracy": 0.9}, ("share of the dense model's time", ""), 0.25),
        ({"cut": "a", "decode (ms)": 4.0, "accuracy": 0.9}, ("latency", "ms"), 4.0),
        ({"cut": "a", "file (MB)": 4.0, "agreement": 0.9}, ("size", "MB"), 4.0),
        ({"cut": "a", "MACs (G)": 4.0, "perplexity / dense": 1.1}, ("MACs", "G"), 4.0),
    ],
)
def test_a_cost_and_a_quality_are_found(row: dict, axis: tuple[str, str], cost: float):
    (found,) = of(run(row))
    assert (found.cost, found.cost_unit, found.spots[0].cost[0]) == (*axis, cost)


@pytest.mark.parametrize(
    "row",
    [
        {"cut": "a", "accuracy": 0.9, "share removed": 0.1},
        {"cut": "a", "MACs left": 0.5, "speed-up": 2.0},
        {"cut": "a", "left of it": 0.5, "accuracy": 0.9},
        {"cut": "a", "MACs left": 0.5, "accuracy": None},
        {"cut": "a", "MACs left": 0.5, "accuracy": "good"},
        {"cut": "a", "MACs left": "nan", "accuracy": 0.9},
        {"cut": "a", "speed-up": 0.0, "accuracy": 0.9},
    ],
)
def test_without_both_there_is_no_figure(row: dict):
    assert of(run(row)) == []


def test_speed_ups_turn_with_their_interval():
    (found,) = of(run({"cut": "a", "accuracy": 0.9, "speed-up": 2.0, "speed-up low": 1.6, "speed-up high": 2.5}))
    assert found.spots[0].cost == pytest.approx((0.5, 0.4, 0.625))


def test_an_interval_stays_with_its_column():
    (found,) = of(run(CUT))
    assert found.spots[0].quality == (90.0, 88.0, 92.0) and found.spots[0].cost == (0.5, -INF, INF)


def test_several_sizes_in_a_row_are_lines_of_one_figure():
    row = {"sparsity": 0.0, "accuracy": 0.9, "dense (MB)": 90.0, "csr (MB)": 180.0}
    (found,) = of(run(row, row | {"sparsity": 0.9, "csr (MB)": 40.0}))
    assert {one.series for one in found.spots} == {"dense", "csr"}
    assert [one.cost[0] for one in found.spots if one.dense] == [90.0]


def test_seeds_are_pooled():
    accuracies = [90.0, 80.0, 85.0]
    (found,) = of(*(run(CUT | {"accuracy (%)": value}, seed=seed) for seed, value in enumerate(accuracies)))
    (one,) = found.spots
    assert one.quality == stats.mean_ci(accuracies) and one.runs == 3
    assert one.cost == (0.5, 0.5, 0.5)


def test_seeds_within_a_table_are_pooled_too():
    (found,) = of(run(*(CUT | {"seed": seed, "accuracy (%)": 90.0 + seed} for seed in range(3))))
    assert [(one.quality[0], one.runs) for one in found.spots] == [(91.0, 3)]


def test_every_recorded_lesson_with_such_tables_has_its_figures():
    records, _ = results.recorded_runs()
    found = {(one.lesson, one.table) for record in records for one in pareto.trade_offs([Point((record,), False)])}
    expected = {("02", "MiniLM pruned"), ("03", "accuracy and time"), ("03", "budgets"), ("04", "SmolLM2, perplexity")}
    assert expected <= found


# figures ------------------------------------------------------------------------------------------


def parts(html: str) -> tuple[str, str]:
    """Alt text and table of a figure."""
    return re.search(r'alt="([^"]*)"', html)[1], re.search(r"<table.*</table>", html)[0]


def test_a_figure_has_alt_text_and_its_numbers():
    dense = CUT | {"cut": "dense", "MACs left": 1.0, "accuracy (%)": 93.0}
    worse = CUT | {"cut": "bad", "MACs left": 0.6, "accuracy (%)": 50.0}
    html = pareto_figure.figure(of(run(dense, CUT, worse))[0])
    alt, table = parts(html)
    assert "accuracy (%) against share of the dense model&#x27;s MACs for 3 points" in alt
    assert "the Pareto front joins 2 of them: 90 % at 0.500 to 93 % at 1" in alt
    assert "The dense model, yours, smoke: 93 % at 1." in alt
    assert table.count("<tr>") == 4 and table.count(">yes<") == 2 and "88 to 92" in table
    assert html.count("data:image/png;base64,") == 1


def test_a_sweep_is_told_apart_by_its_parameters():
    (swept,) = of(*(run(CUT | one, **given) for given, one in grid({"l1": 80.0, "taylor": 90.0})))
    assert swept.swept == ["CRITERION", "RATIO"]
    _, table = parts(pareto_figure.figure(swept))
    assert ">CRITERION<" in table and ">taylor<" in table and table.count("<tr>") == 1 + 6


def grid(accuracy: dict[str, float]) -> list[tuple[dict, dict]]:
    """Parameters and results of six runs; what is left of the MACs is the ratio."""
    points = [(ratio, how) for ratio in (0.3, 0.5, 0.7) for how in accuracy]
    return [({"RATIO": r, "CRITERION": how}, {"MACs left": r, "accuracy (%)": accuracy[how] + r}) for r, how in points]


def test_a_parameter_that_changes_nothing_in_a_table_does_not_repeat_its_points():
    rows = [CUT, CUT | {"cut": "whole"}]
    (swept,) = of(*(run(*[row | one for row in rows], **given) for given, one in grid({"l1": 80.0, "taylor": 80.0})))
    assert swept.swept == ["RATIO"] and len(swept.spots) == 2 * 3
    looks = {pareto_figure._look(spot, swept) for spot in swept.spots}
    assert looks == {(cut, f"RATIO {ratio}") for cut in ("half", "whole") for ratio in (0.3, 0.5, 0.7)}
    _, table = parts(pareto_figure.figure(swept))
    assert ">RATIO<" in table and ">CRITERION<" not in table


def test_machines_and_presets_have_fronts_of_their_own():
    other = replace(run(CUT | {"accuracy (%)": 99.0}), machine={"slug": "gpu", "label": "A GPU, big"}, preset="full")
    (found,) = pareto.trade_offs([*points([run(CUT)]), *points([other], here=False)])
    alt, table = parts(pareto_figure.figure(found))
    assert "yours, smoke, Test CPU, 2 cores: the Pareto front joins 1" in alt and "recorded, full, A GPU, big:" in alt
    assert table.count(">yes<") == 2


def test_a_run_with_other_parameters_than_the_recorded_one_shares_no_front_with_it():
    recorded = replace(run(CUT | {"accuracy (%)": 99.0}, RATIO=0.5), preset="class")
    (found,) = pareto.trade_offs([*points([run(CUT, RATIO=0.7)]), *points([recorded], here=False)])
    alt, _ = parts(pareto_figure.figure(found))
    assert found.swept == [] and "yours, smoke, RATIO 0.7: the Pareto front joins 1" in alt
    assert "recorded, class, RATIO 0.5: the Pareto front joins 1" in alt


@pytest.mark.parametrize("value", [0.0, -1.0, 1e12])
def test_any_number_can_be_drawn(value: float):
    rows = [{"cut": str(n), "file (MB)": one, "perplexity": one} for n, one in enumerate((value, 5.0, 7.0))]
    assert "data:image/png" in pareto_figure.figure(of(run(*rows))[0])


def test_what_a_record_says_is_escaped():
    hostile = "<script>alert(1)</script>"
    html = pareto_figure.figure(of(run(CUT | {"cut": hostile}, CUT))[0])
    assert "<script" not in html
    with_dollars = of(run(CUT | {"cut": r"$\frac{"}, CUT))
    assert "data:image/png" in pareto_figure.figure(with_dollars[0])
