"""Claims about the Triton kernels, in a process that interprets them on the CPU, or on a GPU (test_triton_kernels.py).

Bit by bit where every sum is exact: small whole numbers, and factors that are powers of two. Else within bounds on
rounding, with u = 2^-24 for float32; gamma(n) = n u / (1 - n u) bounds the relative error of n roundings in a row. A
tensor core may cut sums off where IEEE rounds, which doubles u. bfloat16 has 8 significant bits: rounding to nearest
changes a number by 2^-8 of it at most, and the interpreter's cutting off by 2^-7.
"""

import math

import pytest
import torch
from refusals import check_refusal
from torch import Tensor, nn

from labkit.attention import blockwise
from labkit.quantization import weight_only
from labkit.quantization.affine import Grid, Quantized
from labkit.quantization.weight_only import WeightOnlyLinear
from labkit.triton_kernels import int4_product, is_interpreted, online_softmax

DEVICE = "cpu" if is_interpreted() else "cuda"
U = 2**-24 if is_interpreted() else 2**-23
CUT_OFF = {torch.float32: 0.0, torch.bfloat16: 2**-7}  # of a result or a weight that is brought to the dtype
DTYPES = [torch.float32, torch.bfloat16]


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def whole(least: int, most: int, *shape: int) -> Tensor:
    """Whole numbers from least to most, float32, on the CPU."""
    return torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


# --- four-bit weights -------------------------------------------------------------------------------------------------

SHAPES = [  # rows, inputs, outputs, group
    (1, 64, 16, 64),
    (3, 192, 37, 64),  # outputs beyond the last program, and three groups: zero points of two outputs share a byte
    (16, 288, 70, 96),  # steps of 32 inputs
    (17, 512, 5, 256),  # more rows than a tensor core takes at once, two steps within a group
    (5, 576, 33, 576),  # a scale for a whole row
]


def packed_by_hand(inputs: int, outputs: int, group: int) -> WeightOnlyLinear:
    """A layer whose scales are powers of two from 1/8 to 8."""
    groups = inputs // group
    scale = 2 ** whole(-3, 3, outputs, groups, 1)
    zero = whole(0, 15, outputs, groups, 1).int()
    codes = whole(0, 15, outputs, inputs).to(torch.uint8)
    return WeightOnlyLinear(Quantized(codes, Grid(scale.half(), zero, 4, 0, 15))).to(DEVICE)


@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), SHAPES)
def test_the_int4_product_is_exact_where_float32_is(rows: int, inputs: int, outputs: int, group: int):
    """Terms are multiples of 2^-3 below 2^10, and 576 of them add up to less than 2^20: 23 bits, of 24."""
    layer, x = packed_by_hand(inputs, outputs, group), whole(-8, 8, rows, inputs).to(DEVICE)
    exact = x.double() @ layer.weight.double().t()
    assert torch.equal(int4_product.linear(x, layer).double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), SHAPES)
def test_the_int4_product_is_within_its_bound(dtype: torch.dtype, rows: int, inputs: int, outputs: int, group: int):
    """A term is rounded as a product, in sums of a block, by the scale, in sums over blocks: I + 3 times at most.

    So a sum is off by gamma(I + 3) times the sum of the terms' sizes, and the result is then brought to the dtype.
    """
    draw = torch.Generator().manual_seed(inputs)
    dense = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(dense.weight, generator=draw)
    (layer,) = weight_only.quantize(nn.Sequential(dense), group_size=group).to(DEVICE)
    x = torch.randn(rows, inputs, generator=draw).to(DEVICE, dtype)
    weight = layer.weight.double()
    exact, sizes = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    y = int4_product.linear(x, layer)
    summed = gamma(inputs + 3) * sizes
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= summed + CUT_OFF[dtype] * (exact.abs() + summed)).all()


def test_another_layer_and_another_width_are_refused():
    model = nn.Sequential(nn.Linear(64, 16))
    x = torch.zeros(1, 64, device=DEVICE)
    for options in ({"bits": 8}, {"symmetric": "signed"}, {"method": "nf4"}, {"group_size": 16}):
        (layer,) = weight_only.quantize(model, **options).to(DEVICE)
        check_refusal("quantize it to 4 bits with symmetric=False", lambda layer=layer: int4_product.linear(x, layer))
    (layer,) = weight_only.quantize(model).to(DEVICE)
    check_refusal("x is [1, 32] on", lambda: int4_product.linear(x[:, :32], layer))


# --- attention --------------------------------------------------------------------------------------------------------

TOKENS = [(1, 200), (64, 64), (70, 130), (130, 130)]  # queries and keys; a block has 64 of each
WIDTHS = [16, 20, 64]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("queries", "keys"), TOKENS)
@pytest.mark.skipif(not is_interpreted(), reason="a GPU's division of float32 is not rounded to nearest")
def test_a_softmax_of_base_2_is_exact_where_float32_is(queries: int, keys: int, width: int, causal: bool):
    """Scores from -4 to 4: weights and the factors between blocks are powers of two, and sums have 20 bits of 24.

    Only the division rounds, in the reference too: a quotient in float64 rounds to float32 as the quotient itself does.
    """
    q, k = (whole(-1, 1, 2, tokens, width) for tokens in (queries, keys))
    q[..., 4:] = 0
    v = whole(-8, 8, 2, keys, width)
    weights = 2.0 ** (q.double() @ k.double().mT)
    if causal:
        weights = weights.tril(keys - queries)
    exact = (weights @ v.double()) / weights.sum(-1, keepdim=True)
    assert torch.equal(online_softmax.launch(q, k, v, causal, factor=1.0), exact.float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("queries", "keys"), TOKENS)
def test_attention_is_within_its_bound(queries: int, keys: int, width: int, dtype: torch.dtype, causal: bool):
    """That of blockwise.attention: the factor log2(e) / sqrt(D) and its product round as the scale and its product do.

    In bfloat16 each weight, then the result, is brought to the dtype, which changes the mean of the values by no more
    than that part of the largest value.
    """
    draw = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(2, n, width, generator=draw).to(DEVICE, dtype) for n in (queries, keys, keys))
    exact = blockwise.attention(*(x[None].double() for x in (q, k, v)), causal=causal)[0]
    largest_score = float((q.double().abs() @ k.double().abs().mT).max()) / math.sqrt(width)
    blocks = math.ceil(keys / online_softmax.KEYS)
    in_float32 = U * (2 * (width + 6) * largest_score + 2 * keys + 8 * blocks + 8)
    largest_value = float(v.double().abs().max())
    y = online_softmax.attention(q, k, v, causal=causal)
    assert y.dtype == dtype
    assert float((y.double() - exact).abs().max()) <= (in_float32 + 2 * CUT_OFF[dtype]) * largest_value


def test_queries_without_a_key_and_tensors_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 3, 16, device=DEVICE), torch.zeros(1, 2, 16, device=DEVICE)
    check_refusal("3 queries have only 2 keys", lambda: online_softmax.attention(q, k, k, causal=True))
    check_refusal("do not fit together", lambda: online_softmax.attention(q, k, q))
