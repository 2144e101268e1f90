"""Kernels in Triton for a GPU, short enough to be read whole.

int4_product.py: four-bit weights times a few rows of activations
online_softmax.py: attention of a block of queries, key block after key block

A kernel's module needs Triton, and is imported where it is used. On a machine without a GPU Triton's interpreter runs
the same source on the CPU (TRITON_INTERPRET=1 before Python starts): slowly, to check the arithmetic.

>>> from labkit import triton_kernels
>>> print(triton_kernels.source("attend"))
@triton.jit
def attend(
...
"""

import ast
import re
from pathlib import Path
from typing import Any

import torch

KERNELS = {"int4_product": "int4_product", "attend": "online_softmax"}  # a kernel, and its module
NOT_FOR_READERS = re.compile(r"  # (fmt|noqa): .*")
MISSING = "Triton is not installed here: torch's CUDA build for Linux brings it, or install the extra gpu."


def is_interpreted() -> bool:
    """Return True if Triton runs its interpreter in place of a GPU."""
    from triton import knobs

    return knobs.runtime.interpret


def source(kernel: str) -> str:
    """Return the source of a kernel, one of KERNELS; Triton need not be installed."""
    module = Path(__file__).with_name(f"{KERNELS[kernel]}.py").read_text("utf-8")
    (function,) = [node for node in ast.parse(module).body if getattr(node, "name", "") == kernel]
    first = function.decorator_list[0].lineno - 1
    lines = module.splitlines()[first : function.end_lineno]
    return "\n".join(NOT_FOR_READERS.sub("", line) for line in lines)


def operand(dtype: torch.dtype) -> Any:
    """Return Triton's type for the factors of a product of `dtype`; float32 in the interpreter, which has no bfloat16.

    The cast to float32 changes no number, and products are added in float32 either way.
    """
    import triton.language as tl

    if is_interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
