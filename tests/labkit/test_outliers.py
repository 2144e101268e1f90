"""The outlier split against integers in int64 and floats in float64."""

import copy
import math

import families
import pytest
import torch
from torch import nn

from labkit.quantization import affine, outliers


def example(tokens: int = 5) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 7), torch.randn(tokens, 24)
    x[2, 3], x[0, 11] = 40, -9  # one token each
    return layer, x


def by_hand(layer: nn.Linear, x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Column by column, token by token, in int64 and float64."""
    w = layer.weight.detach().double()
    split = [j for j in range(x.shape[1]) if float(x[:, j].abs().max()) >= threshold]
    rest = [j for j in range(x.shape[1]) if j not in split]
    step_w = w.abs().amax(1) / 127
    codes_w = (w / step_w[:, None]).round().long()
    y = torch.zeros(len(x), len(w), dtype=torch.double)
    for t, row in enumerate(x.double()):
        step = row[rest].abs().max() / 127 if rest else 1.0
        codes = (row[rest] / step).round().long()
        y[t] = (codes_w[:, rest] @ codes) * step * step_w + w[:, split] @ row[split]
    return y + layer.bias.detach().double()


@pytest.mark.parametrize("threshold", [6.0, 20.0, math.inf])
@torch.no_grad()
def test_the_split_is_the_papers(threshold):
    layer, x = example()
    new = outliers.OutlierSplit(layer, threshold)
    assert torch.allclose(new(x).double(), by_hand(layer, x, threshold), rtol=1e-4, atol=1e-5)
    assert new.columns == {6.0: 2, 20.0: 1, math.inf: 0}[threshold]


@torch.no_grad()
def test_split_all_is_the_layer_and_leading_dimensions_stay():
    layer, x = example(6)
    new = outliers.OutlierSplit(layer, 1e-9)
    assert torch.allclose(new(x), layer(x), atol=1e-5)
    assert torch.allclose(new(x.view(2, 3, 24)), layer(x).view(2, 3, 7), atol=1e-5)


@torch.no_grad()
def test_outliers_are_what_eight_bits_a_token_fail_at():
    layer, x = example(64)
    x[:, 3] = 60
    y = layer(x)
    split, plain = (affine.sqnr(y, outliers.OutlierSplit(layer, threshold)(x)) for threshold in (6.0, math.inf))
    assert split > plain + 15


def test_every_linear_of_a_model_is_split():
    model = families.family("llama")
    before = copy.deepcopy(model.state_dict())
    new = outliers.split(model)
    kinds = {name for name, x in new.named_modules() if isinstance(x, outliers.OutlierSplit)}
    assert len(kinds) == 3 * 7 + 1
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        y, ids = model(**families.inputs("llama")).logits, families.inputs("llama")
        assert 20 < affine.sqnr(y, new(**ids).logits) < 80
