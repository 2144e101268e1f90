"""A session from start to finish: what is settled, predicted, measured, claimed, checked, and what the record holds."""

import functools
import gc
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from refusals import Refusals, check_refusal, refused

import labkit
from course import reference
from labkit import files
from labkit.errors import InputError
from labkit.lesson import challenge, records, reference_runs, session, worked
from labkit.lesson import check as checks
from labkit.lesson.records import cost
from labkit.lesson.session import Lab
from labkit.lesson.timings import TimingRow
from labkit.timing import machine, thread_race
from labkit.timing.machine import Ceilings
from labkit.timing.results import Comparison, Measurement
from labkit.timing.thread_race import ThreadRace
from labkit.timing.work import Work

ALONE = ThreadRace(several=1, multiple=1.0)
ROOFS = Ceilings("a small CPU", {"fp32": 1e11, "int8": 1e12}, 1e9)
CLAIMS = """
[[claim]]
id = "1.1"
section = 1
text = "It is twice as fast."
quantity = "speed-up"
unit = "x"
expected = [1.8, 2.2]
needs = "any"
source = "guide section 1"

[[claim]]
id = "1.2"
section = 1
text = "A GPU is ten times as fast."
quantity = "speed-up"
unit = "x"
expected = [9, 11]
needs = "gpu"
source = "guide section 1"
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No reference runs, two claims, no overrides, and the process's settings put back."""
    for variable in ("LABKIT_PRESET", "LABKIT_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path)
    (tmp_path / "claims.toml").write_text(CLAIMS, encoding="utf-8")
    threads = torch.get_num_threads()
    with matplotlib.rc_context():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def lab(tmp_path) -> Lab:
    return labkit.start("01", preset="class", device="cpu", results_dir=tmp_path / "runs")


@pytest.fixture
def smoke(tmp_path) -> Lab:
    return labkit.start("01", preset="smoke", device="cpu", results_dir=tmp_path / "runs")


def done(lab: Lab) -> dict:
    lab.finish()
    return json.loads((lab._path).read_text(encoding="utf-8"))


# start ------------------------------------------------------------------------------------------------------------


def test_import_is_quick_and_brings_no_heavy_package():
    heavy = ("torch", "transformers", "matplotlib", "pydantic")
    code = f"import sys, labkit; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_modules_are_attributes_of_the_package():
    assert labkit.bench.measure and labkit.roofline.count and labkit.machine.DEVICES
    assert all(getattr(labkit, name) for name in dir(labkit))
    for package in (labkit.pruning, labkit.quantization, labkit.attention, labkit.deploy):
        assert all(getattr(package, name) for name in package.__all__)
    assert not hasattr(labkit, "no_module_of_this_name") and not hasattr(labkit.pruning, "pkgutil")
    with pytest.raises(AttributeError, match="labkit has no 'speed'; it has start, "):
        _ = labkit.speed


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    drawn = []
    for _ in range(2):
        labkit.start("01", device="cpu", seed=7, results_dir=tmp_path)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


def test_a_collection_before_a_measurement_does_not_search_what_the_imports_made(lab):
    assert not any(thing is vars(torch) for thing in gc.get_objects())


@pytest.mark.parametrize(("preset", "value"), [("smoke", 1), ("class", 2), ("full", 3)])
def test_a_preset_chooses_a_size(tmp_path, preset, value):
    lab = labkit.start("01", preset=preset, device="cpu", results_dir=tmp_path)
    assert lab.by_preset(smoke=1, class_=2, full=3) == value


def test_the_environment_overrides_the_preset_and_auto_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_PRESET", "smoke")
    monkeypatch.setenv("LABKIT_DEVICE", "cpu")
    lab = labkit.start("01", preset="full", results_dir=tmp_path)
    assert (lab.preset, lab.device) == ("smoke", torch.device("cpu"))
    monkeypatch.setenv("LABKIT_DEVICE", "tpu")
    assert labkit.start("01", device="cpu", results_dir=tmp_path).device.type == "cpu"


def starting(**arguments):
    return lambda folder: labkit.start(**{"lesson": "01", "device": "cpu", "results_dir": folder, **arguments})


def starting_with(variable: str, value: str, **arguments):
    def start(folder):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(variable, value)
            starting(**arguments)(folder)

    return start


STARTS: Refusals = {
    'There is no lesson \'14\'; give one of "00" to "13"': starting(lesson="14"),
    "PRESET cannot be 'tiny'; choose one of smoke, class, full": starting(preset="tiny"),
    "device is 'tpu'; choose auto, cpu, cuda or cuda:N": starting(device="tpu"),
    "SEED cannot be -1; give a whole number from 0 to 4294967295": starting(seed=-1),
    "SEED cannot be 1.5; give a whole number": starting(seed=1.5),
    "RESULTS_DIR cannot be 3; give the name of a folder": starting(results_dir=3),
    "not a ReLU": starting(parameters={"MODEL": torch.nn.ReLU()}),
    "LABKIT_DEVICE is 'tpu'; choose auto, cpu": starting_with("LABKIT_DEVICE", "tpu", device="auto"),
    "LABKIT_PRESET cannot be 'tiny'; choose one of smoke, class, full": starting_with("LABKIT_PRESET", "tiny"),
    "give a results_dir that is a folder you may write to": lambda folder: starting(
        results_dir=folder / "claims.toml" / "runs"
    )(folder),
}


@refused(STARTS)
def test_a_session_that_cannot_be_is_refused_before_anything_changes(tmp_path, words, call):
    state = torch.get_rng_state()
    check_refusal(words, lambda: call(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)


BOUNDED = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# A lesson"]},
        {"cell_type": "code", "metadata": {"labkit": {"ranges": {"RATIO": [0.1, 0.9]}}}, "source": ["RATIO = '0.5'"]},
    ]
}


@pytest.mark.parametrize("folder", ["notebooks", "."])  # the repository's, and a release's
def test_a_value_outside_the_range_that_the_lesson_states_is_refused(tmp_path, monkeypatch, folder):
    """The range holds for what the session is given; what the cell on the disk says besides does not matter."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "01_small.ipynb").write_text(json.dumps(BOUNDED), encoding="utf-8")
    place = {"device": "cpu", "results_dir": tmp_path}
    assert labkit.start("01", **place, parameters={"RATIO": 0.5})._parameters["RATIO"] == 0.5
    assert labkit.start("02", **place, parameters={"RATIO": 1.5})._parameters["RATIO"] == 1.5  # another lesson's
    for wrong in (1.5, "0.5", None, True, [0.5]):
        sentence = f"RATIO cannot be {wrong!r}; give a number from 0.1 to 0.9."
        check_refusal(sentence, partial(labkit.start, "01", **place, parameters={"RATIO": wrong}))


def test_a_session_computes_float32_in_full_whatever_was_set_before(tmp_path):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lab = labkit.start("01", preset="smoke", device="cpu", results_dir=tmp_path)
        with torch.backends.cudnn.flags(enabled=True):  # which raises after a mix of torch's two settings
            pass
    assert lab.machine.float32_matmul_precision == torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.conv.fp32_precision != "tf32" and torch.backends.cudnn.rnn.fp32_precision != "tf32"
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_a_convolution_on_a_gpu_rounds_as_float32(tmp_path):
    lab = labkit.start("03", preset="smoke", device="cuda", results_dir=tmp_path)
    x, weight = torch.randn(8, 64, 16, 16, device=lab.device), torch.randn(64, 64, 3, 3, device=lab.device)
    exact = torch.conv2d(x.double(), weight.double())
    error = (torch.conv2d(x, weight) - exact).abs().max() / exact.abs().max()
    assert error < 64 * 9 * 2**-24  # a sum of 576 products; TF32 rounds each operand to 2**-11


@pytest.mark.gpu
def test_a_session_on_a_gpu_records_its_memory(tmp_path):
    lab = labkit.start("01", preset="smoke", device="cuda", results_dir=tmp_path)
    kept = torch.zeros(2**20, device=lab.device)
    result = lab.measure("add", lambda: kept + 1, budget_s=0.2)
    assert result.device.startswith("cuda")
    assert done(lab)["peak_device_memory"] >= 2 * kept.nbytes
    check_refusal("is not there", lambda: labkit.start("01", device="cuda:99", results_dir=tmp_path))


@pytest.mark.gpu
def test_the_memory_on_record_is_the_lesson_s_without_that_of_the_ceilings(tmp_path):
    lab = labkit.start("01", preset="smoke", device="cuda", results_dir=tmp_path)
    before = torch.zeros(2**26, dtype=torch.uint8, device=lab.device)
    del before  # part of the peak all the same, as ceilings are measured later
    lab.ceilings()
    assert 2**26 <= done(lab)["peak_device_memory"] < 2**28


def test_the_card_names_machine_preset_and_budget(lab, capsys):
    session._show_card(lab, ALONE)
    out = capsys.readouterr().out
    assert out.startswith("Lesson 01: The inference challenge")
    assert all(part in out for part in (lab.machine.label, "class, within 600 s; seed 0", torch.__version__))


# predict, measure, record -------------------------------------------------------------------------------------------


def test_a_measurement_meets_its_prediction_in_the_predicted_unit(lab):
    lab.predict("step", 3, "ms", question="How long is a step?")
    lab.record("step", 0.0015, "s", ci95=(0.001, 0.002))
    (prediction,) = done(lab)["predictions"]
    assert prediction.pop("ci95") == pytest.approx([1.0, 2.0])
    assert prediction == {
        "name": "step",
        "question": "How long is a step?",
        "unit": "ms",
        "predicted": 3,
        "measured": pytest.approx(1.5),
    }


def test_the_first_prediction_stands_once_measured(lab, capsys):
    lab.predict("step", 3, "ms")
    lab.predict("step", 4, "ms")
    lab.record("step", 5, "ms")
    lab.predict("step", 5, "ms")
    assert "your prediction of 4 ms stands" in capsys.readouterr().out
    lab.record("late", 1)
    lab.predict("late", 1)
    assert "late has been measured already: too late" in capsys.readouterr().out
    assert [one["predicted"] for one in done(lab)["predictions"]] == [4]


def test_a_question_without_a_guess_is_asked_and_never_scored(lab, capsys):
    lab.predict("step", 3, "ms")
    lab.predict("step", ..., "ms", question="How long is a step?")  # withdrawn
    asked = "How long is a step? (ms)\nno prediction yet: replace the ... by your number"
    assert asked in capsys.readouterr().out
    lab.predict("ratio", ..., "x", question="How much faster?")
    assert "How much faster? (as a factor)" in capsys.readouterr().out
    lab.record("step", 1.5, "ms")
    lab.predict("step", ..., "ms", question="How long is a step?")  # the cell again
    lab.predict("step", 1, "ms")
    assert "step has been measured already: too late" in capsys.readouterr().out
    prediction, _ = done(lab)["predictions"]
    assert (prediction["predicted"], prediction["measured"]) == (None, 1.5)


def test_measure_and_compare_keep_samples_intervals_and_verdict(lab, capsys):
    lab.predict("ratio", 1, "x")
    one = lab.measure("short", lambda: sum(range(500)), budget_s=0.1)
    two = lab.compare("ratio", lambda: sum(range(500)), lambda: sum(range(5000)), budget_s=0.2)
    assert str(one) in capsys.readouterr().out
    kept = done(lab)
    first, second = kept["measurements"]
    assert (first["kind"], first["value"], first["unit"]) == ("measurement", one.median_s, "s")
    assert [(entry["role"], entry["clock"]) for entry in (first, second)] == [("cost", True), ("quality", True)]
    assert first["detail"]["samples_s"] == pytest.approx(one.samples_s, rel=5e-6)
    assert (second["kind"], second["unit"], second["verdict"]) == ("comparison", "x", two.verdict)
    assert second["detail"]["candidate"]["samples_s"] == pytest.approx(two.candidate.samples_s, rel=5e-6)
    assert (second["value"], second["ci95"]) == (two.speedup, records.plain(two.ci95))  # an end may be infinite
    assert kept["predictions"][0]["measured"] == two.speedup


def test_a_race_is_recorded_over_its_first(lab):
    calls = {name: lambda n=n: sum(range(n)) for name, n in (("eager", 4000), ("engine", 1000), ("slow", 9000))}
    result = lab.race("batch 1", calls, budget_s=0.3)
    kept = {entry["name"]: entry for entry in done(lab)["measurements"]}
    assert list(kept) == ["engine, batch 1", "slow, batch 1"]
    assert kept["engine, batch 1"]["value"] == result.over("eager", "engine").speedup


@pytest.fixture
def in_a_recording(lab, monkeypatch, tmp_path):
    """Make the session the last process of a recording: (ratios and seconds of the earlier processes)."""

    def join(ratios: list[float], seconds: list[float], name: str = "ratio") -> None:
        earlier = []
        for ratio, median in zip(ratios, seconds, strict=True):
            call = Measurement("call", (median,) * 20, 1, "wall", "hot", "cpu", 1)
            slower = replace(call, samples_s=(ratio * median,) * 20)
            lab._results.add_measurement("call", call)
            lab._results.add_comparison(name, Comparison(slower, call, (True, False) * 10, 1))
            lab.record("calls per second", 1 / median, "1/s", clock=True)
            earlier.append(tmp_path / f"{len(earlier)}.json")
            records.write(lab.finish(), earlier[-1])
        monkeypatch.setenv(records.OTHERS, os.pathsep.join(map(str, earlier)))

    return join


def test_the_last_process_of_a_recording_shows_median_and_range_over_all_and_folds_what_holds_within_it(
    lab, in_a_recording, capsys
):
    lab.predict("ratio", 3, "x")
    in_a_recording([0.5, 0.9, 2000, 9000], [1e-9, 2e-9, 3e-9, 4e-9])
    capsys.readouterr()
    timing = lab.measure("call", lambda: sum(range(500)), budget_s=0.05)
    pair = lab.compare("ratio", lambda: sum(range(5000)), lambda: sum(range(500)), budget_s=0.1)
    assert (pair.ci95, pair.verdict) == (pytest.approx((0.5, 9000)), "inconclusive")
    assert pair.speedup == pair.process_speedup  # the middle one of five
    assert timing.ci95_s == pytest.approx((1e-9, timing.process_median_s)) and timing.within_run_s[0] > 4e-9
    assert timing.median_s == pytest.approx(3e-9)
    out = capsys.readouterr().out
    assert f"ratio: {pair.speedup:.2f}x (0.50x to 9,000x over 5 processes)\n" in out
    assert re.search(r"over 5 processes; \d\S+x in the last of them, 95% CI", out)
    kept = {entry["name"]: entry for entry in done(lab)["measurements"]}
    assert (kept["ratio"]["value"], kept["ratio"]["ci95"]) == (pair.speedup, list(pair.ci95))
    assert (kept["ratio"]["process_value"], kept["ratio"]["processes"]) == (pair.process_speedup, 5)
    assert kept["call"]["value"] == pytest.approx(3e-9) and kept["call"]["process_value"] > 4e-9
    assert "0.50x to 9,000x over 5 processes" in capsys.readouterr().out  # beside the prediction


def test_a_number_derived_in_each_process_is_read_back_as_the_median_with_the_range(lab, in_a_recording):
    in_a_recording([1, 1, 1, 1], [0.1, 0.2, 0.5, 1.0])
    assert lab.record("calls per second", 4, "1/s", ci95=(3.9, 4.1), clock=True) is None
    rate = lab.result("calls per second")
    assert (rate.value, rate.ci95, rate.covers, rate.process_value) == (4, (1, 10), "over 5 processes", 4)
    lab.record("calls per second", 0.5, "1/s", clock=True)
    rate = lab.result("calls per second")
    assert (rate.value, rate.ci95, rate.process_value) == (2, (0.5, 10), 0.5)
    with pytest.raises(InputError, match="There is no number called 'calls'"):
        lab.result("calls")


def test_a_number_that_a_process_lacks_keeps_the_interval_within_the_run(lab, in_a_recording, capsys):
    lab.predict("ratio", 3, "x")
    in_a_recording([0.5, 0.9], [1e-9, 2e-9], name="another ratio")
    pair = lab.compare("ratio", lambda: sum(range(5000)), lambda: sum(range(500)), budget_s=0.1)
    assert pair.processes == () and pair.ci95 == pair.within_run
    done(lab)
    assert re.search(r"x to \S+x within this run", capsys.readouterr().out)


def test_any_two_of_a_race_have_the_range_over_the_processes_of_a_recording(lab, monkeypatch, tmp_path):
    calls = {name: lambda n=n: sum(range(n)) for name, n in (("eager", 4000), ("engine", 1000), ("slow", 9000))}
    first = lab.race("batch 1", calls, budget_s=0.2)
    records.write(lab.finish(), tmp_path / "first.json")
    monkeypatch.setenv(records.OTHERS, str(tmp_path / "first.json"))
    second = lab.race("batch 1", calls, budget_s=0.3)
    for pair in (("eager", "engine"), ("slow", "engine")):
        here = replace(second, processes=()).over(*pair).process_speedup
        assert second.over(*pair).processes == pytest.approx((here, first.over(*pair).speedup), rel=1e-4)
        assert len(second.over(*pair).candidate.processes) == len(second.sides[pair[0]].processes) == 2
    assert done(lab)["measurements"][0]["processes"] == 2


def test_in_the_last_process_of_a_recording_the_roof_is_the_highest_that_any_process_reached(
    lab, monkeypatch, tmp_path
):
    call, work = (lambda: sum(range(5000))), Work(flops=10, bytes=1000)
    paths = []
    for factor in (3, 0.5):  # the bandwidth of each earlier process over that of the last
        earlier = replace(ROOFS, bandwidth=factor * ROOFS.bandwidth)
        monkeypatch.setattr(machine, "ceilings", lambda device, budget_s, earlier=earlier: earlier)
        lab._roofs._measured.clear()
        lab.compare("pair", call, call, work=(work, work), budget_s=0.05)
        paths.append(tmp_path / f"{factor}.json")
        records.write(lab.finish(), paths[-1])
    monkeypatch.setattr(machine, "ceilings", lambda device, budget_s: ROOFS)
    lab._roofs._measured.clear()
    monkeypatch.setenv(records.OTHERS, os.pathsep.join(map(str, paths)))
    side = lab.compare("pair", call, call, work=(work, work), budget_s=0.05).baseline
    assert len(side.processes) == 3
    assert side.roof_share == pytest.approx(1000 / (3 * ROOFS.bandwidth) / side.median_s)
    assert lab.ceilings() is ROOFS  # a process records and returns its own


def test_a_comparison_in_fresh_processes_has_their_range_and_is_recorded(lab, tmp_path, monkeypatch):
    (tmp_path / "sides.py").write_text(SIDES)
    monkeypatch.syspath_prepend(tmp_path)
    pair = lab.compare("more work", "sides:long", "sides:short", processes=5, budget_s=0.05)
    assert len(pair.processes) == len(set(pair.processes)) == 5
    assert pair.ci95 == (min(pair.processes), max(pair.processes)) and pair.verdict == "faster"
    assert pair.speedup == sorted(pair.processes)[2]
    assert "over 5 processes; " in str(pair)
    (kept,) = done(lab)["measurements"]
    assert (kept["ci95"], kept["processes"]) == (list(pair.ci95), 5)


SIDES = """
import functools, os
def long():
    return lambda: sum(range(20_000))
def short():
    return lambda: sum(range(200))
def broken():
    raise ValueError("no model here")
build = functools.partial(long)
"""


def test_a_side_that_another_process_cannot_build_is_refused(lab, tmp_path, monkeypatch):
    (tmp_path / "other_sides.py").write_text(SIDES)
    monkeypatch.syspath_prepend(tmp_path)
    import other_sides

    def here():
        return sum

    for side in (here, lambda: sum, functools.partial(here)):
        with pytest.raises(InputError, match=r"baseline cannot be imported by another process.*into a file"):
            lab.compare("x", side, "other_sides:short", processes=5)
    with pytest.raises(InputError, match=r"candidate is 'other_sides:none', which cannot be imported \(.*\): give"):
        lab.compare("x", other_sides.long, "other_sides:none", processes=5)
    with pytest.raises(InputError, match="processes is 4, but it must be a whole number from 5"):
        lab.compare("x", other_sides.long, other_sides.short, processes=4)
    with pytest.raises(InputError, match="An argument cannot be sent to another process"):
        lab.compare("x", other_sides.long, other_sides.short, processes=5, check=lambda a, b: True)
    with pytest.raises(InputError, match=r"Process 1 could not compare \(ValueError: no model here\)"):
        lab.compare("x", other_sides.build, other_sides.broken, processes=5)
    assert lab.finish().measurements == []


def test_work_adds_the_share_of_the_roof_by_the_sessions_own_ceilings(lab, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "ceilings", lambda device, budget_s: asked.append(device) or ROOFS)
    call, work = (lambda: sum(range(5000))), Work(flops=0, bytes=1000)
    pair = lab.compare("pair", call, call, work=(work, Work(10**6, 0)), dtype=("fp32", "int8"), budget_s=0.05)
    assert pair.candidate.roof_share == pytest.approx(1e-6 / pair.candidate.median_s)
    assert (pair.baseline.limited_by, pair.candidate.limited_by) == ("memory", "compute")
    assert asked == ["cpu"]
    measurements = {entry["name"]: entry for entry in done(lab)["measurements"]}
    assert measurements["pair"]["detail"]["baseline"]["roof_share"] == pair.baseline.roof_share
    roofs = next(entry for name, entry in measurements.items() if name.startswith("ceilings of cpu, "))
    assert [row["ceiling"] for row in roofs["rows"]] == ["fp32", "int8", "bandwidth"]
    assert lab.ceilings(torch.device("cpu")) is ROOFS and len(asked) == 1
    monkeypatch.setattr(machine, "ceilings", lambda device, budget_s: replace(ROOFS, bandwidth=2 * ROOFS.bandwidth))
    assert lab.ceilings(again=True).bandwidth == lab.ceilings().bandwidth == 2 * ROOFS.bandwidth


ABOVE = {
    "compute": (Work(10**12, 0), "hot", 2),
    "memory, cold": (Work(0, 10**12), "cold", 2),
    "memory, hot": (Work(0, 10**12), "hot", 1),  # the data may have stayed in a cache
}


@pytest.mark.parametrize(("work", "cache", "measured"), ABOVE.values(), ids=ABOVE)
def test_a_side_above_a_roof_that_must_be_too_low_has_the_roofs_measured_again(lab, monkeypatch, work, cache, measured):
    asked = []

    def higher_each_time(device, budget_s):
        asked.append(device)
        factor = 10 ** (9 * (len(asked) - 1))
        flops = {name: rate * factor for name, rate in ROOFS.flops.items()}
        return replace(ROOFS, flops=flops, bandwidth=ROOFS.bandwidth * factor)

    def call():
        return sum(range(5000))

    monkeypatch.setattr(machine, "ceilings", higher_each_time)
    pair = lab.compare("pair", call, call, work=(work, work), cache=cache, budget_s=0.05)
    assert len(asked) == measured
    assert (pair.baseline.roof_share > 1) == (measured == 1)


def test_running_a_cell_again_replaces_what_it_recorded(lab):
    for value in (1, 2):
        lab.record("step", value, "ms")
        lab.record("other", value)
    assert [(one["name"], one["value"]) for one in done(lab)["measurements"]] == [("step", 2), ("other", 2)]


def test_record_takes_numbers_texts_and_rows_in_silence(lab, capsys):
    capsys.readouterr()
    lab.record("loss", torch.tensor(0.25))
    lab.record("limiter", "memory")
    lab.record("size", np.int64(10), "B", simulated=True)
    lab.record("sweep", [{"batch": 1, "ms": np.float32(0.5)}], simulated=True)
    assert capsys.readouterr().out == ""
    loss, limiter, size, sweep = lab.finish().measurements
    assert (loss.value, limiter.value, size.value) == (0.25, "memory", 10)
    assert [entry.simulated for entry in (loss, limiter, size, sweep)] == [False, False, True, True]
    assert (sweep.kind, sweep.rows) == ("table", [{"batch": 1, "ms": 0.5}])


def test_what_the_columns_of_a_table_mean_is_recorded(lab):
    rows = [{"batch": size, "seed": 0, "ms": 1.5 * size} for size in (1, 2)]
    lab.record("sweep", rows, by=("batch", "seed"), columns={"ms": cost("ms", clock=True)})
    table = records.read(lab.finish() and lab._path).named("sweep")
    assert (table.by, table.meaning("ms")) == (("batch", "seed"), cost("ms", clock=True))


def predicted_in_ms(lab):
    lab.predict("step", 3, "ms")
    lab.record("step", 3, "tokens/s")


def compared(**options):
    return lambda lab: lab.compare("pair", len, len, **options)


WORK = Work(flops=0, bytes=1000)
RECORDS: Refusals = {
    "'x' is a NoneType; record a number, a text or a list of dicts": lambda lab: lab.record("x", None),
    "non-empty list of dicts": lambda lab: lab.record("x", []),
    "The name is ''; give what is measured as a short text": lambda lab: lab.record("", 1),
    "The interval of 'x' is (1,); give (low, high)": lambda lab: lab.record("x", 1, ci95=(1,)),
    "The role of 'x' is 'best'; choose one of setting, quality, cost, result.": lambda lab: lab.record(
        "x", 1, role="best"
    ),
    "'x' is a single value, and by and columns are about rows": lambda lab: lab.record("x", 1, by=("a",)),
    "'x' has no column 'b'": lambda lab: lab.record("x", [{"a": 1}], columns={"b": cost()}),
    "'step' was predicted in ms and measured in tokens/s; use one unit for both": predicted_in_ms,
    "work is Work( ... ); give two, that of the baseline and of the candidate": compared(work=WORK),
    "dtype is ('fp32',); give two": compared(work=(WORK, WORK), dtype=("fp32",)),
    **{
        f"{value!r}; give one number, your best guess will do": lambda lab, value=value: lab.predict("step", value)
        for value in ("3", True, None, math.nan)
    },
}


@refused(RECORDS)
def test_what_cannot_be_predicted_or_recorded_is_refused_and_nothing_is_kept(lab, words, call):
    check_refusal(words, lambda: call(lab))
    assert lab.finish().measurements == []


def test_what_is_said_is_shown_and_recorded_without_what_does_not_hold(lab, capsys):
    lab.say("figure", "An earlier run.")
    capsys.readouterr()
    ratio = np.float64(2.1)
    lab.say("figure", f"It takes {ratio:.1f} times as long.", ratio < 1 and "Not so.", None, "", "Why: see below.")
    assert capsys.readouterr().out == "It takes 2.1 times as long.\nWhy: see below.\n"
    assert done(lab)["sentences"] == {"figure": ["It takes 2.1 times as long.", "Why: see below."]}


@pytest.mark.parametrize("sentences", [(), (False, None, ""), (True,), (3,), (["A sentence."],)])
def test_a_figure_about_which_nothing_is_said_is_refused(lab, sentences):
    words = "Nothing is said about 'figure' by ... ; give a sentence for each way"
    check_refusal(words, lambda: lab.say("figure", *sentences))


def test_what_is_timed_in_a_fold_is_one_table_with_all_lines(lab, capsys):
    capsys.readouterr()
    with lab.fold("Two timings"):
        short = lab.measure("short", lambda: sum(range(500)), budget_s=0.05)
        long = lambda: sum(range(5000))  # noqa: E731
        two = lab.compare("ratio", long, long, names=("long", "candidate"), budget_s=0.05)
        assert capsys.readouterr().out == ""
    out = capsys.readouterr().out
    assert out == f"Two timings\n  {short}\n  ratio: {two}\n"
    again = lab.measure("short", lambda: sum(range(500)), budget_s=0.05)
    assert capsys.readouterr().out == f"{again}\n"
    assert [entry["name"] for entry in done(lab)["measurements"]] == ["short", "ratio"]


def test_the_columns_of_a_fold_are_those_that_it_needs(lab, monkeypatch):
    shown = []
    monkeypatch.setattr(session.show, "emit", lambda text, html=None, **_: shown.append(html))
    with lab.fold("Timings"):
        lab._timings.add(TimingRow("line", {"name": "a <b>", "verdict": "faster"}))
    with lab.fold("Timings"):
        lab._timings.add(TimingRow("line", {"name": "a"}))
        lab._timings.add(TimingRow("line", {"name": "b"}, warnings="the machine was busy"))
    assert shown[0].startswith("<details><summary>Timings</summary><table") and "a &lt;b&gt;" in shown[0]
    assert ["warnings" in html for html in shown] == [False, True] and "of the roof" not in "".join(shown)


def test_an_exception_in_a_fold_shows_what_there_is_and_passes_through(lab, capsys):
    with pytest.raises(ZeroDivisionError), lab.fold("Timings"):
        lab._timings.add(TimingRow("the first line", {"name": "a"}))
        _ = 1 / 0
    assert "Timings\n  the first line\n" in capsys.readouterr().out
    with lab.fold("Empty"):
        pass
    assert capsys.readouterr().out == ""


# challenges ---------------------------------------------------------------------------------------------------------

GOALS = {"time": (None, 0.6, "x"), "accuracy": (84, None, "%")}
REFERENCES = [
    {"recipe": "dense", "time": 1.0, "accuracy": 90.0},
    {"recipe": "half", "time": 0.5, "time ci95": (0.45, 0.55), "accuracy": np.float32(70.0)},
]


def place(lab: Lab, point: object, **changes: object) -> records.Challenge:
    lab.challenge("MiniLM", "Faster, and as good.", point, **{"goals": GOALS, "references": REFERENCES, **changes})
    (task,) = lab.finish().challenges
    return records.read(lab._path).challenges[0] if task else task


@pytest.mark.parametrize(
    ("point", "reached", "words"),
    [
        (None, None, "challenge MiniLM: no plan yet."),
        ({"time": 0.6, "accuracy": torch.tensor(84)}, True, "challenge MiniLM: reached."),
        (
            {"time": 0.7, "time ci95": (0.6, 0.8), "accuracy": 83.5},
            False,
            "not reached yet; time is 0.70x, and at most 0.60x was asked for; accuracy is 83.5 %, and at least 84 %",
        ),
    ],
)
def test_a_plan_is_placed_beside_the_references_and_recorded(lab, capsys, point, reached, words):
    task = place(lab, point)
    out = capsys.readouterr().out
    assert (task.reached, task.goal, task.goals) == (reached, "Faster, and as good.", GOALS)
    assert words in out and "shaded is the goal, time at most 0.60x, accuracy at least 84 %" in out
    assert ("your plan  " in out) == (point is not None) and "dense" in out
    assert task.point == (None if point is None else {name: pytest.approx(value) for name, value in point.items()})
    result = {True: "reached", False: "not reached yet", None: "no plan yet"}[reached]
    assert out.rstrip().splitlines()[-3].endswith(f"accuracy at least 84 %  {result}")


def test_a_plan_that_fails_is_told_in_a_line_and_the_page_goes_on(lab, capsys):
    with lab.judging("A plan is a dict of shares."):
        _ = {"fc": 0.5}["conv"]
    said = "Your plan failed, so it is not placed: KeyError: 'conv'\nA plan is a dict of shares.\n"
    assert capsys.readouterr().out == said
    with lab.judging("A plan is a dict of shares."):
        pass
    assert capsys.readouterr().out == ""


def test_an_interrupt_is_not_a_plan_that_fails(lab):
    with pytest.raises(KeyboardInterrupt), lab.judging("A plan is a dict of shares."):
        raise KeyboardInterrupt


def test_the_shaded_region_is_the_goal(lab, monkeypatch):
    from matplotlib.patches import Rectangle

    figures = []
    monkeypatch.setattr(session.show, "figure", lambda fig, **_: figures.append(fig))
    place(lab, {"time": 0.55, "accuracy": 85.0})
    (ax,) = figures[0].axes
    (region,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    (left, bottom), (right, top) = region.get_bbox().get_points()
    assert (right, bottom) == (0.6, 84) and (left, top) == (ax.get_xlim()[0], ax.get_ylim()[1])
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    assert [line.get_xydata().tolist() for line in stars] == [[[0.55, 85.0]]]


def placing(**changes):
    return lambda lab: place(lab, **{"point": None, **changes})


PLANES: Refusals = {
    "has None as its 'accuracy'; give a number for": placing(point={"time": 0.5}),
    "has 'fast' as its 'time'": placing(point={"time": "fast", "accuracy": 1}),
    "has None as its 'accuracy'": placing(references=[{"recipe": "a", "time": 1}]),
    "non-empty list of dicts": placing(references=[]),
    "give two columns, each with": placing(goals={"time": (None, 0.6, "x")}),
    "ask for nothing": placing(goals={"time": (None, None, "x"), "accuracy": (None, None, "%")}),
}


@refused(PLANES)
def test_a_challenge_without_a_plane_is_refused_and_not_recorded(lab, words, call):
    check_refusal(words, lambda: call(lab))
    assert lab.finish().challenges == []


# other machines -----------------------------------------------------------------------------------------------------


def test_this_machine_stands_beside_the_recorded_ones(lab, capsys):
    lab.record("step", 0.002, "s")
    lab.beside("step")
    alone = capsys.readouterr().out
    assert "2 ms" in alone and "a GPU" in alone and "not recorded yet" in alone
    session._show_card(lab, ALONE)
    assert "none recorded" in capsys.readouterr().out

    other = labkit.start("01", preset="class", device="cpu", results_dir=lab._path.parent)
    other.record("step", 0.001, "s", ci95=(0.0009, 0.0011))
    values = {**other.finish().to_dict(), "device": "cuda", "machine": {"label": "Some GPU", "slug": "some-gpu"}}
    records.write(records.RunRecord.from_dict(values), files.RECORDED / "some-gpu" / "01.json")
    capsys.readouterr()

    (found,) = lab.reference_runs("step")
    assert (found["machine"], found["device"], found["preset"], found["value"]) == ("Some GPU", "cuda", "class", 0.001)
    assert lab.reference_runs("another") == []
    lab.beside("step")
    both = capsys.readouterr().out
    assert "Some GPU" in both and "900 µs to 1.10 ms" in both and "not recorded yet" not in both
    assert "this run" in both and "95 % interval within this run, 1 process" in both

    path = files.RECORDED / "some-gpu" / "01.json"
    three = [records.read(path).model_copy(update={"created": "2026-11-24T14:55:00+00:00"}) for _ in range(3)]
    for record, seconds in zip(three, (0.0011, 0.0008, 0.002), strict=True):
        record.measurements[0].value = seconds
    records.write(reference.together(three), path)
    lab.beside("step")
    words = capsys.readouterr().out
    assert "recorded 24 Nov 2026" in words and "median, smallest to largest of 3 processes" in words
    assert "1.10 ms" in words and "800 µs to 2 ms" in words
    records.write(records.RunRecord.from_dict(values), path)
    session._show_card(lab, ALONE)
    assert f"at class on Some GPU, {values['created'][:10]}" in capsys.readouterr().out


def test_a_range_over_processes_beside_recorded_runs_is_called_so():
    run = {"machine": "Some CPU", "device": "cpu", "preset": "class", "value": 0.9, "unit": "x", "ci95": (0.8, 1.0)}
    (row, *_) = reference_runs.beside({**run, "processes": 5}, [])
    assert row["kind of range"] == "smallest to largest of 5 processes"


def test_beside_needs_a_number_measured_here(lab):
    lab.record("sweep", [{"batch": 1}])
    lab.record("step", 1)
    check_refusal("There is no number called 'sweep' to show; measured so far: step", lambda: lab.beside("sweep"))


# exercises ----------------------------------------------------------------------------------------------------------

LESSON = """
import labkit
def helper(x): return x
def half(x): raise NotImplementedError("Your answer goes here")
"""
WORKED = """def half(x: float) -> float:
    ### BEGIN SOLUTION
    return _divided(helper(x))


def _divided(x):
    return x / 2
    ### END SOLUTION"""


def halves(fn, failures) -> None:
    with failures.given(x=3.0):
        failures.close(fn(3.0), 1.5, "that is not the half")
    failures.close(fn(5.0), 2.5, "that is not the half")  # a check that names no input


@pytest.fixture
def notebook(monkeypatch, tmp_path) -> dict:
    """The namespace of a lesson whose second exercise is `half`, not answered yet, with its check."""
    cells = [{"source": [source], "metadata": {"tags": ["exercise"]}} for source in ("def other(): pass", WORKED)]
    (tmp_path / "01_small.ipynb").write_text(json.dumps({"cells": [{"source": "", "metadata": {}}, *cells]}))
    monkeypatch.setitem(checks.load("01"), "01.2", halves)
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    space = vars(sys.modules["__main__"])
    exec(LESSON, space)
    return space


WRONG = [
    ("def half(x): raise NotImplementedError('Your answer goes here; then')", "not done yet. Replace the `raise"),
    ("def half(x): return x", "that is not the half (expected 1.5, got 3)"),
    ("def half(x): pass", "does it end in `return`?"),
    ("def half(x): return 1.5 if x == 3 else [][0]", "it raised IndexError: list index out of range"),
    ("half = lambda x: 7", "that is not the half (expected 1.5, got 7)"),
    ("class half:\n  def __init__(self, x): pass", "returned a half, not a number"),
]


@pytest.mark.parametrize(("answer", "words"), WRONG)
def test_an_answer_that_is_not_right_is_told_recorded_and_stood_in_for(lab, capsys, notebook, answer, words):
    exec(answer, notebook)
    lab.check("01.2", notebook["half"])
    assert words in capsys.readouterr().out
    half = lab.answer("01.2", notebook["half"])
    assert half(3.0) == 1.5 and half(5.0) == 2.5
    assert "has not passed yet; the worked answer is used from here on.\n" in capsys.readouterr().out
    assert "_divided" not in notebook
    (check,) = done(lab)["checks"]
    assert (check["passed"], check["used"], bool(check["failures"])) == (False, "worked", True)


def test_a_right_answer_is_what_the_lesson_goes_on_with(lab, capsys, notebook):
    exec("def half(x): return helper(x) / 2", notebook)
    lab.check("01.2", notebook["half"])
    assert lab.answer("01.2", notebook["half"]) is notebook["half"]
    out = capsys.readouterr().out
    assert "exercise 01.2: passed, 2 requirements met.\n01.2: your half is used from here on.\n" in out
    assert lab.finish().checks == [records.CheckedExercise(id="01.2", passed=True, used="learner")]


def test_the_lesson_goes_on_in_its_own_settings_whenever_the_answer_is_called(lab, capsys, notebook):
    exec("import torch\ndef half(x):\n    torch.set_default_dtype(torch.float64)\n    return x / 2", notebook)
    lab.check("01.2", notebook["half"])
    assert torch.get_default_dtype() == torch.float32
    half = lab.answer("01.2", notebook["half"])
    assert half(3.0) == 1.5 and torch.get_default_dtype() == torch.float32
    assert "2 requirements met. It changed torch's default dtype: put back.\n" in capsys.readouterr().out


def test_an_answer_that_changed_since_its_check_is_checked_again_in_silence(lab, capsys, notebook):
    lab.check("01.2", notebook["half"])
    exec("def half(x): return x / 2", notebook)
    capsys.readouterr()
    lab.answer("01.2", notebook["half"])
    exec("def half(x): return x / 3", notebook)
    lab.answer("01.2", notebook["half"])
    said = "01.2: your half is used from here on.\n"
    assert capsys.readouterr().out == said + said.replace("is used", "has not passed yet; the worked answer is used")
    assert [check["passed"] for check in done(lab)["checks"]] == [False]


def test_the_worked_answer_never_counts_as_the_learner_s(lab, capsys, notebook):
    notebook["half"] = lab.answer("01.2", notebook["half"])
    capsys.readouterr()
    lab.check("01.2", notebook["half"])
    assert lab.answer("01.2", notebook["half"]) is notebook["half"]
    assert "this is the worked answer" in capsys.readouterr().out
    assert [(check["passed"], check["used"]) for check in done(lab)["checks"]] == [(False, "worked")]


def test_a_class_finds_the_worked_answer_packed_and_without_it_is_told_so(lab, capsys, notebook, tmp_path):
    (tmp_path / "01_small.ipynb").unlink()
    assert lab.answer("01.2", notebook["half"]) is notebook["half"]
    assert "has not passed yet, and no worked answer is here to stand in" in capsys.readouterr().out
    text = worked.packed({"01.2": worked.without_markers(WORKED)})
    (tmp_path / worked.PACKED).write_text(text)
    assert "return" not in text
    assert lab.answer("01.2", notebook["half"])(3.0) == 1.5


@pytest.mark.parametrize("call", ["check", "answer"])
def test_what_is_no_exercise_or_no_function_is_refused(lab, call):
    check_refusal("There is no check '01.9'", lambda: getattr(lab, call)("01.9", print))
    check_refusal("takes your function itself, not 3", lambda: getattr(lab, call)("01.1", 3))


# at smoke, which tries the code ---------------------------------------------------------------------------------------


def test_at_smoke_a_number_is_recorded_and_nothing_is_said_of_it(smoke, capsys):
    capsys.readouterr()
    smoke.record("perplexity", 3_452_722.0, ci95=(3e6, 4e6), role="cost")
    smoke.say("perplexity", "Nearer weights, a worse model.")
    smoke.table([{"method": "gptq", "perplexity": 3_452_722.0}], caption="GPTQ is the best of these")
    assert capsys.readouterr().out == "method  perplexity\ngptq    3,452,722\n"
    record = smoke.finish()
    assert (record.sentences, record.named("perplexity").value) == ({}, 3_452_722.0)


def ten_ms_a_call(fn: Callable, number: int) -> float:
    return 0.01 * number


def test_at_smoke_a_timing_takes_a_twentieth_of_a_second_and_empties_no_cache(smoke, lab):
    long = {"budget_s": 0.5, "clock": ten_ms_a_call}
    few, many = (a_lab.measure("step", list, cache="cold", **long) for a_lab in (smoke, lab))
    assert (len(few.samples_s), few.cache) == (5, "hot") and (len(many.samples_s), many.cache) == (50, "cold")
    few, many = (a_lab.compare("pair", list, list, **long) for a_lab in (smoke, lab))
    assert len(few.baseline.samples_s) <= 5 < len(many.baseline.samples_s)
    few, many = (a_lab.race("three", {"a": list, "b": list, "c": list}, **long) for a_lab in (smoke, lab))
    assert len(few.orders) == 1 < len(many.orders)
    assert len(smoke.measure("step", list, clock=ten_ms_a_call).samples_s) == 5  # without a budget, too
    with pytest.raises(InputError, match="budget_s must be a number of seconds above 0, got 0"):
        smoke.measure("step", list, budget_s=0)
    with pytest.raises(InputError, match="cache"):
        smoke.measure("step", list, cache="warm")


def test_what_is_the_same_at_every_preset_is_said_at_smoke_too(smoke, capsys):
    capsys.readouterr()
    smoke.say("coins", "A fair coin has two sides.", any_preset=True)
    smoke.table([{"flips": 20}], caption="Flips of a fair coin", any_preset=True)
    assert capsys.readouterr().out == "A fair coin has two sides.\nFlips of a fair coin\nflips\n20\n"
    assert smoke.finish().sentences == {"coins": ["A fair coin has two sides."]}


def test_what_is_wrong_with_a_sentence_shows_at_smoke(smoke):
    with pytest.raises(InputError, match="Nothing is said about 'figure'"):
        smoke.say("figure", False)


def test_at_smoke_a_figure_is_described_by_its_axes_alone(smoke, capsys):
    fig, ax = plt.subplots()
    ax.set(xlabel="bits", ylabel="perplexity", title="")
    capsys.readouterr()
    alt = "Perplexity falls from 40 at 2 bits to 12 at 8."
    smoke.show(fig, alt=alt, table=[{"bits": 2}], caption="8 bits are best")
    words = capsys.readouterr().out
    assert "smoke tries the code; run class to see. Drawn: perplexity against bits." in words
    assert "falls" not in words and "best" not in words
    with pytest.raises(InputError, match="no alt text"):
        smoke.show(plt.figure(), alt="short", table=[{"bits": 2}])


def test_at_smoke_no_prediction_claim_or_plan_is_judged(smoke, capsys):
    smoke.predict("points lost", 1.5, "points")
    smoke.record("points lost", 0.03, "points", ci95=(0.01, 0.05))
    smoke.claim("1.1", 2.0, (1.9, 2.1))
    smoke.challenge("needles", "Find them all.", {"time": 0.5, "accuracy": 100}, goals=GOALS, references=REFERENCES)
    record = smoke.finish()
    words = capsys.readouterr().out
    assert "challenge needles: smoke tries the code; run class to see." in words
    assert words.count("not judged at smoke") == 2 and "reached" not in words and "too high" not in words
    assert "Smoke tries the code; run class to see. All results: " in words
    assert [guess.measured for guess in record.predictions] == [None]
    assert [(claim.verdict, claim.value) for claim in record.claims] == [("not measurable here", None)]
    assert [(task.point, task.reached) for task in record.challenges] == [(None, None)]


def test_at_smoke_units_that_do_not_compare_are_refused_too(smoke):
    smoke.predict("step", 3, "ms")
    with pytest.raises(InputError, match="'step' was predicted in ms and measured in tokens/s"):
        smoke.record("step", 3, "tokens/s")


def test_at_smoke_the_recorded_numbers_stand_alone(smoke, capsys, tmp_path):
    other = labkit.start("01", preset="class", device="cpu", results_dir=tmp_path / "runs")
    other.record("step", 0.001, "s", ci95=(0.0009, 0.0011))
    records.write(other.finish(), files.RECORDED / "cpu" / "01.json")
    smoke.record("step", 0.002, "s")
    capsys.readouterr()
    smoke.beside("step")
    words = capsys.readouterr().out
    assert "1 ms" in words and "2 ms" not in words
    assert not any(row.startswith("this run") for row in words.splitlines())


def test_the_card_says_why_a_run_has_one_thread(lab, capsys):
    session._show_card(lab, ThreadRace(several=4, multiple=2.34))
    assert "1, because 4 take 2.3 times as long beside another program; float32" in capsys.readouterr().out
    session._show_card(lab, ThreadRace(several=4, multiple=0.6))
    assert "4; float32" in capsys.readouterr().out


@pytest.mark.parametrize(("users", "expected"), [(None, 1), ("2", 2)])
def test_a_run_has_one_thread_where_several_lose_the_race_unless_the_user_set_a_number(
    users: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads
):
    threads(2)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(thread_race, "race", lambda several: ThreadRace(several=2, multiple=1.9))
    lab = session.start("00", preset="smoke", results_dir=tmp_path)
    assert (torch.get_num_threads(), lab.machine.threads) == (expected, expected)


def test_the_card_says_what_smoke_is(smoke, lab, capsys):
    capsys.readouterr()
    session._show_card(smoke, ALONE)
    assert "smoke (smoke tries the code; run class to see), within 90 s" in capsys.readouterr().out
    session._show_card(lab, ALONE)
    assert "tries the code" not in capsys.readouterr().out


def test_a_sentence_with_an_undefined_number_is_not_said(lab, capsys):
    capsys.readouterr()
    lab.say("ratio", f"It is {math.nan:.2f} times as fast.", "It was timed twice.")
    assert capsys.readouterr().out == "It was timed twice.\n"


# finish -------------------------------------------------------------------------------------------------------------


PLENTY = session.Budget(90, 1e12)  # the peak of this process is that of all tests in it


def test_finish_writes_the_record_and_shows_what_came_of_it(lab, capsys, monkeypatch):
    monkeypatch.setattr(lab, "budget", PLENTY)
    lab.predict("step", 3, "ms")
    lab.predict("never", 1)
    lab.record("step", 1.5, "ms")
    lab.predict("asked", ...)
    lab.claim("1.1", 2.0)
    result = lab.finish()
    out = capsys.readouterr().out
    assert records.read(lab._path) == result
    assert lab._path.parts[-3:] == ("runs", "01", "record.json")
    assert "2.00x too high" in out and "not measured" in out and "no prediction" in out
    assert "All results: 01/record.json" in out and "twice as fast" not in out
    assert "within the budget of preset class" in out
    assert str(lab._path.parent) not in out


def test_the_record_holds_machine_parameters_and_cost(tmp_path):
    lab = labkit.start("01", preset="smoke", device="cpu", seed=3, results_dir=tmp_path, parameters={"BATCHES": (1, 8)})
    assert lab.budget == session.Budget(90, 4e9)
    lab.budget = PLENTY
    kept = done(lab)
    assert kept["parameters"] == {"SEED": 3, "BATCHES": [1, 8]}
    assert kept["machine"]["slug"] == lab.machine.slug and kept["machine"]["threads"] == torch.get_num_threads()
    assert kept["peak_memory"] > 50e6 and kept["peak_device_memory"] is None
    assert kept["budget"] == {"seconds": 90, "memory": 1e12, "within": True}
    assert (kept["version"], kept["lesson"], kept["device"]) == ("labkit.record/2", "01", "cpu")


def test_a_run_over_its_budget_says_so(lab, capsys, monkeypatch):
    monkeypatch.setattr(lab, "budget", session.Budget(0.0, 4e9))
    assert lab.finish().budget["within"] is False
    assert "OVER the budget of preset class" in capsys.readouterr().out
    monkeypatch.setattr(lab, "budget", session.Budget(90, 1e6))
    assert lab.finish().budget["within"] is False


def test_finish_may_be_called_again_and_keeps_what_came_since(lab):
    lab.record("step", 1)
    lab.finish()
    lab.record("after", 2)
    assert [one["name"] for one in done(lab)["measurements"]] == ["step", "after"]


def test_peak_memory_is_this_process_s_own():
    from labkit.lesson.memory import peak_memory

    kept = np.ones(2**26, dtype=np.uint8)
    code = "from labkit.lesson.memory import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak_memory() >= kept.nbytes
    assert 5e6 < child < 2e9


# in a notebook ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_executed_notebook_carries_its_record_and_counts_only_running_cells(tmp_path: Path):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    def read_before(cell: dict, cell_index: int) -> None:
        time.sleep(3.0 * (cell_index == 2))

    cells = [
        f"import labkit\nlab = labkit.start('01', preset='smoke', device='cpu', results_dir={str(tmp_path)!r})",
        "lab.record('step', 1.0, 'ms')",
        "lab.finish()",
    ]
    book = new_notebook(cells=[new_code_cell(source) for source in cells])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(book, timeout=120, on_cell_start=read_before).execute()
    shown = book.cells[-1].outputs[0].data
    carried = records.RunRecord.from_dict(shown[records.MIME])
    assert carried == records.read(tmp_path / "01" / "record.json")
    assert carried.named("step").value == 1.0
    assert carried.seconds < 2.5
    assert "Lesson 01 finished" in shown["text/html"] and "Lesson 01 finished" in shown["text/plain"]


def test_the_end_of_a_lesson_names_its_record(lab, capsys):
    lab.record("step", 1.5, "ms")
    lab.finish()
    assert "All results: 01/record.json" in capsys.readouterr().out


def test_a_plane_of_times_does_not_reach_below_zero():
    _, ax = plt.subplots()
    points = [{"plan": "ann", "time": 0.05, "size": 2.0}, {"plan": "ben", "time": 0.5, "size": 3.0}]
    challenge.plane(ax, {"time": (None, 0.25, "s"), "size": (None, None, "")}, points, "plan")
    assert ax.get_xlim()[0] == 0


def test_plans_that_reach_the_same_point_keep_their_labels():
    _, ax = plt.subplots()
    points = [{"plan": "ann", "time": 1.0, "size": 2.0}, {"plan": "ben", "time": 1.0, "size": 2.0}]
    challenge.plane(ax, {"time": (None, 0.5, "s"), "size": (None, None, "")}, points, "plan")
    assert {"ann", "ben"} <= {text.get_text() for text in ax.texts}


def crowded_plane() -> tuple[Any, list[dict], dict[str, Any]]:
    """An axis with a plane of ten points that lie close, the points, and the boxes of the names, in pixels."""
    fig, ax = plt.subplots(figsize=(6.8, 4))
    points = [{"plan": f"int4 in groups of {i}", "bits": 4.25 + 0.001 * i, "ratio": 1.3 - 0.001 * i} for i in range(9)]
    points += [{"plan": "yours", "bits": 4.254, "ratio": 1.296, "ratio ci95": (1.29, 1.302)}]
    challenge.plane(ax, {"bits": (None, 4, ""), "ratio": (None, 3, "")}, points, "plan", star="yours")
    fig.draw_without_rendering()
    return ax, points, {text.get_text(): text.get_window_extent() for text in ax.texts}


def test_where_points_crowd_every_point_is_named_and_no_two_words_overlap():
    ax, points, boxes = crowded_plane()
    assert set(boxes) == {point["plan"] for point in points} | {"goal"}
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    for box in boxes.values():
        assert ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1


def test_no_name_covers_a_point_or_an_interval():
    ax, points, boxes = crowded_plane()
    del boxes["goal"]
    covered = [(point["bits"], point["ratio"]) for point in points]
    covered += [(4.254, ratio) for ratio in np.linspace(1.29, 1.302, 50)]  # the interval of "yours"
    for place in ax.transData.transform(covered):
        assert not [name for name, box in boxes.items() if box.contains(*place)]


def test_a_line_joins_each_name_to_its_point():
    ax, points, boxes = crowded_plane()
    ends = [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_color() == "grey"]
    for point in points:
        place, box = ax.transData.transform((point["bits"], point["ratio"])), boxes[point["plan"]]
        at_the_point = [name_end for name_end, point_end in ends if math.dist(point_end, place) < 1]
        gaps = [math.dist(name_end, np.clip(name_end, box.min, box.max)) for name_end in at_the_point]
        assert min(gaps) < 5  # pixels, a third of the height of the type


def test_intervals_are_drawn_along_both_axes_and_stand_in_the_table(lab, capsys):
    _, ax = plt.subplots()
    points = [{"plan": "half", "time": 0.5, "time ci95": (0.4, 0.7), "accuracy": 85.0, "accuracy ci95": (84.0, 88.0)}]
    points += [{"plan": "dense", "time": 1.0, "accuracy": 90.0}]
    challenge.plane(ax, GOALS, points, "plan")
    bars = [bar.get_segments()[0].tolist() for bar in ax.collections]
    assert bars == [[[0.4, 85.0], [0.7, 85.0]], [[0.5, 84.0], [0.5, 88.0]]]
    half, dense = challenge.rows(GOALS, points, "plan")
    assert half["time, interval"] == "0.400 to 0.700" and dense["time, interval"] == ""
    assert half["accuracy, interval"] == "84 to 88"


def test_a_time_of_several_parts_is_split_in_the_table_and_in_the_state(lab, capsys):
    point = {"time": 0.7, "accuracy": 85.0, "seconds": {"preparing": 8.12, "running": 4.5}}
    task = place(lab, point)
    out = capsys.readouterr().out
    assert "at most 0.60x was asked for; of the time preparing 8.12 s, running 4.50 s." in out
    assert "preparing (s)  running (s)" in out
    assert task.point == {"time": 0.7, "accuracy": 85.0}


def test_what_reaches_the_goal_and_leads_along_an_axis_has_its_label_in_a_crowd():
    fig, ax = plt.subplots(figsize=(6.8, 4))
    points = [{"plan": f"engine number {i}, batch 32", "time": 1.5 + 0.01 * i, "change": -0.2} for i in range(6)]
    points += [{"plan": "reaches the goal, batch 8", "time": 1.05, "change": -0.2}]
    points += [{"plan": "leads, batch 8", "time": 1.55, "change": 0.0}, {"plan": "late", "time": 6.0, "change": -0.2}]
    challenge.plane(ax, {"time": (None, 1.1, ""), "change": (-1, None, "points")}, points, "plan")
    fig.canvas.draw()
    labels = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert {"reaches the goal, batch 8", "leads, batch 8"} <= set(labels)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(labels.values(), 2))
