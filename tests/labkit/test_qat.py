"""Gradients against the papers' equations, grids that move and stay, and integers that are the trained model."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hardware import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import shortcuts
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import datasets, models, training
from labkit.deploy import engines
from labkit.modules import hooks
from labkit.quantization import affine, integer, ptq, qat
from labkit.quantization.affine import Grid

vnni = needs("vnni")


DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 1, 9, 9, generator=DRAW), torch.randint(3, (24,), generator=DRAW)
METHODS = ("ste", "lsq")


def trained(method: str, weights=4, activations=4, steps: int = 12, lr: float = 0.05) -> nn.Module:
    model = qat.prepare(shortcuts(), [X], weights=weights, activations=activations, method=method)
    qat.finetune_(model, [(X, Y)], steps=steps, max_lr=lr)
    return model


def layers(model: nn.Module) -> dict[str, ptq.FakeQuantized]:
    return {name: x for name, x in model.named_modules() if isinstance(x, ptq.FakeQuantized)}


def grids(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {f"{name} weight": x.weight_grid for name, x in layers(model).items()}
    named |= {f"{name} input": x.input_grid for name, x in layers(model).items()}
    named |= {name: x.grid for name, x in model.named_modules() if isinstance(x, ptq.QuantizationPoint)}
    return {name: torch.stack([x.scale.detach(), x.zero.float()]) for name, x in named.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- gradients --------------------------------------------------------------------------------------------------------


def case(bits: int, symmetric: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """Values of which a quarter is clipped, a gradient, and a grid: of 3 channels, or with a zero point for all."""
    draw = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, 3, 40, dtype=torch.float64, generator=draw)
    ends = 0.4 * torch.rand(3, 1, dtype=torch.float64, generator=draw) + 0.2
    if not symmetric:
        ends = ends[0, 0]
    grid = affine.choose(-ends, 1.2 * ends, bits, symmetric=symmetric)
    codes = x / grid.scale + grid.zero
    at_an_end = ((codes - grid.lo).abs() < 1e-4) | ((codes - grid.hi).abs() < 1e-4)  # a slope has two values there
    return torch.where(at_an_end, x + 1e-3 * grid.scale, x), gradient, grid


CASES = (st.integers(2, 8), st.booleans(), st.integers(0, 2**16))


def straight_line(x, gradient, grid):
    """Bengio et al. 2013 with a clip: the gradient of x wherever round(x / s) + z is a code, 0 elsewhere."""
    codes = torch.round(x / grid.scale) + grid.zero
    return torch.where((codes >= grid.lo) & (codes <= grid.hi), gradient, torch.zeros_like(gradient))


@given(*CASES)
@settings(max_examples=60, deadline=None)
def test_straight_through_is_the_grid_forwards_and_a_clip_backwards(bits, symmetric, seed):
    x, gradient, grid = case(bits, symmetric, seed)
    y = qat.StraightThrough.apply(x.requires_grad_(), grid)
    assert torch.equal(y, grid.fake(x.detach())) and torch.equal(y, grid.dequantize(grid.quantize(x.detach())))
    y.backward(gradient)
    expected = straight_line(x.detach(), gradient, grid)
    assert torch.equal(x.grad, expected) and 0 < int((expected == 0).sum()) < x.numel()


def published(x, scale, grid, factor):
    """The pseudocode of Esser et al. 2020 (gradscale, roundpass, quantize), which leaves the gradients to autograd."""

    def gradscale(x, scale):
        return (x - x * scale).detach() + x * scale

    def roundpass(x):
        return (x.round() - x).detach() + x

    step = gradscale(scale, factor)
    v = (x / step).clamp(grid.lo - int(grid.zero.max()), grid.hi - int(grid.zero.max()))
    return roundpass(v) * step


@given(*CASES)
@settings(max_examples=60, deadline=None)
def test_a_learned_step_is_the_published_one(bits, symmetric, seed):
    x, gradient, grid = case(bits, symmetric, seed)
    ours, theirs = ((x.clone().requires_grad_(), grid.scale.clone().requires_grad_()) for _ in range(2))
    y = qat.LearnedStep.apply(*ours, grid, 0.1)
    assert torch.equal(y, grid.fake(x))
    y.backward(gradient)
    reference = published(*theirs, grid, 0.1)
    torch.testing.assert_close(reference, y)
    reference.backward(gradient)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-9, atol=1e-12)


def equation_3(x, gradient, grid):
    """Esser et al. 2020, equation 3, element by element: the derivative by s, summed up over what shares a step."""
    v, most, least = x / grid.scale, grid.hi - grid.zero, grid.zero - grid.lo
    inside = torch.where(v <= -least, -least.double(), torch.where(v >= most, most.double(), torch.round(v) - v))
    return (gradient * inside).sum_to_size(grid.scale.shape)


def finite_difference(x, gradient, grid, by):
    """Of what the estimator pretends to be: the staircase with its rounding error, in steps, held as it is."""
    least, most = grid.lo - grid.zero, grid.hi - grid.zero
    error, size = (x / grid.scale).round() - x / grid.scale, 1e-7 * grid.scale

    def surrogate(x, scale):
        v = x / scale
        clipped = torch.where(v <= least, least.double(), torch.where(v >= most, most.double(), v + error))
        return gradient * clipped * scale

    if by == "x":
        return (surrogate(x + size, grid.scale) - surrogate(x - size, grid.scale)) / (2 * size)
    slope = (surrogate(x, grid.scale + size) - surrogate(x, grid.scale - size)) / (2 * size)
    return slope.sum_to_size(grid.scale.shape)


@given(*CASES)
@settings(max_examples=60, deadline=None)
def test_the_gradients_are_equation_3_and_slopes_of_the_surrogate(bits, symmetric, seed):
    x, gradient, grid = case(bits, symmetric, seed)
    leaf, scale = x.clone().requires_grad_(), grid.scale.clone().requires_grad_()
    qat.LearnedStep.apply(leaf, scale, grid, 1.0).backward(gradient)
    torch.testing.assert_close(scale.grad, equation_3(x, gradient, grid), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(scale.grad, finite_difference(x, gradient, grid, "scale"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf.grad, finite_difference(x, gradient, grid, "x"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convolution", [True, False])
def test_a_layer_learns_with_the_paper_s_gradient_scale(convolution):
    """One backward pass of a prepared layer beside the pseudocode with 1 / sqrt(N Q_P) and its initial step."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3) if convolution else nn.Linear(10, 3)
    seen, x = torch.randn((2, 5, 2, 6, 6) if convolution else (2, 5, 10)).relu()
    model = qat.prepare(layer, [seen], weights=3, activations=4, method="lsq")
    weight, source = model.weight_quantizer, model.input_quantizer
    count, features = layer.weight[0].numel(), x[0].numel()
    torch.testing.assert_close(
        weight.scale.flatten(), 2 * layer.weight.abs().flatten(1).mean(1) / math.sqrt(3), rtol=1e-6, atol=0
    )
    assert torch.equal(source.scale, ptq.quantize(layer, [seen], activations=4, observer="mse").model.input_grid.scale)

    leaves = [p.detach().clone().requires_grad_() for p in (layer.weight, weight.scale, source.scale)]
    w = published(leaves[0], leaves[1], weight.grid, 1 / math.sqrt(count * 3))
    rounded = published(x, leaves[2], source.grid, 1 / math.sqrt(features * 15))
    y = F.conv2d(rounded, w, layer.bias) if convolution else F.linear(rounded, w, layer.bias)
    y.square().sum().backward()
    model(x).square().sum().backward()
    ours = (model.layer.weight.grad, weight.scale.grad, source.scale.grad)
    for gradient, expected in zip(ours, (leaf.grad for leaf in leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


# --- grids that move --------------------------------------------------------------------------------------------------


def test_training_starts_from_ptq():
    """STE is ptq's model to the bit; LSQ has the ranges of another of its observers."""
    start, best = (
        ptq.quantize(shortcuts(), [X], weights=4, activations=4, observer=name).model for name in ("minmax", "mse")
    )
    ste, lsq = (qat.prepare(shortcuts(), [X], method=method) for method in METHODS)
    with torch.no_grad():
        assert torch.equal(ste(X), start(X)) and not torch.equal(lsq(X), best(X))
    assert same(grids(ste), grids(start))
    assert same(*({n: g for n, g in grids(m).items() if "weight" not in n} for m in (lsq, best)))
    assert not ste.training and not lsq.training


def test_straight_through_follows_the_extremes():
    """The grids after one training pass, by hand: a weight's own extremes, nine tenths of the old range and a tenth."""
    model = qat.prepare(nn.Linear(6, 2), [X.view(-1, 6)], method="ste")
    old, x = model.input_grid, 3 * X.view(-1, 6)
    with torch.no_grad():
        model.layer.weight.mul_(1.5)
    assert not torch.equal(model.weight_grid.scale, ptq.weight_grid(model.layer, 4).scale)
    model.train()(x)
    assert torch.equal(model.weight_grid.scale, ptq.weight_grid(model.layer, 4).scale)
    lo, hi = ((end - old.zero) * old.scale for end in (0, 15))
    expected = affine.choose(0.9 * lo + 0.1 * x.min(), 0.9 * hi + 0.1 * x.max(), 4, symmetric=False)
    torch.testing.assert_close(model.input_grid.scale, expected.scale)
    assert torch.equal(model.input_grid.zero, expected.zero)


@pytest.mark.parametrize("method", METHODS)
def test_grids_move_in_training_until_they_are_frozen(method):
    model = qat.prepare(shortcuts(), [X], method=method)

    def moved(lr: float = 0.05) -> tuple[bool, bool]:
        before = grids(model), {name: x.layer.weight.clone() for name, x in layers(model).items()}
        training.train_(model, [(1.5 * X, Y)], epochs=3, max_lr=lr, precision="fp32")
        after = grids(model), {name: x.layer.weight.clone() for name, x in layers(model).items()}
        return tuple(not any(torch.equal(a[name], b[name]) for name in a) for a, b in zip(before, after, strict=True))

    assert moved() == (True, True)
    stay = grids(model)
    with torch.no_grad():
        model(5 * X)
    assert same(grids(model), stay), "in eval mode"
    qat.freeze(model)
    assert moved() == (False, True) and same(grids(model), stay)


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_freezes_after_four_fifths(method):
    """The loss of each step knows the grids that it was computed with."""
    model, seen = qat.prepare(shortcuts(), [X], method=method), []
    model.register_forward_hook(lambda *_: seen.append(grids(model)))
    history = qat.finetune_(model, [(X, Y)], steps=10, max_lr=0.05)
    moves = [not same(a, b) for a, b in itertools.pairwise(seen)]
    assert moves == [True] * 7 + [False] * 2 if method == "ste" else moves == [True] * 8 + [False]
    assert len(history.losses) == 10 and history.precision == "fp32" and not model.training


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_read_the_same_value_keep_one_grid(method):
    model = trained(method)
    after, at = grids(model), layers(model)
    (first, second) = (name for name in after if name.endswith("_point"))
    assert torch.equal(after[first], after["a input"]) and torch.equal(after["c input"], after["shortcut input"])
    assert not torch.equal(after[second], after["c input"])
    with torch.no_grad():  # a layer behind a point does not round again
        x = torch.randn(3, 4, 9, 9)
        assert torch.equal(at["a"].fake_input(x), x) and not torch.equal(at["b"].fake_input(x), x)


@vnni
def test_a_model_without_a_graph_and_a_layer_that_is_called_twice():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = torch.tanh(self.a(self.a(x)))
            return self.b(-y if float(y.sum()) > 0 else y)

    class Twice(Branching):
        def forward(self, x):
            return self.b(torch.tanh(self.a(self.a(x))))

    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    for build, method in ((Branching, "ste"), (Twice, "lsq")):
        model = qat.prepare(build(), [x], weights=8, activations=8, method=method)
        assert affine.sqnr(model(x), integer.convert(model)(x)) > 40
        losses = qat.finetune_(model, [(x, y)], steps=40, max_lr=0.1).losses
        assert losses[-1] < losses[0] - 0.1
        assert affine.sqnr(model(x), integer.convert(model)(x)) > 40


def test_bits_of_layers_and_modules_by_name():
    bits = {"": 4, "stem": 8, "head": 6}
    model = qat.prepare(shortcuts(), [X], weights=bits, activations={**bits, "a": 3}, method="lsq")
    assert {name: (x.weight_grid.bits, x.input_grid.bits) for name, x in layers(model).items()} == {
        "stem": (8, 8), "a": (4, 3), "b": (4, 4), "c": (4, 4), "shortcut": (4, 4), "head": (6, 6),
    }  # fmt: skip
    with torch.no_grad():  # 4 bits are handed over to the sum, and 3 of them read
        assert len(torch.unique(layers(model)["a"].fake_input(torch.linspace(0, 9, 99).view(1, 1, 9, 11)))) <= 8
    wrapped = qat.prepare(nn.Sequential(shortcuts()), [X], weights={"0": 3}, activations=8, method="ste")
    assert {x.weight_grid.bits for x in layers(wrapped).values()} == {3}


# --- what comes out ---------------------------------------------------------------------------------------------------


@vnni
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights, activations", [(8, 8), (4, 8), (2, 4)])
@torch.no_grad()
def test_the_integers_are_the_trained_model_code_by_code(method, weights, activations):
    with torch.enable_grad():
        model = trained(method, weights, activations)
    before = copy.deepcopy(model.state_dict())
    real = integer.convert(model)
    assert same(before, model.state_dict())
    for name, layer in layers(model).items():
        stored, grid = real.get_submodule(name), layer.weight_grid
        assert stored.codes.dtype is torch.int8 and int(stored.codes.abs().max()) <= 2 ** (weights - 1) - 1
        assert torch.equal(stored.codes * stored.scale.view(grid.scale.shape), layer.fake_weight())
        assert stored.numbers("input") == (float(layer.input_grid.scale), int(layer.input_grid.zero))
    proof = integer.prove(real, X)
    assert sum(row["codes"] for row in proof) > 20_000 and not any(row["wrong"] for row in proof)

    handed, simulated = {}, {}
    modules = {name: real.get_submodule(name) for name in ("b", "c", "head")}
    with hooks.watching(real, modules, lambda name, x, _: handed.update({name: x.clone()})):
        real(X)
    wide = copy.deepcopy(model).double()
    with hooks.watching(wide, modules, lambda name, x, _: simulated.update({name: x})):
        y = wide(X.double())
    for name in ("b", "c"):
        codes = layers(wide)[name].input_grid.quantize(simulated[name])
        assert handed[name].dtype is torch.uint8 and torch.equal(handed[name], codes), name
    torch.testing.assert_close(real(X).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_model_is_saved_and_loaded(method, tmp_path):
    model = trained(method)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = qat.prepare(shortcuts(), [0.5 * X], method=method)
    assert not same(grids(model), grids(other))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(grids(model), grids(other))
    with torch.no_grad():
        assert torch.equal(model(X), other(X)) and torch.equal(copy.deepcopy(model)(X), model(X))


@pytest.mark.slow
@pytest.mark.skipif(engines.available()["onnxruntime"] != "ready", reason="onnxruntime is not installed")
@pytest.mark.parametrize("method", ["lsq", pytest.param("ste", marks=pytest.mark.nightly)])
def test_a_trained_model_runs_in_an_engine(method):
    model = trained(method, 8, 8)
    with torch.no_grad():
        assert affine.sqnr(model(X), engines.prepare("onnxruntime", model, X, batches=[X])(X)) > 25


@pytest.mark.parametrize("method", METHODS)
def test_the_caller_s_model_is_not_touched(method):
    model = shortcuts().train().requires_grad_(method == "ste")  # LSQ from a frozen one
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prepared = qat.prepare(model, [X], method=method)
    qat.finetune_(prepared, [(X, Y)], steps=3, max_lr=0.1)
    assert same(before, model.state_dict()) and torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in prepared.parameters()}
    assert all(p.requires_grad == (method == "ste") for p in model.parameters())
    assert all(p.requires_grad for x in layers(prepared).values() for p in x.layer.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_late_error_leaves_the_prepared_model_as_it_was(method):
    """The loss of the last step is NaN, when the grids have been frozen."""
    prepared = qat.prepare(shortcuts(), [X], method=method)
    before = copy.deepcopy(prepared.state_dict())
    learns = {name: p.requires_grad for name, p in prepared.named_parameters()}
    batches = [(X, Y)] * 9 + [(X * torch.nan, Y)]
    call = partial(qat.finetune_, prepared, batches, steps=10, max_lr=0.01)
    check_refusal("The loss of step 10 is nan", call, leaves=prepared)
    assert learns == {name: p.requires_grad for name, p in prepared.named_parameters()}
    qat.finetune_(prepared, [(X, Y)], steps=3, max_lr=0.01)
    assert not same(before, prepared.state_dict())


def test_a_step_that_training_drives_through_zero_stays_a_grid():
    """With a rate far too high; a negative step would turn the codes of ReLU's results round."""
    model = trained("lsq", weights=2, lr=5.0)
    assert all(float(x.weight_grid.scale.min()) > 0 < float(x.input_grid.scale) for x in layers(model).values())
    with torch.no_grad():
        assert integer.convert(model)(X).isfinite().all()


# --- training pays, and what is refused -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_bits_are_learned_where_they_cannot_be_calibrated():
    """ResNet-20, 16 steps: calibration alone is lost, LSQ is not, and a smaller loss is a better model."""
    train, test = datasets.fashion_mnist("train", 512), datasets.fashion_mnist("test", 200)
    images, bits = [train.images[:64]], {"": 2, "conv": 8, "fc": 8}

    def accuracy(model):
        return training.accuracy(model, training.Batches((test.images, test.labels), 100))

    calibrated = ptq.quantize(models.resnet20(), images, weights=bits, activations=8).model
    model = qat.prepare(models.resnet20(), images, weights=bits, activations=8, method="lsq")
    before = accuracy(model)
    qat.finetune_(model, training.Batches((train.images, train.labels), 32, seed=0), steps=16)
    assert accuracy(calibrated) < 0.5 < 0.8 < accuracy(model) and before < accuracy(model)


def alone(model):
    return [[x] for x in model.modules() if isinstance(x, (ptq.FakeQuantized, ptq.QuantizationPoint))]


def learned_step(change):
    """LearnedStep with the derivative by the step from x in steps, its code, and whether it is inside."""

    class Wrong(qat.LearnedStep):
        @staticmethod
        def backward(ctx, gradient):
            x, y, scale = ctx.saved_tensors
            lo, hi = ctx.ends
            slope = change(x / scale, y / scale, (x > lo) & (x < hi))
            return (
                qat._clipped(gradient, x, lo, hi),
                (gradient * slope).sum_to_size(scale.shape) * ctx.factor,
                None,
                None,
            )

    return Wrong


@pytest.mark.parametrize(
    "name, wrong, claim, args",
    [
        ("_clipped", lambda gradient, x, lo, hi: gradient, "straight_through_is_the_grid", (4, True, 0)),
        ("_clipped", lambda gradient, x, lo, hi: gradient, "a_learned_step_is", (4, False, 0)),
        ("_clipped", lambda gradient, x, lo, hi: gradient.where(x > lo, 0), "the_gradients_are", (4, True, 0)),
        (
            "_ends",
            lambda grid, margin=0.0: (grid.lo * grid.scale, grid.hi * grid.scale),
            "the_gradients",
            (4, False, 0),
        ),
        ("LearnedStep", learned_step(lambda v, c, inside: c), "the_gradients_are", (4, True, 0)),
        ("LearnedStep", learned_step(lambda v, c, inside: c - v), "the_gradients_are", (4, True, 0)),
        ("LearnedStep", learned_step(lambda v, c, inside: torch.where(inside, v - c, c)), "a_learned", (4, True, 0)),
        ("LearnedStep", learned_step(lambda v, c, inside: c.where(~inside, 0)), "a_learned_step_is", (4, True, 0)),
        ("MOMENTUM", 0.99, "straight_through_follows", ()),
        ("MOVING", 1.0, "fine_tuning_freezes", ("ste",)),
        ("freeze", lambda model: None, "fine_tuning_freezes", ("lsq",)),
        ("_by_value", alone, "layers_that_read_the_same", ("lsq",)),
        ("_Rounded", lambda quantizer: quantizer, "layers_that_read_the_same", ("ste",)),
    ],
)
def test_these_tests_tell_wrong_implementations(monkeypatch, name, wrong, claim, args):
    (test,) = (fn for key, fn in globals().items() if key.startswith(f"test_{claim}"))
    test = test.hypothesis.inner_test if hasattr(test, "hypothesis") else test
    test(*args)
    monkeypatch.setattr(qat, name, wrong)
    with pytest.raises(AssertionError):
        test(*args)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


LINEAR, FEW = nn.Linear(4, 2), torch.randn(6, 4)


def trained_in_bf16():
    model = qat.prepare(LINEAR, [FEW], method="lsq")
    training.train_(model, [(FEW, torch.zeros(6).long())], max_lr=0.1, precision="bf16")


REFUSALS: Refusals = {
    "There is no method 'pact': choose one of ste, lsq": lambda: qat.prepare(LINEAR, [FEW], method="pact"),
    "batches is empty": lambda: qat.prepare(LINEAR, [], method="lsq"),
    "weights is 1, ... whole number from 2 to 8": lambda: qat.prepare(LINEAR, [FEW], weights=1),
    "activations['a'] is 9, ... from 2 to 8": lambda: qat.prepare(shortcuts(), [X], activations={"a": 9}),
    "no module 'z' in the model": lambda: qat.prepare(shortcuts(), [X], activations={"z": 4}),
    "activations has bits for 'norm'": lambda: qat.prepare(shortcuts(), [X], activations={"norm": 4}),
    'trained in float32 ... precision="fp32"': lambda: autocast(qat.prepare(LINEAR, [FEW]), FEW),
    "trained in float32": lambda: qat.prepare(LINEAR, [FEW]).bfloat16()(FEW.bfloat16()),
    "lack points of an 8-bit grid": trained_in_bf16,
    "steps is 0": lambda: qat.finetune_(shortcuts(), [(X, Y)], steps=0),
}


@refused(REFUSALS)
def test_errors_say_what_is_allowed(words, call):
    check_refusal(words, call, leaves=LINEAR)


def test_bf16_would_train_another_model():
    """Why it is refused: of the points of an 8-bit grid bf16 moves most, of those of a 4-bit one too, but by less."""
    grid = Grid(torch.tensor(0.0123), torch.tensor(0), 8, 0, 255)
    points = grid.dequantize(torch.arange(256, dtype=torch.uint8))
    steps = (points.bfloat16().float() - points).abs() / grid.scale
    assert float(steps.max()) > 0.45 and float(steps[:16].max()) < 0.04
