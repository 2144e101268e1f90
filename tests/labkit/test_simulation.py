"""The batching simulation against queueing theory, conservation laws and small cases worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused

from labkit.deploy.simulation import continuous, dynamic, poisson_arrivals, static

POLICIES = {
    "static": lambda *args, **kw: static(*args, batch=8, **kw),
    "dynamic": lambda *args, **kw: dynamic(*args, max_batch=8, max_delay_s=0.05, **kw),
    "continuous": lambda *args, **kw: continuous(*args, max_batch=8, **kw),
}
each_policy = pytest.mark.parametrize("policy", POLICIES)


def step_seconds(batch: int) -> float:
    return 0.010 + 0.001 * batch


def requests(rate: float, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.random.default_rng(seed + 1).geometric(1 / 20, n)
    return poisson_arrivals(rate, n, seed), lengths


@each_policy
@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_every_request_is_served_once_after_it_arrives(policy: str, gaps: list[float], seed: int):
    arrivals = np.cumsum(gaps)
    lengths = np.random.default_rng(seed).integers(1, 30, len(gaps))
    served = POLICIES[policy](arrivals, lengths, step_seconds)
    assert served.finish_s.shape == arrivals.shape
    assert (served.latency_s >= lengths * step_seconds(1) - 1e-9).all()


@each_policy
def test_batch_never_exceeds_its_limit(policy: str):
    asked = []

    def watched(batch: int) -> float:
        asked.append(batch)
        return step_seconds(batch)

    POLICIES[policy](*requests(rate=200, n=300), watched)
    assert max(asked) == 8


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("policy", [continuous, lambda *a, max_batch: dynamic(*a, max_batch=max_batch, max_delay_s=0)])
def test_one_at_a_time_with_constant_service_waits_as_m_d_1(policy, load: float):
    n, service = 100_000, 0.01
    served = policy(poisson_arrivals(load / service, n, seed=3), np.ones(n, int), lambda batch: service, max_batch=1)
    waiting = served.latency_s.mean() - service
    assert waiting == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)  # Pollaczek-Khinchine, no variance


def uniform(n: int) -> np.ndarray:
    """Lengths of 8 to 64 tokens, each equally likely."""
    return np.random.default_rng(0).integers(8, 65, n)


@pytest.mark.parametrize("batch", [4, 8, 16])
def test_capacities_differ_by_the_longest_of_a_batch_over_the_mean(batch: int):
    lengths = uniform(8_000)
    flood = np.zeros(len(lengths))  # all are there at once, so the queue is never empty
    by_static = static(flood, lengths, step_seconds, batch=batch).finish_s.max()
    by_continuous = continuous(flood, lengths, step_seconds, max_batch=batch).finish_s.max()
    longest_over_mean = lengths.reshape(-1, batch).max(1).mean() / lengths.mean()
    assert by_static / by_continuous == pytest.approx(longest_over_mean, rel=0.01)
    assert longest_over_mean == pytest.approx((7 + 57 * batch / (batch + 1) + 0.5) / 36, rel=0.01)


def test_continuous_batching_by_hand():
    # One second a step. A (3 tokens) starts at 0; B (1) comes at 0.5 and joins at 1; C (2) joins when B has left, at 2.
    served = continuous([0.0, 0.5, 0.6], [3, 1, 2], lambda batch: 1.0, max_batch=2)
    assert served.finish_s.tolist() == [3.0, 2.0, 4.0]
    assert served.latency_s.tolist() == pytest.approx([3.0, 1.5, 3.4])


def test_dynamic_batching_by_hand():
    # The first waits its whole delay of 1 s; two are there by then and are padded to 3 tokens, the third comes late.
    served = dynamic([0.0, 0.9, 1.1], [1, 3, 1], lambda batch: 1.0, max_batch=4, max_delay_s=1.0)
    assert served.finish_s.tolist() == [4.0, 4.0, 5.0]


def test_static_batching_by_hand():
    served = static([0.0, 2.0, 2.5], [1, 2, 1], lambda batch: 1.0, batch=2)
    assert served.finish_s.tolist() == [4.0, 4.0, 5.0]


def test_arrivals_are_poisson_and_seeded():
    arrivals = poisson_arrivals(50, 20_000, seed=1)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert (arrivals == poisson_arrivals(50, 20_000, seed=1)).all()
    assert (arrivals != poisson_arrivals(50, 20_000, seed=2)).any()


def test_inputs_are_left_as_they_were():
    arrivals, lengths = requests(rate=10, n=50)
    copies = arrivals.copy(), lengths.copy()
    served = continuous(arrivals, lengths, step_seconds, max_batch=4)
    served.arrival_s[0] = -1
    assert (arrivals == copies[0]).all()
    assert (lengths == copies[1]).all()


ONE = ([0.0], [1], step_seconds)
REFUSALS: Refusals = {
    "rate has to be above 0 requests a second, got 0": lambda: poisson_arrivals(0, 5),
    "n is 0, but it must be a whole number from 1": lambda: poisson_arrivals(1, 0),
    "arrivals ... sort them": lambda: continuous([1.0, 0.5], [1, 1], step_seconds, max_batch=1),
    "arrivals (0,) and lengths (0,) have to match": lambda: static([], [], step_seconds, batch=1),
    "lengths have to be whole numbers": lambda: continuous([0.0], [0.5], step_seconds, max_batch=1),
    "largest batch is 0, but it must be a whole number from 1": lambda: continuous(*ONE, max_batch=0),
    "max_delay_s has to be 0 or more seconds": lambda: dynamic(*ONE, max_batch=1, max_delay_s=-1),
    "step_seconds has to give above 0": lambda: static([0.0], [1], lambda batch: 0.0, batch=1),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_one_sentence(words, call):
    check_refusal(words, call)
