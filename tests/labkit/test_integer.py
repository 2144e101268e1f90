"""Integer layers against int64 and float64, code by code; kernels that are wrong or slow against the probe."""

import copy
import json
import os
import subprocess
import sys
import time
from unittest import mock

import families
import hardware
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hardware import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mobile, Terms, WithForward, by_sign, untraceable
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import datasets, models
from labkit.errors import InputError
from labkit.files import ROOT
from labkit.graph import tracing
from labkit.quantization import affine, formats, integer, integer_kernels, ptq
from labkit.quantization.affine import Grid
from labkit.quantization.integer_kernels import FEW, MANY
from labkit.quantization.weight_only import SCALE, WeightOnlyLinear
from labkit.storage import artifact

vnni, vectors = needs("vnni"), needs("vectors")
EPS = 2**-22  # of what is added up in float32, some roundings


def grid(scale: float, zero: int = 0, bits: int = 8) -> Grid:
    return Grid(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), bits, 0, 2**bits - 1)


def exact(layer, x, other=None):
    """(result, what its parts are in magnitude) of an integer layer in float64, which holds every sum of products."""
    (step, zero), codes = layer.numbers("input"), layer.codes.double()
    x = x.double() - zero
    shape = (-1, *[1] * (codes.dim() - 2))
    if codes.dim() == 2:
        products = x @ codes.t()
    else:
        stride, padding, dilation, groups = layer.options
        products = F.conv2d(x, codes, None, stride, padding, dilation, groups)
    parts = [products * step * layer.scale.double().view(shape)]
    if layer.bias is not None:
        parts.append(layer.bias.double().view(shape))
    if other is not None:
        scale, zero = layer.numbers("term")
        parts.append((other.double() - zero) * scale)
    return sum(parts), sum(part.abs() for part in parts)


def check_codes(layer, y, x, other=None):
    """The codes y are those of float64, but for values so near a tie that float32 may see them on its other side."""
    value, size = exact(layer, x, other)
    scale, zero = layer.numbers("output")
    steps = value / scale
    expected = (steps.round() + zero).clamp(0, layer.highest["output"])
    tie = ((steps - steps.floor()) - 0.5).abs() <= EPS * size / scale + 2**-16
    assert y.dtype == torch.uint8
    assert not ((y != expected) & ~tie).any()
    assert (y.double() - expected).abs().max() <= 1
    return int((y != expected).sum()), int(tie.sum())


# --- the probe --------------------------------------------------------------------------------------------------------


@vnni
@vectors
def test_this_machine_has_every_kernel():
    assert set(integer.available().values()) == {"ready"}


CHILD = """
import json, torch
from labkit.errors import InputError
from labkit.quantization import integer, ptq
probe, kernels = integer.probe, integer.KERNELS
draw = torch.Generator().manual_seed(0)
x = torch.randn(64, 512, generator=draw).relu().mul(40).round().clamp(0, 255).to(torch.uint8)
w = torch.randn(64, 512, generator=draw).mul(30).round().clamp(-127, 127).to(torch.int8)
usual = integer.KERNELS["qlinear"].prepare(w, torch.ones(64))(x).double() == x.double() @ w.double().t()
model = torch.nn.Sequential(torch.nn.Linear(64, 8))
calibrated = {bits: ptq.quantize(model, [torch.randn(8, 64)], weights=bits).model for bits in (7, 8)}
try:
    integer.convert(calibrated[8])
    refused = ""
except InputError as error:
    refused = str(error)
integer.convert(calibrated[7])
names = ("qlinear", "qconv", "int_mm", "fbgemm", "qlinear_of_floats")
print(json.dumps({
    "8": {name: probe(kernels[name]) for name in names},
    "7": {name: probe(kernels[name], 7) for name in names},
    "usual": usual.double().mean().item(), "refused": refused,
}))
"""


@vnni
@pytest.mark.slow
def test_a_kernel_that_adds_pairs_in_int16_is_refused():
    """Without VNNI, made so in a child: extreme codes show it, Gaussian ones do not, and 7-bit weights are right."""
    slower = {"ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    environment = {**os.environ, **slower, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    result = json.loads(child.stdout.splitlines()[-1])
    assert all("extreme 8-bit codes wrong" in reason and "7 bits" in reason for reason in result["8"].values())
    assert result["refused"] == result["8"]["qlinear"]
    assert not any(result["7"].values())
    assert result["usual"] == 1.0  # why nobody notices


@vnni
def test_signed_activations_are_refused_as_a_reference_loop():
    def signed(codes, scale):
        run = integer.KERNELS["qlinear"].prepare(codes, scale)
        return lambda x: run(x.to(torch.int8))

    reason = integer.probe(integer.IntegerKernel(signed, "s8"))
    if hardware.has("amx"):  # whose tiles multiply signed codes as well
        assert not reason
    else:
        assert "reference loop" in reason and "unsigned" in reason


@vnni
def test_a_kernel_that_other_programs_slow_down_is_not_refused():
    """Its first runs wait, as threads do on a machine that others use; the later ones do not."""
    waits = iter([0.05] * 10)

    def interrupted(codes, scale):
        run = integer.KERNELS["qlinear"].prepare(codes, scale)

        def late(*inputs):
            time.sleep(next(waits, 0.0))
            return run(*inputs)

        return late

    assert not integer.probe(integer.IntegerKernel(interrupted, "u8"))
    assert next(waits, None) is None, "the probe has seen all of the slow runs"


def test_a_kernel_that_is_not_there_says_so():
    def missing(codes, scale):
        return lambda *_: torch.ops.onednn.no_such_product()

    assert "does not run in torch" in integer.probe(integer.IntegerKernel(missing, "u8"))


@pytest.mark.skipif(hardware.has("vectors"), reason="needs torch's own kernels without vector instructions")
def test_a_kernel_without_vectors_is_refused_with_what_to_do_instead():
    """It is the weights alone that are codes, so that other activations would not help."""
    with pytest.raises(InputError, match=r"reference loop here, .*: multiply in float32, or use an engine\.$"):
        integer.convert(weight_only(16, 64, 4, 64))


# --- layers -----------------------------------------------------------------------------------------------------------


def codes_of(shape, lo, hi, draw, extreme):
    codes = torch.randint(lo, hi + 1, shape, generator=draw)
    return torch.where(codes > (lo + hi) / 2, hi, lo) if extreme else codes


@st.composite
def cases(draw):
    """A layer of integers, its input codes, and whether it is at the ends of every range."""
    torch_draw = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    extreme, zero = draw(st.booleans()), draw(st.sampled_from([0, 3, 128, 255]))
    if draw(st.booleans()):
        groups = draw(st.sampled_from([1, 1, 2, 4]))
        layer = nn.Conv2d(
            4 * groups, 8, draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2)),
            draw(st.integers(1, 2)), groups, bias=draw(st.booleans()),
        )  # fmt: skip
        shape = (draw(st.integers(1, 3)), layer.in_channels, draw(st.integers(6, 9)), draw(st.integers(6, 9)))
    else:
        layer = nn.Linear(draw(st.integers(1, 70)), draw(st.integers(1, 9)), bias=draw(st.booleans()))
        shape = (draw(st.integers(1, 20)), layer.in_features)
    weight = codes_of(layer.weight.shape, -127, 127, torch_draw, extreme)
    scale = torch.rand((len(weight), *[1] * (weight.dim() - 1)), generator=torch_draw) * 0.01 + 0.001
    weight_grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), 8, -127, 127)
    with torch.no_grad():
        layer.weight.copy_(weight_grid.dequantize(weight))
    x = codes_of(shape, 0, 255, torch_draw, extreme).to(torch.uint8)
    return layer, weight, weight_grid, grid(0.02, zero), x, torch_draw


def build(layer, *args, **kwargs):
    return (integer.Int8Linear if isinstance(layer, nn.Linear) else integer.Int8Conv2d)(layer, *args, **kwargs)


@vnni
@given(cases(), st.sampled_from([(0, 8), (17, 8), (0, 4), (7, 3)]))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_a_layer_is_int64_and_one_rounding(case, target):
    layer, weight, weight_grid, source, x, _ = case
    new = build(layer, weight_grid, source)
    assert torch.equal(new.codes.long(), weight)
    value, size = exact(new, x)
    y = new(x)
    assert y.dtype == torch.float32
    assert ((y - value).abs() <= EPS * size + 1e-12).all()
    scale = float(value.abs().max()) / 2 ** (target[1] - 1) or 1.0
    coded = build(layer, weight_grid, source, grid(scale, *target))
    check_codes(coded, coded(x), x)


@vnni
@given(cases(), st.booleans())
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_a_sum_is_added_before_its_one_rounding(case, last):
    layer, _, weight_grid, source, x, draw = case
    if isinstance(layer, nn.Linear):
        return
    value, _ = exact(build(layer, weight_grid, source), x)
    term = torch.randint(0, 256, value.shape, generator=draw).to(torch.uint8)
    term = term.contiguous(memory_format=torch.channels_last) if last else term
    new = build(layer, weight_grid, source, grid(float(value.abs().max()) / 100 or 1.0), grid(0.01, 9))
    before = term.clone()
    check_codes(new, new(x, term), x, before)


@vnni
@pytest.mark.parametrize("zero", [0, 7])
@torch.no_grad()
def test_a_convolution_takes_images_of_other_sizes_than_the_first(zero):
    """The weight is packed for the first; 512 channels of 14 x 14 are packed in another way than those of 7 x 7."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(512, 512, 1)
    new = build(layer, ptq.weight_grid(layer, 8), grid(0.02, zero), grid(0.05, 100))
    for size in (14, 7, 28, 14):
        x = torch.randint(0, 256, (2, 512, size, size), generator=draw).to(torch.uint8)
        check_codes(new, new(x), x)


@vnni
def test_padding_is_the_zero_point():
    """Pitfall: padding with code 0, or a correction by z sum(w), which is right in the middle only."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(4, 16, 14, 14, generator=draw)
    source = affine.choose(x.min(), x.max(), 8, symmetric=False)
    new = build(layer, ptq.weight_grid(layer, 8), source)
    y, codes = layer(x), source.quantize(x)
    with_code_0 = build(layer, ptq.weight_grid(layer, 8), source)
    with_code_0.options = ([1, 1], [0, 0], [1, 1], 1)
    wrong = with_code_0(F.pad(codes, (1, 1, 1, 1)))
    assert affine.sqnr(y, new(x)) > 38 > 10 > affine.sqnr(y, wrong)
    assert torch.equal(new(x)[..., 1:-1, 1:-1], wrong[..., 1:-1, 1:-1])  # a test of the middle passes
    padded = integer.PadCodes(source, (1, 1, 1, 1))(codes)
    assert torch.equal(source.dequantize(padded), F.pad(source.dequantize(codes), (1, 1, 1, 1)))


@given(st.integers(0, 255), st.sampled_from([0.5, 0.1, 3e-5]), st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_codes_of_floats_are_the_grid_s(zero, scale, bits):
    target = grid(scale, min(zero, 2**bits - 1), bits)
    x = torch.cat(
        [(torch.arange(-300, 300) + 0.5) * scale, torch.randn(200) * 90 * scale, torch.tensor([0.0, 1e30, -1e30])]
    )
    codes = integer.Quantize(target)(x)
    assert torch.equal(codes, target.quantize(x))
    assert torch.equal(integer.Dequantize(target)(codes), target.fake(x))


MISSING = integer.IntegerKernel(lambda *_: torch.ops.quantized.no_such, "rounded")
# The row that takes the place of FBGEMM's, by the kernel that then multiplies.
DYNAMIC = {
    "fbgemm": {},
    "qlinear_of_floats": {"fbgemm": integer.KERNELS["qlinear_of_floats"]},
    "qlinear, or int_mm for few": {"fbgemm": MISSING},
}


@vnni
@pytest.mark.parametrize("kernel", DYNAMIC)
@given(
    st.integers(1, 6),
    st.sampled_from([(40, 12), (37, 11), (1, 1)]),
    st.integers(0, 2**16),
    st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e6]),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
@torch.no_grad()
def test_dynamic_grids_are_those_of_affine(kernel, rows, shape, seed, size, positive):
    """Codes next to a tie may differ if x times 1 / s is rounded; without such a kernel few rows have a grid each."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(*shape)
    x = torch.randn(rows, layer.in_features, generator=draw) * size
    x = x.abs() if positive else x
    with mock.patch.dict(integer.KERNELS, DYNAMIC[kernel]):
        y = integer.convert_dynamic(layer)(x)
    weight = ptq.weight_grid(layer, 8).fake(layer.weight).double()
    of_floats = kernel in integer.KERNELS
    by_row = rows <= FEW and not of_floats
    options = {"symmetric": True, "group_size": layer.in_features} if by_row else {"symmetric": False}
    codes = affine.quantize(x, 8, **options)
    rounded = codes.dequantize().double()
    error = (y - rounded @ weight.t() - layer.bias.double()).abs()
    steps = x.double() / codes.scale.double().reshape(-1, 1)
    ties = ((steps - steps.floor() - 0.5).abs() < 1e-4).sum(1, keepdim=True) if of_floats else 0
    allowed = 1e-5 * rounded.abs() @ weight.t().abs() + ties * codes.scale.max() * weight.abs().max()
    assert (error <= allowed + 1e-6 * min(size, 1.0) + 1e-6 * layer.bias.abs()).all()


@vnni
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 2**16),
    st.sampled_from([0, 3, 128, 255]),
    st.sampled_from([1.0, 0.02, 3e-5]),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_both_products_of_floats_round_to_the_same_codes(rows, columns, seed, zero, scale):
    """At ties and beyond both ends of the grid as well: then the layer's numbers do not hang on the kernel."""
    draw = torch.Generator().manual_seed(seed)
    halves = torch.randint(-600, 600, (columns, rows), generator=draw) / 2
    x = (halves * scale).t()  # as a view that is not contiguous
    weight = torch.randint(-127, 128, (9, columns), generator=draw).to(torch.int8)
    ones = torch.ones(9)
    products = [
        integer.KERNELS[name].prepare(weight, ones)(x, scale, zero).div(scale).round()
        for name in ("fbgemm", "qlinear_of_floats")
    ]
    assert torch.equal(*products)


@vnni
@pytest.mark.parametrize("bits", [7, 8])
def test_onednn_multiplies_many_rows_of_floats_where_it_has_amx(bits):
    amx = "amx" in integer_kernels.fingerprint("cpu").features
    assert not integer_kernels.is_faster_by_qlinear(MANY - 1, bits)
    assert integer_kernels.is_faster_by_qlinear(MANY, bits) == amx


@vnni
@pytest.mark.parametrize("rows", [1, MANY])
@torch.no_grad()
def test_a_dynamic_layer_takes_other_numbers_of_rows_than_it_is_made_for(rows):
    torch.manual_seed(0)
    layer = nn.Linear(37, 11)
    usual, dynamic = integer.convert_dynamic(layer), integer.convert_dynamic(layer, rows=rows)
    for number in (2 * MANY + 1, 1, 3, 0):
        x = torch.randn(number, 37)
        torch.testing.assert_close(dynamic(x), usual(x), rtol=0, atol=1e-5)


@vnni
@torch.no_grad()
def test_the_calls_before_do_not_choose_the_kernel():
    """A decoder reads a prompt of many rows first, and then writes with one row a call."""
    torch.manual_seed(0)
    layer = integer.convert_dynamic(nn.Linear(37, 11))

    def unwanted(*_):
        raise AssertionError("the kernel for many rows was prepared")

    with mock.patch.dict(integer.KERNELS, {"qlinear_of_floats": integer.IntegerKernel(unwanted, "rounded")}):
        assert layer(torch.randn(2 * MANY, 37)).shape == (2 * MANY, 11)
        assert layer(torch.randn(1, 37)).shape == (1, 11)


@vnni
@torch.no_grad()
def test_dynamic_layers_lose_less_than_torch_s():
    """Pitfall: `torch.ao`'s quantize_dynamic has a weight scale a tensor and leaves out an activation bit."""
    ao = pytest.importorskip("torch.ao.quantization")
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    model[0].weight.mul_(torch.rand(256, 1, generator=draw) + 0.1)
    x = torch.randn(64, 256, generator=draw)
    y, peer = model(x), ao.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert affine.sqnr(y, integer.convert_dynamic(model)(x)) > affine.sqnr(y, peer(x)) + 4


# --- models -----------------------------------------------------------------------------------------------------------


def every_layer(real, x):
    """Runs the model and lays each integer layer beside float64; (codes compared, codes that are others, near ties)."""
    seen, handles = [], []

    def before(layer, args):
        seen.append([layer, [arg.clone() for arg in args]])  # a sum overwrites its term

    def after(layer, _, y):
        next(entry for entry in reversed(seen) if entry[0] is layer).append(y.clone())

    for layer in real.modules():
        if isinstance(layer, integer.IntegerLayer):
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    y = real(x)
    for handle in handles:
        handle.remove()
    total = flipped = ties = 0
    for layer, args, result in seen:
        if args[0].dtype != torch.uint8:
            args[0] = integer.Quantize(grid(*layer.numbers("input")))(args[0])
        if result.dtype == torch.uint8:
            a, b = check_codes(layer, result, *args)
            total, flipped, ties = total + result.numel(), flipped + a, ties + b
        else:
            value, size = exact(layer, *args)
            assert ((result - value).abs() <= EPS * size + 1e-12).all()
    return y, total, flipped, ties


@pytest.fixture(scope="module")
def resnet():
    images = datasets.fashion_mnist("test", 64).images
    calibrated = ptq.quantize(models.resnet20(), [images])
    return images, calibrated, integer.convert(calibrated.model)


@vnni
@torch.no_grad()
def test_resnet20_multiplies_integers_from_end_to_end(resnet):
    images, calibrated, real = resnet
    y, total, flipped, ties = every_layer(real, images)
    assert total > 2_000_000 and flipped <= ties < total * 1e-4
    floats = [m for m in real.modules() if isinstance(m, integer.Quantize)]
    assert len(floats) == 3  # the image, the last shortcut, which leads into a mean, and that mean
    simulated = calibrated.model(images)
    assert torch.equal(simulated.argmax(1), y.argmax(1))
    assert affine.sqnr(simulated, y) > 45


def codes_after_each_block(model, images):
    """The codes of what each block of the simulated or integer ResNet-20 hands on."""
    seen = {}
    with torch.no_grad():
        if isinstance(model.conv, integer.Int8Conv2d):
            for name in ("stage1.0.conv2", "stage1.2.conv2", "stage3.1.conv2"):
                model.get_submodule(name).register_forward_hook(
                    lambda _, __, y, name=name: seen.update({name: y.clone()})
                )
        else:
            for name, reader in (
                ("stage1.0.conv2", "stage1.1.conv1"), ("stage1.2.conv2", "stage2.0.conv1"),
                ("stage3.1.conv2", "stage3.2.conv1"),
            ):  # fmt: skip
                layer = model.get_submodule(reader)
                layer.register_forward_hook(
                    lambda m, args, _, name=name: seen.update({name: m.input_grid.quantize(args[0])})
                )
        model(images)
    return seen


@vnni
def test_the_chain_is_the_simulated_one_but_for_ties_that_spread(resnet):
    """And with the shortcut in float32, the usual mistake, it is another."""
    images, calibrated, real = resnet
    integers = codes_after_each_block(copy.deepcopy(real), images)
    simulated = codes_after_each_block(copy.deepcopy(calibrated.model), images)
    wrong = copy.deepcopy(calibrated.model)
    for name in calibrated.plan.points:
        wrong.set_submodule(name, nn.Identity())
    wrong = codes_after_each_block(wrong, images)
    share = {name: float((codes == simulated[name]).float().mean()) for name, codes in integers.items()}
    forgotten = {name: float((codes == wrong[name]).float().mean()) for name, codes in integers.items()}
    assert share["stage1.0.conv2"] > 0.9999 and share["stage1.2.conv2"] > 0.998 and share["stage3.1.conv2"] > 0.98
    assert forgotten["stage1.0.conv2"] < 0.97 and forgotten["stage3.1.conv2"] < 0.9
    largest = max(int((codes.int() - simulated[name].int()).abs().max()) for name, codes in integers.items())
    assert largest <= 3


@vnni
@torch.no_grad()
@pytest.mark.parametrize("build, shape", [(Mobile, (6, 3, 16, 16)), (untraceable, (6, 1, 8, 8))])
def test_other_models_hand_on_codes_where_they_can(build, shape):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    calibrated = ptq.quantize(model, [x])
    assert calibrated.plan.traced == (build is Mobile)
    before = copy.deepcopy(calibrated.model.state_dict())
    real = integer.convert(calibrated.model)
    y, total, flipped, ties = every_layer(real, x)
    assert flipped <= ties and (total > 0) == (build is Mobile)
    assert affine.sqnr(calibrated.model(x), y) > 45
    assert affine.sqnr(model(x), y) > 25
    after = calibrated.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@vnni
@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_term_that_is_read_again_is_not_overwritten(layout):
    torch.manual_seed(0)
    model, x = Terms().eval(), torch.randn(8, 3, 12, 12).abs().to(memory_format=layout)
    calibrated = ptq.quantize(model, [x])
    real = integer.convert(calibrated.model)
    assert calibrated.plan.traced and len(calibrated.plan.points) == 2
    assert sum(row["wrong"] for row in integer.prove(real, x)) == 0
    assert affine.sqnr(calibrated.model(x), real(x)) > 45


@vnni
@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "t5"])
def test_models_that_look_at_the_type_of_a_weight(name):
    model, batch = families.family(name), families.inputs(name)
    simulated = ptq.quantize(model, [batch]).model
    real = integer.convert(simulated)
    a, b = (tracing.outputs(m(**batch))[0] for m in (simulated, real))
    assert affine.sqnr(a, b) > 45
    layer = next(m for m in real.modules() if isinstance(m, integer.Int8Linear))
    assert torch.equal(layer.weight, layer.codes * layer.scale[:, None])


@vnni
@torch.no_grad()
def test_lite0_s_blocks_run_in_codes():
    from labkit.data.efficientnet import InvertedResidual

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), InvertedResidual(16, 24, 3, 2, 6), InvertedResidual(24, 24, 3, 1, 6),
        InvertedResidual(24, 24, 5, 1, 6), nn.Conv2d(24, 8, 1),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    calibrated = ptq.quantize(model, [x])
    real = integer.convert(calibrated.model)
    y, _, flipped, ties = every_layer(real, x)
    assert flipped <= ties and affine.sqnr(calibrated.model(x), y) > 45
    assert sum(isinstance(m, integer.Quantize) and type(m) is not integer.PadCodes for m in real.modules()) == 1
    assert len(calibrated.plan.points) == 2


@vnni
@torch.no_grad()
def test_the_proof_counts_what_is_wrong(resnet):
    """Its rows are those of this file's oracle, and a weight that is not the stored one shows in its layer alone."""
    images, _, real = resnet
    images = images[:16]
    rows = integer.prove(real, images)
    _, total, flipped, _ = every_layer(real, images)
    assert [sum(row[key] for row in rows) for key in ("codes", "different")] == [total, flipped]
    assert len(rows) == 22 and not any(row["wrong"] for row in rows)
    wrong = copy.deepcopy(real)
    wrong(images[:1])  # the kernel is prepared with the codes as they are now
    wrong.get_submodule("stage2.1.conv1").codes[0, 0] += 1
    assert [row["layer"] for row in integer.prove(wrong, images) if row["wrong"]] == ["stage2.1.conv1"]


@vnni
@torch.no_grad()
def test_a_few_wrong_codes_are_not_forgiven_for_the_ties_of_others():
    """Half of the values are ties that come out right; one is not near to any and comes out wrong."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    weight = Grid(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int32), 8, -127, 127)
    with torch.no_grad():
        layer.weight.fill_(1)
    real = nn.Sequential(build(layer, weight, grid(1.0), grid(2.0)))
    codes = torch.arange(100).view(1, 1, 10, 10).float()
    (row,) = integer.prove(real, codes)
    assert (row["different"], row["ties"], row["wrong"]) == (0, 50, 0)
    for place, change in ((4, 1), (5, 2)):  # no tie and one code off, a tie and two codes off
        corrupt = real[0].register_forward_hook(lambda _, __, y, p=place, c=change: y.flatten()[p].add_(c) and None)
        (row,) = integer.prove(real, codes)
        corrupt.remove()
        assert row["different"] == row["wrong"] == 1 < row["ties"]


@vnni
@torch.no_grad()
def test_the_proof_follows_layers_that_are_called_by_keyword():
    model = WithForward(lambda m, x: m.b(by_sign(m.a(input=x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    x = torch.randn(5, 6)
    rows = integer.prove(integer.convert(ptq.quantize(model, [x]).model), x)
    assert [(row["layer"], row["wrong"]) for row in rows] == [("a", 0), ("b", 0)]


@vnni
@torch.no_grad()
def test_what_is_stored_is_integers(resnet, tmp_path):
    images, calibrated, real = resnet
    state = real.state_dict()
    weights = sum(layer.layer.weight.numel() for layer in calibrated.model.modules() if hasattr(layer, "weight_grid"))
    assert sum(x.numel() for name, x in state.items() if name.endswith("codes")) == weights
    assert all(x.dtype == torch.int8 for name, x in state.items() if name.endswith("codes"))
    bytes_stored = sum(x.nbytes for x in state.values())
    assert bytes_stored < artifact.size(real) < 1.1 * bytes_stored < artifact.size(models.resnet20()) / 3.3
    expected = real(images)
    safetensors.torch.save_file(state, tmp_path / "int8.safetensors")
    other = integer.convert(ptq.quantize(models.resnet20(pretrained=False), [images]).model)
    other(images)  # its kernels are prepared
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "int8.safetensors"))
    assert torch.equal(other(images), expected)
    assert torch.equal(copy.deepcopy(real)(images), expected)


@vnni
@torch.no_grad()
def test_dynamic_models_take_any_number_of_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    real = integer.convert_dynamic(model)
    assert type(real[0]) is type(real[2]) is integer.Int8Linear and type(model[0]) is nn.Linear
    x = torch.randn(2, 5, 8)
    assert real(x).shape == (2, 5, 4) and affine.sqnr(model(x), real(x)) > 30


@vnni
@torch.no_grad()
def test_a_layer_with_two_names_is_one_layer():
    torch.manual_seed(0)
    model = untraceable()
    model.alias = model.b
    real = integer.convert(ptq.quantize(model, [torch.randn(6, 1, 8, 8)]).model)
    assert type(real.b) is integer.Int8Linear and real.alias is real.b


@vnni
@torch.no_grad()
@pytest.mark.parametrize("kernel", DYNAMIC)
def test_tiny_numbers_have_a_range_and_nan_and_infinity_none(kernel):
    with mock.patch.dict(integer.KERNELS, DYNAMIC[kernel]):
        real = integer.convert_dynamic(nn.Linear(2, 3, bias=False))
        assert real(torch.tensor([[3e-39, -1e-39]])).abs().max() < 1e-37  # whose 1 / scale is infinite
        for bad in (torch.nan, torch.inf):
            with pytest.raises(InputError, match="NaN or infinity, or a range beyond float32"):
                real(torch.tensor([[1.0, bad]]))


def one_output(inputs: int) -> nn.Linear:
    """A layer that adds up its inputs: with all weights 1, every product is the largest there is."""
    layer = nn.Linear(inputs, 1, bias=False)
    nn.init.ones_(layer.weight)
    return layer


@vnni
@torch.no_grad()
def test_the_longest_sum_that_fits_in_int32_is_right():
    """66,311 products of 255 x 127 fit; beyond, oneDNN's sum comes out negative."""
    layer, x = one_output(66_311), torch.ones(1, 66_311)
    x[0, 0] = 0
    real = integer.convert(ptq.quantize(layer, [x]).model)
    assert float(real(x)) == pytest.approx(66_310, rel=1e-4)


LAYER, IMAGE_LAYER, X = nn.Linear(4, 4), nn.Conv2d(4, 4, 1), torch.randn(5, 4)
WEIGHTS, INPUTS = ptq.weight_grid(LAYER, 8), affine.quantize(X, symmetric=False).grid
HALF_MODEL = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
NEEDS_KERNELS: Refusals = {
    "A sum of 66312 products of these codes can leave int32: ... .": lambda: integer.convert_dynamic(
        one_output(66_312)
    ),
    "has NaN or infinity": lambda: integer.convert_dynamic(LAYER)(torch.full((3, 4), torch.nan)),
    "a range beyond float32": lambda: integer.convert_dynamic(LAYER)(torch.tensor([[3e38, -3e38] * 2] * 3)),
    "takes [N, C, H, W] with 4 channels C, not [4, 5, 5]": lambda: integer.Int8Conv2d(
        IMAGE_LAYER, ptq.weight_grid(IMAGE_LAYER, 8), INPUTS
    )(torch.randn(4, 5, 5)),
}
REFUSALS: Refusals = {
    "no quantized layer: call ptq.quantize or weight_only": lambda: integer.convert(LAYER),
    "no integer layer": lambda: integer.prove(LAYER, X),
    "weight is torch.bfloat16": lambda: integer.convert_dynamic(HALF_MODEL),
    "no nn.Linear that is called": lambda: integer.convert_dynamic(nn.ReLU()),
    "rows is 0, but it must be a whole number from 1.": lambda: integer.convert_dynamic(LAYER, rows=0),
    "no nn.Linear that is called: give another": lambda: integer.convert_dynamic(nn.TransformerEncoderLayer(8, 2, 16)),
}


@vnni
@refused(NEEDS_KERNELS)
@torch.no_grad()
def test_numbers_that_no_kernel_multiplies_are_refused_in_a_sentence(words, call):
    check_refusal(words, call)


@refused(REFUSALS)
def test_models_without_a_layer_to_convert_are_refused_in_a_sentence(words, call):
    check_refusal(words, call)


@vnni
@pytest.mark.parametrize("options", [{"symmetric": False, "axis": 0}, {"axis": 1}, {"group_size": 2}], ids=str)
def test_a_weight_needs_a_symmetric_grid_that_is_the_same_for_all_inputs(options):
    wrong = affine.quantize(LAYER.weight, **options).grid
    check_refusal("A weight needs a symmetric grid", lambda: integer.Int8Linear(LAYER, wrong, INPUTS))


@vnni
@pytest.mark.parametrize("options", [{}, {"symmetric": False, "axis": 1}], ids=str)
def test_activations_need_an_unsigned_grid_for_the_tensor(options):
    wrong = affine.quantize(X, **options).grid
    check_refusal("one unsigned grid for the tensor", lambda: integer.Int8Linear(LAYER, WEIGHTS, wrong))


# --- weights only -----------------------------------------------------------------------------------------------------


def weight_only(
    rows: int, columns: int, bits: int, group: int, symmetric: bool | str = False, bias: bool = False
) -> WeightOnlyLinear:
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(rows, columns, generator=draw) * 2
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()  # zero points at the ends
    quantized = affine.quantize(weight.to(SCALE), bits, symmetric=symmetric, axis=0, group_size=group)
    return WeightOnlyLinear(quantized, nn.Parameter(torch.randn(rows, generator=draw)) if bias else None)


FOUR = [  # rows, columns, bits, group, symmetric
    (16, 64, 4, 64, False),
    (80, 128, 4, 32, "signed"),
    (64, 512, 4, 256, "full"),
    (64, 512, 4, 512, True),
    (48, 576, 4, 192, False),
    (16, 576, 4, 576, "clipped"),
    (32, 96, 3, 96, False),
    (64, 128, 2, 64, True),
]
EIGHT = [(5, 64, 8, 64, True), (64, 576, 8, 576, "full"), (7, 48, 6, 48, "signed"), (24, 32, 4, 32, True)]


@vectors
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("case", FOUR + EIGHT, ids=str)
@torch.no_grad()
def test_a_packed_layer_is_its_rounded_operands_in_float64(case, rows):
    layer = weight_only(*case, bias=rows == 3)
    real = integer.convert(layer)
    assert integer.packing(layer) == ("int8pack" if case in EIGHT else "int4pack", "")
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)) * 5
    y = real(x)
    assert y.dtype == torch.float32
    assert real.compare(y, x)["wrong"] == 0
    assert affine.sqnr(layer(x), y) > 40  # against what is simulated: bfloat16's roundings, 50 dB and more each
    assert torch.equal(real(x[None]), y[None])


@vectors
@pytest.mark.parametrize("case", [FOUR[0], FOUR[4], EIGHT[1]], ids=str)
@torch.no_grad()
def test_the_proof_sees_what_a_wrong_kernel_does(case):
    layer = weight_only(*case)
    real = integer.convert(layer)
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
    codes, *table = real.operands()
    scale, shift = (part.bfloat16().double()[..., None] for part in table)
    grouped = codes.double().unflatten(1, (scale.shape[1], -1))
    weight = (grouped * scale + shift).flatten(1)

    def wrong(weight: torch.Tensor) -> float:
        y = F.linear(x.bfloat16().double(), weight).float().bfloat16().float()
        return real.compare(y, x)["wrong"] / y.numel()

    assert wrong(weight) == 0
    without = weight.clone()
    without[:, 5] = 0
    assert wrong(without) > 0.5  # an input forgotten
    assert wrong(weight * 1.01) > 0.9  # a scale rounded otherwise
    assert wrong(weight.unflatten(1, (-1, 32)).flip(1).flatten(1)) > 0.9  # another group's codes
    if shift.any():
        assert wrong((grouped * scale + shift - scale).flatten(1)) > 0.9  # a zero point off by one
        assert wrong((grouped * scale).flatten(1)) > 0.3  # without one: 8 is that of many groups


@vectors
@torch.no_grad()
def test_a_model_of_few_bits_becomes_real_and_is_proved():
    model = families.family("llama")
    for name, x in list(model.named_modules()):
        if name.endswith(("_proj", "lm_head")):
            rows, columns = x.weight.shape
            bits, group, symmetric = (4, 32, False) if rows % 16 == columns % 32 == 0 else (8, columns, True)
            if columns % 16 == 0:
                quantized = affine.quantize(x.weight.to(SCALE), bits, symmetric=symmetric, axis=0, group_size=group)
                model.set_submodule(name, WeightOnlyLinear(quantized))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    real = integer.convert(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(isinstance(x, integer.PackedLinear) for x in model.modules())
    inputs = families.inputs("llama")
    rows = integer.prove(real, inputs)
    assert len(rows) == 3 * 6 + 1 and not any(row["wrong"] for row in rows)
    assert affine.sqnr(model(**inputs).logits, real(**inputs).logits) > 30
    assert artifact.size(real) - artifact.size(model) < 64 * len(rows)  # longer names: the same bytes are stored
    other = copy.deepcopy(real)
    other.load_state_dict(real.state_dict())
    assert torch.equal(other(**inputs).logits, real(**inputs).logits)
    layer = real.model.layers[1].mlp.gate_proj
    run = layer._run
    layer._run = lambda x: run(x) * 1.02
    assert [row["layer"] for row in integer.prove(real, inputs) if row["wrong"]] == ["model.layers.1.mlp.gate_proj"]


@vectors
@torch.no_grad()
def test_loading_other_codes_makes_the_kernels_layout_anew():
    layer, x = weight_only(16, 64, 4, 64), torch.randn(2, 64)
    real, other = integer.convert(layer), integer.convert(weight_only(16, 64, 4, 64, bias=False))
    other.layer.codes.bitwise_not_()
    y, z = real(x), other(x)
    assert not torch.equal(y, z)
    real.load_state_dict(other.state_dict())
    assert torch.equal(real(x), z)


@vectors
@torch.no_grad()
def test_a_bfloat16_model_and_a_slice_of_memory_are_multiplied_as_well():
    """The int8 kernel loads what it takes for aligned."""
    layer = weight_only(16, 64, 8, 64, True)
    real, memory = integer.convert(layer), torch.randn(1 + 3 * 64).bfloat16()
    x = memory[1:].view(3, 64)
    y = real(x)
    assert y.dtype == torch.bfloat16 and real.compare(y, x)["wrong"] == 0
    assert torch.equal(real(x.clone()), y)


UNPACKED = {  # a layer that no kernel takes -> why
    "its 4 bits, [24, 64] and groups of 64": weight_only(24, 64, 4, 64),  # outputs
    "its 4 bits, [16, 48] and groups of 48": weight_only(16, 48, 4, 48),  # group
    "its 8 bits, [16, 64] and groups of 64": weight_only(16, 64, 8, 64),  # zero point
    "its 8 bits, [16, 64] and groups of 32": weight_only(16, 64, 8, 32, True),
    "its 8 bits, [16, 40] and groups of 40": weight_only(16, 40, 8, 40, True),  # inputs
    "nf4 is a table of points": WeightOnlyLinear(formats.quantize(torch.randn(16, 64), "nf4")),
}


@pytest.mark.parametrize("why", UNPACKED)
def test_weights_that_no_kernel_takes_are_refused_with_the_reason(why):
    sentence = f"head cannot be converted ({why} ... ): quantize it so, or name it in ignore."
    check_refusal(sentence, lambda: integer.convert(nn.ModuleDict({"head": UNPACKED[why]})))
