"""2:4 weights on the GPU kernels that multiply them: which shapes torch's two backends take, and what would run here.

`torch.sparse.to_sparse_semi_structured` (cuSPARSELt or CUTLASS, NVIDIA Ampere and later). Nothing is simulated: on a
machine without such a GPU `available` says so. `sparse.convert(model, format="2:4")` puts a whole model on them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from labkit.arguments import check_module
from labkit.errors import InputError, check_choice
from labkit.pruning.pattern import is_nm

BACKENDS = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}


class Candidate(NamedTuple):
    """A Linear of a model: its weight's name, and why no 2:4 kernel takes it ("" where one does)."""

    name: str
    refusal: str


def backend_in_use() -> str:
    """The backend that torch converts to: "cusparselt" unless torch was told to force CUTLASS."""
    return "cutlass" if SparseSemiStructuredTensor._FORCE_CUTLASS else "cusparselt"


def shapes(backend: str) -> dict[torch.dtype, tuple[int, int]]:
    """{dtype: (rows, columns)} that a weight's shape has to be a multiple of, as the installed torch has them."""
    check_choice(backend, BACKENDS, "backend")
    rules = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS
    return {dtype: (rule.sparse_min_rows, rule.sparse_min_cols) for dtype, rule in rules.items()}


def refusal(weight: Tensor, *, dtype: torch.dtype | None = None, backend: str | None = None) -> str:
    """Why torch's 2:4 kernels do not take `weight`, in one sentence that says what would help; "" if they do.

    dtype: what it would be converted to, its own by default. backend: "cusparselt", "cutlass", or the one that torch
    uses here. Looks at dimensions, dtype, shape and pattern, not at the device: `available` does.
    """
    if not isinstance(weight, Tensor):
        raise InputError(f"weight is a {type(weight).__name__}, but it must be a torch.Tensor.")
    backend = backend_in_use() if backend is None else backend
    rules, dtype = shapes(backend), weight.dtype if dtype is None else dtype
    if weight.dim() != 2:
        return f"The weight has {weight.dim()} dimensions, but the kernels multiply matrices only: keep it dense."
    if dtype not in rules:
        return f"{backend} multiplies no 2:4 weights of {dtype}: convert to {', '.join(map(str, rules))}."
    (rows, columns), (out, width) = rules[dtype], weight.shape
    if not out or not width or out % rows or width % columns:
        return (
            f"The weight is {out} x {width}, but for {dtype} {backend} takes multiples of {rows} x {columns}: choose "
            "such a width, or keep it dense."
        )
    if not is_nm(weight, 2, 4):
        return "The weight has more than two nonzeros in a group of four: prune it with nm.prune(model, 2, 4)."
    return ""


def available() -> str:
    """ "" on a machine whose GPU multiplies 2:4 weights, else the reason in one sentence."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, and its 2:4 kernels run on NVIDIA GPUs, from Ampere on."
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (
            f"{torch.cuda.get_device_name()} has compute capability {'.'.join(map(str, capability))}, and 2:4 tensor "
            "cores came with 8.0 (Ampere)."
        )
    if backend_in_use() == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "This build of torch comes without cuSPARSELt: install one with it, or force CUTLASS."
    return ""


def plan(model: nn.Module, *, dtype: torch.dtype = torch.float16, backend: str | None = None) -> list[Candidate]:
    """What would run on 2:4 kernels: a row for every nn.Linear; needs no GPU."""
    check_module(model)
    return [
        Candidate(f"{name}.weight".lstrip("."), refusal(linear.weight, dtype=dtype, backend=backend))
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear)
    ]


def convert(weight: Tensor) -> Tensor:
    """`weight` [out, in] as torch's semi-structured tensor; InputError with the reason of `refusal` or `available`.

    F.linear takes it in the place of a weight; of int8, torch.mm(weight, x) does.
    """
    if reason := refusal(weight) or available():
        raise InputError(reason)
    return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
