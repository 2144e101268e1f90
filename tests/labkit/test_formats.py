"""Codes and points against the published tables, torch's casts, and the rules of the specifications as loops."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused

from labkit.quantization import affine, formats
from labkit.quantization.formats import FORMATS

BLOCKS = ["nf4", "mxfp4", "nvfp4"]
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def test_points_are_the_published_ones():
    # OCP Microscaling Formats 1.0, table 5; codes 8..15 are the negative ones
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FORMATS["mxfp4"].decode(torch.arange(16)).tolist() == [*e2m1, *(-x for x in e2m1)]
    # Micikevicius et al. 2022, table 1: largest, smallest normal and smallest subnormal number
    for name, extremes in {"e4m3": (448, 2**-6, 2**-9), "e5m2": (57344, 2**-14, 2**-16)}.items():
        points, steps = FORMATS[name].points, 8 if name == "e4m3" else 4
        assert (points[-1], points[steps], points[1]) == extremes
    # QLoRA, section 3: quantiles of N(0, 1), evenly spaced in probability on each side of 0, over the largest
    offset, normal = 0.9677083, NormalDist()
    right = [normal.inv_cdf(0.5 + (offset - 0.5) * k / 8) for k in range(1, 9)]
    left = [-normal.inv_cdf(0.5 + (offset - 0.5) * k / 7) for k in range(7, 0, -1)]
    expected = [x / right[-1] for x in (*left, 0.0, *right)]
    assert FORMATS["nf4"].points == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_codes_are_those_of_torch(name):
    dtype, last = FLOAT8[name], FORMATS[name].points[-1]
    codes = torch.arange(256, dtype=torch.uint8)
    points, theirs = FORMATS[name].decode(codes), codes.view(dtype).float()
    number = theirs.isfinite()
    assert torch.equal(points[number], theirs[number]) and points[~number].isnan().all()
    assert torch.equal(FORMATS[name].encode(points[number]), codes[number])  # -0.0 too
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * torch.exp2(torch.randint(-22, 18, (100_000,), generator=generator))
    positive = points[: len(FORMATS[name].points)]
    ties = (positive[1:] + positive[:-1]) / 2
    x = torch.cat([x, ties, -ties, torch.tensor([0.0, -0.0])]).clamp(-last, last)
    assert torch.equal(formats.quantize(x, name).codes.view(dtype).float(), x.to(dtype).float())
    assert torch.equal(formats.quantize(x, name).codes, x.to(dtype).view(torch.uint8))
    assert formats.fake(torch.tensor([1e9, -1e9]), name).tolist() == [last, -last]


def nearest(value, points):
    """Of all signed points the nearest; of two as near, that with the even code."""
    return min(range(len(points)), key=lambda code: (abs(abs(value) - points[code]), code % 2))


def by_loop(block, name, largest_of_all):
    """The values of a block after quantization, by the rule of the format, in float64."""
    row, largest = FORMATS[name], max(abs(x) for x in block)
    last = row.points[-1]
    if name == "mxfp4":
        exponent = math.floor(math.log2(largest)) - math.floor(math.log2(last)) if largest else -127
        scale = 2.0 ** max(-127, min(127, exponent))
    elif name == "nf4":
        scale = torch.tensor(largest).half().item()
    else:
        tensor_scale = torch.tensor(largest_of_all / 6 / 448, dtype=torch.float32).item() or 1.0
        scale = torch.tensor(largest / 6 / tensor_scale).clamp(2**-9).to(torch.float8_e4m3fn).item() * tensor_scale
        scale = torch.tensor(scale).item()
    scale = scale or 1.0
    steps = (torch.tensor(block) / torch.tensor(scale)).tolist()  # in float32, as documented: that decides about ties
    if not row.signed:
        return [row.points[min(range(16), key=lambda c: abs(x - row.points[c]))] * scale for x in steps]
    return [math.copysign(row.points[nearest(x, row.points)], x) * scale for x in steps]


@given(
    name=st.sampled_from(BLOCKS), seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 1.0, 3e3]), ties=st.booleans()
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_blocks_are_those_of_a_loop(name, seed, scale, ties):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 128, generator=generator) * scale
    if ties:  # halves of powers of two, and blocks of zeros
        x = torch.randint(-8, 9, (2, 128), generator=generator) / 4
        x[0, :64] = 0
    expected = []
    for block in x.view(-1, FORMATS[name].block).tolist():
        expected += by_loop(block, name, float(x.abs().max()))
    expected = torch.tensor(expected, dtype=torch.float64).view(x.shape)
    q = formats.quantize(x, name)
    assert q.codes.shape == x.shape and q.scale.dtype == FORMATS[name].scale and q.scale.shape[-1] == 1
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(formats.fake(x, name), q.dequantize())


def test_mxfp4_values_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType.MXFP4
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    assert torch.equal(formats.fake(x, "mxfp4"), torch.from_numpy(theirs).view(x.shape))


def test_formats_are_those_of_torchao():
    kernels = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    theirs = kernels.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, block_size=32)
    assert torch.equal(formats.fake(x, "mxfp4"), theirs.dequantize(torch.float32))
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
    assert torch.equal(formats.fake(x, "nvfp4"), theirs.dequantize(torch.float32))


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    x[:, 0] = 4.0  # whose float16 is exact, since their scale is float32
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(x, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(formats.fake(x, "nf4"), theirs)


def test_power_of_two_scales_clip_and_the_others_do_not():
    x = torch.linspace(0.1, 7.9, 32)[None]  # floor(log2 7.9) = 2, so the scale is 1 and 7.9 becomes 6
    assert formats.fake(x, "mxfp4").max() == 6
    assert formats.fake(x, "nvfp4").max() == pytest.approx(7.9, rel=0.07)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12])
def test_zero_and_tiny_blocks_stay_numbers(name, value):
    x = torch.full((2, 64), value)
    x[1] = 1.0
    assert (torch.tensor(value).half() / torch.tensor(value).half()).isnan()  # the scale that is not clamped
    back = formats.fake(x, name)
    assert back.isfinite().all() and back[0].abs().max() <= 1e-4 and torch.allclose(back[1], torch.ones(64), rtol=0.04)


def test_quality_on_normal_weights():
    w = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    for name, decibels in {"nf4": 20.76, "mxfp4": 18.7, "nvfp4": 20.4}.items():
        assert affine.sqnr(w, formats.fake(w, name)) == pytest.approx(decibels, abs=0.2), name


def test_dtypes_and_shapes_stay():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(3, 4, 64).to(dtype)
        assert formats.fake(x, "mxfp4").dtype == dtype and formats.fake(x.mT.contiguous().mT, "nf4").shape == x.shape


REFUSALS: Refusals = {
    "no number format 'fp4': choose one of e4m3, e5m2": lambda: formats.fake(torch.ones(4), "fp4"),
    "is 16, but groups ... a divisor of 27: 1, 3, 9, 27": lambda: formats.fake(torch.ones(2, 27), "nvfp4"),
    "is 64, but groups ... a divisor of 1: 1": lambda: formats.fake(torch.tensor(1.0), "nf4"),
    "x is torch.int64 [64], but it must hold floating-point": lambda: formats.fake(torch.arange(64), "nf4"),
    "x is torch.float32 [0, 64]": lambda: formats.fake(torch.zeros(0, 64), "nvfp4"),
    "The values have NaN or infinities": lambda: formats.fake(torch.tensor([torch.nan]), "e4m3"),
    "or a range beyond torch.float16": lambda: formats.fake(torch.full((64,), 1e5), "nf4"),
    "have NaN or infinities": lambda: formats.fake(torch.full((64,), torch.inf), "mxfp4"),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_the_better_exponent_of_mxfp4_is_the_better_of_both():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    first = formats.quantize(x, "mxfp4")
    second = formats.Encoded(
        FORMATS["mxfp4"].encode(x.unflatten(1, (-1, 32)) / (2 * first.scale.float())).view(x.shape),
        (2 * first.scale.float()).to(first.scale.dtype),
        None,
        "mxfp4",
    )
    blocks = x.unflatten(1, (-1, 32))
    errors = [(encoded.dequantize().unflatten(1, (-1, 32)) - blocks).square().sum(-1) for encoded in (first, second)]
    chosen = formats.with_better_exponent(x)
    found = (chosen.dequantize().unflatten(1, (-1, 32)) - blocks).square().sum(-1)
    assert torch.equal(found, torch.minimum(*errors)) and (errors[1] < errors[0]).any()
    assert torch.equal(formats.with_better_exponent(torch.zeros(1, 32)).dequantize(), torch.zeros(1, 32))
