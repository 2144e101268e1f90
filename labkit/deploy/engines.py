"""Other runtimes on this CPU, behind one call: a model is written as an ONNX file, and an engine compiles and runs it.

A quantized model is multiplied in the engine's int8 kernels, on the grids of `ptq.quantize` (see `export`). The
engines' own tools for quantization stand beside it, as peers: ONNX Runtime's, whose default has signed activations and
makes a convolution three times slower, and NNCF for OpenVINO. Every engine runs on as many threads as torch.
"""

import contextlib
import copy
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from labkit import artifact
from labkit import batches as batching
from labkit.deploy import export
from labkit.errors import InputError, check_choice
from labkit.pruning.coupling.tracing import outputs
from labkit.quantization.affine import Grid
from labkit.quantization.ptq import FakeQuantized

INSTALL = "pip install 'labkit[engines]'"

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Engine:
    """A model in a runtime: `engine(*args, **kwargs)` with the model's tensors, of the shapes it was prepared for.

    It returns the tensor of the model's output, or a tuple where there are several. bytes: of the file that is
    deployed (for torch: of what would be stored). load_seconds: to read that file, compile it for this CPU and give
    the first result (for torch, which has no file: the first result). shapes: of the inputs, by name.
    """

    name: str
    bytes: int
    load_seconds: float
    shapes: Mapping[str, tuple[int, ...]]
    run: Run

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        named = {**dict(zip([*self.shapes, "one more"], args, strict=False)), **kwargs}
        _check_shapes(self.shapes, named)
        results = self.run(named)
        return results[0] if len(results) == 1 else tuple(results)


def available() -> dict[str, str]:
    """ "ready" for each name that `prepare` takes, or what is missing and how to install it."""
    return {name: _missing(name) or "ready" for name in ENGINES}


def prepare(name: str, model: nn.Module, args: Any, *, batches: Iterable | None = None, **options: Any) -> Engine:
    """`model` in the engine `name`, on torch.get_num_threads() threads (of that moment), with the shapes of `args`.

    name: fp32, or int8 if `model` is `Calibrated.model` of `ptq.quantize`: "torch", "onnxruntime", "openvino"; the
        same with bfloat16 for what is not int8: "torch-bf16", "openvino-bf16". A float model that the engine's own
        tools quantize: "onnxruntime-dynamic" (needs no batches), "onnxruntime-static" (u8 s8, per channel),
        "onnxruntime-s8s8" (the same with signed activations), "nncf", "nncf-bf16" and "nncf-accuracy-control".
    model: on the CPU; it is left as it was, but "torch" runs it and no copy.
    args: an example of what the model is called with: a tensor, tuple or dict, labels left out. Shapes are fixed.
    batches: to calibrate on; from each as many pieces of the size of `args` are cut as it has. ONNX Runtime has no
        convolution that adds before it rounds and none from int8 to float32: for a quantized model it rounds these
        results as well, to the extremes seen in `batches`, by default in `args`.
    options: for the tool that quantizes. "nncf": those of nncf.quantize, preset and model_type by name. "onnxruntime-
        static" and "-s8s8": those of quantize_static. "nncf-accuracy-control" puts the worst layers back to float32
        until the drop is at most max_drop (.01): validate(engine, batches) -> float, better if higher, and validation,
        a list of batches, as well.

    Equal to the simulation within one code a layer; in "onnxruntime" but for the results named above. InputError for
    an engine that is not installed or does not multiply extreme codes as int64 does, for a quantized model where the
    engine quantizes, and for a model that cannot be exported.
    """
    check_choice(name, ENGINES, "engine")
    if missing := _missing(name):
        raise InputError(missing)
    row = ENGINES[name]
    named = {key: value for key, value in batching.inputs(model, args).items() if value is not None}
    if options and row.takes == "any":
        raise InputError(f"{name} takes no options, and got {', '.join(options)}: leave them out.")
    if row.takes != "any" and export.is_quantized(model):
        raise InputError(f"{name} takes a float model, and this one is quantized already: give the one it came from.")
    if row.takes == "data" and batches is None:
        raise InputError(f"{name} takes ranges from data: give batches, some hundred inputs in all.")
    bits = max((x.weight_grid.bits for x in model.modules() if isinstance(x, FakeQuantized)), default=0)
    if bits and not _multiplies(name.removesuffix("-bf16"), bits):
        raise InputError(
            f"{name} gives other products of extreme {bits}-bit codes than int64, as a CPU without VNNI does that adds "
            "pairs in int16: quantize the weights to 7 bits, whose pairs fit, or take float32."
        )
    return _prepare(name, model, named, batches, options)


def _prepare(name: str, model: nn.Module, named: dict[str, Any], batches: Iterable | None, options: dict) -> Engine:
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    with torch.no_grad(), batching.evaluating(model), tempfile.TemporaryDirectory() as folder:
        job = _Job(model, named, list(tensors), batches, Path(folder), options)
        size, load = ENGINES[name].deploy(job)
        start = time.perf_counter()
        run = load()
        run(tensors)
        seconds = time.perf_counter() - start
    return Engine(name, size, seconds, {key: tuple(value.shape) for key, value in tensors.items()}, run)


class _Job(NamedTuple):
    model: nn.Module
    named: dict[str, Any]  # the model's arguments
    names: list[str]  # of those that are tensors
    batches: Iterable | None
    folder: Path
    options: dict[str, Any]

    def pieces(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of the batches, cut to the shapes of the example."""
        shapes = {name: tuple(self.named[name].shape) for name in self.names}
        size = next(iter(shapes.values()))[0]
        for batch in batching.not_empty(batching.check_batches(self.batches, "calibration")):
            tensors = batching.inputs(self.model, batch)
            rows = zip(*(tensors[name].split(size) for name in self.names), strict=True)
            for row in rows:
                piece = dict(zip(self.names, row, strict=True))
                if len(row[0]) == size:
                    _check_shapes(shapes, piece)
                    yield piece


# --- engines: each writes what is deployed, and gives its bytes and what loads it -------------------------------------


def _torch(job: _Job, dtype: torch.dtype | None = None) -> tuple[int, Callable[[], Run]]:
    model = job.model if dtype is None else copy.deepcopy(job.model).to(dtype)
    constants = {key: value for key, value in job.named.items() if key not in job.names}

    @torch.inference_mode()
    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        if dtype is not None:
            named = {key: x.to(dtype) if x.is_floating_point() else x for key, x in named.items()}
        with batching.evaluating(model) if model.training else contextlib.nullcontext():
            results = outputs(model(**named, **constants))
        return results if dtype is None else [x.float() if x.dtype is dtype else x for x in results]

    return artifact.size(model), lambda: run


def _onnxruntime(job: _Job, quantize: Callable[[_Job, Path, Path], None] | None = None):
    source = path = job.folder / "model.onnx"
    export.write_onnx(job.model, job.named, path, batches=job.batches or [job.named])
    if quantize is not None:
        path = job.folder / "quantized.onnx"
        with export.quietly():
            quantize(job, source, path)
    return path.stat().st_size, partial(_session, path)


def _session(path: Path) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    # Workers of a session that waits would spin and take the cores from the session that is timed next.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        results = session.run(None, {name: named[name].detach().contiguous().numpy() for name in names})
        return [torch.from_numpy(x) for x in results]

    return run


def _dynamic(job: _Job, source: Path, target: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, **job.options)


def _static(job: _Job, source: Path, target: Path, *, signed: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_static

    arrays = ({name: x.contiguous().numpy() for name, x in piece.items()} for piece in job.pieces())
    reader = SimpleNamespace(get_next=lambda: next(arrays, None))
    activations = QuantType.QInt8 if signed else QuantType.QUInt8
    quantize_static(source, target, reader, **{"per_channel": True, "activation_type": activations, **job.options})


def _openvino(job: _Job, quantize: Callable[[_Job, Any], Any] | None = None, precision: str = "f32"):
    import openvino

    source = job.folder / "model.onnx"
    export.write_onnx(job.model, job.named, source)
    model = openvino.Core().read_model(source)
    if quantize is not None:
        with export.quietly():
            model = quantize(job, model)
    path = job.folder / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return size, lambda: _compiled(openvino.Core().read_model(path), precision)


def _compiled(model: Any, precision: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the operating system places threads, as it does for the other engines
        "INFERENCE_PRECISION_HINT": precision,  # else bfloat16 wherever the CPU has it
    }
    return _requests(openvino.Core().compile_model(model, "CPU", settings))


def _requests(compiled: Any) -> Run:
    request = compiled.create_infer_request()

    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: x.detach().contiguous().numpy() for name, x in named.items()}
        results = request.infer(arrays, share_inputs=True)  # what it returns are copies, which the next call leaves
        return [torch.from_numpy(results[place]) for place in range(len(results))]

    return run


def _nncf(job: _Job, model: Any, *, control: bool = False) -> Any:
    with patch.dict(os.environ, CI="true"):  # else it reports its use over the network
        import nncf

    options, kinds = dict(job.options), {"preset": nncf.QuantizationPreset, "model_type": nncf.ModelType}
    for key in kinds.keys() & options.keys():
        options[key] = kinds[key](options[key])
    data = nncf.Dataset([{name: x.contiguous().numpy() for name, x in piece.items()} for piece in job.pieces()])
    if not control:
        return nncf.quantize(model, data, **options)
    validate, validation = options.pop("validate"), options.pop("validation")
    shapes = {name: tuple(job.named[name].shape) for name in job.names}

    def score(compiled: Any, batches: Iterable) -> tuple[float, None]:
        return validate(Engine("nncf", 0, 0.0, shapes, _requests(compiled)), batches), None

    return nncf.quantize_with_accuracy_control(model, data, nncf.Dataset(validation), score, **options)


class Runtime(NamedTuple):
    """deploy(job) -> (bytes, load); packages: what it imports.

    takes: "any" model, float or quantized; a "float" one; or a float one and "data" for the ranges.
    """

    deploy: Callable[[_Job], tuple[int, Callable[[], Run]]]
    packages: tuple[str, ...] = ()
    takes: str = "any"


_ONNX = ("onnx", "onnxscript")
_ORT, _OV = (*_ONNX, "onnxruntime"), (*_ONNX, "openvino")
ENGINES = {
    "torch": Runtime(_torch),
    "torch-bf16": Runtime(partial(_torch, dtype=torch.bfloat16), takes="float"),
    "onnxruntime": Runtime(_onnxruntime, _ORT),
    "onnxruntime-dynamic": Runtime(partial(_onnxruntime, quantize=_dynamic), _ORT, "float"),
    "onnxruntime-static": Runtime(partial(_onnxruntime, quantize=partial(_static, signed=False)), _ORT, "data"),
    "onnxruntime-s8s8": Runtime(partial(_onnxruntime, quantize=partial(_static, signed=True)), _ORT, "data"),
    "openvino": Runtime(_openvino, _OV),
    "openvino-bf16": Runtime(partial(_openvino, precision="bf16"), _OV),
    "nncf": Runtime(partial(_openvino, quantize=_nncf), (*_OV, "nncf"), "data"),
    "nncf-bf16": Runtime(partial(_openvino, quantize=_nncf, precision="bf16"), (*_OV, "nncf"), "data"),
    "nncf-accuracy-control": Runtime(partial(_openvino, quantize=partial(_nncf, control=True)), (*_OV, "nncf"), "data"),
}


def _missing(name: str) -> str:
    packages = [package for package in ENGINES[name].packages if importlib.util.find_spec(package) is None]
    return f"{name} needs {' and '.join(packages)}, which is not installed: {INSTALL}." if packages else ""


@cache
def _multiplies(name: str, bits: int) -> bool:
    """Whether the engine multiplies extreme u8 and s8 codes as int64 does; 504 terms, which float32 holds exactly."""
    draw, most = torch.Generator().manual_seed(0), 2 ** (bits - 1) - 1
    x, codes = (torch.randint(*ends, (64, 504), generator=draw).float() for ends in ((0, 256), (-most, most + 1)))
    x[0], codes[0], codes[1], codes[2, ::2], codes[2, 1::2] = 255, most, -most, most, -most
    layer = nn.Linear(504, 64, bias=False).requires_grad_(False)
    layer.weight.copy_(codes)
    unit, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    weight = Grid(unit.expand(64, 1), zero.expand(64, 1), bits, -most, most)
    engine = _prepare(name, FakeQuantized(layer, weight, Grid(unit, zero, 8, 0, 255)), {"input": x}, None, {})
    return torch.equal(engine(x).double(), x.double() @ codes.double().t())


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    inputs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if inputs != shapes:
        expected, got = (
            ", ".join(f"{name} {list(shape)}" for name, shape in of.items()) or "nothing" for of in (shapes, inputs)
        )
        raise InputError(
            f"The engine is for {expected} and got {got}: give tensors of these shapes, or prepare it for others."
        )
