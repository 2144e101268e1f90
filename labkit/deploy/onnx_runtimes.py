"""ONNX Runtime on the CPU: a model as it was exported, or quantized by ONNX Runtime's own tools."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from labkit.deploy import export
from labkit.deploy.job import EngineJob, Run, Runtime

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it keeps a device id in the user's cache


def session(source: Path | bytes, *, optimized: bool = True, save: Path | None = None) -> Any:
    """Return an onnxruntime.InferenceSession on the CPU, with torch's number of threads.

    source: an ONNX file, or its bytes.
    optimized: False switches all optimizations of the graph off.
    save: file to write the optimized graph to.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    # Workers of a session that waits would spin and take the cores from the session that is timed next.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # errors
    if not optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        settings.optimized_model_filepath = str(save)
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def _read(path: Path, optimized: bool = True) -> Run:
    runtime = session(path, optimized=optimized)
    names = [x.name for x in runtime.get_inputs()]

    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: named[name].detach().contiguous().numpy() for name in names}
        results = runtime.run(None, arrays)
        return [torch.from_numpy(x) for x in results]

    return run


def _write(job: EngineJob, quantize: Callable[[EngineJob, Path, Path], None] | None = None) -> Path:
    """Write the model as an ONNX file; quantize(job, source, target) writes a second file to deploy instead."""
    source = job.folder / "model.onnx"
    batches = job.batches or [job.named]
    export.write_onnx(job.model, job.named, source, batches=batches, dynamic=job.dynamic)
    if quantize is None:
        return source
    target = job.folder / "quantized.onnx"
    with export.silenced():
        quantize(job, source, target)
    return target


def _quantize_dynamic(job: EngineJob, source: Path, target: Path) -> None:
    """Quantize weights per channel; the ranges of activations are found at each call."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, **job.options)


def _quantize_static(job: EngineJob, source: Path, target: Path, *, signed: bool) -> None:
    """Quantize weights per channel, and activations, signed or not, to ranges seen in the job's batches."""
    from onnxruntime.quantization import QuantType, quantize_static

    reader = SimpleNamespace(get_next=partial(next, job.pieces(), None))
    settings = {
        "per_channel": True,
        "activation_type": QuantType.QInt8 if signed else QuantType.QUInt8,
    }
    quantize_static(source, target, reader, **(settings | job.options))


_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_read_unoptimized = partial(_read, optimized=False)
_write_dynamic = partial(_write, quantize=_quantize_dynamic)
_write_static = partial(_write, quantize=partial(_quantize_static, signed=False))
_write_s8s8 = partial(_write, quantize=partial(_quantize_static, signed=True))
RUNTIMES = {
    "onnxruntime": Runtime(_PACKAGES, "any", _write, _read),
    "onnxruntime-unoptimized": Runtime(_PACKAGES, "float", _write, _read_unoptimized),
    "onnxruntime-dynamic": Runtime(_PACKAGES, "tool", _write_dynamic, _read),
    "onnxruntime-static": Runtime(_PACKAGES, "data", _write_static, _read),
    "onnxruntime-s8s8": Runtime(_PACKAGES, "data", _write_s8s8, _read),
}
