"""Trade-offs: the front, which columns are drawn, what is pooled, and what the figure says."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_records import changed
from test_report import AXES, CUT, WHOLE

from course import results, tradeoffs
from course.results import RunColumn
from course.tradeoffs import TradeOff
from labkit.lesson import records
from labkit.lesson.records import RunRecord, cost, quality, result
from labkit.timing import stats


def run(*rows: dict, columns: dict = AXES, by: tuple = ("cut",), seed: int = 0, **parameters: object) -> RunRecord:
    table = records.table("cuts", list(rows), by, columns)
    return changed(measurements=[table], parameters={"SEED": seed, **parameters})


def trade_offs(*runs: RunRecord, swept: tuple = ()) -> list[TradeOff]:
    return tradeoffs.trade_offs([RunColumn(record, True) for record in runs], swept)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int]], x_more: bool, y_more: bool):
    points = pd.DataFrame(values, columns=["x", "y"])
    front = points.loc[tradeoffs.front(points, x_more, y_more)]
    sign = [1 if more else -1 for more in (x_more, y_more)]

    def beaten(x: int, y: int) -> bool:  # by something as good in both, and not the same
        return any(sign[0] * a >= sign[0] * x and sign[1] * b >= sign[1] * y and (a, b) != (x, y) for a, b in values)

    assert sorted(map(tuple, front.values)) == sorted({pair for pair in values if not beaten(*pair)})


def test_a_declared_quality_is_set_against_a_declared_cost():
    (shown,) = trade_offs(run(CUT, WHOLE))
    assert (shown.x, shown.y) == ("MACs left", "accuracy (%)")
    assert list(shown.points["front"]) == [True, True]
    assert tuple(shown.points.loc[0, ["x", "y", "y_low", "y_high"]]) == (0.5, 90.0, 88.0, 92.0)


@pytest.mark.parametrize(
    ("columns", "drawn"),
    [
        (AXES, [("MACs left", "accuracy")]),
        ({"MACs left": cost(), "accuracy": result()}, []),  # no quality
        ({"MACs left": result(), "accuracy": quality()}, []),  # no cost
        (
            {"MACs left": quality(), "accuracy": quality()},
            [],
        ),  # more of both is better: the same kind, nothing is traded
        ({"accuracy": quality("%"), "MACs left": quality("x")}, []),  # the best in one is the best in the other
        ({"MACs left": cost(), "accuracy": cost()}, []),
    ],
)
def test_only_roles_decide_what_is_drawn(columns: dict, drawn: list):
    assert [(t.x, t.y.removesuffix(" (%)")) for t in trade_offs(run(CUT, WHOLE, columns=columns))] == drawn


def test_two_qualities_are_traded_where_the_best_in_one_is_not_the_best_in_the_other():
    rows = [CUT | {"speed-up": 2.0}, WHOLE | {"speed-up": 1.0}]
    columns = {"accuracy": quality("%"), "speed-up": quality("x", clock=True)}
    (shown,) = trade_offs(run(*rows, columns=columns))
    assert (shown.x, shown.y) == ("speed-up (x)", "accuracy (%)") and shown.points["front"].all()


def test_a_setting_with_a_role_is_an_axis():
    points = ("l1", 0.5, 2.0), ("l1", 0.9, 9.0), ("l2", 0.9, 5.0)
    rows = [{"by": how, "removed": share, "loss": loss} for how, share, loss in points]
    (shown,) = trade_offs(run(*rows, by=("by", "removed"), columns={"removed": quality(), "loss": cost()}))
    assert (shown.x, shown.y) == ("removed", "loss")
    assert list(shown.points["front"]) == [True, False, True] and list(shown.points["series"]) == ["l1", "l1", "l2"]


def test_seeds_of_runs_and_of_rows_are_pooled_with_their_interval():
    accuracies = [90.0, 80.0, 85.0]
    runs = [run(CUT | {"accuracy": value}, WHOLE, seed=seed) for seed, value in enumerate(accuracies)]
    (shown,) = tradeoffs.trade_offs([RunColumn(record, True) for record in runs])
    point = shown.points.iloc[0]
    assert (point.y, point.y_low, point.y_high) == stats.mean_ci(accuracies) and point.repetitions == 3
    rows = [cut | {"seed": seed, "accuracy": cut["accuracy"] + seed} for cut in (CUT, WHOLE) for seed in range(3)]
    (shown,) = trade_offs(run(*rows, by=("cut", "seed")))
    assert [(point.y, point.repetitions) for point in shown.points.itertuples()] == [(91.0, 3), (94.0, 3)]


def test_a_table_over_seeds_without_a_cost_is_shown_by_its_setting():
    rows = [{"cut": cut, "seed": seed, "accuracy": 90.0 + seed} for cut in ("a", "b") for seed in (0, 1)]
    (shown,) = trade_offs(run(*rows, by=("cut", "seed"), columns={"accuracy": quality("%")}))
    assert (shown.x, shown.y, shown.ranked) == ("cut", "accuracy (%)", False)
    assert list(shown.points["x"]) == ["a", "b"] and not shown.points["front"].any()
    assert "The best is 90.5 % at a." in tradeoffs.figure(shown)["alt"]


WITHOUT_FIGURES = {
    "00": "it compares clocks",
    "10": "its students are those of a recorded experiment",
    "12": "its rows are comparisons and loads, not quality against cost",
    "13": "its qualities are those of recorded experiments",
}


@pytest.mark.parametrize("lesson", sorted({run.lesson for run in results.recorded_runs()[0]}))
def test_every_lesson_s_recorded_tables_have_figures(lesson: str):
    runs = [RunColumn(record, False) for record in results.recorded_runs()[0] if record.lesson == lesson]
    drawn = tradeoffs.trade_offs(runs)
    assert bool(drawn) == (lesson not in WITHOUT_FIGURES)
    assert all(len(shown.points) > 1 and shown.x != shown.y for shown in drawn)


def test_a_figure_has_alt_text_and_its_numbers():
    worse = CUT | {"cut": "bad", "MACs left": 0.6, "accuracy": 50.0, "low": 45.0, "high": 55.0}
    picture = tradeoffs.figure(trade_offs(run(WHOLE, CUT, worse))[0])
    assert picture["alt"].startswith("accuracy (%) against MACs left for 3 points of “cuts”. yours, class: the Pareto")
    assert "the Pareto front joins 2 of them: 90 % at 0.500 to 93 % at 1." in picture["alt"]
    assert picture["table"].count("<tr>") == 4 and picture["table"].count(">yes<") == 2
    assert "88 to 92" in picture["table"] and len(picture["png"]) > 1000


@pytest.mark.slow
def test_machines_and_presets_have_fronts_of_their_own():
    gpu = changed(run(CUT, WHOLE), machine={"slug": "gpu", "label": "A GPU, big"}, preset="full")
    (shown,) = tradeoffs.trade_offs([RunColumn(run(CUT, WHOLE), True), RunColumn(gpu, False)])
    alt = tradeoffs.figure(shown)["alt"]
    assert "yours, class, Test CPU, 2 cores: the Pareto front joins 2" in alt and "recorded, full, A GPU, big:" in alt
    assert shown.points["front"].sum() == 4


def test_a_run_with_other_parameters_than_the_recorded_one_shares_no_front_with_it():
    recorded = changed(run(CUT, WHOLE), preset="class")
    (shown,) = tradeoffs.trade_offs([RunColumn(run(CUT, WHOLE), True, "RATIO 0.7"), RunColumn(recorded, False)])
    alt = tradeoffs.figure(shown)["alt"]
    assert "yours, class, RATIO 0.7: the Pareto front joins 2" in alt and "recorded, class: the Pareto" in alt


def grid(accuracy: dict[str, float], *rows: dict) -> list[RunRecord]:
    """Six runs; what is left of the MACs is the ratio."""
    return [
        run(
            *(row | {"MACs left": ratio, "accuracy": accuracy[how] + ratio} for row in rows), RATIO=ratio, CRITERION=how
        )
        for ratio in (0.3, 0.5, 0.7)
        for how in accuracy
    ]


def test_the_points_of_a_sweep_share_one_front():
    (shown,) = trade_offs(*grid({"l1": 80.0, "taylor": 90.0}, CUT), swept=("RATIO", "CRITERION"))
    assert len(shown.points) == 6 and set(shown.points[shown.points["front"]]["run"]) == {
        "RATIO 0.3, CRITERION taylor", "RATIO 0.5, CRITERION taylor", "RATIO 0.7, CRITERION taylor"}  # fmt: skip


def test_a_parameter_that_changes_nothing_in_a_table_does_not_repeat_its_points():
    runs = grid({"l1": 80.0, "taylor": 80.0}, CUT, WHOLE)
    (shown,) = trade_offs(*runs, swept=("RATIO", "CRITERION"))
    assert list(shown.points["run"].unique()) == ["RATIO 0.3", "RATIO 0.5", "RATIO 0.7"] and len(shown.points) == 6
    still = [run(CUT, WHOLE, RATIO=ratio) for ratio in (0.3, 0.5)]
    assert trade_offs(*still, swept=("RATIO",)) == []


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, -1.0, 1e12])
def test_any_number_can_be_drawn(value: float):
    rows = [{"cut": str(n), "x": number, "y": number} for n, number in enumerate((value, 5.0, 7.0))]
    (shown,) = trade_offs(run(*rows, columns={"x": cost("MB"), "y": quality()}))
    assert len(tradeoffs.figure(shown)["png"]) > 1000


@pytest.mark.parametrize("gap", [None, "nan", "inf", "good"])
def test_a_row_without_a_number_is_no_point(gap: object):
    (shown,) = trade_offs(run(CUT, WHOLE, CUT | {"cut": "gap", "accuracy": gap}))
    assert list(shown.points["cut"]) == ["half", "whole"]


def test_what_a_record_says_is_shown_and_not_run():
    hostile = CUT | {"cut": "<script>alert(1)</script>"}
    assert "<script" not in tradeoffs.figure(trade_offs(run(hostile, WHOLE))[0])["table"]
    assert len(tradeoffs.figure(trade_offs(run(CUT | {"cut": r"$\\frac{"}, WHOLE))[0])["png"]) > 1000
