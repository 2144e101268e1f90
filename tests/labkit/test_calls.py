"""Odd models, batches and arguments: each is computed as it should be, or refused in one sentence before any work."""

import re
import types

import families
import pytest
import torch
from hardware import needs
from networks import WithForward, by_sign
from torch import nn

from labkit.deploy import isa
from labkit.errors import InputError
from labkit.graph.tracing import outputs
from labkit.quantization import affine, fold, integer, observers, ptq, qat, rotation, rounding, weight_only
from labkit.quantization.affine import Grid

DRAW = torch.Generator().manual_seed(0)
X, IMAGES = torch.randn(4, 6, generator=DRAW), torch.randn(4, 3, 8, 8, generator=DRAW)
vnni = needs("vnni")


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    ).eval()


def returning(change, inner: nn.Module) -> nn.Module:
    """`inner` with change(its output) as what the model returns."""
    return WithForward(lambda m, x: change(m.inner(x)), inner=inner).eval()


def failing(y):
    """An error of the model's own, on large outputs."""
    if float(y.abs().sum()) > 1e5:
        raise KeyError("too large")
    return y


def poisoned() -> nn.Sequential:
    model = linear()
    model[0].weight.data[0, 0] = torch.nan
    return model


def calibrated() -> ptq.Calibrated:
    return ptq.quantize(linear(), [X])


def seven_bits() -> nn.Module:
    return integer.convert(ptq.quantize(linear(), [X], weights=7).model)


def llama():
    return families.family("llama")


LAYER = nn.Linear(6, 3)
GRID = Grid(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32), 8, -127, 127)
WEIGHT, HESSIAN = torch.randn(2, 64, generator=DRAW), torch.eye(64)
ROW = {"layer": "a", "bits": 8, "bytes": 3, "db": 30.0}
NO_MODEL, WRONG = "must be a torch.nn.Module", "does not run on a batch .*cannot be multiplied"
EMPTY, DEPENDS = "has no examples", "depends on the values of its activations"
NOTHING = "holds no tensor with a number in it"

REFUSED = {
    # models
    "ptq of None": (lambda: ptq.quantize(None, [X]), f"model is None, .*{NO_MODEL}"),
    "ptq of a class": (lambda: ptq.quantize(nn.Linear, [X]), NO_MODEL),
    "ptq of a function": (lambda: ptq.quantize(torch.relu, [X]), NO_MODEL),
    "ptq of weights": (lambda: ptq.quantize(linear().state_dict(), [X]), f"a OrderedDict, .*{NO_MODEL}"),
    "ptq of a scripted model": (lambda: ptq.quantize(torch.jit.trace(linear(), X), [X]), "give the eager module"),
    "ptq of a compiled model": (lambda: ptq.quantize(torch.compile(linear()), [X]), "give the eager model"),
    "ptq of a wrapped model": (lambda: ptq.quantize(nn.DataParallel(linear()), [X]), "give model.module"),
    "ptq of lazy layers": (lambda: ptq.quantize(nn.Sequential(nn.LazyLinear(4)), [X]), "0.weight has no shape yet"),
    "ptq on meta": (lambda: ptq.quantize(linear().to("meta"), [X]), "The model is on the meta device"),
    "ptq in float16": (lambda: ptq.quantize(linear().half(), [X.half()]), "float16, and only float32 is quantized"),
    "ptq in bfloat16": (lambda: ptq.quantize(linear().bfloat16(), [X.bfloat16()]), "bfloat16, and only float32"),
    "ptq of norms in float16": (lambda: ptq.quantize(normed().half(), [IMAGES.half()]), "float16, and only float32"),
    "ptq in float64": (lambda: ptq.quantize(linear().double(), [X.double()]), "float64, and only float32"),
    "ptq of complex numbers": (
        lambda: ptq.quantize(nn.Linear(6, 3).to(torch.complex64), [X.cfloat()]), "complex64, and only"
    ),
    "ptq twice": (lambda: ptq.quantize(calibrated().model, [X]), "quantized already: give the float model"),
    "ptq of no outputs": (lambda: ptq.quantize(nn.Sequential(nn.Linear(6, 0)), [X]), r"\[0, 6\] has no numbers"),
    "ptq of NaN": (lambda: ptq.quantize(poisoned(), [X]), "weight of '0' has NaN"),
    "qat of None": (lambda: qat.prepare(None, [X]), NO_MODEL),
    "qat in float16": (lambda: qat.prepare(linear().half(), [X.half()]), "float16, and only float32"),
    "freeze None": (lambda: qat.freeze(None), NO_MODEL),
    "fold None": (lambda: fold.fold_batch_norm(None, X), NO_MODEL),
    "fold a scripted model": (lambda: fold.fold_batch_norm(torch.jit.script(normed()), IMAGES), "give the eager mod"),
    "fold on meta": (lambda: fold.fold_batch_norm(normed().to("meta"), IMAGES), "on the meta device"),
    "equalise None": (lambda: fold.equalize(None, X), NO_MODEL),
    "smooth None": (lambda: fold.smooth(None, [X]), NO_MODEL),
    "convert None": (lambda: integer.convert(None), NO_MODEL),
    "convert what ptq returns": (lambda: integer.convert(calibrated()), f"a Calibrated, .*{NO_MODEL}"),
    "convert twice": (lambda: integer.convert(seven_bits()), "no quantized layer"),
    "convert dynamically None": (lambda: integer.convert_dynamic(None), NO_MODEL),
    "prove None": (lambda: integer.prove(None, X), NO_MODEL),
    "prove a float model": (lambda: integer.prove(linear(), X), "no integer layer"),
    "weights only of None": (lambda: weight_only.quantize(None), NO_MODEL),
    "weights only on meta": (lambda: weight_only.quantize(linear().to("meta"), group_size=None), "on the meta device"),
    "weights only, scripted": (lambda: weight_only.quantize(torch.jit.script(linear())), "give the eager module"),
    "rotate None": (lambda: rotation.rotate(None), NO_MODEL),
    "rotate a perceptron": (lambda: rotation.rotate(linear()), "cannot be rotated"),
    "rotate on meta": (lambda: rotation.rotate(llama().to("meta")), "on the meta device"),
    # outputs that prove nothing
    "fold with no output": (lambda: fold.fold_batch_norm(returning(lambda y: None, normed()), IMAGES), NOTHING),
    "fold with a string": (lambda: fold.fold_batch_norm(returning(lambda y: "y", normed()), IMAGES), NOTHING),
    "fold with a part of nothing": (
        lambda: fold.fold_batch_norm(returning(lambda y: y[:0], normed()), IMAGES), NOTHING
    ),
    "fold an empty batch": (lambda: fold.fold_batch_norm(normed(), IMAGES[:0]), NOTHING),
    "equalise with no output": (lambda: fold.equalize(returning(lambda y: None, linear()), X), NOTHING),
    "equalise an empty batch": (lambda: fold.equalize(linear(), X[:0]), NOTHING),
    "smooth with no output": (lambda: fold.smooth(returning(lambda y: None, linear()), [X]), NOTHING),
    "sensitivity with no output": (
        lambda: ptq.sensitivity(ptq.quantize(returning(lambda y: None, linear()), [X]), [X]), "returns no tensor"
    ),
    # passes that branch on a value, where the rewrite needs a trace
    "fold a branch": (lambda: fold.fold_batch_norm(returning(by_sign, normed()), IMAGES), DEPENDS),
    "equalise a branch": (lambda: fold.equalize(returning(by_sign, linear()), X), DEPENDS),
    "smooth a branch": (lambda: fold.smooth(returning(by_sign, linear()), [X]), DEPENDS),
    # batches
    "batches None": (lambda: ptq.quantize(linear(), None), "give batches"),
    "batches a number": (lambda: ptq.quantize(linear(), 3), "batches is one int"),
    "batches a string": (lambda: ptq.quantize(linear(), "text"), "batches is one str"),
    "batches a dict": (lambda: ptq.quantize(linear(), {"input": X}), "batches is one dict"),
    "batches empty": (lambda: ptq.quantize(linear(), []), "batches is empty"),
    "a generator empty": (lambda: ptq.quantize(linear(), (x for x in ())), "batches is empty"),
    "qat, batches empty": (lambda: qat.prepare(linear(), []), "batches is empty"),
    "an empty batch": (lambda: ptq.quantize(linear(), [X[:0]]), rf"\[0, 6\] {EMPTY}"),
    "a second batch empty": (lambda: ptq.quantize(linear(), [X, X[:0]]), EMPTY),
    "an empty batch of images": (lambda: ptq.quantize(normed(), [IMAGES[:0]]), EMPTY),
    "another width": (lambda: ptq.quantize(linear(), [torch.randn(4, 5)]), WRONG),
    "another width later": (lambda: ptq.quantize(linear(), [X, torch.randn(4, 5)]), WRONG),
    "another type": (lambda: ptq.quantize(linear(), [X.double()]), "does not run on a batch .*dtype"),
    "numpy": (lambda: ptq.quantize(linear(), [X.numpy()]), "does not run on a batch .*numpy"),
    "a batch None": (lambda: ptq.quantize(linear(), [None]), "does not run on a batch"),
    "a batch on meta": (lambda: ptq.quantize(linear(), [X.to("meta")]), "holds a tensor on meta"),
    "a sparse batch": (lambda: ptq.quantize(linear(), [X.to_sparse()]), "no dense tensor"),
    "another name": (lambda: ptq.quantize(linear(), [{"x": X}]), "unexpected keyword argument 'x'"),
    "no arguments": (lambda: ptq.quantize(linear(), [()]), "missing 1 required"),
    "a pass that fails": (
        lambda: ptq.quantize(returning(failing, linear()), [X, X + 1e6]), r"does not run on a batch \(KeyError: 'too l"
    ),
    "smooth another width": (lambda: fold.smooth(linear(), [X, torch.randn(2, 5)]), WRONG),
    "smooth an empty batch": (lambda: fold.smooth(linear(), [X[:0]]), f"no values in the input of 2|{NOTHING}"),
    "gptq another width": (
        lambda: weight_only.quantize(linear(), group_size=None, method="gptq", batches=[torch.randn(2, 5)]), WRONG
    ),
    "gptq an empty batch": (
        lambda: weight_only.quantize(linear(), group_size=None, method="gptq", batches=[X, X[:0]]), EMPTY
    ),
    "awq an empty batch": (
        lambda: weight_only.quantize(linear(), group_size=None, method="awq", batches=[X[:0]]), EMPTY
    ),
    "gptq of NaN": (
        lambda: weight_only.quantize(linear(), group_size=None, method="gptq", batches=[X * torch.nan]), "NaN"
    ),
    "a decoder's empty batch": (
        lambda: weight_only.quantize(
            llama(), group_size=None, method="gptq", batches=[{"input_ids": torch.zeros(0, 9, dtype=torch.long)}]
        ),
        EMPTY,
    ),
    "sensitivity, an empty batch": (lambda: ptq.sensitivity(calibrated(), [X[:0]]), EMPTY),
    "sensitivity, another width": (lambda: ptq.sensitivity(calibrated(), [torch.randn(2, 5)]), WRONG),
    "prove an empty batch": (lambda: integer.prove(seven_bits(), X[:0]), EMPTY),
    "prove NaN": (lambda: integer.prove(seven_bits(), X * torch.nan), "NaN or infinity"),
    "prove another width": (lambda: integer.prove(seven_bits(), torch.randn(2, 5)), r"takes \[..., 6\], not \[2, 5\]"),
    "integers of another width": (lambda: seven_bits()(torch.randn(2, 5)), r"takes \[..., 6\], not \[2, 5\]"),
    "integers of other channels": (
        lambda: integer.convert(ptq.quantize(nn.Conv2d(3, 4, 3), [IMAGES], weights=7).model)(IMAGES[:, :2]),
        r"with 3 channels C, not \[4, 2, 8, 8\]",
    ),
    # arguments
    "weights a string": (lambda: ptq.quantize(linear(), [X], weights="8"), "weights is '8', .* from 2 to 8"),
    "weights 8.0": (lambda: ptq.quantize(linear(), [X], weights=8.0), "weights is 8.0, .* from 2 to 8"),
    "weights a list": (lambda: ptq.quantize(linear(), [X], weights=[8]), r"weights is \[8\], .* from 2 to 8"),
    "weights by number": (lambda: ptq.quantize(linear(), [X], weights={0: 8}), "no module 0 in the model"),
    "ignore None": (lambda: ptq.quantize(linear(), [X], ignore=None), "must hold names of modules"),
    "ignore a number": (lambda: ptq.quantize(linear(), [X], ignore=[0]), "must hold names of modules"),
    "ignore a module": (lambda: ptq.quantize(linear(), [X], ignore=[LAYER]), "must hold names of modules"),
    "ignore the whole model": (lambda: ptq.quantize(linear(), [X], ignore=""), "no layer to quantize .*ignored"),
    "sensitivity of a model": (lambda: ptq.sensitivity(linear(), [X]), "must be what ptq.quantize returns"),
    "sensitivity of 9 bits": (lambda: ptq.sensitivity(calibrated(), [X], bits=(9,)), "bits is 9"),
    "sensitivity of one width": (lambda: ptq.sensitivity(calibrated(), [X], bits=8), "must be a list of the widths"),
    "sensitivity of no width": (lambda: ptq.sensitivity(calibrated(), [X], bits=()), "must be a list of the widths"),
    "allocate nothing": (lambda: ptq.allocate([], 100), "at least one"),
    "allocate other rows": (lambda: ptq.allocate([{"layer": "a"}], 100), "rows must have a layer, bits, bytes and db"),
    "allocate NaN": (lambda: ptq.allocate([{**ROW, "db": torch.nan}], 100), "NaN or infinite"),
    "allocate a string": (lambda: ptq.allocate([ROW], "100"), "budget is '100'"),
    "an observer of 0 bits": (lambda: observers.Observer("mse", 0), "bits is 0"),
    "observe a list": (lambda: observers.Observer("minmax").observe([1.0]), "no dense tensor"),
    "observe complex numbers": (lambda: observers.Observer("minmax").observe(X.cfloat()), "no dense tensor"),
    "observe on meta": (lambda: observers.Observer("minmax").observe(X.to("meta")), "no dense tensor"),
    "rtn of a list": (lambda: weight_only.rtn([[1.0]]), "must be floating-point numbers"),
    "rtn of a vector": (lambda: weight_only.rtn(X[0]), "must be floating-point numbers"),
    "rtn of integers": (lambda: weight_only.rtn(torch.ones(2, 64).long()), "must be floating-point numbers"),
    "rtn of nothing": (lambda: weight_only.rtn(WEIGHT[:0]), "at least one"),
    "gptq of a list": (lambda: weight_only.gptq([[1.0]], HESSIAN), "must be tensors"),
    "gptq, another mask": (lambda: weight_only.gptq(WEIGHT, HESSIAN, mask=WEIGHT[:, 1:] > 0), r"mask is .*\[2, 63\]"),
    "gptq, a float mask": (lambda: weight_only.gptq(WEIGHT, HESSIAN, mask=WEIGHT), "mask is torch.float32"),
    "awq of no weight": (lambda: weight_only.awq([], HESSIAN, HESSIAN[0], abs), "There are 0 weights"),
    "awq, other inputs": (lambda: weight_only.awq([WEIGHT], HESSIAN, WEIGHT[0, 1:], abs), r"\[63\] magnitudes"),
    "hadamard of 0": (lambda: rotation.hadamard(0), "n is 0"),
    "hadamard of a string": (lambda: rotation.hadamard("8"), "n is '8'"),
    "hadamard, another seed": (lambda: rotation.hadamard(8, "a"), "seed is 'a'"),
    "round a ReLU": (lambda: rounding.adaround(nn.ReLU(), GRID, X, X), "must be a Linear or a convolution"),
    "round on no grid": (lambda: rounding.adaround(LAYER, None, X, X[:, :3]), "grid is a NoneType"),
    "round on another grid": (
        lambda: rounding.adaround(nn.Linear(6, 4), GRID, X, X[:, :4]), r"4 outputs .* scale of \[3, 1\]"
    ),
    "round for other outputs": (lambda: rounding.adaround(LAYER, GRID, X, X), r"An output is \[6\], .*gives \[3\]"),
    "round for other inputs": (lambda: rounding.adaround(LAYER, GRID, X[:, 1:], X[:, :3]), WRONG),
    "round for integers": (lambda: rounding.adaround(LAYER, GRID, X.long(), X[:, :3]), "inputs is torch.int64"),
    "round for a list": (lambda: rounding.adaround(LAYER, GRID, [1], [2]), "inputs is a list"),
    "correct a ReLU": (lambda: rounding.bias_correction(nn.ReLU(), X, X[0]), "must be a Linear or a convolution"),
    "correct for a list": (lambda: rounding.bias_correction(LAYER, [[1]], X[0]), "must be tensors"),
    "correct for NaN": (lambda: rounding.bias_correction(LAYER, LAYER.weight * torch.nan, X[0]), "NaN or infinity"),
    "send a function": (lambda: isa.apart(calibrated, lambda: 3), "cannot be sent to a process .*: give what pickles"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_told_in_one_sentence(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"\bprun", text)


RETURNED = {
    "a tensor": lambda y: y,
    "nothing": lambda y: None,
    "a number": lambda y: float(y.sum()),
    "an array": lambda y: y.numpy(),
    "a list with a dict": lambda y: [y, {"y": y}],
    "a namespace": lambda y: types.SimpleNamespace(y=y),
    "a distribution": lambda y: torch.distributions.Normal(y, 1.0),
    "a generator": lambda y: (row for row in y),
    "a set": lambda y: {y},
    "an empty part": lambda y: y[:0],
}


@pytest.mark.parametrize("build, x", [(linear, X), (normed, IMAGES)])
@pytest.mark.parametrize("kind", RETURNED)
@torch.no_grad()
def test_a_model_is_quantized_whatever_it_returns(kind, build, x):
    """All its layers; batch norms and sums where numbers that it returns can prove the rewrite, and not without."""
    model = returning(RETURNED[kind], build())
    result = ptq.quantize(model, [x])
    assert len(result.plan.layers) == 2
    if kind in ("nothing", "a number", "an array", "an empty part"):
        assert not result.plan.traced and set(result.plan.refused) == ({"inner.1"} if build is normed else set())
    if not result.plan.traced:
        assert affine.sqnr(model.inner(x), result.model.inner(x)) > 25
    elif build is normed:
        assert not result.plan.refused and affine.sqnr(outputs(model(x))[0], outputs(result.model(x))[0]) > 25


FORMS = {
    "a list": [X, X],
    "a generator": (x for x in (X, X)),
    "with labels": [(X, torch.zeros(4))],
    "by name": [{"input": X}],
    "part of a graph": [X.clone().requires_grad_() * 1],
    "of inference mode": [torch.inference_mode()(X.clone)()],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_batches_changes_no_code(form):
    expected = ptq.quantize(linear(), [X])
    calibrated = ptq.quantize(linear(), FORMS[form])
    assert calibrated.plan == expected.plan and calibrated.plan.traced
    with torch.no_grad():
        assert torch.equal(calibrated.model(X), expected.model(X))


def test_inference_mode_and_another_default_type_change_no_code():
    expected = ptq.quantize(normed(), [IMAGES])
    model = normed()
    with torch.inference_mode():
        inside = ptq.quantize(model, [IMAGES])
    torch.set_default_dtype(torch.float64)
    try:
        wide = ptq.quantize(model, [IMAGES])
    finally:
        torch.set_default_dtype(torch.float32)
    assert str(inside.plan) == str(wide.plan) == str(expected.plan) and not inside.plan.refused


class Graph(nn.Module):
    """Nodes that are mixed by a matrix, an input or a buffer: a part of the nodes is no input."""

    def __init__(self, adjacency: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x, adjacency=None):
        mixed = self.adjacency if adjacency is None else adjacency
        return self.b(torch.relu(torch.mm(mixed, self.a(x))))


@torch.no_grad()
def test_graphs_are_calibrated_as_a_whole():
    nodes = torch.randn(9, 6, generator=DRAW)
    mixing = torch.rand(9, 9, generator=DRAW).softmax(1)
    dense, sparse = Graph(), Graph(mixing.to_sparse())
    given = {"x": nodes, "adjacency": mixing}
    for model, batch in ((dense, given), (dense, given | {"adjacency": mixing.to_sparse()}), (sparse, {"x": nodes})):
        result = ptq.quantize(model, [batch], weights=7)
        assert [row.name for row in result.plan.layers] == ["a", "b"]
        real = integer.convert(result.model)
        assert affine.sqnr(model(**batch), result.model(**batch)) > 25
        assert affine.sqnr(result.model(**batch), real(**batch)) > 40


@torch.no_grad()
def test_an_empty_batch_goes_through_integers_as_through_floats():
    """An image that no object was found in."""
    convolution = ptq.quantize(nn.Conv2d(3, 4, 3), [IMAGES], weights=7).model
    models = [seven_bits(), integer.convert_dynamic(linear(), weights=7)]
    for model in models:
        assert model(X[:0]).shape == (0, 3) and model(X).shape == (4, 3)
    assert integer.convert(convolution)(IMAGES[:0]).shape == (0, 4, 6, 6)


@torch.no_grad()
def test_integers_of_seven_bits_are_exact_on_every_cpu():
    """Without VNNI too, whose pairs of products leave 16 bits at 8."""
    for build, x in ((linear, X), (normed, IMAGES)):
        simulated = ptq.quantize(build(), [x], weights=7).model
        real = integer.convert(simulated)
        assert not any(row["wrong"] for row in integer.prove(real, x))
        assert affine.sqnr(simulated(x), real(x)) > 40
