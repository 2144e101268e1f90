"""The simulation against its definition, the plan against the model, and sentences for what cannot be quantized."""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_, shortcuts
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import models
from labkit.quantization import affine, integer, ptq, qat


class Branching(nn.Module):
    """What its forward pass does depends on values, so it has no graph; `spare` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x, mask=None, labels=None):
        y = torch.tanh(self.a(input=x))
        y = y if mask is None else y * mask[..., None]
        return self.b(-y if float(y.sum()) > 0 else y)


@pytest.fixture(scope="module")
def residual():
    model, x = shortcuts(), torch.randn(6, 1, 9, 9)
    return model, x, ptq.quantize(model, [x[:3], x[3:]])


@torch.no_grad()
def test_each_value_is_rounded_where_the_rules_say(residual):
    """The forward pass by hand, with each rounding written out."""
    model, x, calibrated = residual
    new = calibrated.model

    def at(name):
        return new.get_submodule(name).input_grid.fake

    weight = {
        name: affine.fake_quantize(m.layer.weight, 8, axis=0) for name, m in new.named_modules() if hasattr(m, "layer")
    }
    bias = {name: m.layer.bias for name, m in new.named_modules() if hasattr(m, "layer")}
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    stem = affine.fake_quantize(model.stem.weight * factor[:, None, None, None], 8, axis=0)
    y = F.relu(F.conv2d(at("stem")(x), stem, model.norm.bias - model.norm.running_mean * factor, padding=1))
    shortcut = at("a")(y)  # the identity shortcut is rounded, on the grid of the layer that reads it too
    y = F.relu(F.conv2d(shortcut, weight["a"], bias["a"], padding=1))
    y = F.conv2d(at("b")(y), weight["b"], bias["b"], padding=1)  # its result is not
    y = at("c")(F.relu(y + shortcut))
    first, last = F.conv2d(y, weight["c"], bias["c"], padding=1), F.conv2d(y, weight["shortcut"], bias["shortcut"])
    grid = new.get_submodule("c_point").grid
    y = F.relu(grid.fake(first) + last)
    y = y + F.relu(y)
    y = F.linear(at("head")(y.mean((2, 3))), weight["head"], bias["head"])
    assert affine.sqnr(y, new(x)) > 80  # the folded weights differ in their last digit
    assert len(calibrated.plan.points) == 2 and calibrated.plan.traced and not calibrated.plan.refused


def test_the_plan_says_what_the_model_is(residual):
    _model, _x, calibrated = residual
    layers = {name: m for name, m in calibrated.model.named_modules() if isinstance(m, ptq.FakeQuantized)}
    assert [row.name for row in calibrated.plan.layers] == list(layers) == ["stem", "a", "b", "c", "shortcut", "head"]
    for row in calibrated.plan.layers:
        grid = layers[row.name].input_grid
        assert (row.weights, row.activations, row.scales) == (8, 8, row.shape[0])
        assert row.lo <= 0 <= row.hi and math.isclose(row.hi - row.lo, 255 * float(grid.scale), rel_tol=1e-5)
    text = str(calibrated.plan)
    assert "head: Linear [3, 4], weights 8 bits x 3 scales, input 8 bits from" in text
    assert float(layers["c"].input_grid.scale) == float(layers["shortcut"].input_grid.scale)


@torch.no_grad()
def test_the_report_is_the_layers_noise(residual):
    model, x, calibrated = residual
    rows = {row["layer"]: row for row in calibrated.report}
    fake = calibrated.model.head
    got = {}
    handle = fake.register_forward_hook(lambda _, args, y: got.update(x=args[0], y=y))
    calibrated.model(x[:3])
    handle.remove()
    features = {}
    handle = model.head.register_forward_hook(lambda _, args, y: features.update(x=args[0], y=y))
    model(x[:3])
    handle.remove()
    assert math.isclose(rows["head"]["chain_db"], affine.sqnr(features["y"], got["y"]), abs_tol=0.01)
    assert math.isclose(rows["head"]["alone_db"], affine.sqnr(features["y"], fake(features["x"])), abs_tol=0.01)
    assert math.isclose(rows["head"]["weight_db"], affine.sqnr(model.head.weight, fake.fake_weight()), abs_tol=0.01)
    assert all(row["chain_db"] > 20 for row in calibrated.report)


def test_the_model_stays_as_it_was(residual):
    model, x, _ = residual
    model = copy.deepcopy(model).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    ptq.quantize(model, [x])
    assert model.training and all(m.training for m in model.modules()) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 2**16), st.booleans())
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_a_layer_is_affine_s_fake_quantization(weights, activations, seed, convolution):
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(2, 3, 3, 2, 1) if convolution else nn.Linear(5, 3)
    x = torch.randn((4, 2, 6, 6) if convolution else (4, 5), generator=draw)
    fake = ptq.quantize(layer, [x], weights=weights, activations=activations).model
    assert isinstance(fake, ptq.FakeQuantized)
    rounded = affine.fake_quantize(x, activations, symmetric=False)
    weight = affine.fake_quantize(layer.weight, weights, axis=0)
    product = F.conv2d(rounded, weight, layer.bias, 2, 1) if convolution else F.linear(rounded, weight, layer.bias)
    assert torch.equal(fake(x), product)
    assert torch.equal(fake.fake_input(rounded), rounded)  # rounding twice is rounding once


@torch.no_grad()
def test_models_without_a_graph_and_every_form_of_batch():
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(4, 5, 6)
    batches = [{"x": x, "mask": torch.ones(4, 5), "labels": torch.zeros(4)}]
    plans = [ptq.quantize(model, b) for b in (batches, [x], iter([x]), [(x, torch.ones(4, 5))])]
    for calibrated in plans:
        assert not calibrated.plan.traced and not calibrated.plan.points
        assert calibrated.plan.refused == {"spare": "no batch calls it as a module"}
        assert type(calibrated.model.spare) is nn.Linear and type(calibrated.model) is Branching
        assert affine.sqnr(model(x), calibrated.model(x)) > 30


class Hesitant(nn.Module):
    """Branches on a value, behind batch norms that nothing but a trace can tell to be foldable."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.norm(self.a(x)).relu().mean((2, 3))
        return self.b(y if float(y.sum()) > 0 else -y)


@torch.no_grad()
def test_a_norm_stays_where_the_pass_branches_on_a_value_and_the_plan_says_why():
    """As without a norm, where nothing needs a trace. The norm's statistics are those of the model."""
    model, x = randomise_(Hesitant()), torch.randn(6, 3, 8, 8)
    calibrated = ptq.quantize(model, [x], weights=7)
    assert [row.name for row in calibrated.plan.layers] == ["a", "b"] and not calibrated.plan.traced
    assert re.fullmatch(
        r"no layer could take it in \(The forward pass depends on the values of its activations .*\)",
        calibrated.plan.refused["norm"],
    )
    assert "norm: float32, no layer could take it in" in str(calibrated.plan)
    assert type(calibrated.model.norm) is nn.BatchNorm2d and affine.sqnr(model(x), calibrated.model(x)) > 25
    real = integer.convert(calibrated.model)
    assert not any(row["wrong"] for row in integer.prove(real, x))
    trained = qat.prepare(model, [x], weights=8, activations=8)
    assert affine.sqnr(model(x), trained(x)) > 25


@torch.no_grad()
def test_a_model_that_looks_at_its_own_norm_keeps_it():
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(self.norm(self.a(x))) * (1 + isinstance(self.norm, nn.BatchNorm2d))

    model, x = randomise_(Curious()), torch.randn(6, 3, 8, 8)
    calibrated = ptq.quantize(model, [x])
    assert "The rewritten model's outputs differ by" in calibrated.plan.refused["norm"]
    assert affine.sqnr(model(x), calibrated.model(x)) > 25


def test_bits_a_layer_and_layers_that_are_ignored(residual):
    model, x, _ = residual
    calibrated = ptq.quantize(model, [x], weights={"a": 4, "head": 3}, ignore=["stem", "c"])
    assert {row.name: row.weights for row in calibrated.plan.layers} == {"a": 4, "b": 8, "shortcut": 8, "head": 3}
    assert calibrated.plan.refused == {"stem": "it is ignored", "c": "it is ignored"}
    whole = ptq.quantize(nn.Sequential(copy.deepcopy(model), nn.Linear(3, 2)), [x], ignore="0")
    assert [row.name for row in whole.plan.layers] == ["1"]
    assert calibrated.model.get_submodule("a").weight_grid.bits == 4


def test_layers_that_torch_s_encoder_reads_without_a_call_stay_in_float32():
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(3, 5, 4)
    calibrated = ptq.quantize(model, [x])
    assert [row.name for row in calibrated.plan.layers] == ["0"]
    assert "reads its weight without calling it" in calibrated.plan.refused["1.linear2"]
    with torch.no_grad():  # on its fast path
        assert affine.sqnr(model(x), calibrated.model(x)) > 30


@torch.no_grad()
def test_a_name_is_no_operation():
    """An input called as a convolution is, and modules called as additions."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.add, self.head = nn.Conv2d(2, 2, 1), nn.Bilinear(5, 5, 5), nn.Conv2d(2, 2, 1)

        def forward(self, conv):
            y = torch.tanh(self.conv(conv * 2))
            return self.head(self.add(y, self.head(y)) + (y + conv))

    calibrated = ptq.quantize(Named(), [torch.randn(3, 2, 5, 5)])
    assert calibrated.plan.traced and not calibrated.plan.points


class Odd(nn.Module):
    """Layers that no kernel computes."""

    def __init__(self) -> None:
        super().__init__()
        self.reflecting = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")
        self.uneven = nn.Conv2d(2, 2, 2, padding="same")
        self.up = nn.ConvTranspose2d(2, 2, 2, 2)
        self.alone = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        x = self.alone(F.relu(self.up(self.uneven(self.reflecting(x))))).mean((2, 3))
        return self.head(x)


def test_what_stays_in_float32_has_a_reason():
    calibrated = ptq.quantize(Odd().eval(), [torch.randn(4, 1, 6, 6)])
    reasons = calibrated.plan.refused
    assert [row.name for row in calibrated.plan.layers] == ["head"]
    assert "pads with 'reflect'" in reasons["reflecting"] and "more on one side" in reasons["uneven"]
    assert "ConvTranspose2d has no integer kernel" in reasons["up"] and "BatchNorm2d" in reasons["alone"]
    assert "reflecting: float32, it pads" in str(calibrated.plan)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.wide(x.double()).float())


def test_only_float32_is_quantized():
    calibrated = ptq.quantize(Mixed(), [torch.randn(3, 4)])
    assert "torch.float64" in calibrated.plan.refused["wide"] and len(calibrated.plan.layers) == 1


X = torch.randn(4, 1, 9, 9)
LINEAR, ROWS = nn.Linear(4, 2), torch.randn(3, 4)


def poisoned():
    layer = nn.Linear(4, 2)
    layer.weight.data[0, 0] = torch.nan
    return layer


def asked(**options):
    return lambda: ptq.quantize(LINEAR, **{"batches": [ROWS], **options})


def asked_of_shortcuts(**options):
    return lambda: ptq.quantize(shortcuts(), **{"batches": [X], **options})


REFUSALS: Refusals = {
    "weights is 9, ... whole number from 2 to 8": asked(weights=9),
    "activations is 1, ... from 2 to 8": asked(activations=1),
    "no observer 'best': choose one of minmax": asked(observer="best"),
    "batches is empty": asked(batches=[]),
    "batches is one Tensor": asked(batches=ROWS),
    "NaN or infinity in the input of ''": asked(batches=[ROWS * torch.nan]),
    "weights['a'] is 16, ... from 2 to 8": asked_of_shortcuts(weights={"a": 16}),
    "no module 'z' in the model": asked_of_shortcuts(weights={"z": 4}),
    "bits for 'norm', ... it is no Linear": asked_of_shortcuts(weights={"norm": 4}),
    "bits for 'a', ... it is ignored": asked_of_shortcuts(weights={"a": 4}, ignore="a"),
    "no module 'stm' in the model": asked_of_shortcuts(ignore=["stm"]),
    "NaN or infinity in the input of 'stem'": asked_of_shortcuts(batches=[X, X * torch.inf]),
    "All values of the input of 'stem' are 0": asked_of_shortcuts(batches=[X * 0]),
    "weight of '' has NaN": lambda: ptq.quantize(poisoned(), [ROWS]),
    "no layer to quantize (it has no Linear and no Conv2d": lambda: ptq.quantize(nn.Sequential(nn.ReLU()), [X]),
    "no layer to quantize (0: a LSTM has no integer": lambda: ptq.quantize(nn.Sequential(nn.LSTM(9, 9)), [X[:, 0]]),
}


@refused(REFUSALS)
def test_errors_say_what_is_allowed(words, call):
    check_refusal(words, call, leaves=LINEAR)


@torch.no_grad()
def test_resnet20_gets_a_point_for_every_sum():
    x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    calibrated = ptq.quantize(models.resnet20(), [x])
    assert len(calibrated.plan.layers) == 22 and len(calibrated.plan.points) == 9 and not calibrated.plan.refused
    assert affine.sqnr(models.resnet20()(x), calibrated.model(x)) > 30
    one = calibrated.model.get_submodule("stage1.1.conv1").input_grid
    (point,) = (calibrated.model.get_submodule(name).grid for name in calibrated.plan.points if name == "relu_2_point")
    assert torch.equal(one.scale, point.scale) and torch.equal(one.zero, point.zero)


def test_sensitivity_is_the_noise_of_one_layer(residual):
    model, x, calibrated = residual
    rows = ptq.sensitivity(calibrated, [x], bits=(8, 4, 2))
    assert len(rows) == 18
    by = {(row["layer"], row["bits"]): row for row in rows}
    assert all(by[layer, 8]["db"] > by[layer, 4]["db"] > by[layer, 2]["db"] for layer in ("stem", "a", "b"))
    assert by["stem", 4]["bytes"] == 36 * 4 // 8 + 16 and by["head", 2]["bytes"] == 3 + 12
    with torch.no_grad():
        alone = ptq.quantize(model, [x[:3], x[3:]], weights=4, ignore=["stem", "a", "b", "c", "shortcut"]).model
        assert math.isclose(by["head", 4]["db"], affine.sqnr(model(x), alone(x)), abs_tol=0.01)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_bits_under_a_budget_are_the_best_there_are(data):
    layers = data.draw(st.integers(1, 5))
    rows = [
        {"layer": f"l{i}", "bits": bits, "bytes": data.draw(st.integers(1, 4000)), "db": data.draw(st.floats(-5, 60))}
        for i in range(layers)
        for bits in (8, 4, 2)
    ]
    choices = list(itertools.product(*(rows[3 * i : 3 * i + 3] for i in range(layers))))
    sizes = [sum(row["bytes"] for row in choice) for choice in choices]
    budget = data.draw(st.integers(min(sizes), max(sizes)))

    def noise(choice):
        return sum(10 ** (-row["db"] / 10) for row in choice)

    best = min(noise(choice) for choice, size in zip(choices, sizes, strict=True) if size <= budget)
    bits = ptq.allocate(rows, budget)
    chosen = [row for row in rows if bits[row["layer"]] == row["bits"]]
    assert len(chosen) == layers and sum(row["bytes"] for row in chosen) <= budget
    assert noise(chosen) <= best + 1e-9 * max(10 ** (-row["db"] / 10) for row in rows)
    check_refusal(f"take {min(sizes)} at least", lambda: ptq.allocate(rows, min(sizes) - 1))
