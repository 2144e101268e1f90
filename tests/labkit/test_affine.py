"""Affine grids against a loop in float64: codes, errors and scales of every convention, granularity and type."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused

from labkit.quantization import affine

CONVENTIONS = [False, *affine.SYMMETRIC]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
VALUES = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 127.0, -128.0, 6e-8, 3e-5, -7.3, 1000.1, -60000.0]


def by_loop(values, bits, convention, stored, zero):
    """Codes, scale and zero point of one group of numbers as the papers write them; codes from what is stored."""
    half, lo, hi = 2 ** (bits - 1), min(0.0, *values), max(0.0, *values)
    extreme = hi if hi > -lo else lo
    scale, lowest, highest = {
        "restricted": (abs(extreme) / (half - 1), 1 - half, half - 1),
        "full": (2 * abs(extreme) / (2**bits - 1), -half, half - 1),
        "clipped": (abs(extreme) / half, -half, half - 1),
        "signed": (extreme / -half, -half, half - 1),
        False: ((hi - lo) / (2**bits - 1), 0, 2**bits - 1),
    }[convention]
    codes = [min(max(round(x / stored) + zero, lowest), highest) for x in values]
    return codes, scale, 0 if convention else min(max(-lo / stored, 0), highest)


def tensors(draw, dtype):
    """Few different values, so that ties, constants, extremes and all-zero groups are frequent."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-4, 1.0, 300.0]))
    else:
        few = torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=4)))
        x = few[torch.randint(len(few), shape, generator=generator)]
    return x.to(dtype)


def grouped(x, axis, group_size):
    """Which scale each value has: a number an element, in x's shape."""
    places = torch.zeros(x.shape, dtype=torch.long)
    if axis is not None:
        places += torch.arange(x.shape[axis]).view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
    elif group_size:
        rows = torch.arange(math.prod(x.shape[:-1])).view(*x.shape[:-1], 1)
        places = places + rows
    if group_size:
        places = places * x.shape[-1] + torch.arange(x.shape[-1]) // group_size
    return places


def spread(part, shape):
    """A scale or a zero point for each value."""
    if part.dim() == len(shape):
        return part.expand(shape)
    return part.expand(*shape[:-1], part.shape[-2], shape[-1] // part.shape[-2]).reshape(shape)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_codes_are_those_of_a_loop_in_float64(data):
    dtype, bits = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(2, 8))
    convention = data.draw(st.sampled_from(CONVENTIONS))
    x = tensors(data.draw, dtype)
    axis = data.draw(st.none() | st.integers(-x.dim(), x.dim() - 1))
    sizes = [size for size in range(1, x.shape[-1] + 1) if x.shape[-1] % size == 0]
    last = axis is not None and axis % x.dim() == x.dim() - 1
    group_size = None if last else data.draw(st.none() | st.sampled_from(sizes))
    before = x.clone()
    q = affine.quantize(x, bits, symmetric=convention, axis=axis, group_size=group_size)
    assert torch.equal(x, before) and q.codes.shape == x.shape and q.bits == bits and q.scale.dtype == dtype
    assert q.codes.dtype == (torch.int8 if convention else torch.uint8)
    places = grouped(x, axis, group_size)
    scale, zero = (spread(part, x.shape) for part in (q.scale, q.zero))
    for place in places.unique():
        inside = places == place
        values = x[inside].double()
        stored, wide = scale[inside].unique(), torch.promote_types(dtype, torch.float32)
        code_of_zero = zero[inside].unique().item()
        codes, expected, place = by_loop(values.tolist(), bits, convention, stored.item(), code_of_zero)
        assert abs(code_of_zero - place) <= 0.5 + 1e-4  # itself rounded, and in float32 too
        least = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 2.0**-126)
        expected = max(abs(expected), least) if values.any() else 1.0
        assert abs(stored.abs().item() - expected) <= max(torch.finfo(dtype).eps * expected, least)
        steps = values / stored  # in float32 a quotient next to a tie may round to it: either code is right
        near = (steps - steps.floor() - 0.5).abs() < 4 * torch.finfo(wide).eps * steps.abs()
        assert ((q.codes[inside].long() - torch.tensor(codes)).abs() <= near).all()
    points = (q.codes.to(wide) - zero.to(wide)) * scale.to(wide)
    assert torch.equal(q.dequantize(), points.to(dtype))
    fake = affine.fake_quantize(x, bits, symmetric=convention, axis=axis, group_size=group_size)
    assert torch.equal(fake, q.dequantize()) and fake.dtype == dtype


def test_five_numbers_by_hand_in_all_conventions():
    x = torch.tensor([0.62, -1.27, 0.05, 0.9, -0.3])
    eight = affine.quantize(x)
    assert eight.codes.tolist() == [62, -127, 5, 90, -30] and eight.scale.item() == pytest.approx(0.01)
    expected = {  # scale, codes at four bits
        "restricted": (1.27 / 7, [3, -7, 0, 5, -2]),
        "full": (2 * 1.27 / 15, [4, -8, 0, 5, -2]),
        "clipped": (1.27 / 8, [4, -8, 0, 6, -2]),
        "signed": (1.27 / 8, [4, -8, 0, 6, -2]),
    }
    for convention, (scale, codes) in expected.items():
        q = affine.quantize(x, 4, symmetric=convention)
        assert q.codes.tolist() == codes and q.scale.item() == pytest.approx(scale), convention
    asymmetric = affine.quantize(x, 4, symmetric=False)
    assert asymmetric.codes.tolist() == [13, 0, 9, 15, 7] and asymmetric.zero.item() == 9
    mirrored = affine.quantize(-x, 4, symmetric="signed")  # the extreme is positive, so the scale is negative
    assert mirrored.codes.tolist() == [4, -8, 0, 6, -2] and mirrored.scale.item() == pytest.approx(-1.27 / 8)
    clipped = affine.quantize(-x, 4, symmetric="clipped")  # and here it loses a step
    assert clipped.codes.tolist() == [-4, 7, 0, -6, 2]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("offset", [-5.0, 0.0, 5.0])
def test_zero_is_a_point_of_every_grid(convention, offset):
    x = torch.rand(64) + offset  # all positive, all negative, or both
    grid = affine.quantize(x, 4, symmetric=convention).grid
    assert grid.fake(torch.zeros(3)).eq(0).all()

    def not_pulled_to_zero(x):
        scale = (x.max() - x.min()) / 15
        return lambda value: (value / scale).round() * scale + (x.min() / scale - (x.min() / scale).round()) * scale

    assert not offset or not_pulled_to_zero(x)(torch.zeros(())) != 0


@given(
    bits=st.integers(2, 8), convention=st.sampled_from([False, "restricted", "full"]), seed=st.integers(0, 999),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_error_is_at_most_half_a_step(bits, convention, seed, shift):
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    q = affine.quantize(x, bits, symmetric=convention)
    assert (x - q.dequantize()).abs().max() <= q.scale / 2 * (1 + 1e-9)


def test_six_db_a_bit_for_uniform_values_and_what_conventions_cost():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=generator) * 2 - 1
    decibels = [affine.sqnr(uniform, affine.fake_quantize(uniform, bits, symmetric=False)) for bits in range(4, 9)]
    assert decibels == pytest.approx([20 * math.log10(2**bits - 1) for bits in range(4, 9)], abs=0.1)
    weights = torch.randn(4096, 64, generator=generator)
    at = {
        bits: [
            affine.sqnr(weights, affine.fake_quantize(weights, bits, symmetric=c, group_size=64)) for c in CONVENTIONS
        ]
        for bits in (3, 8)
    }
    asymmetric, restricted, full, _, signed = at[3]
    assert restricted == pytest.approx(12.0, abs=0.2) and full == pytest.approx(13.1, abs=0.2)
    assert signed == pytest.approx(14.3, abs=0.2) and asymmetric == pytest.approx(14.2, abs=0.2)
    assert abs(at[8][1] - at[8][2]) < 0.2


def test_ties_go_to_the_even_code():
    grid = affine.choose(torch.tensor(-127.0), torch.tensor(127.0), 8)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    assert grid.scale == 1 and grid.quantize(x).tolist() == [0, 2, 2, 0, -2, -2, 126]
    half_up = (x + 0.5).floor()
    assert half_up.tolist() != grid.quantize(x).tolist()
    third = affine.choose(torch.tensor(-0.3), torch.tensor(0.3), 8)  # dividing is not multiplying by the reciprocal
    y = (torch.arange(-120, 120) + 0.5) * third.scale
    assert torch.equal(third.quantize(y).float(), (y / third.scale).round())
    assert not torch.equal((y / third.scale).round(), (y * (1 / third.scale)).round())


def test_what_lies_outside_gets_the_last_code_and_the_zero_point_is_added_before():
    grid = affine.choose(torch.tensor(-1.0), torch.tensor(3.0), 8, symmetric=False)
    assert grid.zero == 64 and grid.quantize(torch.tensor([-9.0, 9.0, 1e30, -torch.inf])).tolist() == [0, 255, 255, 0]
    wrong = (torch.tensor(9.0) / grid.scale).round().clamp(0, 255) + grid.zero
    assert wrong == 319
    signed = affine.choose(torch.tensor(-127.5), torch.tensor(127.5), 8, symmetric="full")
    assert signed.quantize(torch.tensor([127.5, -127.5])).tolist() == [127, -128]  # 128 would be -128 in int8


def test_a_scale_that_float16_rounds_to_zero_becomes_the_least_number():
    weight = torch.tensor([[1e-9, -2e-9, 0, 1e-9], [0, 0, 0, 0], [1.0, -2.0, 0.5, 0.1]])
    lo, hi = weight.amin(1, True), weight.amax(1, True)
    clamped_before = (torch.maximum(hi, -lo) / 127).clamp(min=1e-12).half()
    assert (weight / clamped_before.float()).isnan().any()  # 0 / 0
    for convention in CONVENTIONS:
        grid = affine.choose(lo, hi, 8, symmetric=convention, dtype=torch.float16)
        assert grid.scale.dtype == torch.float16 and grid.scale.ne(0).all()
        back = grid.dequantize(grid.quantize(weight), torch.float32)
        assert back.isfinite().all() and back[1].eq(0).all()
        assert affine.sqnr(weight[2], back[2]) > 35
    assert affine.quantize(torch.zeros(4)).scale == 1  # a product or a quotient of scales stays harmless
    assert (1 / affine.quantize(torch.full((4,), 1e-44)).scale).isfinite()


def test_codes_of_bfloat16_are_multiplied_in_float32():
    x = torch.linspace(-1, 1, 255).bfloat16()
    q = affine.quantize(x)
    in_float32 = q.codes.float() * q.scale.float()
    assert torch.equal(q.dequantize(), in_float32.bfloat16())
    assert torch.equal(q.grid.dequantize(q.codes, torch.float32), in_float32)
    assert not torch.equal(in_float32.bfloat16().float(), in_float32)  # what training under autocast sees


def test_nan_has_no_code_and_stays_nan_in_the_simulation():
    grid = affine.choose(torch.tensor(-1.0), torch.tensor(1.0), 8)
    x = torch.tensor([0.3, torch.nan])
    assert grid.fake(x).isnan().tolist() == [False, True]
    check_refusal("x has NaN, for which there is no code", lambda: grid.quantize(x))


def test_shapes_of_scales():
    x = torch.randn(4, 6, 8)
    assert affine.quantize(x).scale.shape == (1, 1, 1)
    assert affine.quantize(x, axis=1).scale.shape == (1, 6, 1)
    assert affine.quantize(x, group_size=4).scale.shape == (4, 6, 2, 1)
    assert affine.quantize(x, group_size=8).scale.shape == (4, 6, 1, 1)  # a scale for each token
    assert affine.quantize(x, axis=0, group_size=4).scale.shape == (4, 1, 2, 1)
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(
        affine.quantize(channels_last, axis=1).codes, affine.quantize(channels_last.contiguous(), axis=1).codes
    )
    assert torch.equal(
        affine.quantize(x.mT, group_size=2).codes, affine.quantize(x.mT.contiguous(), group_size=2).codes
    )


def test_sqnr_is_in_db_and_exact_when_nothing_differs():
    r = torch.tensor([3.0, 4.0])
    assert affine.sqnr(r, r + torch.tensor([0.0, 0.5])) == pytest.approx(20.0)
    assert affine.sqnr(r, r / 0) == -math.inf and math.isnan(affine.sqnr(r, r * torch.nan))
    assert affine.sqnr(r, r) == math.inf and affine.sqnr(torch.zeros(2), r) == -math.inf
    long = torch.full((2**24 + 8,), 1.0)  # whose sum of squares float32 cannot count
    assert affine.sqnr(long, long + 0.5) == pytest.approx(6.0206, abs=1e-4)


X = torch.randn(2, 576)
REFUSALS: Refusals = {
    "bits is 9, but it must be a whole number from 2 to 8": lambda: affine.quantize(X, 9),
    "bits is 1": lambda: affine.quantize(X, 1),
    "no kind of symmetric grid 'max': choose one of asymmetric, r": lambda: affine.quantize(X, symmetric="max"),
    "axis is 2, but x has 2 dimensions: take one from -2 to 1": lambda: affine.quantize(X, axis=2),
    "is 128, ... a divisor of 576: 32, 64, 96, 192, 288, 576": lambda: affine.quantize(X, group_size=128),
    "a divisor of 27: 1, 3, 9, 27": lambda: affine.quantize(X[:, :27], group_size=4),
    "group_size is 0": lambda: affine.quantize(X, group_size=0),
    "Groups run along the last dimension": lambda: affine.quantize(X, axis=1, group_size=64),
    "NaN, infinities or a range beyond torch.float32": lambda: affine.quantize(X / 0),
    "The values have NaN": lambda: affine.quantize(X.index_fill(0, torch.tensor([0]), torch.nan)),
    "beyond torch.float16": lambda: affine.choose(*torch.tensor([0.0, 3e38]), 4, dtype=torch.float16),
    "x is torch.int64 [2, 576], but it must hold floating-point": lambda: affine.quantize(X.long()),
    "x is torch.float32 [0, 576]": lambda: affine.quantize(X[:0]),
    "The reference is [2, 576] and the approximation [576]": lambda: affine.sqnr(X, X[0]),
    "x is a list": lambda: affine.quantize([1.0, 2.0]),
    "x is a ndarray": lambda: affine.quantize(X.numpy()),
    "x is None": lambda: affine.quantize(None),
    "x is a str": lambda: affine.fake_quantize("x"),
    "x is a tensor of layout sparse_coo": lambda: affine.quantize(X.to_sparse()),
    "x is a tensor of layout sparse_csr": lambda: affine.fake_quantize(X.to_sparse_csr()),
    "x is a tensor of layout nested": lambda: affine.quantize(torch.nested.nested_tensor([X[0], X[1, :9]])),
    "x is on the meta device": lambda: affine.quantize(X.to("meta")),
    "x is torch.complex64": lambda: affine.quantize(X.to(torch.complex64)),
    "x is torch.bool": lambda: affine.quantize(X > 0),
    "x is torch.float8_e4m3fn": lambda: affine.quantize(X.to(torch.float8_e4m3fn)),
    "bits is '8'": lambda: affine.quantize(X, "8"),
    "bits is 8.0": lambda: affine.quantize(X, 8.0),
    "bits is True": lambda: affine.quantize(X, True),
    "kind of symmetric grid None": lambda: affine.quantize(X, symmetric=None),
    "kind of symmetric grid ['full']": lambda: affine.quantize(X, symmetric=["full"]),
    "kind of symmetric grid 1": lambda: affine.quantize(X, symmetric=1),
    "axis is True": lambda: affine.quantize(X, axis=True),
    "axis is 1.0": lambda: affine.quantize(X, axis=1.0),
    "axis is (0, 1)": lambda: affine.quantize(X, axis=(0, 1)),
    "axis is -3": lambda: affine.quantize(X, axis=-3),
    "group_size is '64'": lambda: affine.quantize(X, group_size="64"),
    "group_size is 64.0": lambda: affine.quantize(X, group_size=64.0),
    "group_size is -1": lambda: affine.quantize(X, group_size=-1),
    "axis must be another": lambda: affine.quantize(torch.tensor(1.0), group_size=1),
    "lo is a float": lambda: affine.choose(0.0, 1.0, 8),
    "hi is a float": lambda: affine.choose(torch.zeros(1), 1.0, 8),
    "lo is torch.int64": lambda: affine.choose(torch.tensor(0), torch.tensor(1), 8),
    "dtype is torch.int8": lambda: affine.choose(*torch.tensor([0.0, 1.0]), 8, dtype=torch.int8),
    "dtype is 'float16'": lambda: affine.choose(*torch.tensor([0.0, 1.0]), 8, dtype="float16"),
    "reference is a list": lambda: affine.sqnr([1.0], X),
    "approximation is None": lambda: affine.sqnr(X, None),
    "approximation is on the meta device": lambda: affine.sqnr(X, X.to("meta")),
    "x is a tuple": lambda: affine.quantize(X).grid.quantize((1.0,)),
    "codes is a list": lambda: affine.quantize(X).grid.dequantize([1]),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_an_axis_may_be_a_number_of_numpy():
    assert torch.equal(affine.fake_quantize(X, axis=np.int64(0)), affine.fake_quantize(X, axis=0))
