"""Prove a cut: compare the outputs of the pruned model and of the dense model with the removed channels unread.

`check` runs the two models on the example input. In a copy of the dense model, every weight column that reads a removed
channel is set to zero, which leaves the function of the remaining channels. No weight can do that for a norm or another
statistic over pruned channels, so the dense copy takes it over the remaining channels, and the report names
it. Of the pruned model the check uses the outputs only, never the plan behind the weights.
"""

import math
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.errors import EqualityError, first_line
from labkit.graph.abstract import name_of
from labkit.graph.passes import on_copy, tensors_of, unchanged
from labkit.graph.record import Record, Restricted
from labkit.modules.returned import numbers, outputs

DOUBLE_UP_TO = 2**27  # bytes of a model that is checked in float64; a larger one would need too much memory
FAR = 100  # numbers more than FAR times the largest number that differs are a mask's, not computed
NOISE = 0.1  # standard deviation of the noise on parameters, if the outputs are zero
_ANOTHER = "give another input for the proof in check, or leave the proof out with check=False."


@dataclass(frozen=True)
class Report:
    """The result of an equality check.

    error: largest difference between the outputs of the two models.
    scale: largest number in the dense model's outputs.
    tolerance: largest error explained by rounding, 8 eps sqrt(K) scale, with K the number of terms summed in all
        products of the model. A product of n terms rounds by about eps sqrt(n), and the errors of products add up like
        a random walk; 8 allows for the largest of many outputs.
    dtype: type in which the models were run, for example "float64".
    restricted: names of the statistics over pruned channels, taken over the remaining channels in each model.
    noisy: True if the model's outputs are zero (a head initialised with zeros) and would show no difference; then the
        same noise was added to the parameters of the two models.
    reference: a description of the dense model in the comparison, for `str`.
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
            f"{verdict} to the dense model {self.reference}: "
            f"largest difference {self.error:.2g}, tolerance {self.tolerance:.2g}, "
            f"largest output {self.scale:.2g}, in {self.dtype}."
        )
        if self.noisy:
            text += " Their outputs are zero, so noise was added to the parameters of both for this."
        if self.restricted:
            names = ", ".join(self.restricted[:3])
            more = ", ..." if len(self.restricted) > 3 else ""
            count = len(self.restricted)
            statistics = "1 statistic runs" if count == 1 else f"{count} statistics run"
            text += (
                f" {statistics} over pruned channels ({names}{more}): with the dense model's "
                "own statistics the outputs cannot be equal, so the reference takes them over the kept channels."
            )
        return text


class _Precision(NamedTuple):
    """A floating-point type to run the models in.

    widens: narrower types named by a forward pass are replaced by `dtype` too.
    """

    dtype: torch.dtype
    widens: bool


@torch.inference_mode(False)  # in that mode composite operators arrive whole, and no statistic is seen
def check(
    model: nn.Module, pruned: nn.Module, record: Record, gone: np.ndarray, args: tuple, kwargs: Mapping
) -> Report:
    """Compare copies of the two models on the example input, in several precisions until the outcome is decided.

    model: the dense model.
    pruned: the model cut from `model`.
    record: trace of the dense model on the example input.
    gone: [labels] bool, True for removed labels.
    args, kwargs: the example input.

    Returns the report of the last comparison, also if the outputs differ. Raises EqualityError if no precision gives a
    number to compare.
    """
    comparison = _Comparison(model, pruned, record, gone, args, kwargs)
    report = None
    first_failure = None
    with unchanged(model), unchanged(pruned):
        for precision in comparison.precisions():
            try:
                report, narrows = comparison.run(precision, noise=0.0)
                outputs_are_zero = report.equal and not report.scale
                if outputs_are_zero and gone.any():  # without a cut parameters may be rewritten, but not the noise
                    report, narrows = comparison.run(precision, noise=NOISE)
            except EqualityError as error:
                first_failure = first_failure or error
                continue
            if report.equal or not narrows:
                break
    if report is None:
        raise first_failure
    return report


class _ComparedModel(NamedTuple):
    """A model of a comparison.

    tensors: {name: parameter or buffer}.
    keep: {name: {dimension: kept indices}}, empty for the dense model.
    restricted: statistics to be taken over the remaining channels, empty for the pruned model.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    keep: Mapping[str, Mapping[int, Tensor]]
    restricted: list[Restricted]


class _Comparison:
    """A dense and a pruned model, run as copies on the same input. The arguments are as in `check`."""

    def __init__(
        self, model: nn.Module, pruned: nn.Module, record: Record, gone: np.ndarray, args: tuple, kwargs: Mapping
    ) -> None:
        self._record = record
        self._gone = gone
        self._args = args
        self._kwargs = kwargs
        # Parameters that share memory get the same noise: {parameter: the first name of its memory}.
        self._first_names = {name: record.first(name) for name, _ in model.named_parameters()}
        keep = record.kept(gone)
        self._dense = _ComparedModel(model, dict(tensors_of(model)), {}, record.restricted)
        self._pruned = _ComparedModel(pruned, dict(tensors_of(pruned)), keep, [])

    def precisions(self) -> list[_Precision]:
        """Return the precisions to try, in order: float64 first if the model is small enough for a copy in float64."""
        tensors = self._dense.tensors.values()
        floating = [x.dtype for x in tensors if x.is_floating_point()]
        single = torch.promote_types(floating[0] if floating else torch.float32, torch.float32)
        has_double = all(x.device.type != "mps" for x in tensors)
        size = sum(x.numel() * x.element_size() for x in tensors)
        is_small = size <= DOUBLE_UP_TO
        if self._record.names_dtype or not has_double:
            dtypes = [single]
        elif is_small:
            dtypes = [torch.float64, single]
        else:
            dtypes = [single, torch.float64]
        precisions = [_Precision(dtype, widens=False) for dtype in dtypes]
        widest = torch.float64 if has_double and is_small else single
        return [*precisions, _Precision(widest, widens=True)]

    def run(self, precision: _Precision, *, noise: float) -> tuple[Report, bool]:
        """Compare the outputs of the two models in a precision.

        noise: standard deviation of the noise added to the parameters of each model; 0 adds no noise.

        Returns (report, True if a forward pass casts to a narrower type). Rounding to a narrower type may explain a
        difference. Raises EqualityError if the dense model does not run in the precision, or has NaN in the outputs.
        """
        dense_output, dense_narrows = self._dense_output(precision, noise)
        pruned_tensors = self._tensors(self._pruned, precision, noise)
        pruned_output, pruned_narrows = self._output(self._pruned, pruned_tensors, precision)
        error, scale = difference(dense_output, pruned_output)
        terms = sum(cost.terms for cost in self._record.costs)
        eps = torch.finfo(precision.dtype).eps
        report = Report(
            error=error,
            scale=scale,
            tolerance=8 * eps * max(terms, 1) ** 0.5 * scale,
            dtype=str(precision.dtype).removeprefix("torch."),
            restricted=self._names_of_restricted(),
            noisy=noise > 0,
        )
        return report, dense_narrows or pruned_narrows

    def _dense_output(self, precision: _Precision, noise: float) -> tuple[Any, bool]:
        """Return (output of the dense model with the removed channels unread, True if the pass narrows types)."""
        tensors = self._tensors(self._dense, precision, noise)
        _blind_(tensors, self._record, self._gone)
        try:
            return self._output(self._dense, tensors, precision)
        except RuntimeError as error:  # some forward passes name a dtype themselves
            raise EqualityError(
                f"The dense model does not run in {precision.dtype} ({first_line(error)}): {_ANOTHER}"
            ) from error

    def _tensors(self, compared: _ComparedModel, precision: _Precision, noise: float) -> dict[str, Tensor]:
        """Return copies of all parameters and buffers, {name: tensor}, in a precision and with noise.

        noise: standard deviation of normal noise on every parameter, the same in the dense and in the pruned model;
            buffers are left alone.
        """
        tensors = {name: _in_precision(x, precision.dtype) for name, x in compared.tensors.items()}
        if not noise:
            return tensors
        generator = torch.Generator()
        for name, first_name in self._first_names.items():
            if not tensors[name].is_floating_point():
                continue
            generator.manual_seed(zlib.crc32(first_name.encode()))
            shape = self._dense.tensors[name].shape
            x = torch.randn(shape, generator=generator, dtype=precision.dtype).mul_(noise)
            for dim, indices in compared.keep.get(name, {}).items():
                x = x.index_select(dim, indices)
            tensors[name] += x.to(tensors[name].device)
        return tensors

    def _output(self, compared: _ComparedModel, tensors: dict[str, Tensor], precision: _Precision) -> tuple[Any, bool]:
        """Run a copy of a model with new tensors, and with statistics restricted to the remaining channels.

        tensors: {name: tensor} of all parameters and buffers.
        Returns (output, True if the pass narrows types).
        """

        def wide(x: Tensor) -> Tensor:
            return _in_precision(x, precision.dtype)

        copies = {"copy_input": wide, "copy_tensor": wide}
        with (
            on_copy(compared.model, tensors, self._args, self._kwargs, **copies) as copied,
            sdpa_kernel(SDPBackend.MATH),
        ):
            _seed(0)  # a pass that draws numbers draws the same in both models
            with _Restricting(compared.restricted, self._gone, copied.stack, precision) as mode:
                output = copied.run()
        return output, mode.narrows

    def _names_of_restricted(self) -> tuple[str, ...]:
        """Name the statistics over removed labels, each once, for example "native_layer_norm in layers.0.norm"."""
        names = []
        for statistic in self._record.restricted:
            if self._gone[statistic.labels].any():
                place = f" in {statistic.module}" if statistic.module else ""
                names.append(f"{statistic.name}{place}")
        return tuple(dict.fromkeys(names))


# --- outputs ----------------------------------------------------------------------------------------------------------


def difference(expected: Any, results: Any) -> tuple[float, float]:
    """Compare the outputs of two models.

    expected, results: outputs of the dense and of the pruned model, in any form read by `returned.outputs`.

    Returns (largest difference, largest number of `expected`).

    The difference is infinite if shapes differ, or tensors of whole numbers or truth values, or numbers of Python.

    The largest number tells how much rounding is allowed, so only computed numbers may count: the -1e9 of a mask, the
    same in both outputs, would hide a wrong cut. Computed numbers differ by rounding, and a number of more than FAR
    times the largest number that differs is taken for a mask's.

    Raises EqualityError if `expected` has NaN, or no finite number.
    """
    tensors_expected, tensors_of_results = outputs(expected), outputs(results)
    numbers_are_equal = numbers(expected) == numbers(results)
    if any(x.isnan().any() for x in tensors_expected):
        raise EqualityError(f"The dense model's own output has NaN on the example input: {_ANOTHER}")
    shapes_are_equal = [x.shape for x in tensors_expected] == [x.shape for x in tensors_of_results]
    if not shapes_are_equal or not numbers_are_equal:
        return math.inf, 0.0

    exact: list[tuple[Tensor, Tensor]] = []
    rounded: list[tuple[Tensor, Tensor]] = []
    for a, b in zip(tensors_expected, tensors_of_results, strict=True):
        if a.is_floating_point() or a.is_complex():
            rounded.append((_real(a), _real(b)))
        else:
            exact.append((_real(a), _real(b)))
    if not any(a.isfinite().any() for a, _ in exact + rounded):
        raise EqualityError(f"The dense model's output has no finite number to compare: {_ANOTHER}")

    exact_are_equal = all(torch.equal(a, b) for a, b in exact)
    error = 0.0 if exact_are_equal else math.inf
    largest_differing = 0.0  # the largest number of `expected` that a result differs from
    for a, b in rounded:
        differs = a != b
        if differs.any():
            error = max(error, _largest_difference(a[differs], b[differs]))
            largest_differing = max(largest_differing, _largest(a[differs]))
    limit = FAR * largest_differing if largest_differing else math.inf
    scale = max(_largest(a, limit) for a, _ in rounded or exact)
    return error, scale


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| of two float64 tensors; infinite if a difference is NaN."""
    differences = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(differences.max())


def _largest(x: Tensor, limit: float = math.inf) -> float:
    """Return the largest finite |x| up to `limit`; 0 if all numbers are larger or not finite."""
    sizes = x.double().abs()
    counted = sizes[sizes.isfinite() & (sizes <= limit)]
    return float(counted.max()) if len(counted) else 0.0


def _real(x: Tensor) -> Tensor:
    """Return `x` as a dense tensor on the CPU, complex numbers as pairs, floating-point numbers in float64."""
    if x.layout is not torch.strided:
        x = x.to_dense()
    x = x.cpu()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.double() if x.is_floating_point() else x


# --- copies of the tensors --------------------------------------------------------------------------------------------


def _in_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `x`, in `dtype` if `x` is of floating-point numbers."""
    dtype = dtype if x.is_floating_point() else x.dtype
    return x.detach().to(dtype, copy=True)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _blind_(tensors: dict[str, Tensor], record: Record, gone: np.ndarray) -> None:
    """Set the columns of the dense model's weights that read removed channels to zero.

    tensors: {name: tensor}, changed in place.
    gone: [labels], bool, True for removed labels.
    """
    reads = np.zeros(len(gone), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    reads_what_is_gone = reads & gone
    for axis in record.axes:
        columns = _indices(reads_what_is_gone[axis.labels])
        if not len(columns):
            continue
        for name in record.names(axis.name):
            x = tensors[name]
            x.index_fill_(axis.dim, columns.to(x.device), 0)


def _indices(mask: np.ndarray) -> Tensor:
    """Return the indices of the True entries of a mask [n], int64."""
    return torch.from_numpy(mask.nonzero()[0])


# --- statistics over the channels that stay ---------------------------------------------------------------------------


class _Norm(NamedTuple):
    """A norm over the remaining entries, and the place of the normalised values among zeros."""

    zeros: Tensor  # of the shape of the norm's input
    dim: int
    kept_indices: Tensor  # of the remaining entries in that dimension


class _Restricting(TorchDispatchMode):
    """A mode in which statistics over pruned channels are taken over the remaining channels only.

    restricted: the statistics in the trace.
    gone: [labels] bool, True for removed labels.
    stack: names of the running modules, the innermost last.
    precision: if `widens`, narrower types are replaced by the precision's dtype.

    `narrows` is True afterwards if the pass cast a tensor to a narrower type.
    """

    def __init__(self, restricted: list[Restricted], gone: np.ndarray, stack: list[str], precision: _Precision) -> None:
        super().__init__()
        self.narrows = False
        self._precision = precision
        self._stack = stack
        self._calls: Counter[tuple[str, str]] = Counter()  # of each operator in each module
        self._watched = {statistic.name for statistic in restricted}
        self._statistics = defaultdict(list)  # {(operator, module, number of the call): [(statistic, mask of gone)]}
        for statistic in restricted:
            is_gone = gone[statistic.labels]
            if is_gone.any():
                call = (statistic.name, statistic.module, statistic.number)
                self._statistics[call].append((statistic, is_gone))

    def __torch_dispatch__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping | None = None
    ):
        name = name_of(func)
        kwargs = self._widened(name, args, kwargs or {})
        if name not in self._watched:
            return func(*args, **kwargs)
        place = (name, self._stack[-1])
        number = self._calls[place]
        self._calls[place] += 1
        statistics = self._statistics.get((*place, number), ())
        return self._restricted_call(func, args, kwargs, statistics)

    def _widened(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Note a cast to a type narrower than the precision's, and return the arguments with a widened type."""
        dtype = self._precision.dtype
        requested = kwargs.get("dtype") or dtype
        is_narrow = requested.is_floating_point and requested.itemsize < dtype.itemsize
        if is_narrow and name == "_to_copy" and args[0].dtype is dtype:
            self.narrows = True
        if is_narrow and self._precision.widens:
            return {**kwargs, "dtype": dtype}
        return kwargs

    def _restricted_call(
        self,
        func: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        statistics: Sequence[tuple[Restricted, np.ndarray]],
    ) -> Any:
        """Call an operator over the remaining entries; the result of a norm gets zeros for the removed entries."""
        name = name_of(func)
        args = list(args)
        norms: list[_Norm] = []
        for statistic, is_gone in statistics:
            x = args[statistic.argument]
            if x.shape[statistic.dim] != len(is_gone):
                place = statistic.module or "the model"
                raise RuntimeError(f"{name} in {place} is not called as it was in the trace")
            kept_indices = _indices(~is_gone).to(x.device)
            if statistic.kind == "mask":
                removed_indices = _indices(is_gone).to(x.device)
                args[statistic.argument] = x.index_fill(statistic.dim, removed_indices, 0)
                continue
            if statistic.kind == "norm":
                zeros = torch.zeros_like(x, memory_format=torch.contiguous_format)
                norms.append(_Norm(zeros, statistic.dim, kept_indices))
                _shrink_norm_(name, args, statistic.dim, kept_indices)
            args[statistic.argument] = x.index_select(statistic.dim, kept_indices)
        out = func(*args, **kwargs)
        if name == "_weight_norm_interface":  # a weight that the blind model does not read has the norm 0
            normalised, *rest = out
            out = (normalised.nan_to_num(0, torch.inf, -torch.inf), *rest)
        for zeros, dim, kept_indices in reversed(norms):
            normalised, *rest = out
            out = (zeros.index_copy_(dim, kept_indices, normalised), *rest)
        return out


def _shrink_norm_(name: str, args: list[Any], dim: int, kept_indices: Tensor) -> None:
    """Reduce the arguments of a norm after the first to the remaining entries of dimension `dim` of the input args[0].

    name: name of the operator.
    args: arguments in the order of the ATen schema, changed in place.
    kept_indices: indices of the remaining entries.
    """
    if name == "native_layer_norm":  # input, normalized_shape, weight, bias, eps
        shape = list(args[1])
        dim_in_shape = dim - (args[0].dim() - len(shape))
        if dim_in_shape >= 0:
            shape[dim_in_shape] = len(kept_indices)
        args[1] = shape
        args[2] = _selected(args[2], dim_in_shape, kept_indices)
        args[3] = _selected(args[3], dim_in_shape, kept_indices)
    elif name == "native_group_norm":  # input, weight, bias, N, C, ...
        args[1] = _selected(args[1], 0, kept_indices)
        args[2] = _selected(args[2], 0, kept_indices)
        args[4] = len(kept_indices)


def _selected(x: Tensor | None, dim: int, indices: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(dim, indices)
