"""2:4 weights on the GPU: the shapes that torch's two backends take, and the layers of a model that could run.

`torch.sparse.to_sparse_semi_structured` calls the kernels (cuSPARSELt or CUTLASS, NVIDIA Ampere and later). Nothing is
simulated: on a machine without a suitable GPU `available` gives the reason. `sparse.convert(model, format="2:4")`
converts a whole model.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from labkit.arguments import check_module
from labkit.errors import InputError, check_choice
from labkit.modules.weights import qualified
from labkit.pruning.pattern import is_nm

BACKENDS = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}


class Candidate(NamedTuple):
    """A Linear of a model: the name of its weight, and its `refusal`, "" if a 2:4 kernel takes it."""

    name: str
    refusal: str


def backend_in_use() -> str:
    """Return the backend that torch converts to: "cusparselt" unless torch was told to force CUTLASS."""
    return "cutlass" if SparseSemiStructuredTensor._FORCE_CUTLASS else "cusparselt"


def shapes(backend: str) -> dict[torch.dtype, tuple[int, int]]:
    """Return {dtype: (rows, columns)}: the shape of a weight has to be a multiple, in the installed torch.

    backend: "cusparselt" or "cutlass".
    """
    check_choice(backend, BACKENDS, "backend")
    rules = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS
    return {dtype: (rule.sparse_min_rows, rule.sparse_min_cols) for dtype, rule in rules.items()}


def refusal(weight: Tensor, *, dtype: torch.dtype | None = None, backend: str | None = None) -> str:
    """Return why torch's 2:4 kernels do not take `weight`, with a remedy, in a sentence; "" if the kernels do.

    weight: a tensor on any device.
    dtype: type to convert to, the weight's own by default.
    backend: "cusparselt" or "cutlass", torch's choice (`backend_in_use`) by default.
    Looks at dimensions, dtype, shape and pattern; `available` looks at the device.
    """
    if not isinstance(weight, Tensor):
        raise InputError(f"weight is a {type(weight).__name__}, but it must be a torch.Tensor.")
    backend = backend_in_use() if backend is None else backend
    dtype = weight.dtype if dtype is None else dtype
    rules = shapes(backend)
    if weight.dim() != 2:
        return f"The weight has {weight.dim()} dimensions, but the kernels multiply matrices only: keep it dense."
    if dtype not in rules:
        return f"{backend} multiplies no 2:4 weights of {dtype}: convert to {', '.join(map(str, rules))}."
    rows, columns = rules[dtype]
    out, width = weight.shape
    is_empty = not out or not width
    if is_empty or out % rows or width % columns:
        return (
            f"The weight is {out} x {width}, but for {dtype} {backend} takes multiples of {rows} x {columns}: choose "
            "such a width, or keep it dense."
        )
    if not is_nm(weight, 2, 4):
        return "The weight has more than two nonzeros in a group of four: prune it with nm.prune(model, 2, 4)."
    return ""


def available() -> str:
    """Return why this machine cannot multiply 2:4 weights, in a sentence; "" if its GPU can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, and its 2:4 kernels run on NVIDIA GPUs, from Ampere on."
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        number = ".".join(map(str, capability))
        return (
            f"{torch.cuda.get_device_name()} has compute capability {number}, and 2:4 tensor cores came with 8.0 "
            "(Ampere)."
        )
    if backend_in_use() == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "This build of torch comes without cuSPARSELt: install one with it, or force CUTLASS."
    return ""


def plan(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float16,
    backend: str | None = None,
) -> list[Candidate]:
    """Return a row for every nn.Linear of a model: if a 2:4 kernel would take the weight. Needs no GPU.

    dtype, backend: as in `refusal`.
    """
    check_module(model)
    candidates = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = refusal(module.weight, dtype=dtype, backend=backend)
            candidates.append(Candidate(qualified(name, "weight"), reason))
    return candidates


def convert(weight: Tensor) -> Tensor:
    """Return `weight` [out, in] as torch's semi-structured tensor, for F.linear, or for torch.mm(weight, x) with int8.

    Raises InputError with the reason of `refusal` or `available`.
    """
    reason = refusal(weight) or available()
    if reason:
        raise InputError(reason)
    return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
