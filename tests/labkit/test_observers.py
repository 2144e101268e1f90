"""Observers against numpy on all values at once, in float64: whatever the batches, their order and their signs."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused

from labkit.quantization import affine, observers
from labkit.quantization.observers import Observer


def drawn(kind: str, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    return {
        "normal": x,
        "relu": x.relu(),
        "shifted": x + 5,
        "negative": -x.abs() - 1,
        "outlier": torch.cat([x, torch.tensor([900.0])]),
        "ties": (x * 2).round() / 2,
        "tiny": x * 1e-12,
    }[kind]


KINDS = ["normal", "relu", "shifted", "negative", "outlier", "ties", "tiny"]


def observed(name: str, *tensors: torch.Tensor, bits: int = 8) -> Observer:
    observer = Observer(name, bits)
    for x in tensors:
        observer.observe(x)
    return observer


def bounds(name: str, *tensors: torch.Tensor, bits: int = 8) -> tuple[float, float]:
    return tuple(float(end) for end in observed(name, *tensors, bits=bits).range())


def error(x: torch.Tensor, lo: float, hi: float, bits: int) -> float:
    """Mean squared error of the codes for this range, in numpy float64, written down anew."""
    x, lo, hi = x.double().numpy(), min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (2**bits - 1)
    zero = np.round(-lo / scale)
    return float(np.mean((x - (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale) ** 2))


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 300), st.integers(0, 99)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_histogram_counts_every_value_once_in_any_order(parts):
    tensors = [drawn(*part) for part in parts]
    x = torch.cat(tensors).double().numpy()
    assume(x.min() < x.max())
    forwards, backwards = observed("mse", *tensors), observed("mse", *reversed(tensors))
    assert (forwards.counts == np.histogram(x, forwards.edges)[0]).all() and forwards.counts.sum() == len(x)
    assert (forwards.counts == backwards.counts).all() and forwards.exponent == backwards.exponent
    assert forwards.edges[observers.BINS // 2] == 0


@given(st.sampled_from(KINDS), st.integers(2, 5000), st.integers(0, 99), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_ranges_are_those_of_numpy(kind, n, seed, batches):
    parts = drawn(kind, n, seed).chunk(batches)
    x = torch.cat(parts).numpy()
    assume(x.min() < x.max())
    assert bounds("minmax", *parts) == (x.min(), x.max())

    lo, hi = parts[0].double().min().item(), parts[0].double().max().item()
    for part in parts[1:]:
        lo, hi = 0.9 * lo + 0.1 * part.min().item(), 0.9 * hi + 0.1 * part.max().item()
    assert bounds("moving", *parts) == pytest.approx((lo, hi), rel=1e-6, abs=1e-15)

    cut = (1 - observers.PERCENTILE / 100) / 2
    width = observed("percentile", *parts).width
    expected = [np.quantile(x, q, method="inverted_cdf") for q in (cut, 1 - cut)]
    assert np.abs(np.subtract(bounds("percentile", *parts), expected)).max() <= width * 1.0001


@given(st.sampled_from(list(observers.RANGES)), st.sampled_from(KINDS), st.integers(2, 3000), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_range_lies_within_what_was_seen_and_makes_a_grid(name, kind, n, seed):
    x = drawn(kind, n, seed)
    assume(x.min() < x.max())
    lo, hi = observed(name, x).range()
    assert x.min() <= lo <= hi <= x.max() and (lo < 0 or hi > 0) and lo.dtype == torch.float32
    grid = affine.choose(lo, hi, 8, symmetric=False)
    assert grid.fake(torch.zeros(3)).eq(0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS[:6])
def test_squared_error_is_that_of_the_best_of_all_pairs_of_ends(kind, bits):
    x = drawn(kind, 4000, 3)
    lo, hi = bounds("mse", x, bits=bits)
    low, high = x.min().item(), x.max().item()
    shares = np.linspace(0.02, 1, 50)
    ends = (
        [(a, high * b) for a in {low * a for a in shares} for b in shares]
        if low < 0
        else [(0, high * b) for b in shares]
    )
    best = min(error(x, *pair, bits) for pair in ends)
    assert error(x, lo, hi, bits) <= min(error(x, low, high, bits) * 1.02, best * 1.15)


def test_four_bits_clip_a_gaussian_where_theory_says():
    """Banner et al. 2019 (arXiv:1810.05723), table 1: the best clip of a Gaussian at 4 bits is 2.55 sigma."""
    lo, hi = bounds("mse", drawn("normal", 200_000, 0), bits=4)
    assert hi == pytest.approx(2.55, abs=0.2) and -lo == pytest.approx(2.55, abs=0.2)
    assert bounds("mse", drawn("normal", 200_000, 0), bits=8)[1] > 3.5


def test_divergence_is_that_of_a_loop():
    """Bin by bin, as Migacz's slides have it."""
    counts = np.random.default_rng(0).integers(0, 50, 300) * (np.arange(300) % 7 > 1)
    for i in (16, 40, 77, 300):
        p, q = counts[:i].astype(float), np.zeros(i)
        for code in range(16):
            bins = [j for j in range(i) if j * 16 // i == code and counts[j] > 0]
            for j in bins:
                q[j] = sum(counts[k] for k in bins) / len(bins)
        p[max(j for j in range(i) if counts[j])] += counts[i:].sum()
        p, q = p / p.sum(), q / q.sum()
        expected = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)
        assert observers._divergence(counts, i, 16) == pytest.approx(expected, abs=1e-12)


def test_the_zeros_of_a_relu_do_not_decide_the_threshold():
    """Counted as they are, the zeros drive the threshold to where each bin has a code of its own."""
    x = drawn("relu", 100_000, 0)
    x[::3] = 0
    _, hi = bounds("histogram", x)
    seen = observed("histogram", x)
    counts = seen.counts[observers.BINS // 2 :]
    last = int(counts.nonzero()[0].max()) + 1
    naive = min(range(256, last + 1), key=lambda i: observers._divergence(counts, i, 256)) * seen.width
    assert hi > 2.5 and naive <= 1


def test_an_outlier_stretches_min_max_and_nothing_that_weighs_counts():
    x = drawn("outlier", 100_000, 1)
    assert bounds("minmax", x)[1] == 900
    assert bounds("percentile", x)[1] < 6 and bounds("histogram", x)[1] < 200
    average = bounds("moving", x[:-1], x)[1]  # a tenth of it
    assert 90 < average < 100


def test_one_sided_values_get_twice_the_codes_for_the_threshold():
    x = drawn("normal", 50_000, 2)
    assert bounds("histogram", x, bits=5)[1] < bounds("histogram", x.abs(), bits=5)[1]


CONSTANTS: Refusals = {
    f"All values of the activation are {number:g}, ... .": lambda name, number=number: observed(
        name, torch.full((2, 3), number), torch.full((4,), number)
    ).range()
    for number in (0.0, 3.0, -2.5)
}
RANGELESS: Refusals = {
    "Nothing was observed of fc: calibrate on at least one batch ... .": lambda name: Observer(
        name, where="fc"
    ).range(),
    "no values in the activation": lambda name: observed(name, torch.empty(0, 4)),
    **CONSTANTS,
}


@pytest.mark.parametrize("name", observers.RANGES)
@refused(RANGELESS)
def test_what_has_no_range_is_refused_in_one_sentence(name, words, call):
    check_refusal(words, lambda: call(name))


@pytest.mark.parametrize("name", observers.RANGES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_and_not_counted(name, bad):
    seen = observed(name, torch.randn(3))
    check_refusal("There is NaN or infinity in the activation: ... .", lambda: seen.observe(torch.tensor([1.0, bad])))
    assert len(seen.extremes) == 1 and seen.counts.sum() in (0, 3)  # as before


def test_an_unknown_observer_names_the_known_ones():
    check_refusal("minmax, moving, percentile, mse, histogram", lambda: Observer("entropy"))


def test_half_precision_and_strides_count_alike():
    x = drawn("normal", 600, 0).view(20, 30)
    assert (observed("mse", x.t()).counts == observed("mse", x).counts).all()
    assert (observed("mse", x.bfloat16()).counts == observed("mse", x.bfloat16().float()).counts).all()
