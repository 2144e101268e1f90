"""The fair baseline: every way gives the model's answer, keeps the process's threads, and the race decides."""

from types import SimpleNamespace

import pytest
import torch
from refusals import check_refusal
from torch import nn

from labkit.deploy import eager
from labkit.timing.machine import on_threads


@pytest.fixture
def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval().requires_grad_(False)


def test_every_layout_and_number_of_threads_gives_the_model_s_answer(convolution):
    x = torch.randn(2, 3, 16, 16)
    with on_threads(2):
        ways = eager.ways(convolution, x)
        names = ["channels first, 1 thread", "channels first, 2 threads"]
        names += ["channels last, 1 thread", "channels last, 2 threads"]
        assert list(ways) == names
        for way in ways.values():
            torch.testing.assert_close(way(), convolution(x), rtol=0, atol=1e-5)
            assert torch.get_num_threads() == 2
    assert [way.threads for way in ways.values()] == [1, 2, 1, 2]


def test_a_way_computes_on_its_own_threads():
    class Threads(nn.Module):
        def forward(self, x):
            return x + torch.get_num_threads()

    with on_threads(2):
        ways = eager.ways(Threads(), torch.zeros(1))
        assert {name: way().item() for name, way in ways.items()} == {"1 thread": 1.0, "2 threads": 2.0}


def test_without_an_image_there_is_one_layout_and_with_one_thread_one_way():
    with on_threads(1):
        assert list(eager.ways(nn.Linear(4, 2), {"input": torch.ones(1, 4)})) == ["1 thread"]


def test_the_best_way_has_the_least_median_among_those_named():
    race = SimpleNamespace(sides={name: SimpleNamespace(median_s=s) for name, s in (("a", 2), ("b", 1), ("engine", 0))})
    assert eager.best(race, ["a", "b"]) == "b"
    check_refusal("The race has no c: let all the ways run in it", lambda: eager.best(race, ["a", "c"]))
