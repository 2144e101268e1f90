"""Engines against the models that they were prepared from, code by code; each wrong way to write one down is caught."""

import copy
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hardware import needs
from networks import UnevenlyPadded, WithForward, WithOptions, by_sign
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import datasets, models
from labkit.deploy import engines, export, parity
from labkit.files import ROOT
from labkit.quantization import affine, ptq
from labkit.quantization.affine import Grid
from labkit.quantization.ptq import FakeQuantized, QuantizationPoint
from labkit.timing.machine import on_threads

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

vnni = needs("vnni")
openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs OpenVINO")
nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs NNCF")
READY = engines.available()
BOTH = ["onnxruntime", pytest.param("openvino", marks=openvino)]
INT8 = [pytest.param("onnxruntime", marks=needs("cpu vnni")), pytest.param("openvino", marks=[openvino, vnni])]


def compilers(by_day: str, *by_night: str) -> list:
    """Parameters of a claim about torch's compilers, each of which starts g++: one by day, the others each night."""
    parameters = []
    for name in (by_day, *by_night):
        often = pytest.mark.slow if name == by_day else pytest.mark.nightly
        ready = pytest.mark.skipif(READY[name] != "ready", reason=READY[name])
        parameters.append(pytest.param(name, marks=[often, pytest.mark.slow, ready]))
    return parameters


COMPILERS = compilers("torch-compile", "aotinductor")  # for claims that hold or fail in all compilers alike
EXECUTORCH = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.skipif(READY[name] != "ready", reason="needs ExecuTorch")])
    for name in ("executorch", "executorch-portable")
]
EPS = 1e-5  # of the largest: what engines may add up in another order


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def traits(model: nn.Module) -> tuple:
    values = {name: value.tolist() for name, value in model.state_dict().items()}
    return values, [(name, type(x), x.training) for name, x in model.named_modules()], getattr(model, "code", "")


@pytest.fixture(scope="module", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory):
    """A model is exported once for all engines that get the same file, and is afterwards as it was."""
    folder, write, files = tmp_path_factory.mktemp("onnx"), export.write_onnx, {}

    def write_or_copy(model, named, path, *, batches=None, dynamic=None):
        # rounded results: only one model has them
        key = model, batches is not None and model is simulated_net(), bool(dynamic)
        if key not in files:
            before = traits(model)
            write(model, named, path, batches=batches, dynamic=dynamic)
            assert traits(model) == before
            files[key] = shutil.copy(path, folder / f"{len(files)}.onnx")
        shutil.copy(files[key], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_onnx", write_or_copy)
        yield


@cache
def words() -> WithOptions:
    torch.manual_seed(0)
    return WithOptions().eval()


def calibrated(model: nn.Module, x, **options) -> nn.Module:
    return ptq.quantize(model, x if isinstance(x, list) else [x], **options).model.requires_grad_(False)


def grid(scale: float, zero: int, bits: int = 8) -> Grid:
    return Grid(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), bits, 0, 2**bits - 1)


IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
X = IMAGES[:8]


@cache
def net() -> UnevenlyPadded:
    torch.manual_seed(0)
    return UnevenlyPadded().eval()


@cache
def simulated_net() -> nn.Module:
    return calibrated(net(), X)


@pytest.fixture
def path(tmp_path):
    """The quantized network as ONNX Runtime gets it, every result of a convolution rounded."""
    export.write_onnx(simulated_net(), {"x": X}, tmp_path / "model.onnx", batches=[X])
    return tmp_path / "model.onnx"


def kinds(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# --- the same function ------------------------------------------------------------------------------------------------


FROZEN_OR_NOT = compilers("torch-compile", "torch-compile-unfrozen", "aotinductor", "aotinductor-unfrozen")
FLOAT = ["torch", "torch-channels-last", *FROZEN_OR_NOT, *EXECUTORCH, "onnxruntime-unoptimized", *BOTH]


@pytest.mark.parametrize("name", FLOAT)
def test_a_float_model_is_the_same_function(name: str):
    model, x = net(), X.clone()
    engine = engines.prepare(name, model, x)
    torch.testing.assert_close(engine(x), model(x).detach(), rtol=EPS, atol=EPS)
    first = engine(x)
    before = first.clone()
    engine(x + 1)
    assert torch.equal(first, before), "a result must not change with the next call"
    assert engine.load_seconds > 0 and engine.bytes >= 4 * sum(p.numel() for p in model.parameters()) * 0.9


@pytest.mark.skipif(engines.available()["executorch"] != "ready", reason="needs ExecuTorch")
@pytest.mark.slow
def test_executorch_has_as_many_threads_as_torch():
    from executorch.extension.pybindings import portable_lib

    model, x = nn.Linear(8, 4).eval(), torch.randn(2, 8)
    for count in (2, 1):
        with on_threads(count):
            torch.testing.assert_close(engines.prepare("executorch", model, x)(x), model(x).detach())
            assert portable_lib._threadpool_get_thread_count() == count


@pytest.mark.parametrize("name", ["torch", *COMPILERS, EXECUTORCH[0], *BOTH])
def test_keywords_constants_and_several_outputs(name: str):
    model = words()
    batch = {"ids": torch.randint(50, (2, 7)), "mask": torch.ones(2, 7), "scale": 2.0, "labels": torch.zeros(2)}
    engine = engines.prepare(name, model, batch)
    ids, mask = torch.randint(50, (2, 7)), torch.rand(2, 7)
    reference = model(ids, mask, 2.0)
    for outputs in (engine(ids, mask), engine(mask=mask, ids=ids), engine(ids, mask=mask)):
        for result, expected in zip(outputs, reference.values(), strict=True):
            torch.testing.assert_close(result, expected.detach(), rtol=EPS, atol=EPS)


def test_what_left_the_graph_is_counted():
    """ReLUs go into convolutions, norms into weights, and nothing else does."""
    table = engines.graphs(net(), X)
    exported = {kind.split(".")[1]: count for kind, count in table["torch.export"].items()}
    assert (exported["conv2d"], exported["batch_norm"], exported["relu"]) == (4, 1, 3)
    assert table["onnx"]["Conv"] == 4 and table["onnx"]["BatchNormalization"] <= 1
    fused = table["onnxruntime"]
    assert fused["Conv"] + fused["FusedConv"] == 4 and not fused["BatchNormalization"] and not fused["Relu"]
    if "openvino" in table:
        assert table["openvino"]["Convolution"] == 4 and table["openvino"].total() < table["onnx"].total() + 8


@cache
def bert() -> nn.Module:
    """MiniLM's architecture, small: random weights large enough that a wrong mask is seen."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=100, initializer_range=0.3, **sizes)).eval()


def texts(*lengths: int, pad: int = 0) -> dict[str, torch.Tensor]:
    """Ids and mask [B, T] of texts of these lengths, padded to the longest and `pad` further."""
    size = len(lengths), max(lengths) + pad
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, 100, size) * mask, "attention_mask": mask}


VARYING = ["torch", *compilers("aotinductor", "torch-compile"), EXECUTORCH[0], *BOTH]


@pytest.mark.parametrize("name", VARYING)
def test_a_size_that_varies_and_rows_that_are_masked_give_what_eager_gives(name: str, tmp_path):
    """Batch 1, the shortest and the longest text, padding beyond all: shapes that it was not exported with."""
    model, folder = bert(), None if name.startswith("torch") else tmp_path
    engine = engines.prepare(name, model, texts(5, 9, 7), dynamic={0: (1, 6), 1: (2, 24)}, folder=folder)
    shapes = [texts(3), texts(2), texts(24), texts(1, 11), texts(6, 6, pad=3), texts(1, 2, 3, 4, 5, 24)]
    for loaded in [engine] if folder is None else [engine, engines.load(folder)]:
        for named in shapes:
            torch.testing.assert_close(loaded(**named), model(**named).logits.detach(), rtol=1e-4, atol=1e-4)
        check_refusal("input_ids [1 to 6, 2 to 24] ... got input_ids [1, 25]", partial(loaded, **texts(25)))
    alone, padded = texts(7), texts(7, pad=9)
    padded["input_ids"][:, :7] = alone["input_ids"]
    torch.testing.assert_close(engine(**padded), engine(**alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INT8)
def test_a_quantized_model_takes_batches_of_any_size(name: str):
    model = simulated_net()
    engine = engines.prepare(name, model, X, batches=[X], dynamic={0: (1, 64)})
    for x in (X[:1], X, IMAGES):
        assert affine.sqnr(model(x), engine(x)) > 25


@pytest.mark.parametrize("name", INT8)
def test_quantized_layers_take_the_rows_of_a_sequence(name: str):
    x = torch.randn(3, 5, 8)
    model = calibrated(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), x)
    y = engines.prepare(name, model, x)(x)
    assert y.shape == (3, 5, 4) and affine.sqnr(model(x), y) > 25


@pytest.mark.parametrize("name", ["onnxruntime", "torch-bf16", *COMPILERS, EXECUTORCH[0]])
def test_the_model_is_left_as_it_was(name: str):
    model = copy.deepcopy(net()).train()
    before = traits(model)
    engines.prepare(name, model, X)
    assert traits(model) == before


# --- integers ---------------------------------------------------------------------------------------------------------


@cache
def two_layers(bits: int, zero: int) -> torch.fx.GraphModule:
    """A padding convolution whose input has a zero point, and one that hands its codes through: result / scale."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1, bias=False)
    with torch.no_grad():
        second.weight.copy_(torch.eye(6)[..., None, None])
    weights = [ptq.weight_grid(layer, 8) for layer in (first, second)]
    weights[1] = Grid(torch.ones_like(weights[1].scale), weights[1].zero, 8, -127, 127)
    model = torch.fx.symbolic_trace(nn.Sequential(first, nn.ReLU(), second).eval())
    model.set_submodule("0", FakeQuantized(first, weights[0], grid(0.02, zero, bits)))
    model.set_submodule("2", FakeQuantized(second, weights[1], grid(0.011, 0)))
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize(("bits", "zero"), [(8, 77), (4, 5)])
def test_codes_are_those_of_the_simulation(name: str, bits: int, zero: int):
    model, x = two_layers(bits, zero), torch.randn(8, 4, 12, 12)
    x[0] = x[0].sign() * 1e3  # beyond the grid at both ends
    codes = (engines.prepare(name, model, x)(x) / 0.011).round()
    expected = (model(x) / 0.011).round()
    assert expected.unique().numel() > 30
    assert (codes - expected).abs().max() <= 1
    assert (codes != expected).double().mean() < 1e-3
    first = model.get_submodule("0")
    x = F.pad(first.fake_input(x), (1,) * 4, value=-zero * 0.02)
    padded = F.conv2d(x, first.fake_weight(), first.layer.bias)
    wrong = (padded.relu() / 0.011).round().clamp(0, 255)
    assert (wrong != expected).double().mean() > 0.1, "padding with the code 0 is another function at the rim"


@pytest.mark.parametrize("name", INT8)
def test_extreme_codes_are_multiplied_exactly_and_would_show_sums_in_int16(name: str):
    assert engines._multiplies(name, 8)
    draw = torch.Generator().manual_seed(0)
    x, codes = (torch.randint(low, high, (64, 504), generator=draw) for low, high in ((0, 256), (-127, 128)))
    x[0], codes[0], codes[1] = 255, 127, -127
    products = x[:, None] * codes[None]
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    assert (pairs.sum(-1) != products.sum(-1)).any(1).all(), "each input sees a saturated sum"


def test_an_engine_that_adds_pairs_in_int16_is_refused_but_for_7_bits(monkeypatch: pytest.MonkeyPatch):
    def saturating(job):
        layer = job.model

        def run(named):
            x, weight = named["input"], layer.weight_grid.quantize(layer.layer.weight).float()
            pairs = (x[:, None] * weight[None]).unflatten(-1, (-1, 2)).sum(-1)
            return [pairs.clamp(-(2**15), 2**15 - 1).sum(-1)]

        return run

    monkeypatch.setitem(engines.ENGINES, "saturating", engines.Runtime((), "any", lambda job: job, saturating))
    layer = nn.Linear(4, 3)
    eight, seven = (FakeQuantized(layer, ptq.weight_grid(layer, bits), grid(0.1, 3)) for bits in (8, 7))
    words = "extreme 8-bit codes than int64 ... quantize the weights to 7 bits"
    check_refusal(words, partial(engines.prepare, "saturating", eight, torch.randn(2, 4)))
    engines.prepare("saturating", seven, torch.randn(2, 4))


IN_ANOTHER_PROCESS = """
import torch
from labkit.deploy import engines
engines.prepare("onnxruntime", torch.nn.Linear(4, 2), torch.ones(1, 4))(torch.ones(1, 4))
openvino_is_ready = engines.available()["openvino"] == "ready"
print(openvino_is_ready and engines._multiplies("openvino", 8))
"""


@pytest.fixture(scope="module")
def another_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Both engines in a process without VNNI, as oneDNN's setting makes it for OpenVINO; its home, what it printed."""
    home = tmp_path_factory.mktemp("home")
    settings = {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment = {**os.environ, **settings}
    for variable in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return home, child.stdout


@openvino
@pytest.mark.slow
def test_openvino_does_not_pass_without_vnni(another_process: tuple[Path, str]):
    """ONNX Runtime asks the CPU alone, so that it cannot be made so."""
    _, printed = another_process
    assert printed.splitlines()[-1] == "False"


def test_activations_are_u8_weights_s8_per_channel_and_biases_s32(path):
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    makers = {name: node for node in graph.node for name in node.output}
    assert len(layers) == 5
    for layer in layers:
        codes, weight, bias = (makers[name] for name in layer.input)
        assert {codes.op_type, weight.op_type, bias.op_type} == {"DequantizeLinear"}
        assert types[codes.input[2]] == onnx.TensorProto.UINT8 and sizes[codes.input[1]] == []
        assert types[weight.input[0]] == types[weight.input[2]] == onnx.TensorProto.INT8
        assert sizes[weight.input[1]] == sizes[weight.input[0]][:1]
        assert types[bias.input[0]] == onnx.TensorProto.INT32
    floats = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT and math.prod(sizes[name]) > 8]
    assert not floats, "no weight is stored in float32"
    assert not any(node.metadata_props for node in graph.node), "no line of Python is"
    assert "Pad" not in kinds(path), "a convolution pads by itself, with the zero point"


def test_onnx_runtime_multiplies_integers_in_every_layer(path, tmp_path):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    assert kinds(path).count("Conv") == 4
    operators = kinds(settings.optimized_model_filepath)
    assert operators.count("QLinearConv") == 4 and operators.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Gemm", "Relu", "Clip"} & set(operators)


@vnni
@openvino
def test_openvino_multiplies_integers_in_every_layer():
    import openvino as ov

    engine = engines.prepare("openvino", simulated_net(), X)
    request = next(c.cell_contents for c in engine.run.__closure__ if isinstance(c.cell_contents, ov.InferRequest))
    compiled = request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    layers = [
        {name: str(node.rt_info[name].astype(str)) for name in ("layerType", "runtimePrecision", "primitiveType")}
        for node in compiled.get_runtime_model().get_ops()
    ]
    products = [x for x in layers if x["layerType"] in ("Convolution", "FullyConnected")]
    assert len(products) == 5 and {x["runtimePrecision"] for x in products} <= {"u8", "i8"}, products


def test_onnx_runtime_rounds_the_results_that_it_has_to_round():
    """The simulation with a point behind the convolution that is summed up, on the extremes in the batches."""
    model = simulated_net()
    engine = engines.prepare("onnxruntime", model, X, batches=[X])
    rounded = export._with_integer_layers(copy.deepcopy(model))
    assert torch.equal(rounded(X), model(X))
    export._take_in_pads(rounded)
    assert torch.equal(rounded(X), model(X))
    export._round_results(rounded, [X])
    points = [[m for m in part.modules() if isinstance(m, QuantizationPoint)] for part in (rounded, model)]
    assert len(points[0]) - len(points[1]) - 5 == 2, "before the sum and before the mean"
    step = float(model.head.input_grid.scale) * float(model.head.fake_weight().abs().sum(1).max())
    assert (engine(X) - rounded(X)).abs().max() <= 2 * step
    assert affine.sqnr(rounded(X), engine(X)) > affine.sqnr(model(X), engine(X)) + 3
    assert affine.sqnr(model(X), engine(X)) > 25


@vnni
@openvino
def test_openvino_rounds_what_the_simulation_rounds_and_nothing_else():
    model, x = simulated_net(), X
    result = engines.prepare("openvino", model, x)(x)
    step = float(model.head.input_grid.scale) * float(model.head.fake_weight().abs().sum(1).max())
    assert (result - model(x)).abs().max() <= 2 * step
    assert affine.sqnr(model(x), result) > 40


@cache
def tiny_weights() -> FakeQuantized:
    torch.manual_seed(0)
    layer = nn.Linear(8, 3).requires_grad_(False)
    layer.weight[0], layer.bias[:] = 1e-12, torch.tensor([0.5, -0.3, 0.2])
    return FakeQuantized(layer, ptq.weight_grid(layer, 8), grid(0.02, 100))


@pytest.mark.parametrize("name", INT8)
def test_a_bias_beside_tiny_weights_fits_in_32_bits(name: str):
    model, x = tiny_weights(), torch.randn(5, 8)
    step = 0.02 * model.weight_grid.scale.flatten()
    assert (model.layer.bias / step).abs().max() > 2**31, "or the test shows nothing"
    torch.testing.assert_close(engines.prepare(name, model, x)(x), model(x), rtol=EPS, atol=EPS)


@cache
def lite0() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """EfficientNet-lite0 simulated in int8, crops of photos that it was not calibrated on, and those that it was."""
    photos, others = (models.imagenet_input(datasets.photo_crops(n, seed=seed)) for n, seed in ((4, 2), (6, 1)))
    return calibrated(models.efficientnet_lite0(), [others]), photos, others


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory):
    """EfficientNet-lite0 with QuantizeLinear and DequantizeLinear, and what ONNX Runtime answers with it."""
    folder = tmp_path_factory.mktemp("lite0")
    model, photos, others = lite0()
    engine = engines.prepare("onnxruntime", model, photos, batches=[others], folder=folder)
    return folder / "model.onnx", engine(photos)


@openvino
@pytest.mark.slow
@pytest.mark.nightly
def test_one_file_of_efficientnet_gives_the_same_answers_in_every_engine(one_file):
    """Beside ONNX Runtime on the same file: integers are equal but for ties of rounding, layer on layer."""
    path, answers = one_file
    model, photos, _ = lite0()
    results = torch.from_numpy(engines.request(path).infer([photos.numpy()])[0])
    judged = parity.compare_scores(answers, results)
    assert judged.sqnr_db > 20, judged
    assert judged.sure_agreement is None or judged.sure_agreement[0] == 1, judged
    assert parity.compare_scores(model(photos), results).sqnr_db > 20


# --- the engines' own tools -------------------------------------------------------------------------------------------

TOOLS = [
    "onnxruntime-dynamic", "onnxruntime-static", "onnxruntime-s8s8", pytest.param("nncf", marks=nncf),
    pytest.param("nncf-bf16", marks=nncf), pytest.param("openvino-bf16", marks=openvino), "torch-bf16",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_peers_come_near_the_model(name: str):
    model, x = net(), IMAGES
    engine = engines.prepare(name, model, X, batches=[x, x[:12]])  # what does not fill a batch of 8 is left out
    assert 20 < affine.sqnr(model(x[:8]).detach(), engine(x[:8])) < 80


# --- sentences --------------------------------------------------------------------------------------------------------


def test_onnx_runtime_keeps_no_device_id_in_the_user_s_cache(another_process: tuple[Path, str]):
    home, _ = another_process
    assert not list(home.rglob("*deviceid*")) and not list(home.rglob("Microsoft"))


@pytest.mark.parametrize("folder", ["a new place", "it's"])
def test_a_path_that_the_compiler_cannot_take_is_told(monkeypatch: pytest.MonkeyPatch, folder: str):
    monkeypatch.setattr(torch, "__file__", f"/{folder}/torch/__init__.py")
    monkeypatch.setattr(engines, "_present", lambda package: True)
    sentence = f"torch-compile cannot compile against /{folder}/torch/__init__.py: set the course up where no folder"
    assert engines.available()["torch-compile"].startswith(sentence)
    assert engines.available()["onnxruntime"] == "ready"


def test_what_is_missing_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openvino", "nncf") else real(name))
    state = engines.available()
    assert state["torch"] == state["onnxruntime"] == "ready"
    assert state["nncf"] == "nncf needs openvino and nncf, which are not installed: ./lab setup --with engines."
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert engines.available()["aotinductor"] == (
        "aotinductor needs g++, which is not installed: install it, or name another C++ compiler in CXX."
    )
    call = partial(engines.prepare, "openvino", nn.Linear(3, 2), torch.randn(1, 3))
    check_refusal("openvino needs openvino ... ./lab setup --with engines", call)
    edge = {"executorch": object(), "torchao": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: edge[name] if name in edge else real(name))
    missing = "executorch needs torchao, which is not installed: ./lab setup --with edge."
    assert engines.available()["executorch"] == missing


LINEAR, LINES = nn.Linear(3, 2), torch.randn(4, 3)
SIMULATED = calibrated(LINEAR, LINES)
BY_SIGN = WithForward(lambda m, x: by_sign(m.layer(x)), layer=nn.Linear(3, 3))


def prepared() -> engines.Engine:
    return engines.prepare("torch", LINEAR, LINES)


def static(model: nn.Module = LINEAR, **options) -> engines.Engine:
    return engines.prepare("onnxruntime-static", model, LINES, **options)


REFUSALS: Refusals = {
    "There is no engine 'tensorrt': choose one of torch,": lambda: engines.prepare("tensorrt", LINEAR, LINES),
    "takes ranges from data: give batches": lambda: static(),
    "batches is empty": lambda: static(batches=[]),
    "for input [4, 3] and got input [4, 5]": lambda: static(batches=[torch.randn(4, 5)]),
    "onnxruntime-static ... quantized already": lambda: static(SIMULATED, batches=[LINES]),
    "cannot be exported to ONNX": lambda: engines.prepare("onnxruntime", BY_SIGN, LINES),
    "takes no options": lambda: engines.prepare("torch-bf16", LINEAR, LINES, preset="mixed"),
    "the example has 1 there: give one of 2 or more": lambda: engines.prepare(
        "onnxruntime", LINEAR, LINES[:1], dynamic={0: (1, 8)}
    ),
    "has no file to keep": lambda: engines.prepare("torch", LINEAR, LINES, folder="nowhere"),
    "There is no engine in": lambda: engines.load(ROOT / "tests"),
    "The engine is for input [4, 3] and got input [5, 3]": lambda: prepared()(torch.randn(5, 3)),
    "The engine is for input [4, 3] and got nothing": lambda: prepared()(),
    "The engine is for input [4, 3] and got input [4, 3], one more [4, 3]": lambda: prepared()(LINES, LINES),
}
NEEDS_A_COMPILER: Refusals = {
    "cannot be exported by torch.export": lambda: engines.prepare("aotinductor", BY_SIGN, LINES),
    "torch-compile ... quantized already": lambda: engines.prepare("torch-compile", SIMULATED, LINES),
}


@refused(REFUSALS)
def test_what_cannot_be_prepared_or_run_is_refused_in_a_sentence(words, call):
    check_refusal(words, call, leaves=LINEAR)


@pytest.mark.skipif(READY["aotinductor"] != "ready", reason=READY["aotinductor"])
@refused(NEEDS_A_COMPILER)
def test_what_torch_cannot_export_or_compile_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
