"""Kernels in Triton for a GPU, short enough to be read whole.

int4_product.py: four-bit weights times a few rows of activations
online_softmax.py: attention of a block of queries, key block after key block

A kernel's module needs Triton, and is imported where it is used. On a machine without a GPU Triton's interpreter runs
the same source on the CPU (TRITON_INTERPRET=1 before Python starts): slowly, to check the arithmetic.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

MISSING = "Triton is not installed here: torch's CUDA build for Linux brings it, or install the extra gpu."


def unavailable() -> str:
    """Return why no Triton kernel runs on this machine, in a sentence; "" if kernels do."""
    if importlib.util.find_spec("triton") is None:
        return MISSING
    if is_interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, and Triton compiles for GPUs: TRITON_INTERPRET=1 runs its interpreter."
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of the driver's library, or of the C compiler that builds Triton's part
        return f"Triton cannot reach the GPU's driver ({type(error).__name__}): look at `nvidia-smi`."
    return ""


def is_interpreted() -> bool:
    """Return True if Triton runs its interpreter in place of a GPU."""
    from triton import knobs

    return knobs.runtime.interpret


def source(name: str) -> str:
    """Return the source of a kernel's module, "int4_product" or "online_softmax"; Triton need not be installed."""
    return Path(__file__).with_name(f"{name}.py").read_text("utf-8")


def operand(dtype: torch.dtype) -> Any:
    """Return Triton's type for the factors of a product of `dtype`; float32 in the interpreter, which has no bfloat16.

    The cast to float32 changes no number, and products are added in float32 either way.
    """
    import triton.language as tl

    if is_interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
