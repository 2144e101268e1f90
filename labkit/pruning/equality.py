"""The proof of a cut: the pruned model against the dense one in which nothing reads the removed channels.

In the dense model every weight column that reads a removed channel is set to zero, which leaves the function of the
kept channels. Where a norm or another statistic runs over pruned channels no weight can express that, so there the
reference takes the statistic over the kept channels, and the report says so. Needs no pruned weights but the model.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from labkit.batches import evaluating
from labkit.pruning.abstract import name_of, undisturbed
from labkit.pruning.tracing import Record, Restricted, outputs

DOUBLE_UP_TO = 2**27  # bytes of a model that is checked in float64; a larger one would need too much memory


@dataclass(frozen=True)
class Report:
    """What the check found. error, scale: the largest difference between the outputs, the largest output.

    tolerance: 8 eps sqrt(K) scale, K the terms summed in all products of the model: each product of n terms rounds by
    about eps sqrt(n), and such errors add up like a random walk; 8 is for the largest of many outputs.
    restricted: the statistics that run over pruned channels, which both models take over the kept channels only.
    noisy: the model's own output is zero (a head that starts at zero) and would show nothing, so that both models were
    compared with the same noise on their parameters.
    """

    error: float
    scale: float
    tolerance: float
    dtype: str
    restricted: tuple[str, ...] = ()
    noisy: bool = False

    @property
    def equal(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "NOT equal"
        text = (
            f"{verdict} to the dense model whose weights do not read the removed channels: largest difference "
            f"{self.error:.2g}, tolerance {self.tolerance:.2g}, largest output {self.scale:.2g}, in {self.dtype}."
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
    """Runs both models on the example input; neither is changed. gone: which labels were removed."""
    total = sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])
    own = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    dtypes = [torch.promote_types(own, torch.float32)]
    if not record.names_dtype and torch.device(next(model.parameters()).device).type != "mps":
        dtypes = [torch.float64, *dtypes] if total <= DOUBLE_UP_TO else [*dtypes, torch.float64]
    report = None
    for dtype in dtypes:
        try:
            report = _compare(model, pruned, record, gone, args, kwargs, dtype, noise=0.0)
            if report.equal and not report.scale:
                report = _compare(model, pruned, record, gone, args, kwargs, dtype, noise=0.1)
        except RuntimeError:
            if dtype is not torch.float64:  # some forward passes name a dtype themselves
                raise
            continue
        if report.equal or dtype is torch.float64:
            break
    return report


def _compare(
    model, pruned, record: Record, gone: np.ndarray, args, kwargs, dtype: torch.dtype, *, noise: float
) -> Report:
    shapes = {name: x.shape for name, x in model.named_parameters()}
    dense = _tensors(model, dtype)
    if noise:
        _add_noise_(dense, shapes, record, np.zeros_like(gone), noise)
    _blind_(dense, record, gone)
    with undisturbed(), evaluating(model, seed=0), sdpa_kernel(SDPBackend.MATH), _Restricting(record.restricted, gone):
        expected = torch.func.functional_call(model, dense, *_copied(dtype, (args, dict(kwargs))))
    del dense  # before the next copy in a wide type is made
    small = _tensors(pruned, dtype)
    if noise:
        _add_noise_(small, shapes, record, gone, noise)
    with torch.no_grad(), evaluating(pruned, seed=0):  # a pass that draws numbers draws the same
        found = torch.func.functional_call(pruned, small, *_copied(dtype, (args, dict(kwargs))))
    error = scale = 0.0
    for a, b in zip(outputs(expected), outputs(found), strict=True):
        if a.shape != b.shape:
            return Report(float("inf"), scale, 0.0, str(dtype))
        a, b = a.to(torch.float64), b.to(torch.float64)
        if a.numel():
            difference = torch.where(a == b, 0.0, (a - b).abs().nan_to_num(torch.inf))  # equal infinities too
            error = max(error, float(difference.max()))
            scale = max(scale, float(a.abs().nan_to_num(0).max()))
    terms = sum(cost.terms for cost in record.costs)
    tolerance = 8 * torch.finfo(dtype).eps * max(terms, 1) ** 0.5 * scale
    names = {f"{r.name} in {r.module}" if r.module else r.name: None for r in record.restricted if gone[r.labels].any()}
    return Report(error, scale, tolerance, str(dtype).removeprefix("torch."), tuple(names), noise > 0)


def _tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and buffers in the wide type. A forward pass may write to its buffers, but not to the model's."""
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    parameters = {name: x.to(dtype) if x.is_floating_point() else x for name, x in parameters.items()}
    return parameters | _copied(dtype, dict(model.named_buffers()))


def _copied(dtype: torch.dtype, value: Any) -> Any:
    def copied(x: Tensor) -> Tensor:
        return x.detach().to(dtype if x.is_floating_point() else x.dtype, copy=True)

    return tree_map_only(Tensor, copied, value)


def _add_noise_(
    tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size], record: Record, gone: np.ndarray, noise: float
) -> None:
    """The same noise on every parameter, of those `shapes` before the cut; buffers (a variance) are left alone."""
    kept: dict[str, dict[int, Tensor]] = {}
    for entry in record.entries:
        stays = ~gone[entry.base : entry.base + entry.size]
        for name in record.names(entry.name):
            kept.setdefault(name, {})[entry.dim] = torch.from_numpy(stays.nonzero()[0])
    generator = torch.Generator()
    for name, shape in shapes.items():
        if tensors[name].is_floating_point():
            generator.manual_seed(zlib.crc32(record.first(name).encode()))  # what shares memory has the same noise
            x = torch.randn(shape, generator=generator, dtype=tensors[name].dtype).mul_(noise)
            for dim, indices in kept.get(name, {}).items():
                x = x.index_select(dim, indices)
            tensors[name] = tensors[name] + x.to(tensors[name].device)


def _blind_(tensors: dict[str, Tensor], record: Record, gone: np.ndarray) -> None:
    """Zeros in the dense model's columns that read what is gone."""
    reads = np.zeros(len(gone), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    copied: set[str] = set()
    for entry in record.entries:
        columns = (gone & reads)[entry.base : entry.base + entry.size].nonzero()[0]
        if not len(columns):
            continue
        for name in record.names(entry.name):
            if name not in copied:
                tensors[name] = tensors[name].clone()
                copied.add(name)
            tensors[name].index_fill_(entry.dim, torch.from_numpy(columns).to(tensors[name].device), 0)


class _Restricting(TorchDispatchMode):
    """Makes the statistics over pruned channels see the kept ones only."""

    def __init__(self, restricted: list[Restricted], gone: np.ndarray) -> None:
        super().__init__()
        self._calls: dict[str, int] = {}
        self._watched = {r.name for r in restricted}
        self._wanted: dict[tuple[str, int], list[tuple[Restricted, np.ndarray]]] = {}
        for r in restricted:
            if gone[r.labels].any():
                self._wanted.setdefault((r.name, r.number), []).append((r, gone[r.labels]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(func)
        if name not in self._watched:
            return func(*args, **kwargs)
        number = self._calls[name] = self._calls.get(name, -1) + 1
        norm = None
        for r, gone in self._wanted.get((name, number), ()):
            args = list(args)
            device = args[r.argument].device
            kept = torch.from_numpy((~gone).nonzero()[0]).to(device)
            if r.kind == "mask":
                removed = torch.from_numpy(gone.nonzero()[0]).to(device)
                args[r.argument] = args[r.argument].index_fill(r.dim, removed, 0)
                continue
            if r.kind == "norm":
                norm = (args[0], r.dim, kept)
                shift = args[0].dim() - len(args[1])
                args[1] = [len(kept) if d + shift == r.dim else n for d, n in enumerate(args[1])]
                args[2:4] = [x if x is None else x.index_select(r.dim - shift, kept) for x in args[2:4]]
            args[r.argument] = args[r.argument].index_select(r.dim, kept)
        out = func(*args, **kwargs)
        if norm is None:
            return out
        x, dim, kept = norm
        return (torch.zeros_like(x).index_copy_(dim, kept, out[0]), *out[1:])
