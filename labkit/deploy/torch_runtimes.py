"""Runtimes of torch: eager, torch.compile, and with a file AOTInductor and ExecuTorch."""

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.deploy import export
from labkit.deploy.job import EngineJob, Run, Runtime, no_file
from labkit.modules import batches as batching
from labkit.modules.returned import outputs

# --- in memory: nothing is written ------------------------------------------------------------------------------------


def _eager(job: EngineJob, dtype: torch.dtype | None = None, channels_last: bool = False) -> Run:
    """Run the model in eager torch; with a dtype or `channels_last`, a copy of the model."""
    model = job.model
    if dtype is not None or channels_last:
        model = copy.deepcopy(model)
    if dtype is not None:
        model = model.to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return _calling(model, job, dtype, channels_last)


def _compiled(job: EngineJob, dtype: torch.dtype | None = None, freezing: bool = True) -> Run:
    """Compile a copy of the model; `freezing` makes the weights constants."""
    model = copy.deepcopy(job.model).eval()
    if dtype is not None:
        model = model.to(dtype)
    compiled = torch.compile(
        model,
        dynamic=bool(job.dynamic),  # else a batch of another size would be compiled for all sizes
        fullgraph=True,  # no part of the model stays eager unnoticed
        options={"freezing": freezing},
    )
    return _calling(compiled, job, dtype)


def _calling(model: Callable, job: EngineJob, dtype: torch.dtype | None, channels_last: bool = False) -> Run:
    """Return a call of `model` with inputs converted to `dtype` and results converted back to float32."""
    constants = {name: value for name, value in job.named.items() if not isinstance(value, Tensor)}

    @torch.inference_mode()
    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        if dtype is not None:
            named = {name: x.to(dtype) if x.is_floating_point() else x for name, x in named.items()}
        if channels_last:
            named = {name: _in_channels_last(x) for name, x in named.items()}
        with batching.evaluating(model) if model.training else contextlib.nullcontext():
            results = outputs(model(**named, **constants))
        if dtype is None:
            return results
        return [x.float() if x.dtype is dtype else x for x in results]

    return run


def _in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


# --- AOTInductor ------------------------------------------------------------------------------------------------------


def _write_aotinductor(job: EngineJob, freezing: bool = True) -> Path:
    program = export.program(job.model, job.named, job.dynamic)
    path = job.folder / "model.pt2"
    settings = {"freezing": freezing}
    with export.silenced():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    return path


def _read_aotinductor(path: Path) -> Run:
    with export.silenced():
        package = torch._inductor.aoti_load_package(str(path))

    @torch.inference_mode()
    def run(named: Mapping[str, Tensor]) -> list[Tensor]:
        return outputs(package(*named.values()))

    return run


# --- ExecuTorch -------------------------------------------------------------------------------------------------------


def _write_executorch(job: EngineJob, delegate: bool = True) -> Path:
    """Lower the model; `delegate` hands the operators to XNNPACK instead of portable kernels."""
    with export.silenced():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = export.program(job.model, job.named, job.dynamic)
        partitioner = [XnnpackPartitioner()] if delegate else None
        edge = to_edge_transform_and_lower(program, partitioner=partitioner)
        lowered = edge.to_executorch()
    path = job.folder / "model.pte"
    path.write_bytes(lowered.buffer)
    return path


def _read_executorch(path: Path) -> Run:
    with export.silenced(), _without_native_log():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as ExecuTorch

        threads = torch.get_num_threads()
        if portable_lib._threadpool_get_thread_count() != threads:  # one pool for the process
            portable_lib._unsafe_reset_threadpool(threads)
        program = ExecuTorch.get().load_program(path.read_bytes())
        method = program.load_method("forward")

    def run(named: Mapping[str, Tensor], program: Any = program) -> list[Tensor]:  # the method reads from the program
        inputs = [x.detach().contiguous() for x in named.values()]
        return [x.clone() for x in method.execute(inputs)]

    return run


@contextlib.contextmanager
def _without_native_log() -> Iterator[None]:
    """Silence the log of C++ code on the process's streams, for example names of system files."""
    streams = (1, 2)  # stdout and stderr
    sys.stdout.flush()
    originals = [os.dup(stream) for stream in streams]
    with open(os.devnull, "w") as nowhere:
        for stream in streams:
            os.dup2(nowhere.fileno(), stream)
        try:
            yield
        finally:
            for stream, original in zip(streams, originals, strict=True):
                os.dup2(original, stream)
                os.close(original)


# --- the table --------------------------------------------------------------------------------------------------------

_COMPILER = ("g++",)
_EDGE = ("executorch", "torchao")
_eager_bf16 = partial(_eager, dtype=torch.bfloat16)
_eager_channels_last = partial(_eager, channels_last=True)
_compiled_bf16 = partial(_compiled, dtype=torch.bfloat16)
_compiled_unfrozen = partial(_compiled, freezing=False)
_write_unfrozen = partial(_write_aotinductor, freezing=False)
_write_portable = partial(_write_executorch, delegate=False)
RUNTIMES = {
    "torch": Runtime((), "any", no_file, _eager),
    "torch-bf16": Runtime((), "float", no_file, _eager_bf16),
    "torch-channels-last": Runtime((), "float", no_file, _eager_channels_last),
    "torch-compile": Runtime(_COMPILER, "float", no_file, _compiled),
    "torch-compile-bf16": Runtime(_COMPILER, "float", no_file, _compiled_bf16),
    "torch-compile-unfrozen": Runtime(_COMPILER, "float", no_file, _compiled_unfrozen),
    "aotinductor": Runtime(_COMPILER, "float", _write_aotinductor, _read_aotinductor),
    "aotinductor-unfrozen": Runtime(_COMPILER, "float", _write_unfrozen, _read_aotinductor),
    "executorch": Runtime(_EDGE, "float", _write_executorch, _read_executorch),
    "executorch-portable": Runtime(_EDGE, "float", _write_portable, _read_executorch),
}
