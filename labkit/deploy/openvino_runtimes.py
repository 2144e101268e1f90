"""OpenVINO on the CPU: a model as it was exported, or quantized by NNCF."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from labkit.deploy import export
from labkit.deploy.job import EngineJob, Run, Runtime


def request(model: Any, precision: str = "f32", **settings: Any) -> Any:
    """Return an openvino.InferRequest on the CPU, with torch's number of threads.

    model: an openvino.Model, or the path of a file.
    precision: type of floating-point arithmetic, "f32" or "bf16".
    settings: further properties of OpenVINO's CPU device.
    """
    import openvino

    properties = cpu_settings()
    properties["INFERENCE_PRECISION_HINT"] = precision  # else bfloat16 where the CPU has it
    compiled = openvino.Core().compile_model(model, "CPU", properties | settings)
    return compiled.create_infer_request()


def cpu_settings() -> dict[str, Any]:
    """Return properties for OpenVINO's CPU device: torch's number of threads, placed by the operating system."""
    return {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}


def _read(path: Path, precision: str = "f32") -> Run:
    infer_request = request(path, precision)

    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: x.detach().contiguous().numpy() for name, x in named.items()}
        results = infer_request.infer(arrays, share_inputs=True)  # results are copies, which the next call leaves
        return [torch.from_numpy(results[place]) for place in range(len(results))]

    return run


def _write(job: EngineJob, quantize: Callable[[EngineJob, Any], Any] | None = None) -> Path:
    """Write the model as OpenVINO's .xml and .bin; quantize(job, model) -> the openvino.Model to deploy."""
    import openvino

    source = job.folder / "model.onnx"
    export.write_onnx(job.model, job.named, source, dynamic=job.dynamic)
    model = openvino.Core().read_model(source)
    if quantize is not None:
        with export.silenced():
            model = quantize(job, model)
    path = job.folder / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def _quantize(job: EngineJob, model: Any) -> Any:
    """Quantize an openvino.Model with NNCF on the job's batches."""
    with patch.dict(os.environ, CI="true"):  # else it reports its use over the network
        import nncf

    options = dict(job.options)
    if "preset" in options:
        options["preset"] = nncf.QuantizationPreset(options["preset"])
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])
    data = nncf.Dataset(list(job.pieces()))
    return nncf.quantize(model, data, **options)


_PACKAGES = ("onnx", "onnxscript", "openvino")
_WITH_NNCF = (*_PACKAGES, "nncf")
_read_bf16 = partial(_read, precision="bf16")
_write_quantized = partial(_write, quantize=_quantize)
RUNTIMES = {
    "openvino": Runtime(_PACKAGES, "any", _write, _read),
    "openvino-bf16": Runtime(_PACKAGES, "any", _write, _read_bf16),
    "nncf": Runtime(_WITH_NNCF, "data", _write_quantized, _read),
    "nncf-bf16": Runtime(_WITH_NNCF, "data", _write_quantized, _read_bf16),
}
