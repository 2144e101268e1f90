"""A race of one thread and several: who wins, by calls whose times are known."""

import time

import pytest
import torch

from labkit.timing import thread_race
from labkit.timing.thread_race import ThreadRace


def slower_on_several(multiple: float) -> None:
    time.sleep(2e-3 * (multiple if torch.get_num_threads() > 1 else 1))


@pytest.mark.parametrize(("multiple", "threads"), [(0.5, 3), (3.0, 1)])
def test_several_threads_are_chosen_unless_they_lose(multiple: float, threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thread_race, "ROUNDS", 5)
    before = torch.get_num_threads()
    race = thread_race.race(3, lambda: slower_on_several(multiple))
    assert race.threads == threads
    assert race.multiple == pytest.approx(multiple, rel=0.5)
    assert torch.get_num_threads() == before


def test_a_race_ends_in_time_and_has_a_round_at_least(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thread_race, "LIMIT_S", 0.0)
    calls = []
    thread_race.race(2, lambda: calls.append(torch.get_num_threads()))
    assert calls == [1, 2, 1, 2]  # untimed, then a round


def test_a_single_thread_has_no_race():
    assert thread_race.race(1, lambda: pytest.fail("nothing is timed")) == ThreadRace(1, 1.0)


def test_a_difference_within_a_quarter_keeps_all_threads():
    assert ThreadRace(several=2, multiple=1.2).threads == 2
    assert ThreadRace(several=2, multiple=1.3).threads == 1
