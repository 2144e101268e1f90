"""The Triton kernels: equal to their references in the interpreter and on a GPU, and compiled for GPUs not here."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import check_refusal

from labkit import triton_kernels
from labkit.files import ROOT
from labkit.triton_kernels import KERNELS

CLAIMS = Path(__file__).with_name("claims_of_triton.py")
MODULES = ("labkit.triton_kernels.int4_product", "labkit.triton_kernels.online_softmax")
NEEDS_TRITON = "needs Triton, which comes with torch's CUDA build for Linux"


@pytest.mark.parametrize("name", MODULES)
def test_without_triton_a_kernel_is_refused_in_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    check_refusal("Triton is not installed", lambda: importlib.import_module(name))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_has_60_lines_at_most_and_can_be_read_without_triton(kernel: str):
    lines = triton_kernels.source(kernel).splitlines()
    assert lines[:2] == ["@triton.jit", f"def {kernel}("] and len(lines) <= 61
    assert "fmt:" not in triton_kernels.source(kernel) and "noqa" not in triton_kernels.source(kernel)


def run_the_claims(**settings: str) -> None:
    """In a process of their own: Triton decides when it is imported whether to interpret."""
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CLAIMS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths} | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_in_triton_s_interpreter_the_kernels_equal_their_references():
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    run_the_claims(TRITON_INTERPRET="1")


@pytest.mark.gpu(pretended=False)
@pytest.mark.slow
def test_on_a_gpu_the_kernels_equal_their_references():
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    run_the_claims(TRITON_INTERPRET="0")


ADDRESSES = {
    "int4_product": {"x": "", "codes": "u8", "scales": "fp16", "zeros": "u8", "y": ""},
    "attend": dict.fromkeys("qkv", "") | {"out": ""},
}
SIZES = {
    "int4_product": {"GROUP": 64, "BLOCK": 64, "ROWS": 16, "OUTPUTS": 16},
    "attend": {"CAUSAL": True, "QUERIES": 64, "KEYS": 64, "WIDTH": 64},
}
NUMBERS = {"rows": "i32", "inputs": "i32", "outputs": "i32"} | {"queries": "i32", "keys": "i32", "width": "i32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "mma")])  # wgmma, of several warps
def test_a_kernel_compiles_for_tensor_cores_without_a_gpu(name: str, capability: int, instruction: str):
    triton = pytest.importorskip("triton", reason=NEEDS_TRITON)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"labkit.triton_kernels.{KERNELS[name]}")
    kernel = getattr(module, name)
    constants = SIZES[name] | {"OPERAND": triton_kernels.operand(torch.bfloat16)}
    types = NUMBERS | {"factor": "fp32"} | dict.fromkeys(constants, "constexpr")
    types |= {address: f"*{dtype or 'bf16'}" for address, dtype in ADDRESSES[name].items()}
    signature = {argument: types[argument] for argument in kernel.arg_names}
    positions = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    program = ASTSource(fn=kernel, signature=signature, constexprs=positions)
    compiled = triton.compile(program, target=GPUTarget("cuda", capability, 32))
    assert instruction in compiled.asm["ptx"] and compiled.asm["cubin"]
