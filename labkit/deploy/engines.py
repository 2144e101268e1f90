"""A model in the runtimes of this CPU, behind one call: eager torch, its compilers, and engines that read a file.

A quantized model is multiplied in the engine's int8 kernels, on the grids of `ptq.quantize` (see `export`). Beside it
stand, as peers, the engines' own tools for quantization: ONNX Runtime's, whose default has signed activations and makes
a convolution three times slower, and NNCF for OpenVINO. Every engine runs on as many threads as torch. `parity` judges
if an engine computes the same function.

Prepare a model for an engine, judge the engine's answers beside the model's, and call it as the model is called:
>>> import torch
>>> from torch import nn
>>> from labkit.deploy import engines, parity
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
>>> x = torch.randn(2, 8)
>>> engines.available()["torch"]  # or what is missing, and how to install it; try "onnxruntime" and "openvino"
'ready'
>>> engine = engines.prepare("torch", model, x)
>>> judged = parity.Reference(model, [x]).judge(engine).require(db=80)  # or an EqualityError
>>> engine(x).shape, engine.bytes > 0, engine.load_seconds > 0
(torch.Size([2, 4]), True, True)

The table ENGINES has a row for each engine; the rows stand in `torch_runtimes`, `onnx_runtimes`, `openvino_runtimes`.
"""

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit.deploy import export, onnx_runtimes, openvino_runtimes, torch_runtimes
from labkit.deploy.job import EngineJob, Run, Runtime, Shapes, Sizes, check_shapes, no_file
from labkit.deploy.onnx_runtimes import session
from labkit.deploy.openvino_runtimes import request
from labkit.errors import InputError, check_choice
from labkit.files import set_up_with
from labkit.modules import batches as batching
from labkit.quantization.affine import Grid
from labkit.quantization.extreme_codes import count_wrong, extreme_codes
from labkit.quantization.ptq import FakeQuantized
from labkit.storage import artifact

ENGINES: dict[str, Runtime] = torch_runtimes.RUNTIMES | onnx_runtimes.RUNTIMES | openvino_runtimes.RUNTIMES
MANIFEST = "engine.json"  # beside the file that is deployed
HOW_TO_INSTALL_PACKAGE = {  # of packages that the extra `engines` does not bring
    "g++": "install it, or name another C++ compiler in CXX",
    "executorch": set_up_with("edge"),
    "torchao": set_up_with("edge"),  # which executorch imports where it lowers
    "openvino_genai": set_up_with("llm"),
}


@dataclass(frozen=True, eq=False)
class Engine:
    """A model in a runtime: `engine(*args, **kwargs)` with the model's tensors, of the prepared shapes.

    A call returns the tensor of the model's output, or a tuple of several.
    bytes: size of the deployed file; for torch, without a file, size of the stored weights (`artifact.size`).
    load_seconds: time to read the file, compile for this CPU and give the first result.
    prepare_seconds: time for the steps before, done once and maybe elsewhere: export, quantization, compilation.
    shapes: shapes of the inputs, by name.
    dynamic: varying dimensions of the inputs.
    """

    name: str
    bytes: int
    load_seconds: float
    shapes: Shapes
    run: Run
    prepare_seconds: float = 0.0
    dynamic: Sizes = field(default_factory=dict)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        names = [*self.shapes, "one more"]  # for an argument too many, which check_shapes refuses
        named = dict(zip(names, args, strict=False)) | kwargs
        check_shapes(self.shapes, named, self.dynamic)
        results = self.run({name: named[name] for name in self.shapes})
        return results[0] if len(results) == 1 else tuple(results)


def available() -> dict[str, str]:
    """Return for each engine "ready", or a sentence that names the missing packages and how to install the first."""
    return {name: missing(name, row.packages) or "ready" for name, row in ENGINES.items()}


def prepare(
    name: str,
    model: nn.Module,
    args: Any,
    *,
    batches: Iterable | None = None,
    dynamic: Sizes | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> Engine:
    """Prepare `model` for the engine `name`, on the current number of torch's threads.

    name: name of an engine.
        float32, or int8 if `model` is `Calibrated.model` of `ptq.quantize`: "torch" (eager), "onnxruntime", "openvino".
        The same in bfloat16, but for int8 layers: "torch-bf16", "torch-compile-bf16", "openvino-bf16".
        A float model only: "torch-compile" and "aotinductor" (with frozen weights), "executorch" (delegated to
        XNNPACK).
        With a step left out, to see its effect: "torch-channels-last" (a changed layout),
        "torch-compile-unfrozen", "aotinductor-unfrozen", "onnxruntime-unoptimized" (no fusion), "executorch-portable"
        (no delegate).
        A float model quantized by the engine's own tools: "onnxruntime-dynamic" (without batches),
        "onnxruntime-static" (u8 s8, per channel), "onnxruntime-s8s8" (signed activations), "nncf" and "nncf-bf16".
    model: a model on the CPU, unchanged afterwards; "torch" runs `model` and no copy.
    args: example of the model's arguments: a tensor, tuple or dict, labels left out. The shapes are fixed, but for
        `dynamic`.
    dynamic: {dimension: (least, most)}, the same in all inputs; the example must have 2 or more at these dimensions.
    folder: place to keep the deployed file, for `load`.
    batches: calibration data, cut into whole pieces of the size of `args`. ONNX Runtime has no convolution that adds
        before rounding, and no convolution from int8 to float32: these results of a quantized model are rounded as
        well, to the extremes seen in `batches`, by default in `args`.
    options: arguments of the quantizing tool, for "nncf" of nncf.quantize, with preset and model_type by name.
        "onnxruntime-static" and "onnxruntime-s8s8": arguments of quantize_static.

    The results equal the simulation within a code per layer; in "onnxruntime" but for the results named above.
    Raises InputError for an engine that is not installed or does not multiply extreme codes as int64 does, for a
    quantized model if the engine quantizes, and for a model that cannot be exported.
    """
    check_choice(name, ENGINES, "engine")
    check_present(name, ENGINES[name].packages)
    arguments = _arguments(model, args)
    dynamic = dict(dynamic or {})
    _check_taken(name, model, batches, folder, options)
    _check_examples(arguments, dynamic)
    _check_products(name, model)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            job = EngineJob(name, model, arguments, batches, Path(temporary), options, dynamic)
            return _build(job)
    Path(folder).mkdir(parents=True, exist_ok=True)
    job = EngineJob(name, model, arguments, batches, Path(folder), options, dynamic)
    return _build(job)


def load(folder: str | Path) -> Engine:
    """Load the engine that `prepare` left in `folder`, in any process, without the model and without an exporter.

    Raises InputError for a folder without an engine. As with any executable file, load only what you trust.
    """
    try:
        text = (Path(folder) / MANIFEST).read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"There is no engine in {folder}: give the folder that prepare(..., folder=) wrote.") from None
    saved = json.loads(text)
    name = saved["name"]
    check_present(name, ENGINES[name].packages)
    shapes = {key: tuple(shape) for key, shape in saved["shapes"].items()}
    dynamic = {int(dimension): tuple(ends) for dimension, ends in saved["dynamic"].items()}
    start = time.perf_counter()
    run = ENGINES[name].read(Path(folder) / saved["file"])
    example = {}
    for key, shape in shapes.items():
        dtype = getattr(torch, saved["dtypes"][key])
        example[key] = torch.zeros(shape, dtype=dtype)
    run(example)
    load_seconds = time.perf_counter() - start
    return Engine(name, saved["bytes"], load_seconds, shapes, run, saved["prepare_seconds"], dynamic)


# --- operators --------------------------------------------------------------------------------------------------------


def graphs(model: nn.Module, args: Any) -> dict[str, Counter[str]]:
    """Count operators by kind: in torch.export's graph, in the ONNX file, and in the graph each engine executes.

    An operator missing in the next graph was folded, fused or removed. "onnxruntime": the optimized graph;
    "openvino": the kernels of the CPU, reorders of memory included. Only installed engines are in the table.
    """
    import onnx

    arguments = _arguments(model, args)
    state = available()
    nodes = export.program(model, arguments).graph.nodes
    table = {"torch.export": Counter(str(node.target) for node in nodes if node.op == "call_function")}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), batching.evaluating(model):
        source = Path(folder) / "model.onnx"
        export.write_onnx(model, arguments, source)
        table["onnx"] = _onnx_operators(onnx.load(source))
        if state["onnxruntime"] == "ready":
            optimized = Path(folder) / "optimized.onnx"
            session(source, save=optimized)
            table["onnxruntime"] = _onnx_operators(onnx.load(optimized))
        if state["openvino"] == "ready":
            table["openvino"] = _openvino_kernels(source)
    return table


def _onnx_operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _openvino_kernels(source: Path) -> Counter[str]:
    executed = request(source).get_compiled_model().get_runtime_model()
    kinds = [layer.rt_info["layerType"].astype(str) for layer in executed.get_ops()]
    return Counter(str(kind) for kind in kinds if kind not in ("Const", "Input", "Output"))


# --- preparing --------------------------------------------------------------------------------------------------------


def _arguments(model: nn.Module, args: Any) -> dict[str, Any]:
    named = batching.inputs(model, args)
    return {name: value for name, value in named.items() if value is not None}


def _check_taken(
    name: str,
    model: nn.Module,
    batches: Iterable | None,
    folder: str | Path | None,
    options: Mapping[str, Any],
) -> None:
    """Raise InputError for an argument of `prepare` that the engine has no use for, or that it lacks."""
    row = ENGINES[name]
    if options and row.takes not in ("tool", "data"):
        raise InputError(f"{name} takes no options, and got {', '.join(options)}: leave them out.")
    if row.takes != "any" and export.is_quantized(model):
        raise InputError(f"{name} takes a float model, and this one is quantized already: give the one it came from.")
    if row.takes == "data" and batches is None:
        raise InputError(f"{name} takes ranges from data: give batches, some hundred inputs in all.")
    if folder is not None and row.write is no_file:
        raise InputError(f"{name} has no file to keep: leave out folder, or take an engine that is deployed as a file.")


def _check_examples(arguments: Mapping[str, Any], dynamic: Sizes) -> None:
    """Raise InputError if a varying dimension has size 1, which the exporter would fix."""
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    for dimension in dynamic:
        sizes = [x.shape[dimension] for x in tensors if dimension < x.dim()]
        if 1 in sizes:
            raise InputError(f"Dimension {dimension} is to vary, and the example has 1 there: give one of 2 or more.")


def _check_products(name: str, model: nn.Module) -> None:
    """Raise InputError if the engine would not multiply the model's largest codes as int64 does."""
    layers = [module for module in model.modules() if isinstance(module, FakeQuantized)]
    if not layers:
        return
    bits = max(layer.weight_grid.bits for layer in layers)
    if not _multiplies(name.removesuffix("-bf16"), bits):
        raise InputError(
            f"{name} gives other products of extreme {bits}-bit codes than int64, as a CPU without VNNI does that adds "
            "pairs in int16: quantize the weights to 7 bits, whose pairs fit, or take float32."
        )


@cache
def _multiplies(name: str, bits: int) -> bool:
    """Return True if the engine multiplies extreme u8 and s8 codes as int64 does.

    bits: width of the weights' codes, see `extreme_codes`.
    """
    draw = torch.Generator().manual_seed(0)
    most = 2 ** (bits - 1) - 1
    codes = extreme_codes(-most, most, draw).float()
    x = extreme_codes(0, 255, draw).float()
    channels, terms = codes.shape
    layer = nn.Linear(terms, channels, bias=False).requires_grad_(False)
    layer.weight.copy_(codes)
    unit = torch.ones(())
    zero = torch.zeros((), dtype=torch.int32)
    weight_grid = Grid(unit.expand(channels, 1), zero.expand(channels, 1), bits, -most, most)
    input_grid = Grid(unit, zero, 8, 0, 255)
    fake = FakeQuantized(layer, weight_grid, input_grid)
    with tempfile.TemporaryDirectory() as folder:
        job = EngineJob(name, fake, {"input": x}, None, Path(folder), {}, {})
        engine = _build(job)
    exact = x.double() @ codes.double().t()
    return count_wrong(engine(x), exact) == 0


def _build(job: EngineJob) -> Engine:
    """Write, read and run a job, and time the steps."""
    row = ENGINES[job.name]
    with torch.no_grad(), batching.evaluating(job.model):
        start = time.perf_counter()
        source = row.write(job)
        written = time.perf_counter()
        run = row.read(source)
        run(job.tensors)
        loaded = time.perf_counter()
    prepare_seconds = written - start
    if source is job:
        size = artifact.size(job.model)
    else:
        files = (source, source.with_suffix(".bin"))
        size = sum(path.stat().st_size for path in files if path.exists())
        _write_manifest(job, source.name, size, prepare_seconds)
    return Engine(job.name, size, loaded - written, job.shapes, run, prepare_seconds, job.dynamic)


def _write_manifest(job: EngineJob, file: str, size: int, prepare_seconds: float) -> None:
    """Write the engine's name, shapes and sizes beside the deployed file, for `load`."""
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in job.tensors.items()}
    saved = {
        "name": job.name,
        "file": file,
        "bytes": size,
        "prepare_seconds": prepare_seconds,
        "shapes": job.shapes,
        "dtypes": dtypes,
        "dynamic": job.dynamic,
    }
    (job.folder / MANIFEST).write_text(json.dumps(saved), encoding="utf-8")


# --- packages ---------------------------------------------------------------------------------------------------------


def missing(name: str, packages: Sequence[str]) -> str:
    """Name the missing packages in a sentence, and how to install the first; "" if all packages are installed.

    name: name of the engine that needs `packages`. "g++" is also of no use if the path of torch has a space or a quote:
    torch's call of the compiler does not escape the path.
    """
    lacking = [package for package in packages if not _present(package)]
    if lacking:
        verb = "is" if len(lacking) == 1 else "are"
        how = HOW_TO_INSTALL_PACKAGE.get(lacking[0], set_up_with("engines"))
        return f"{name} needs {' and '.join(lacking)}, which {verb} not installed: {how}."
    if "g++" in packages and any(character in torch.__file__ for character in " '\""):
        return (
            f"{name} cannot compile against {torch.__file__}: set the course up where no folder's name has a space or "
            "a quote."
        )
    return ""


def check_present(name: str, packages: Sequence[str]) -> None:
    """Raise InputError, in the words of `missing`, unless all packages are installed."""
    sentence = missing(name, packages)
    if sentence:
        raise InputError(sentence)


def _present(package: str) -> bool:
    if package == "g++":
        command = os.environ.get("CXX", package).split()[0]
        return shutil.which(command) is not None
    return importlib.util.find_spec(package) is not None
