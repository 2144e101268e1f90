"""The recorded gains without a changed token: loads, the steps of their tokens, ratios paired by run."""

import numpy as np
import pytest
import torch
from same_tokens import LEAST, MOST, PROMPT, REQUESTS, Run, all_runs, in_turn, load_of, ratios, steps_of

from labkit.deploy.serving import Service


def test_a_load_is_the_same_each_time_and_has_answers_of_about_sixty_tokens():
    text = torch.arange(1000)
    (prompts, answers), (again, _) = (load_of(3, text) for _ in range(2))
    assert all(map(torch.equal, prompts, again))
    assert len(prompts) == len(answers) == REQUESTS
    assert all(PROMPT[0] <= len(prompt) < PROMPT[1] for prompt in prompts)
    assert min(answers) >= LEAST and max(answers) <= MOST
    means = [np.mean(load_of(number, text)[1]) for number in range(200)]
    assert 55 < np.mean(means) < 62  # cut at both ends


def test_tokens_of_one_time_are_of_one_step():
    times = [np.array([0.5, 0.7, 1.5]), np.array([0.7, 1.5, 1.6])]
    assert steps_of(Service([], times, 4, 6, 0)) == [[1, 2, 3], [2, 3, 4]]


def test_each_way_goes_first_in_some_runs():
    assert [in_turn(["a", "b", "c"], number) for number in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


def test_an_interruption_leaves_some_runs_of_each_part():
    runs = list(all_runs())
    assert len(set(runs)) == len(runs)
    assert {run.part for run in runs[:3]} == {"copying", "story", "serving"}


def test_ratios_are_paired_by_run():
    sides = {"plain": {"cpu": 4.0, "calls": 128}, "lookup": {"cpu": 2.0, "calls": 32}}
    served = {way: {"cpu": 1.0, "calls": 10} for way in ("one at a time", "static", "continuous")}
    runs = {Run("copying", i): sides for i in range(6)} | {Run("story", i): sides for i in range(6)}
    runs |= {Run("serving", i): served for i in range(6)}
    rows = {(row["part"], row["before"], row["after"]): row for row in ratios(runs)}
    assert rows["copying", "plain", "lookup"]["cpu"]["ratio"] == pytest.approx(2)
    assert rows["copying", "plain", "lookup"]["calls"]["ratio"] == pytest.approx(4)
    assert rows["serving", "static", "continuous"]["runs"] == 6
