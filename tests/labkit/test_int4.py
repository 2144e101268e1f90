"""The int4 kernel gives the bits of its reference, with every instruction set; the reference is the product it says."""

import copy
import pickle

import kernels
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import llama, text
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit import roofline
from labkit.attention.decoder import Decoder
from labkit.quantization import affine, formats, weight_only
from labkit.storage import int4, native

needs_compiler = pytest.mark.skipif(not native.isas("int4_linear"), reason="needs a C++ compiler")


isa = kernels.every_isa("int4_linear")


def rounded(out_features, in_features, group_size=None, bits=4, symmetric=False):
    return weight_only.rtn(torch.randn(out_features, in_features), bits, group_size=group_size, symmetric=symmetric)


def assert_same_bits(y, expected):
    """Equal, the sign of a zero included; a NaN equals a NaN."""
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert torch.equal(y.isnan(), expected.isnan())
    is_number = ~y.isnan()
    assert torch.equal(y[is_number].view(torch.int32), expected[is_number].view(torch.int32))


def assert_kernel_equals_reference(x, weight, bias=None):
    layer = int4.Int4Linear(weight, bias)
    assert_same_bits(layer(x), int4.reference(x, weight, bias))


# --- the kernel and its reference -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@settings(deadline=None, max_examples=60)
@given(
    outputs=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([1, 2, 3, 7, 8, 9, 15, 32, 64]),
    rows=st.integers(0, 9),
    bits=st.integers(2, 4),
    symmetric=st.sampled_from([False, "restricted", "full", "clipped", "signed"]),
    has_bias=st.booleans(),
)
@torch.no_grad()
def test_every_shape_gives_the_bits_of_the_reference(outputs, groups, group_size, rows, bits, symmetric, has_bias):
    weight = rounded(outputs, groups * group_size, group_size, bits, symmetric)
    bias = nn.Parameter(torch.randn(outputs)) if has_bias else None
    assert_kernel_equals_reference(torch.randn(rows, groups * group_size), weight, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("outputs", "inputs"), [(576, 576), (192, 576), (1536, 576), (576, 1536)])
def test_the_layers_of_smollm2_give_the_bits_of_the_reference(outputs, inputs):
    weight = rounded(outputs, inputs, 64)
    for scale in (1.0, 1e-5, 1e5):
        assert_kernel_equals_reference(scale * torch.randn(2, 1, inputs), weight)


@pytest.mark.usefixtures("isa")
def test_activations_halfway_between_two_codes_give_the_bits_of_the_reference():
    """The last bit of 127 / largest decides these codes."""
    largest = 1 + torch.rand(500, 1)
    halfway = torch.arange(0.5, 127) * largest / 127
    x = torch.cat([halfway, halfway.nextafter(largest), largest, -largest], 1)
    assert_kernel_equals_reference(x, rounded(3, x.shape[1]))


@pytest.mark.usefixtures("isa")
def test_activations_of_every_kind_give_the_bits_of_the_reference():
    weight = rounded(33, 96, 32)
    x = torch.randn(11, 96)
    x[1] = 0.0
    x[2] = -0.0
    x[3, 32:64] = 0.0
    x[4] = 7.25  # a group of equal numbers
    x[5] = torch.arange(96) % 2 - 0.5  # ties between two codes, with the next line
    x[5, ::32] = 127.0
    x[6] = 1e-42
    x[7, :32] = 2.0**-64
    x[8, :32] = 2.0**-65
    x[9] = torch.finfo(torch.float32).max
    x[10] *= 1e30
    assert_kernel_equals_reference(x, weight)
    assert (int4.reference(x[[1, 2, 6]], weight) == 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_make_their_row_nan_and_no_other(bad):
    weight = rounded(20, 24, 8)
    x = torch.randn(3, 24)
    clean = int4.Int4Linear(weight)(x)
    x[1, 13] = bad
    y = int4.Int4Linear(weight)(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert_kernel_equals_reference(x, weight)


@pytest.mark.usefixtures("isa")
def test_weights_of_every_kind_give_the_bits_of_the_reference():
    """Groups of equal weights and of zeros; scales in float16's lowest binade, large, and negative ("signed")."""
    weight = torch.randn(18, 48)
    weight[0], weight[1], weight[2], weight[3] = 0.0, -0.0, 3.0, -3.0
    weight[4:8] *= 1e-5
    weight[8:12] *= 1e4
    for symmetric in (False, "signed"):
        grid = weight_only.rtn(weight, 4, group_size=16, symmetric=symmetric)
        assert_kernel_equals_reference(torch.randn(3, 48), grid)


@pytest.mark.usefixtures("isa")
def test_the_largest_sums_fit():
    """Codes 0 and 15 beside zero points 15 and 0, activations all at their largest: no other group has larger sums."""
    width = 2**17
    scale = torch.ones(2, 1, 1).half()
    zero = torch.tensor([15, 0], dtype=torch.int32).view(2, 1, 1)
    codes = torch.tensor([[0], [15]], dtype=torch.uint8).repeat(1, width)
    weight = affine.Quantized(codes, affine.Grid(scale, zero, 4, 0, 15))
    y = int4.Int4Linear(weight)(torch.ones(1, width))
    assert_same_bits(y, int4.reference(torch.ones(1, width), weight))
    assert torch.allclose(y, torch.tensor([[-15.0 * width, 15.0 * width]]), rtol=2**-22)


@pytest.mark.usefixtures("isa")
def test_memory_that_is_not_aligned_or_not_contiguous_makes_no_difference():
    weight = rounded(40, 64, 32)
    layer = int4.Int4Linear(weight)
    shifted = torch.randn(4 * 64 + 1)[1:].view(4, 64)
    transposed = torch.randn(64, 4).t()
    for x in (shifted, transposed, shifted[::2], shifted.expand(2, 4, 64)):
        assert_same_bits(layer(x), int4.reference(x, weight))
    octets = torch.empty(layer.packed.numel() + 3, dtype=torch.uint8)[3:].view_as(layer.packed)
    layer.packed = octets.copy_(layer.packed)
    assert_same_bits(layer(shifted), int4.reference(shifted, weight))


@needs_compiler
def test_two_threads_give_the_bits_of_one(threads):
    layer, x = int4.Int4Linear(rounded(700, 128, 64)), torch.randn(3, 128)
    threads(1)
    alone = layer(x)
    threads(2)
    assert torch.equal(layer(x), alone)


@pytest.mark.usefixtures("isa")
def test_flushing_small_numbers_to_zero_makes_no_difference():
    weight = weight_only.rtn(1e-6 * torch.randn(16, 64), 4, group_size=32)  # scales in float16's lowest binade
    x = torch.randn(2, 64) * torch.tensor([[1.0], [2.0**-60]])
    expected = int4.reference(x, weight)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    try:
        assert_same_bits(int4.Int4Linear(weight)(x), expected)
    finally:
        torch.set_flush_denormal(False)


def test_the_reference_is_exact_where_nothing_is_rounded():
    """Activations that are codes already, scales that are powers of two: float64's product, to the bit."""
    weight = rounded(30, 64, 16)
    powers = 2.0 ** torch.randint(-8, 0, weight.scale.shape)
    weight = affine.Quantized(weight.codes, affine.Grid(powers.half(), weight.zero, 4, 0, 15))
    x = torch.randint(-127, 128, (5, 64)).float()
    x[:, ::16] = 127.0  # so that the scale of each group is 1
    exact = F.linear(x.double(), weight_only.dequantize(weight).double())
    assert torch.equal(int4.reference(x, weight).double(), exact)


def test_the_reference_is_as_near_as_the_codes_of_the_activations_allow():
    """An activation moves by half a step at most, plus float32's rounding of a few sums."""
    weight = rounded(30, 256, 64)
    x = torch.randn(6, 256)
    points = weight_only.dequantize(weight).double()
    steps = x.unflatten(1, (4, 64)).abs().amax(2, keepdim=True).expand(6, 4, 64).flatten(1) / 127
    error = (int4.reference(x, weight).double() - F.linear(x.double(), points)).abs()
    assert (error <= 0.5001 * F.linear(steps.double(), points.abs())).all()


@pytest.mark.parametrize("symmetric", [False, "restricted", "signed"])
@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(1, 1, None), (17, 45, 15), (48, 128, 64), (16, 8, 1)])
def test_packing_loses_nothing(outputs, inputs, group_size, symmetric):
    weight = rounded(outputs, inputs, group_size, symmetric=symmetric)
    layer = int4.Int4Linear(weight)
    assert torch.equal(layer.weight, weight_only.dequantize(weight))
    assert torch.equal(layer.quantized().scale, weight.scale)
    assert layer.packed.shape[1] % 64 == 0


# --- the layer --------------------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 24, bias=False), nn.Linear(24, 64))


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_converted_model_multiplies_by_the_rounded_weights(method):
    x = torch.randn(3, 64)
    batches = None if method == "rtn" else [torch.randn(200, 64)]
    small = weight_only.quantize(network(), 4, group_size=8, method=method, batches=batches)
    before = copy.deepcopy(small.state_dict())
    real = int4.convert(small)
    expected = x
    for layer in small:
        is_linear = isinstance(layer, weight_only.WeightOnlyLinear)
        expected = int4.reference(expected, layer.quantized(), layer.bias) if is_linear else layer(expected)
    assert_same_bits(real(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_model_may_keep_other_layers_and_a_layer_may_be_the_model():
    kept = int4.convert(weight_only.quantize(network(), 4, group_size=8, ignore=["3"]))
    assert type(kept[3]) is nn.Linear and isinstance(kept[0], int4.Int4Linear)
    assert isinstance(int4.convert(weight_only.WeightOnlyLinear(rounded(8, 8))), int4.Int4Linear)


@torch.no_grad()
def test_it_can_be_saved_loaded_copied_and_cast():
    x, model = torch.randn(2, 64), int4.convert(weight_only.quantize(network(), 4, group_size=8))
    other = int4.convert(weight_only.quantize(network(), 4, group_size=8))
    expected = model(x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    half = copy.deepcopy(model).bfloat16()
    assert torch.equal(half[0].packed, model[0].packed)
    y = half[0](x.bfloat16())
    assert y.dtype == torch.bfloat16
    bias = model[0].bias.bfloat16()
    assert torch.equal(y, int4.reference(x.bfloat16(), model[0].quantized(), bias))


def test_the_work_of_a_call_is_counted():
    layer, x = int4.Int4Linear(rounded(48, 128, 64)), torch.randn(2, 128)
    work = roofline.count(layer, x)
    assert work.flops == 2 * 2 * 48 * 128 and not work.uncounted
    assert work.bytes == layer.packed.nbytes + 4 * (2 * 128 + 2 * 48)
    assert layer.packed.nbytes == 3 * (2 * 512 + 2 * 16 * 3 + 32)  # codes, scales and zeros, up to a cache line
    meta = layer.to("meta")(x.to("meta"))
    assert meta.shape == (2, 48) and meta.is_meta


@needs_compiler
def test_without_a_compiler_a_product_is_slower_said_once_and_the_same(monkeypatch, tmp_path):
    layer, x = int4.Int4Linear(rounded(20, 32, 8)), torch.randn(3, 32)
    expected = layer(x)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    native.load.cache_clear()
    with pytest.warns(UserWarning, match="int4_linear.cpp could not be compiled") as warned:
        assert_same_bits(layer(x), expected)
        assert_same_bits(layer(x), expected)
    native.load.cache_clear()
    assert len(warned) == 1


@pytest.mark.usefixtures("isa")
def test_joined_layers_give_the_bits_of_each():
    x = torch.randn(2, 64)
    for has_bias in (False, True):
        layers = [
            int4.Int4Linear(rounded(n, 64, 32), nn.Parameter(torch.randn(n)) if has_bias else None) for n in (40, 8, 3)
        ]
        assert_same_bits(int4.joined(layers)(x), torch.cat([layer(x) for layer in layers], -1))


@torch.inference_mode()
def test_a_decoder_with_joined_layers_is_the_model():
    small = weight_only.quantize(llama(), 4, group_size=16)
    small.lm_head = weight_only.quantize(small.lm_head, 4, group_size=16)
    real, ids = int4.convert(small), text(12)
    decoder = Decoder(real)
    hidden = decoder.hidden(ids, decoder.cache(12))
    expected = real(ids).logits
    # Attention adds up in another order: an activation near a tie may get the next code, 1/127 of its group's largest.
    assert (decoder.logits(hidden) - expected).abs().max() <= 2 / 127 * expected.abs().max()
    real.model.layers[1].self_attn.k_proj = nn.Linear(64, 32, bias=False)
    check_refusal("only some are Int4Linears", lambda: Decoder(real))


BIAS = nn.Parameter(torch.ones(8))
WRONG: Refusals = {
    "8 bits, and the kernel's at most 4": lambda: int4.Int4Linear(rounded(8, 8, bits=8)),
    "nf4 is a table of points": lambda: int4.Int4Linear(formats.quantize(torch.randn(8, 64), "nf4")),
    "its scales are torch.float32": lambda: int4.Int4Linear(affine.quantize(torch.randn(8, 8), 4, group_size=4)),
    "more than 1,048,576 inputs": lambda: int4.Int4Linear(rounded(1, 2**20 + 1)),
    "The input has 7 features, but the layer takes 8": lambda: int4.Int4Linear(rounded(8, 8))(torch.ones(2, 7)),
    "has no WeightOnlyLinear": lambda: int4.convert(network()),
    "2 cannot be converted (its codes have 8 bits": lambda: int4.convert(
        weight_only.quantize(network(), 8, group_size=8, ignore=["0"])
    ),
    "same inputs and group size": lambda: int4.joined([int4.Int4Linear(rounded(8, 8, g)) for g in (4, 8)]),
    "all a bias or none": lambda: int4.joined([int4.Int4Linear(rounded(8, 8), bias) for bias in (None, BIAS)]),
}


@refused(WRONG)
def test_wrong_inputs_are_refused(words, call):
    check_refusal(words, call)
