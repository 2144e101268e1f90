"""A model in the runtimes of this CPU, behind one call: eager torch, its compilers, and engines that read a file.

A quantized model is multiplied in the engine's int8 kernels, on the grids of `ptq.quantize` (see `export`). The
engines' own tools for quantization stand beside it, as peers: ONNX Runtime's, whose default has signed activations and
makes a convolution three times slower, and NNCF for OpenVINO. Every engine runs on as many threads as torch. Whether it
computes the same function is for `parity` to say.
"""

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from labkit.deploy import export
from labkit.errors import InputError, check_choice
from labkit.files import set_up_with
from labkit.graph.tracing import outputs
from labkit.modules import batches as batching
from labkit.quantization.affine import Grid
from labkit.quantization.ptq import FakeQuantized
from labkit.storage import artifact

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it keeps a device id in the user's cache
INSTALL = {  # of what the extra `engines` does not bring
    "g++": "install it, or name another C++ compiler in CXX",
    "executorch": set_up_with("edge"),
    "torchao": set_up_with("edge"),  # which it imports where it lowers
    "onnxruntime_qnn": set_up_with("hexagon"),
    "openvino_genai": set_up_with("llm"),
    "llama_cpp": "pip install llama-cpp-python, which compiles it",
}

MANIFEST = "engine.json"  # beside the file that is deployed
Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]  # of all inputs, in the order of the shapes
Sizes = Mapping[int, tuple[int, int]]  # {dimension: (least, most)}


@dataclass(frozen=True, eq=False)
class Engine:
    """A model in a runtime: `engine(*args, **kwargs)` with the model's tensors, of the shapes it was prepared for.

    It returns the tensor of the model's output, or a tuple where there are several. bytes: of the file that is
    deployed (for torch, which has none: of what would be stored). load_seconds: to read that file, compile it for this
    CPU and give the first result. prepare_seconds: what came before, once and maybe elsewhere: export, quantization,
    compilation ahead of time. shapes: of the inputs, by name. dynamic: the dimensions of every input that may vary.
    """

    name: str
    bytes: int
    load_seconds: float
    shapes: Mapping[str, tuple[int, ...]]
    run: Run
    prepare_seconds: float = 0.0
    dynamic: Sizes = field(default_factory=dict)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        named = {**dict(zip([*self.shapes, "one more"], args, strict=False)), **kwargs}
        _check_shapes(self.shapes, named, self.dynamic)
        results = self.run({name: named[name] for name in self.shapes})
        return results[0] if len(results) == 1 else tuple(results)


def available() -> dict[str, str]:
    """ "ready" for each name that `prepare` takes, or what is missing and how to install it."""
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
    """`model` in the engine `name`, on torch.get_num_threads() threads (of that moment), with the shapes of `args`.

    name: fp32, or int8 if `model` is `Calibrated.model` of `ptq.quantize`: "torch" (eager), "onnxruntime", "openvino".
        Such a quantized model only: "hexagon", the file of "onnxruntime" compiled for Qualcomm's NPU and run in its
        simulator on this CPU, but for results that are not rounded; SIMULATED, so that its times say nothing.
        With bfloat16 for what is not int8: "torch-bf16", "torch-compile-bf16", "openvino-bf16". A float model only:
        "torch-compile" and "aotinductor" (both freeze the weights), "executorch" (delegated to XNNPACK). With one step
        left out, to see what it does: "torch-channels-last" (the other layout), "torch-compile-unfrozen",
        "aotinductor-unfrozen", "onnxruntime-unoptimized" (no fusion), "executorch-portable" (no delegate). A float
        model that the engine's own tools quantize: "onnxruntime-dynamic" (needs no batches), "onnxruntime-static" (u8
        s8, per channel), "onnxruntime-s8s8" (the same with signed activations), "nncf", "nncf-bf16" and
        "nncf-accuracy-control".
    model: on the CPU; it is left as it was, but "torch" runs it and no copy.
    args: an example of what the model is called with: a tensor, tuple or dict, labels left out. Its shapes are fixed,
        but for `dynamic`: {dimension: (least, most)}, of all inputs alike, where the example has to be 2 or more.
    folder: keeps the file that is deployed there, for `load`.
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
    check_present(name, ENGINES[name].packages)
    row, dynamic = ENGINES[name], dict(dynamic or {})
    named = {key: value for key, value in batching.inputs(model, args).items() if value is not None}
    if options and row.takes not in ("tool", "data"):
        raise InputError(f"{name} takes no options, and got {', '.join(options)}: leave them out.")
    if row.takes not in ("any", "quantized") and export.is_quantized(model):
        raise InputError(f"{name} takes a float model, and this one is quantized already: give the one it came from.")
    if row.takes == "quantized" and not export.is_quantized(model):
        raise InputError(f"{name} takes a quantized model, and this one is float: give ptq.quantize(...).model.")
    if row.takes == "data" and batches is None:
        raise InputError(f"{name} takes ranges from data: give batches, some hundred inputs in all.")
    if folder is not None and row.write is _no_file:
        raise InputError(f"{name} has no file to keep: leave out folder, or take an engine that is deployed as a file.")
    if small := [d for d in dynamic for x in named.values() if isinstance(x, Tensor) and 1 in x.shape[d : d + 1]]:
        raise InputError(f"Dimension {small[0]} is to vary, and the example has 1 there: give one of 2 or more.")
    bits = max((x.weight_grid.bits for x in model.modules() if isinstance(x, FakeQuantized)), default=0)
    if bits and row.takes != "quantized" and not _multiplies(name.removesuffix("-bf16"), bits):
        raise InputError(
            f"{name} gives other products of extreme {bits}-bit codes than int64, as a CPU without VNNI does that adds "
            "pairs in int16: quantize the weights to 7 bits, whose pairs fit, or take float32."
        )
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _prepare(_Job(name, model, named, batches, Path(temporary), options, dynamic))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return _prepare(_Job(name, model, named, batches, Path(folder), options, dynamic))


def load(folder: str | Path) -> Engine:
    """The engine that `prepare` left in `folder`, in any process; it needs neither the model nor an exporter.

    InputError for a folder without one. As with any executable file, load only what you trust.
    """
    try:
        saved = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"There is no engine in {folder}: give the folder that prepare(..., folder=) wrote.") from None
    check_present(saved["name"], ENGINES[saved["name"]].packages)
    shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
    dynamic = {int(dimension): tuple(ends) for dimension, ends in saved["dynamic"].items()}
    start = time.perf_counter()
    run = ENGINES[saved["name"]].read(Path(folder) / saved["file"])
    run({name: torch.zeros(shape, dtype=getattr(torch, saved["dtypes"][name])) for name, shape in shapes.items()})
    seconds = time.perf_counter() - start
    return Engine(saved["name"], saved["bytes"], seconds, shapes, run, saved["prepare_seconds"], dynamic)


def graphs(model: nn.Module, args: Any) -> dict[str, Counter[str]]:
    """How many operators of which kind: in torch.export's graph, in the ONNX file, and in what each engine executes.

    What is in one and not in the next was folded, fused or removed. "onnxruntime": after its optimizations;
    "openvino": the kernels of the CPU, reorders of memory included. Only for engines that are here.
    """
    import onnx

    named, state = {k: v for k, v in batching.inputs(model, args).items() if v is not None}, available()
    nodes = export.program(model, named).graph.nodes
    table = {"torch.export": Counter(str(node.target) for node in nodes if node.op == "call_function")}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), batching.evaluating(model):
        source, optimized = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
        export.write_onnx(model, named, source)
        table["onnx"] = Counter(node.op_type for node in onnx.load(source).graph.node)
        if state["onnxruntime"] == "ready":
            session(source, save=optimized)
            table["onnxruntime"] = Counter(node.op_type for node in onnx.load(optimized).graph.node)
        if state["openvino"] == "ready":
            layers = request(source).get_compiled_model().get_runtime_model().get_ops()
            kinds = (str(layer.rt_info["layerType"].astype(str)) for layer in layers)
            table["openvino"] = Counter(kind for kind in kinds if kind not in ("Const", "Input", "Output"))
    return table


def _prepare(job: "_Job") -> Engine:
    tensors, row = job.tensors, ENGINES[job.name]
    with torch.no_grad(), batching.evaluating(job.model):
        start = time.perf_counter()
        source = row.write(job)
        prepared = time.perf_counter()
        run = row.read(source)
        run(tensors)
        loaded = time.perf_counter()
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if source is job:
        size = artifact.size(job.model)
    else:
        size = sum(path.stat().st_size for path in (source, source.with_suffix(".bin")) if path.exists())
        dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()}
        saved = {"name": job.name, "file": source.name, "bytes": size, "prepare_seconds": prepared - start}
        saved |= {"shapes": shapes, "dtypes": dtypes, "dynamic": job.dynamic}
        (job.folder / MANIFEST).write_text(json.dumps(saved), encoding="utf-8")
    return Engine(job.name, size, loaded - prepared, shapes, run, prepared - start, job.dynamic)


class _Job(NamedTuple):
    name: str
    model: nn.Module
    named: dict[str, Any]  # the model's arguments
    batches: Iterable | None
    folder: Path
    options: dict[str, Any]
    dynamic: Sizes

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the arguments that are tensors."""
        return {name: value for name, value in self.named.items() if isinstance(value, Tensor)}

    def pieces(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of the batches, cut to the shapes of the example."""
        shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        size = next(iter(shapes.values()))[0]
        for batch in batching.not_empty(batching.check_batches(self.batches, "calibration")):
            tensors = batching.inputs(self.model, batch)
            rows = zip(*(tensors[name].split(size) for name in shapes), strict=True)
            for row in rows:
                piece = dict(zip(shapes, row, strict=True))
                if len(row[0]) == size:
                    _check_shapes(shapes, piece)
                    yield piece


# --- torch: the model is run where it is, and nothing is written ------------------------------------------------------


def _no_file(job: _Job) -> _Job:
    return job


def _torch(job: _Job, dtype: torch.dtype | None = None, channels_last: bool = False) -> Run:
    model = job.model if dtype is None and not channels_last else copy.deepcopy(job.model)
    if dtype is not None:
        model = model.to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return _eager(model, job, dtype, channels_last)


def _compile(job: _Job, dtype: torch.dtype | None = None, freezing: bool = True) -> Run:
    model = copy.deepcopy(job.model).eval()
    model = model if dtype is None else model.to(dtype)
    options = {"freezing": freezing}
    # Else a batch of another size would be compiled for all sizes. fullgraph: no part of it stays eager unnoticed.
    return _eager(torch.compile(model, dynamic=bool(job.dynamic), fullgraph=True, options=options), job, dtype)


def _eager(model: Callable, job: _Job, dtype: torch.dtype | None, channels_last: bool = False) -> Run:
    constants = {key: value for key, value in job.named.items() if not isinstance(value, Tensor)}

    @torch.inference_mode()
    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        if dtype is not None:
            named = {key: x.to(dtype) if x.is_floating_point() else x for key, x in named.items()}
        if channels_last:
            layout = torch.channels_last
            named = {key: x.contiguous(memory_format=layout) if x.dim() == 4 else x for key, x in named.items()}
        with batching.evaluating(model) if model.training else contextlib.nullcontext():
            results = outputs(model(**named, **constants))
        return results if dtype is None else [x.float() if x.dtype is dtype else x for x in results]

    return run


# --- engines: each writes the file that is deployed, and reads it -----------------------------------------------------


def _write_aotinductor(job: _Job, freezing: bool = True) -> Path:
    program, path = export.program(job.model, job.named, job.dynamic), job.folder / "model.pt2"
    with export.quietly():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"freezing": freezing}
        )
    return path


def _read_aotinductor(path: Path) -> Run:
    with export.quietly():
        package = torch._inductor.aoti_load_package(str(path))

    @torch.inference_mode()
    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        return outputs(package(*named.values()))

    return run


def _write_executorch(job: _Job, delegate: bool = True) -> Path:
    with export.quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = export.program(job.model, job.named, job.dynamic)
        partitioner = [XnnpackPartitioner()] if delegate else None
        lowered = to_edge_transform_and_lower(program, partitioner=partitioner).to_executorch()
    path = job.folder / "model.pte"
    path.write_bytes(lowered.buffer)
    return path


def _read_executorch(path: Path) -> Run:
    with export.quietly(), _without_native_log():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as ExecuTorch

        if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():  # one pool for the process
            portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
        program = ExecuTorch.get().load_program(path.read_bytes())
        method = program.load_method("forward")

    def run(named: Mapping[str, Tensor], program: Any = program) -> list[Tensor]:  # the method reads from it
        return [x.clone() for x in method.execute([x.detach().contiguous() for x in named.values()])]

    return run


@contextlib.contextmanager
def _without_native_log() -> Iterator[None]:
    """Without what C++ writes to the process's streams: which files of the system it looked into."""
    sys.stdout.flush()
    shown = [os.dup(stream) for stream in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
        try:
            yield
        finally:
            for stream, copy_ in zip((1, 2), shown, strict=True):
                os.dup2(copy_, stream)
                os.close(copy_)


def _write_onnx(job: _Job, quantize: Callable[[_Job, Path, Path], None] | None = None) -> Path:
    source = path = job.folder / "model.onnx"
    export.write_onnx(job.model, job.named, path, batches=job.batches or [job.named], dynamic=job.dynamic)
    if quantize is not None:
        path = job.folder / "quantized.onnx"
        with export.quietly():
            quantize(job, source, path)
    return path


def session(source: Path | bytes, *, optimized: bool = True, save: Path | None = None) -> Any:
    """An InferenceSession of ONNX Runtime on an ONNX file, on torch's threads; save: writes the graph that it runs."""
    import onnxruntime

    settings = _session_options()
    if not optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        settings.optimized_model_filepath = str(save)
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def _session_options() -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    # Workers of a session that waits would spin and take the cores from the session that is timed next.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # errors
    return settings


def _hexagon(source: Path, *, save: Path | None = None) -> Any:
    """A session on Qualcomm's simulator of its NPU (architecture v75), the rest on the CPU; save: writes its binary."""
    import onnxruntime
    import onnxruntime_qnn

    settings = _session_options()
    if save is not None:
        entries = {"enable": "1", "file_path": str(save), "embed_mode": "1"}
        for key, value in entries.items():
            settings.add_session_config_entry(f"ep.context_{key}", value)
    provider = onnxruntime_qnn.get_ep_name()
    with _without_native_log():
        if provider not in {device.ep_name for device in onnxruntime.get_ep_devices()}:
            onnxruntime.register_execution_provider_library(provider, onnxruntime_qnn.get_library_path())
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
        options = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "htp_arch": "75"}
        settings.add_provider_for_devices(devices[:1], options)
        return onnxruntime.InferenceSession(source, settings)


def _write_hexagon(job: _Job) -> Path:
    path = job.folder / "hexagon.onnx"
    _hexagon(_write_onnx(job), save=path)
    if not path.exists():
        raise InputError("The NPU takes none of this model's layers, as no result is rounded: give a longer one.")
    return path


def _read_onnx(path: Path, make: Callable[[Path], Any] = session) -> Run:
    runtime = make(path)
    names = [x.name for x in runtime.get_inputs()]

    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        results = runtime.run(None, {name: named[name].detach().contiguous().numpy() for name in names})
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


def _write_openvino(job: _Job, quantize: Callable[[_Job, Any], Any] | None = None) -> Path:
    import openvino

    source = job.folder / "model.onnx"
    export.write_onnx(job.model, job.named, source, dynamic=job.dynamic)
    model = openvino.Core().read_model(source)
    if quantize is not None:
        with export.quietly():
            model = quantize(job, model)
    path = job.folder / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def request(model: Any, precision: str = "f32", **settings: Any) -> Any:
    """An InferRequest of OpenVINO for a model or its file, on torch's threads; settings: further ones of the CPU."""
    import openvino

    settings = cpu_settings() | {"INFERENCE_PRECISION_HINT": precision} | settings  # else bfloat16 where the CPU has it
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def cpu_settings() -> dict[str, Any]:
    """Of OpenVINO: as many threads as torch has now, placed by the operating system as the other engines' are."""
    return {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}


def _read_openvino(path: Path, precision: str = "f32") -> Run:
    return _requests(request(path, precision))


def _requests(request: Any) -> Run:
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
    shapes = {name: tuple(value.shape) for name, value in job.tensors.items()}

    def score(compiled: Any, batches: Iterable) -> tuple[float, None]:
        return validate(Engine("nncf", 0, 0.0, shapes, _requests(compiled.create_infer_request())), batches), None

    return nncf.quantize_with_accuracy_control(model, data, nncf.Dataset(validation), score, **options)


class Runtime(NamedTuple):
    """write(job) -> the file that is deployed, or the job itself where there is none; read(that) -> run.

    packages: what it imports ("g++": a compiler that it starts).
    takes: "any" model, float or quantized; a "float" or a "quantized" one; one that its own "tool" quantizes; a
        tool that needs "data".
    """

    packages: tuple[str, ...]
    takes: str
    write: Callable[[_Job], Any]
    read: Callable[[Any], Run]


_ORT, _OV = ("onnx", "onnxscript", "onnxruntime"), ("onnx", "onnxscript", "openvino")
_NNCF, _EDGE = (*_OV, "nncf"), ("executorch", "torchao")
_BF16 = {"dtype": torch.bfloat16}
_read_unoptimized = partial(_read_onnx, make=lambda path: session(path, optimized=False))
_quantize = partial(_write_openvino, quantize=_nncf)
_openvino_bf16 = partial(_read_openvino, precision="bf16")
ENGINES = {
    "torch": Runtime((), "any", _no_file, _torch),
    "torch-bf16": Runtime((), "float", _no_file, partial(_torch, **_BF16)),
    "torch-channels-last": Runtime((), "float", _no_file, partial(_torch, channels_last=True)),
    "torch-compile": Runtime(("g++",), "float", _no_file, _compile),
    "torch-compile-bf16": Runtime(("g++",), "float", _no_file, partial(_compile, **_BF16)),
    "torch-compile-unfrozen": Runtime(("g++",), "float", _no_file, partial(_compile, freezing=False)),
    "aotinductor": Runtime(("g++",), "float", _write_aotinductor, _read_aotinductor),
    "aotinductor-unfrozen": Runtime(("g++",), "float", partial(_write_aotinductor, freezing=False), _read_aotinductor),
    "executorch": Runtime(_EDGE, "float", _write_executorch, _read_executorch),
    "executorch-portable": Runtime(_EDGE, "float", partial(_write_executorch, delegate=False), _read_executorch),
    "onnxruntime": Runtime(_ORT, "any", _write_onnx, _read_onnx),
    "onnxruntime-unoptimized": Runtime(_ORT, "float", _write_onnx, _read_unoptimized),
    "onnxruntime-dynamic": Runtime(_ORT, "tool", partial(_write_onnx, quantize=_dynamic), _read_onnx),
    "onnxruntime-static": Runtime(
        _ORT, "data", partial(_write_onnx, quantize=partial(_static, signed=False)), _read_onnx
    ),
    "onnxruntime-s8s8": Runtime(_ORT, "data", partial(_write_onnx, quantize=partial(_static, signed=True)), _read_onnx),
    "hexagon": Runtime((*_ORT, "onnxruntime_qnn"), "quantized", _write_hexagon, partial(_read_onnx, make=_hexagon)),
    "openvino": Runtime(_OV, "any", _write_openvino, _read_openvino),
    "openvino-bf16": Runtime(_OV, "any", _write_openvino, _openvino_bf16),
    "nncf": Runtime(_NNCF, "data", _quantize, _read_openvino),
    "nncf-bf16": Runtime(_NNCF, "data", _quantize, _openvino_bf16),
    "nncf-accuracy-control": Runtime(
        _NNCF, "data", partial(_write_openvino, quantize=partial(_nncf, control=True)), _read_openvino
    ),
}


def missing(name: str, packages: Sequence[str]) -> str:
    """Which of the packages are not here, in a sentence with what installs the first; "" where all are.

    "g++" is of no use either where the path of torch has a space or a quote: torch's call of the compiler does not
    escape them.
    """
    lacking = [package for package in packages if not _present(package)]
    if lacking:
        verb, how = "is" if len(lacking) == 1 else "are", INSTALL.get(lacking[0], set_up_with("engines"))
        return f"{name} needs {' and '.join(lacking)}, which {verb} not installed: {how}."
    if "g++" in packages and any(character in torch.__file__ for character in " '\""):
        return (
            f"{name} cannot compile against {torch.__file__}: set the course up where no folder's name has a space or "
            "a quote."
        )
    return ""


def check_present(name: str, packages: Sequence[str]) -> None:
    """InputError unless all packages are installed."""
    if sentence := missing(name, packages):
        raise InputError(sentence)


def _present(package: str) -> bool:
    if package == "g++":
        return shutil.which(os.environ.get("CXX", package).split()[0]) is not None
    return importlib.util.find_spec(package) is not None


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
    fake = FakeQuantized(layer, weight, Grid(unit, zero, 8, 0, 255))
    with tempfile.TemporaryDirectory() as folder:
        engine = _prepare(_Job(name, fake, {"input": x}, None, Path(folder), {}, {}))
    return torch.equal(engine(x).double(), x.double() @ codes.double().t())


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], dynamic: Sizes | None = None
) -> None:
    inputs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first, ends = next(iter(inputs.values()), ()), dynamic or {}
    sizes = {d: first[d] for d, (least, most) in ends.items() if d < len(first) and least <= first[d] <= most}
    if inputs != {name: tuple(sizes.get(d, n) for d, n in enumerate(shape)) for name, shape in shapes.items()}:
        ranges = {d: f"{least} to {most}" for d, (least, most) in ends.items()}
        expected = {name: [ranges.get(d, str(n)) for d, n in enumerate(shape)] for name, shape in shapes.items()}
        listed = [
            ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in of.items()) or "nothing"
            for of in (expected, inputs)
        ]
        raise InputError(
            f"The engine is for {listed[0]} and got {listed[1]}: give tensors of these shapes, or prepare it for "
            "others."
        )
