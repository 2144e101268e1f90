"""The proof of a cut: the pruned model against the dense one in which nothing reads the removed channels.

In the dense model every weight column that reads a removed channel is set to zero, which leaves the function of the
channels that stay. Where a norm or another statistic runs over pruned channels no weight can express that, so there the
reference takes the statistic over those that stay, and the report says so. Needs no pruned weights but the model.
"""

import math
import random
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.errors import EqualityError, first_line
from labkit.graph.abstract import name_of
from labkit.graph.attributes import tensors_of
from labkit.graph.copies import duplicate, skeleton
from labkit.graph.passes import following, unchanged
from labkit.graph.record import Record, Restricted
from labkit.modules.returned import numbers, outputs
from labkit.modules.undisturbed import undisturbed

DOUBLE_UP_TO = 2**27  # bytes of a model that is checked in float64; a larger one would need too much memory
FAR = 100  # times the largest number that differs: what is larger is no result, but a mask
_ANOTHER = "give another input for the proof in check, or leave the proof out with check=False."


@dataclass(frozen=True)
class Report:
    """What the check gave. error, scale: the largest difference between the outputs, the largest output.

    tolerance: 8 eps sqrt(K) scale, K the terms summed in all products of the model: each product of n terms rounds by
    about eps sqrt(n), and such errors add up like a random walk; 8 is for the largest of many outputs.
    restricted: the statistics that run over pruned channels, which both models take over those that stay.
    noisy: the model's own output is zero (a head that starts at zero) and would show nothing, so that both models were
    compared with the same noise on their parameters.
    reference: what the dense model was made before the comparison.
    """

    error: float
    scale: float
    tolerance: float
    dtype: str
    restricted: tuple[str, ...] = ()
    noisy: bool = False
    reference: str = "whose weights do not read the removed channels"

    @property
    def equal(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "NOT equal"
        text = (
            f"{verdict} to the dense model {self.reference}: largest difference {self.error:.2g}, tolerance "
            f"{self.tolerance:.2g}, largest output {self.scale:.2g}, in {self.dtype}."
        )
        if self.noisy:
            text += " Their outputs are zero, so noise was added to the parameters of both for this."
        if self.restricted:
            text += (
                f" {len(self.restricted)} statistics run over pruned channels ({', '.join(self.restricted[:3])}"
                f"{', ...' if len(self.restricted) > 3 else ''}): with the dense model's own statistics the outputs "
                "cannot be equal, so the reference takes them over the kept channels."
            )
        return text


@torch.inference_mode(False)  # in that mode composite operators arrive whole, and no statistic is seen
def check(
    model: nn.Module, pruned: nn.Module, record: Record, gone: np.ndarray, args: tuple, kwargs: Mapping
) -> Report:
    """Runs copies of both models on the example input, in one type after another until one decides.

    gone: which labels were removed. Raises EqualityError where there is no number to compare.
    """
    report, failure = None, None
    with unchanged(model), unchanged(pruned):
        for dtype, widens in _attempts(model, record):
            compare = partial(_compare, model, pruned, record, gone, args, kwargs, dtype, widens)
            try:
                report, narrows = compare(noise=0.0)
                if report.equal and not report.scale and gone.any():  # noise is not rewritten as a parameter is
                    report, narrows = compare(noise=0.1)
            except EqualityError as error:
                failure = failure or error
                continue
            if report.equal or not narrows:
                break
    if report is None:
        raise failure
    return report


def _attempts(model: nn.Module, record: Record) -> list[tuple[torch.dtype, bool]]:
    """(dtype that both models are run in, whether narrower types that their forward passes name become this one)"""
    total = sum(x.numel() * x.element_size() for _, x in tensors_of(model))
    native = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    single, double = torch.promote_types(native, torch.float32), [torch.float64]
    if next(model.parameters()).device.type == "mps":
        double = []
    small = total <= DOUBLE_UP_TO
    if record.names_dtype:
        dtypes = [single]
    else:
        dtypes = [*double, single] if small else [single, *double]
    widest = double[0] if double and small else single
    return [*((dtype, False) for dtype in dtypes), (widest, True)]


def _compare(
    model, pruned, record: Record, gone: np.ndarray, args, kwargs, dtype: torch.dtype, widens: bool, *, noise: float
) -> tuple[Report, bool]:
    """(what the outputs say, whether the forward pass casts to a narrower type than `dtype`, which decides then)

    widens: narrower types that the forward passes name become `dtype` as well. Raises EqualityError where the dense
    model does not run in `dtype`, or its output is no number.
    """
    narrows = False

    def wide(x: Tensor) -> Tensor:
        return x.detach().to(dtype if x.is_floating_point() else x.dtype, copy=True)

    def run(model: nn.Module, tensors: dict[str, Tensor], restricted: list[Restricted]) -> Any:
        nonlocal narrows
        stands = {id(x): tensors[name] for name, x in tensors_of(model)}
        copied = skeleton(model, stands, wide)
        inputs, options = duplicate((args, dict(kwargs)), wide)
        with undisturbed(), sdpa_kernel(SDPBackend.MATH), following(copied, set()) as stack:
            _seed(0)  # a pass that draws numbers draws the same
            with _Restricting(restricted, gone, stack, dtype, widens) as mode:
                result = copied(*inputs, **options)
        narrows |= mode.narrows
        return result

    shapes = {name: x.shape for name, x in model.named_parameters()}
    tensors = {name: wide(x) for name, x in tensors_of(model)}
    if noise:
        _add_noise_(tensors, shapes, record, {}, noise)
    _blind_(tensors, record, gone)
    try:
        expected = run(model, tensors, record.restricted)
    except RuntimeError as error:  # some forward passes name a dtype themselves
        raise EqualityError(f"The dense model does not run in {dtype} ({first_line(error)}): {_ANOTHER}") from error
    if any(bool(x.isnan().any()) for x in outputs(expected)):
        raise EqualityError(f"The dense model's own output has NaN on the example input: {_ANOTHER}")
    tensors = {name: wide(x) for name, x in tensors_of(pruned)}  # in the place of the dense ones
    if noise:
        _add_noise_(tensors, shapes, record, record.kept(gone), noise)
    error, scale = difference(expected, run(pruned, tensors, []))
    terms = sum(cost.terms for cost in record.costs)
    tolerance = 8 * torch.finfo(dtype).eps * max(terms, 1) ** 0.5 * scale
    names = {f"{r.name} in {r.module}" if r.module else r.name: None for r in record.restricted if gone[r.labels].any()}
    report = Report(error, scale, tolerance, str(dtype).removeprefix("torch."), tuple(names), noise > 0)
    return report, narrows


def difference(expected: Any, results: Any) -> tuple[float, float]:
    """(the largest difference between the outputs of two models, the largest number in those of the first).

    The difference is infinite where shapes differ, or whole numbers, truth values or numbers of Python. A number far
    beyond all that differ is not the largest: the -1e9 of a mask says nothing about rounding. Raises EqualityError
    where there is no finite number to compare.
    """
    shapes = [[x.shape for x in outputs(value)] for value in (expected, results)]
    if shapes[0] != shapes[1] or numbers(expected) != numbers(results):
        return math.inf, 0.0
    pairs = [(_real(a), _real(b)) for a, b in zip(outputs(expected), outputs(results), strict=True)]
    if not any(bool(a.isfinite().any()) for a, _ in pairs):
        raise EqualityError(f"The dense model's output has no finite number to compare: {_ANOTHER}")
    exact = [(a, b) for a, b in pairs if not a.is_floating_point()]
    rounded = [(a, b) for a, b in pairs if a.is_floating_point()]
    error = 0.0 if all(torch.equal(a, b) for a, b in exact) else math.inf
    limit = 0.0  # of what differs
    for a, b in rounded:
        differs = a != b
        if differs.any():
            error = max(error, float((a - b)[differs].abs().nan_to_num(math.inf, math.inf).max()))
            limit = max(limit, float(a[differs].abs().nan_to_num(0, 0).max()))
    scale = 0.0
    for a, _ in rounded or exact:
        size = a.double().abs()
        near = size[size.isfinite() & (size <= (FAR * limit if limit else math.inf))]
        scale = max(scale, float(near.max())) if len(near) else scale
    return error, scale


def _real(x: Tensor) -> Tensor:
    """On the CPU, in float64 if it is not of whole numbers or truth values; a complex number is two."""
    x = (x.to_dense() if x.layout is not torch.strided else x).cpu()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.double() if x.is_floating_point() else x


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _add_noise_(
    tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size], record: Record, keep: Mapping, noise: float
) -> None:
    """The same noise on every parameter, of those `shapes` before the cut; buffers (a variance) are left alone."""
    generator = torch.Generator()
    for name, shape in shapes.items():
        if tensors[name].is_floating_point():
            generator.manual_seed(zlib.crc32(record.first(name).encode()))  # what shares memory has the same noise
            x = torch.randn(shape, generator=generator, dtype=tensors[name].dtype).mul_(noise)
            for dim, indices in keep.get(name, {}).items():
                x = x.index_select(dim, indices)
            tensors[name] += x.to(tensors[name].device)


def _blind_(tensors: dict[str, Tensor], record: Record, gone: np.ndarray) -> None:
    """Zeros in the dense model's columns that read what is gone."""
    reads = np.zeros(len(gone), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    for axis in record.axes:
        columns = torch.from_numpy((gone & reads)[axis.base : axis.base + axis.size].nonzero()[0])
        for name in record.names(axis.name) if len(columns) else ():
            tensors[name].index_fill_(axis.dim, columns.to(tensors[name].device), 0)


class _Restricting(TorchDispatchMode):
    """Makes the statistics over pruned channels see only those that stay, and if it `widens` all types as wide."""

    def __init__(
        self, restricted: list[Restricted], gone: np.ndarray, stack: list[str], dtype: torch.dtype, widens: bool
    ) -> None:
        super().__init__()
        self.narrows = False
        self._dtype, self._widens = dtype, widens
        self._calls: Counter = Counter()
        self._stack = stack
        self._watched = {r.name for r in restricted}
        self._places: dict[tuple[str, str, int], list[tuple[Restricted, np.ndarray]]] = {}
        for r in restricted:
            if gone[r.labels].any():
                self._places.setdefault((r.name, r.module, r.number), []).append((r, gone[r.labels]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(func)
        named = kwargs.get("dtype") or self._dtype
        if named.is_floating_point and named.itemsize < self._dtype.itemsize:
            self.narrows |= name == "_to_copy" and args[0].dtype is self._dtype
            if self._widens:
                kwargs = {**kwargs, "dtype": self._dtype}
        if name not in self._watched:
            return func(*args, **kwargs)
        place = (name, self._stack[-1])
        number = self._calls[place]
        self._calls[place] += 1
        args, norms = list(args), []
        for r, gone in self._places.get((*place, number), ()):
            x = args[r.argument]
            if x.shape[r.dim] != len(gone):
                raise RuntimeError(f"{name} in {r.module or 'the model'} is not called as it was in the trace")
            stays, goes = (torch.from_numpy(mask.nonzero()[0]).to(x.device) for mask in (~gone, gone))
            if r.kind == "mask":
                args[r.argument] = x.index_fill(r.dim, goes, 0)
                continue
            if r.kind == "norm":
                norms.append((torch.zeros_like(x, memory_format=torch.contiguous_format), r.dim, stays))
                _shrink_norm_(name, args, r.dim, stays)
            args[r.argument] = x.index_select(r.dim, stays)
        out = func(*args, **kwargs)
        if name == "_weight_norm_interface":  # what a blind model does not read has the norm 0
            out = (out[0].nan_to_num(0, torch.inf, -torch.inf), *out[1:])
        for zeros, dim, stays in reversed(norms):
            out = (zeros.index_copy_(dim, stays, out[0]), *out[1:])
        return out


def _shrink_norm_(name: str, args: list, dim: int, stays: Tensor) -> None:
    """The other arguments of a norm over dimension `dim` of args[0], of which `stays` remain."""
    if name == "native_layer_norm":
        shift = args[0].dim() - len(args[1])
        args[1] = [len(stays) if d + shift == dim else n for d, n in enumerate(args[1])]
        args[2:4] = [x if x is None else x.index_select(dim - shift, stays) for x in args[2:4]]
    elif name == "native_group_norm":
        args[1:3] = [x if x is None else x.index_select(0, stays) for x in args[1:3]]
        args[4] = len(stays)
