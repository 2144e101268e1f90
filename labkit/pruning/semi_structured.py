"""2:4 weights on the GPU kernels that multiply them: which shapes torch's two backends take, and what would run here.

`torch.sparse.to_sparse_semi_structured` (cuSPARSELt or CUTLASS, NVIDIA Ampere and later). Nothing is simulated: on a
machine without such a GPU `refusal` says so. `sparse.convert(model, format="2:4")` puts whole models on these kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

# (rows, columns) that a weight's shape must be a multiple of: torch/sparse/semi_structured.py
SHAPES: dict[str, dict[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {
        torch.float16: (16, 16),
        torch.bfloat16: (16, 16),
        torch.int8: (32, 32),
        torch.float8_e4m3fn: (32, 32),
    },
    "cutlass": {
        torch.float16: (32, 64),
        torch.bfloat16: (32, 64),
        torch.int8: (16, 128),
        torch.float32: (32, 32),
    },
}


class Row(NamedTuple):
    """A Linear of a model: its weight's name and shape, and why no 2:4 kernel takes it ("" where one does)."""

    name: str
    shape: tuple[int, ...]
    refusal: str


def refusal(weight: Tensor, *, dtype: torch.dtype | None = None, backend: str | None = None) -> str:
    """Why torch's 2:4 kernels do not take `weight`, in one sentence that says what would help; "" if they do.

    dtype: what it would be converted to, its own by default. backend: "cusparselt", "cutlass", or the one that torch
    uses here. Looks at dimensions, dtype, shape and pattern, not at the device: `available` does.
    """
    raise NotImplementedError


def available() -> str:
    """ "" on a machine whose GPU multiplies 2:4 weights, else the reason in one sentence."""
    raise NotImplementedError


def plan(model: nn.Module, *, dtype: torch.dtype = torch.float16, backend: str | None = None) -> list[Row]:
    """What would run on 2:4 kernels: a row for every nn.Linear; needs no GPU."""
    raise NotImplementedError


def convert(weight: Tensor) -> Tensor:
    """`weight` [out, in] as torch's semi-structured tensor; InputError with the reason of `refusal` or `available`."""
    raise NotImplementedError
