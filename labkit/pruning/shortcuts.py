"""What the commonest operators give on the meta device, by hand: torch takes them to pieces there, for half of a trace.

Each function gets the positional arguments of one ATen operator and returns what torch would: shape, type, strides.
None leaves the case to torch, as where strides follow from several operands: what a later view copies depends on them.
Sizes that do not fit are an error here as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def result(name: str, args: tuple, kwargs: dict, in_place: bool) -> Any:
    """What the operator gives, None where torch has to say. In-place forms go by the name of the others."""
    by_hand = BY_HAND.get(name)
    if by_hand is None or (kwargs and by_hand is not _like):
        return None
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    if first.device.type != "meta":
        return None
    if in_place and by_hand is _like:
        return first
    found = by_hand(*args)
    if in_place and found is not None:
        return first if found.shape == first.shape else None
    return found


def _empty(shape: Sequence[int], x: Tensor) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _like(x: Tensor, *_: Any) -> Tensor:
    return _empty(x.shape, x) if x.is_contiguous() else torch.empty_like(x)  # which takes ten times as long


def _softmax(x: Tensor, *_: Any) -> Tensor | None:
    return _empty(x.shape, x) if x.is_contiguous() else None


def _binary(x: Tensor, y: Any, *_: Any) -> Tensor | None:
    """With a number, or with a tensor of the same type where one is repeated to the shape of the other."""
    if not x.is_floating_point() or isinstance(y, complex):
        return None
    if not isinstance(y, Tensor):
        return _like(x)
    if not x.is_contiguous() or y.dtype != x.dtype or not y.is_contiguous():
        return None
    for small, large in ((y, x), (x, y)):
        sizes = zip(reversed(small.shape), reversed(large.shape), strict=False)
        if small.dim() <= large.dim() and all(n in (1, m) for n, m in sizes):
            return _empty(large.shape, x)
    return None


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] != b.shape[0] or bias.shape[-1:] not in ((1,), b.shape[1:]):
        raise RuntimeError(f"a product of {list(a.shape)} and {list(b.shape)} has a bias of {list(bias.shape)}")
    return _empty((a.shape[0], b.shape[1]), a)


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...] | None:
    *vectors, training = rest[:5]
    if training:
        return None
    for vector in vectors:
        if vector is not None and vector.shape[0] != x.shape[1]:
            raise RuntimeError(f"batch norm of {x.shape[1]} channels has vectors of {vector.shape[0]}")
    nothing = _empty((0,), x)
    return _like(x), nothing, nothing


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _: float) -> Any:
    outer, shape = x.dim() - len(shape), list(shape)
    if any(list(part) != shape for part in (x.shape[outer:], *(v.shape for v in (weight, bias) if v is not None))):
        raise RuntimeError(f"a layer norm over {shape} has an input of {list(x.shape)}, or vectors of another size")
    statistics = _empty((*x.shape[:outer], *(1 for _ in shape)), x)
    return _empty(x.shape, x), statistics, statistics  # contiguous, whatever x is


def _mean(x: Tensor, dims: Sequence[int] | None = None, keep: bool = False) -> Tensor | None:
    if not dims or not x.is_contiguous() or not x.is_floating_point():
        return None
    gone = {d % x.dim() for d in dims}
    return _empty([1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone], x)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = parts[0]
    dim %= first.dim()
    rest = (*first.shape[:dim], *first.shape[dim + 1 :])
    for x in parts:
        if x.dtype != first.dtype or (*x.shape[:dim], *x.shape[dim + 1 :]) != rest or not x.is_contiguous():
            return None
    return _empty((*rest[:dim], sum(x.shape[dim] for x in parts), *rest[dim:]), first)


BY_HAND: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu"), _like),
    **dict.fromkeys(("sigmoid", "tanh", "leaky_relu"), _like),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    **dict.fromkeys(("_softmax", "_safe_softmax"), _softmax),
    "addmm": _addmm,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "mean": _mean,
    "cat": _cat,
}
