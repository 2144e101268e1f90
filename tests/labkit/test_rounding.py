"""Rounding against all ways there are to round, and corrected biases against means over data, in float64."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.quantization import affine, rounding


def grid_of(weight: torch.Tensor, bits: int, symmetric: bool | str = True) -> affine.Grid:
    return affine.quantize(weight.detach(), bits, symmetric=symmetric, axis=0).grid


def loss(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Mean squared norm of what the weight changes in the outputs."""
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.weight.copy_(weight)
        channel = -1 if isinstance(layer, nn.Linear) else 1
        return float((new(x) - layer(x)).square().sum(channel).mean())


def correlated(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a large mean and few directions, as behind a ReLU: where errors of rounding add up."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(width // 3, 1), width, generator=generator)
    return (torch.randn(n, len(mix), generator=generator) @ mix + 1).relu()


@pytest.mark.parametrize("seed", range(4))
def test_few_weights_are_rounded_better_than_in_most_of_all_ways(seed):
    torch.manual_seed(seed)
    layer, x = nn.Linear(8, 1), correlated(256, 8, seed)
    grid = grid_of(layer.weight, 3)
    codes = rounding.adaround(layer, grid, x, layer(x))
    down = (layer.weight / grid.scale).floor().detach()
    every = [
        loss(layer, ((down + torch.tensor(up)).clamp(grid.lo, grid.hi)) * grid.scale, x)
        for up in itertools.product([0.0, 1.0], repeat=8)
    ]
    nearest = loss(layer, grid.fake(layer.weight.detach()), x)
    got = loss(layer, grid.dequantize(codes), x)
    assert min(every) <= got * (1 + 1e-4) and got <= nearest
    assert got <= sorted(every)[64] * 1.001  # of 256: it is a heuristic


LAYERS = {
    "linear": (lambda: nn.Linear(24, 12), lambda: correlated(200, 24)),
    "tokens": (lambda: nn.Linear(24, 12, bias=False), lambda: correlated(200, 24).view(20, 10, 24)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: correlated(64, 6 * 16).view(64, 6, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: correlated(64, 6 * 16).view(64, 6, 4, 4)),
}


@pytest.mark.parametrize("symmetric", [True, False, "signed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_nearer_than_those_of_the_nearest_weights(kind, symmetric):
    torch.manual_seed(0)
    layer, x = (make() for make in LAYERS[kind])
    before = copy.deepcopy(layer.state_dict())
    grid = grid_of(layer.weight, 3, symmetric)
    codes = rounding.adaround(layer, grid, x, layer(x), steps=300)
    assert codes.shape == layer.weight.shape and codes.min() >= grid.lo and codes.max() <= grid.hi
    steps = layer.weight.detach() / grid.scale + grid.zero
    away = (codes - steps.clamp(grid.lo, grid.hi)).abs()
    assert away.max() < 1 + 1e-4  # down or up, nothing else
    gain = 0.95 if kind == "depthwise" else 0.8  # nine weights a channel leave little to choose
    assert loss(layer, grid.dequantize(codes), x) < gain * loss(layer, grid.fake(layer.weight.detach()), x)
    assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items()) and layer.weight.grad is None
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)  # storing the points loses nothing


@pytest.mark.parametrize("kind", ["linear", "tokens", "conv"])  # where another order of the rows is another result
def test_rounding_repeats(kind):
    layer, x = (make() for make in LAYERS[kind])
    grid = grid_of(layer.weight, 3)
    first, second = (rounding.adaround(layer, grid, x, layer(x), steps=30) for _ in range(2))
    assert torch.equal(first, second)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_it_never_ends_above_the_nearest_however_few_steps(steps, rows, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(5, 3)
    with torch.inference_mode():  # wherever it is called
        x, grid = torch.randn(rows, 5), grid_of(layer.weight, 2)
        codes = rounding.adaround(layer, grid, x, layer(x), steps=steps)
    assert loss(layer, grid.dequantize(codes), x) <= loss(layer, grid.fake(layer.weight.detach()), x) * (1 + 1e-5)


def test_a_weight_on_the_grid_stays():
    layer, x = nn.Linear(6, 4), torch.randn(50, 6)
    grid = grid_of(layer.weight, 4)
    with torch.no_grad():
        layer.weight.copy_(grid.fake(layer.weight))
    assert torch.equal(rounding.adaround(layer, grid, x, layer(x), steps=100), grid.quantize(layer.weight.detach()))


BIASED = {
    "linear": (lambda: nn.Linear(7, 4), (30, 7)),
    "no bias": (lambda: nn.Linear(7, 4, bias=False), (5, 6, 7)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (3, 6, 5, 5)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", groups=2), (3, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", groups=6), (3, 6, 5, 5)),
    "1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular", bias=False), (3, 6, 5)),
}


@given(st.sampled_from(list(BIASED)), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_corrected_bias_keeps_the_mean_of_every_channel(kind, seed):
    torch.manual_seed(seed)
    layer, shape = BIASED[kind]
    layer, x = layer().double(), torch.randn(shape, dtype=torch.double) + 2
    channel = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
    others = [d for d in range(x.dim()) if d != channel]
    weight = grid_of(layer.weight, 3).fake(layer.weight.detach())
    bias = rounding.bias_correction(layer, weight, x.mean(others))
    new = copy.deepcopy(layer)
    new.weight, new.bias = nn.Parameter(weight), nn.Parameter(bias)
    with torch.no_grad():
        expected, got = layer(x).mean(others), new(x).mean(others)
        new.bias = layer.bias
        assert (new(x).mean(others) - expected).abs().max() > 1e-4  # what it would be without
    assert torch.allclose(got, expected, atol=1e-10, rtol=0)


def test_zero_padding_leaves_a_part_of_the_shift():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 4, 3, padding=1).double(), torch.rand(3, 6, 8, 8, dtype=torch.double)
    weight = grid_of(layer.weight, 3).fake(layer.weight.detach())
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.weight.copy_(weight)
        before = (new(x) - layer(x)).mean((0, 2, 3)).abs().max()
        new.bias.copy_(rounding.bias_correction(layer, weight, x.mean((0, 2, 3))))
        after = (new(x) - layer(x)).mean((0, 2, 3)).abs().max()
    assert 1e-4 < after < before / 2


LAYER, X = nn.Linear(6, 4), torch.randn(5, 6)
GRID, Y = grid_of(LAYER.weight, 4), LAYER(X).detach()
GROUPED = affine.quantize(LAYER.weight.detach(), 4, group_size=3).grid
REFUSALS: Refusals = {
    "steps is 0, ... .": lambda: rounding.adaround(LAYER, GRID, X, Y, steps=0),
    "0 inputs and 0 outputs": lambda: rounding.adaround(LAYER, GRID, X[:0], Y[:0]),
    "5 inputs and 4 outputs": lambda: rounding.adaround(LAYER, GRID, X, Y[:4]),
    "NaN or infinity": lambda: rounding.adaround(LAYER, GRID, X * torch.nan, Y),
    "Grid without groups": lambda: rounding.adaround(LAYER, GROUPED, X, Y),
    "mean [5], ... 6 inputs": lambda: rounding.bias_correction(LAYER, LAYER.weight, torch.zeros(5)),
}


@refused(REFUSALS)
def test_what_cannot_be_rounded_is_refused_in_a_sentence_and_the_layer_left(words, call):
    check_refusal(words, call, leaves=LAYER)
