import math
from dataclasses import replace

import pytest
from test_report import RECORD

from course import points
from labkit import stats
from labkit.records import RunRecord


def run(seed: int = 0, preset: str = "smoke", **parameters: object) -> RunRecord:
    return replace(RECORD, preset=preset, parameters={"SEED": seed, **parameters})


def test_runs_that_differ_only_in_seed_are_one_point():
    found = points.points([run(seed, RATIO=ratio) for ratio in (0.3, 0.5) for seed in range(3)])
    assert [(one.parameters, len(one.records)) for one in found] == [({"RATIO": 0.3}, 3), ({"RATIO": 0.5}, 3)]


def test_presets_and_machines_are_kept_apart():
    other = replace(run(), machine={"slug": "other"})
    assert len(points.points([run(), run(preset="class"), other, replace(run(), device="cuda:0")])) == 4


def test_of_two_runs_with_one_seed_the_last_counts():
    newer = replace(run(), title="Again")
    assert points.points([run(), newer])[0].records == (newer,)


def test_a_single_run_is_no_sweep():
    assert points.sweeps(points.points([run(), run(preset="class")])) == []


@pytest.mark.parametrize("runs", [[run(0), run(1)], [run(RATIO=0.5), run(RATIO=0.3)]])
def test_seeds_or_parameters_make_a_sweep(runs: list[RunRecord]):
    (sweep,) = points.sweeps(points.points(runs))
    assert sum(len(one.records) for one in sweep) == 2


def test_points_are_sorted_by_size_not_by_spelling():
    (sweep,) = points.sweeps(points.points([run(WIDTH=width) for width in (8, 16, 128, 2)]))
    assert [one.parameters["WIDTH"] for one in sweep] == [2, 8, 16, 128]
    assert points.varying(sweep) == {"WIDTH": [2, 8, 16, 128]}


def test_parameters_that_stay_do_not_vary():
    assert points.varying(points.points([run(A=1, B="x"), run(A=2, B="x")])) == {"A": [1, 2]}


def test_a_parameter_may_be_missing_or_of_mixed_type():
    found = points.points([run(A=1), run(A="auto"), run(), run(A=[1, 2])])
    assert len(points.sweeps(found)[0]) == 4 and len(points.varying(found)["A"]) == 4


def test_one_run_keeps_its_interval_and_several_have_students():
    one = (0.9, 0.88, 0.92)
    assert points.pooled([one]) == one
    assert points.pooled([one, (0.8, 0.7, 0.9), (0.7, 0.6, 0.8)]) == stats.mean_ci([0.9, 0.8, 0.7])


@pytest.mark.parametrize("ends", [None, [None, None], ["-inf", "inf"]])
def test_a_value_without_interval_has_infinite_ends(ends: list | None):
    assert points.estimate(1, ends) == (1.0, -math.inf, math.inf)
