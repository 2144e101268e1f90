"""Layers that libraries derive from torch's: used where their operators are the parent's, left alone where not."""

import pytest
import torch
import torch.nn.functional as F
from hardware import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_
from torch import nn

from labkit.deploy import engines
from labkit.graph.subclasses import after_norm, is_plain, pads_same
from labkit.quantization import affine, fold, integer, ptq, qat

vnni = needs("vnni")
IMAGES = torch.randn(4, 3, 17, 18, generator=torch.Generator().manual_seed(0))


class Rewritten(nn.Linear):
    """As in timm: other words for what the parent does."""

    def forward(self, input):
        if torch.jit.is_scripting():
            return F.linear(input, self.weight.to(dtype=input.dtype), bias=self.bias)
        return F.linear(input, self.weight, self.bias)


class RewrittenImages(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LowRank(nn.Linear):
    """LoRA before its first step: the branch gives zeros, so that results are the parent's to the bit."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.a, self.b = nn.Parameter(torch.randn(1, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 1))

    def forward(self, input):
        return F.linear(input, self.weight, self.bias) + input @ self.a.t() @ self.b.t()


class Masked(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight * (self.weight.abs() > 0.1), self.bias)


class Wide(nn.Linear):
    """Another function where inputs are sequences."""

    def forward(self, input):
        y = F.linear(input, self.weight, self.bias)
        return y if input.dim() == 2 else y.softmax(1)


class Branches(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight if float(input.sum()) > 0 else -self.weight, self.bias)


class Standardised(nn.Conv2d):
    """A weight that is standardised in `_conv_forward`, while `forward` is the parent's."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


class SamePadded(nn.Conv2d):
    """As in timm's networks from TensorFlow: zeros by the size of the input."""

    def forward(self, x):
        needed = []
        for size, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            needed.append(max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0))
        (h, w) = needed
        x = F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PaddedBefore(nn.Conv2d):
    """The odd zero at the beginning, as no convolution of TensorFlow has it."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias, self.stride)


@pytest.mark.parametrize(
    "layer, plain",
    [
        (Rewritten(3, 4), True),
        (Rewritten(3, 4, bias=False), True),
        (RewrittenImages(3, 4, 3, dilation=3), True),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), True),
        (type("Named", (nn.Conv2d,), {})(3, 4, 3), True),
        (LowRank(3, 4), False),
        (Masked(3, 4), False),
        (Wide(3, 4), False),
        (Branches(3, 4), False),
        (Standardised(3, 4, 3), False),
        (SamePadded(3, 4, 3, 2), False),
        (PaddedBefore(3, 4, 2), False),
        (nn.ConvTranspose2d(3, 4, 2), False),
        (nn.LayerNorm(4), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_is_plain_where_its_operators_are_the_parent_s(layer, plain):
    assert is_plain(layer) == plain
    assert pads_same(layer) == isinstance(layer, SamePadded)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(5, 9), st.integers(5, 9))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_padding_by_the_size_of_the_input_is_the_library_s_at_every_size(kernel, stride, dilation, height, width):
    layer = SamePadded(2, 3, kernel, stride, dilation=dilation)
    x = torch.randn(2, 2, height, width)
    fake = ptq.quantize(nn.Sequential(layer), [x]).model.get_submodule("0")
    other = torch.randn(2, 2, height + 1, width + 3)  # another size than that of calibration
    layer.weight.copy_(fake.weight)
    for images in (x, other):
        assert torch.equal(fake(images), layer(fake.fake_input(images)))


@vnni
@torch.no_grad()
def test_integers_pad_by_the_size_of_the_input_with_the_zero_point():
    torch.manual_seed(0)
    model = nn.Sequential(SamePadded(3, 8, 3, 2), nn.ReLU(), SamePadded(8, 8, 3, 2, bias=False)).eval()
    calibrated = ptq.quantize(model, [IMAGES])
    real = integer.convert(calibrated.model)
    for images in (IMAGES, IMAGES[..., 1:, 2:]):
        proof = integer.prove(real, images)
        assert proof[0]["codes"] > 2000 and not any(row["wrong"] for row in proof)
        assert affine.sqnr(calibrated.model(images), real(images)) > 45


@pytest.mark.slow
@pytest.mark.skipif(engines.available()["onnxruntime"] != "ready", reason="needs ONNX Runtime")
@torch.no_grad()
def test_an_engine_pads_by_the_size_of_the_input():
    torch.manual_seed(0)
    model = nn.Sequential(SamePadded(3, 8, 3, 2), nn.ReLU(), SamePadded(8, 8, 3, 2, bias=False)).eval()
    simulated = ptq.quantize(model, [IMAGES], weights=7).model
    engine = engines.prepare("onnxruntime", simulated, IMAGES)
    assert affine.sqnr(simulated(IMAGES), engine(IMAGES)) > 35


@torch.no_grad()
def test_what_is_no_plain_layer_stays_and_is_called_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(6, 8), nn.ReLU(), Masked(8, 8), Rewritten(8, 3)).eval()
    x = torch.randn(5, 6)
    calibrated = ptq.quantize(model, [x])
    assert [row.name for row in calibrated.plan.layers] == ["3"]
    assert calibrated.plan.refused == {
        name: f"a {kind} has no integer kernel, and no layer took it in"
        for name, kind in (("0", "LowRank"), ("2", "Masked"))
    }
    trained = qat.prepare(model, [x])
    assert affine.sqnr(model(x), trained(x)) > 10
    trained.get_parameter("0.b").add_(5)  # the branch goes on to be trained
    assert affine.sqnr(model(x), trained(x)) < 5


@torch.no_grad()
def test_a_convolution_with_a_weight_of_its_own_making_is_not_rounded_as_another():
    model = nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    calibrated = ptq.quantize(model, [IMAGES])
    assert list(calibrated.plan.refused) == ["0"] and affine.sqnr(model(IMAGES), calibrated.model(IMAGES)) > 30


# --- batch norms ------------------------------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """As in timm: a batch norm that ends with something."""

    def __init__(self, channels: int, after) -> None:
        super().__init__(channels)
        self.drop, self.after = nn.Identity(), after

    def forward(self, x):
        torch._assert(x.ndim == 4, "four dimensions")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.after(self.drop(x))


class Changed(nn.BatchNorm2d):
    """normed(self, x) in place of the parent's forward pass."""

    def __init__(self, normed) -> None:
        super().__init__(4)
        self.normed = normed

    def forward(self, x):
        return self.normed(self, x)


def normed(norm, x, **others):
    names = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, **others}
    return F.batch_norm(x, norm.running_mean, norm.running_var, **names)


AFTER = {
    "nothing": (nn.Identity(), nn.Identity),
    "ReLU": (nn.ReLU(inplace=True), nn.ReLU),
    "ReLU6": (nn.ReLU6(), nn.ReLU6),
    "PReLU": (nn.PReLU(4), nn.PReLU),
    "a function": (F.silu, torch.fx.GraphModule),
    "two steps": (nn.Sequential(nn.ReLU(), nn.Hardtanh(-1, 1)), torch.fx.GraphModule),
    "a number": (lambda x: F.relu(x) * 2, torch.fx.GraphModule),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", AFTER)
@torch.no_grad()
def test_a_norm_that_ends_with_an_activation_is_folded_and_leaves_the_activation(kind, training):
    after, left = AFTER[kind]
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, after), nn.Conv2d(4, 2, 1))).double()
    expected, count = model(IMAGES.double()), int(model[1].num_batches_tracked)
    model.train(training)
    new = fold.fold_batch_norm(model, IMAGES.double())
    assert isinstance(new[1], left) and not any(isinstance(x, nn.BatchNorm2d) for x in new.modules())
    assert torch.allclose(new.eval()(IMAGES.double()), expected, rtol=1e-9)
    assert model.training == training and int(model[1].num_batches_tracked) == count


@pytest.mark.parametrize(
    "pass_",
    [
        lambda norm, x: x + normed(norm, x),
        lambda norm, x: normed(norm, 2 * x),
        lambda norm, x: normed(norm, x, weight=1 + norm.weight),
        lambda norm, x: normed(norm, x, eps=0.1),
        lambda norm, x: normed(norm, x) * norm.weight[:, None, None],
        lambda norm, x: normed(norm, normed(norm, x)),
        lambda norm, x: normed(norm, x) if float(x.sum()) > 0 else x,
        lambda norm, x: normed(norm, x).relu() * x.sigmoid(),
    ],
    ids=["residual", "scaled before", "1 + weight", "another eps", "weight twice", "twice", "branching", "gated"],
)
@torch.no_grad()
def test_a_norm_with_another_pass_stays(pass_):
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), Changed(pass_), nn.Conv2d(4, 2, 1)))
    calibrated = ptq.quantize(model, [IMAGES])
    assert "1" in calibrated.plan.refused
    assert affine.sqnr(model(IMAGES), calibrated.model(IMAGES)) > 25


def test_an_activation_s_weights_are_those_of_the_norm():
    norm = NormAct(4, nn.PReLU(4))
    assert after_norm(norm) is norm.after


# --- timm -------------------------------------------------------------------------------------------------------------

NETWORKS = {  # name: (how large its images are, names of the norms that no layer can take in)
    "test_byobnet": 64,
    "test_efficientnet": 64,
    "test_resnet": 64,
    "test_convnext": 64,
    "test_vit": 160,
    "mobilenetv2_035": 64,
    "mobilenetv3_small_050": 64,
    "tf_mobilenetv3_small_minimal_100": 64,
}


NIGHTLY = ("mobilenetv2_035", "mobilenetv3_small_050")  # blocks as those of efficientnet and of the one padded as TF


@vnni
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else ()) for name in NETWORKS]
)
@torch.no_grad()
def test_timm_s_networks_are_folded_quantized_and_converted_code_by_code(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomise_(timm.create_model(name, pretrained=False, num_classes=5))
    images = torch.randn(4, 3, NETWORKS[name], NETWORKS[name], generator=torch.Generator().manual_seed(0))
    calibrated = ptq.quantize(model, [images])
    assert calibrated.plan.refused == {}
    assert len(calibrated.plan.layers) == sum(isinstance(x, nn.Linear | nn.Conv2d) for x in model.modules())
    real = integer.convert(calibrated.model)
    proof = integer.prove(real, images)
    assert len(proof) == len(calibrated.plan.layers) and not any(row["wrong"] for row in proof)
    assert affine.sqnr(calibrated.model(images), real(images)) > 20  # after the ties of fifty layers
