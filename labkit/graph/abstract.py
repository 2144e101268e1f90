"""Passes without values: floating-point tensors lie on the meta device, and operators compute shapes only.

Integers and booleans are real: shapes, positions and masks are few and cheap, and many forward passes look at the
values. Decisions by the values of activations cannot be followed, and are an error. `tracing` and `fits` run such
passes and observe each operator.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from labkit.errors import InputError
from labkit.graph.record import traced

# Their result depends on values, which a tensor on the meta device does not have.
DATA_DEPENDENT = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave"}
DATA_DEPENDENT |= {"_unique2", "unique_dim", "unique_consecutive"}
MASKS = (torch.bool, torch.uint8)  # as an index
CPU = torch.device("cpu")
META = torch.device("meta")


def abstract(x: Tensor) -> Tensor:
    """Return a floating-point tensor without values, any other as a copy on the CPU."""
    if x.is_floating_point() or x.is_complex():
        if x.layout is not torch.strided:  # empty_like would give a sparse tensor without entries
            return torch.empty(x.shape, dtype=x.dtype, device=META)
        return torch.empty_like(x, device=META, requires_grad=False)
    return x if x.is_meta else x.detach().to("cpu", copy=True)


def on_meta(x: Tensor) -> Tensor:
    """Return `x` without values; the labels stay."""
    if x.is_meta:
        return x
    new = torch.empty_like(x, device=META)
    traced(new).spans = traced(x).spans
    return new


@functools.cache
def name_of(func: Any) -> str:
    """Return the name of an ATen operator, without namespace, overload and the underscore of an in-place form."""
    name = func._schema.name.removeprefix("aten::")
    return name if name.startswith("__") else name.rstrip("_")


def tensors_in(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Yield the operands of an ATen operator; arguments hold tensors, and lists of tensors."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, Tensor))


class _Call(NamedTuple):
    """The arguments of an operator, ready to run.

    args, kwargs: arguments of the ATen operator.
    touched: as in `Abstract.observe`.
    has_operands: True if an argument is a tensor.
    has_real: True if an operand was a real tensor before the preparation.
    """

    args: tuple
    kwargs: dict
    touched: bool
    has_operands: bool
    has_real: bool


class Abstract(TorchDispatchMode):
    """Runs operators without values: an abstract operand gives an abstract result, real operands a real result.

    A real tensor becomes abstract, with all its views, when an operator writes an abstract operand there. A
    tensor made in the pass is abstract if later operators will write into it (`_is_state`), and real if the
    values matter (`_is_exact`). Subclasses `observe` each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, Tensor] = {}  # real tensors that became abstract, by the address of their memory

    def where(self) -> str:
        """Name the place in the model for an error message."""
        return "the model"

    def observe(self, name: str, args: tuple, kwargs: dict, out: Any, touched: bool) -> None:
        """Look at an operator after the run.

        name: name of the ATen operator.
        args, kwargs: the arguments with which the operator ran.
        out: the result.
        touched: True if an operand is abstract, or a real tensor into whose memory abstract operands were written.
        """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = name_of(func)
        call = self._prepared(func, name, args, dict(kwargs or {}))
        out = self._run(func, name, call)
        self.observe(name, call.args, call.kwargs, out, call.touched)
        if name == "zeros" and not call.has_operands:
            traced(out).is_zero = True
        return out

    def _prepared(self, func: Any, name: str, args: tuple, kwargs: dict) -> _Call:
        """Return a call with operands on a single device: the meta device if an operand is abstract."""
        if name == "_to_copy" and _casts_zeros_to_integers(args[0], kwargs):
            args = (torch.zeros(args[0].shape),)
        operands = list(tensors_in(args, kwargs))
        real = [x for x in operands if not x.is_meta]
        has_abstract = len(real) < len(operands)
        touched = has_abstract or any(map(self._is_written, real))
        if touched:
            args = self._with_known_masks(name, args)
        if touched and real:  # torch refuses operands on two devices
            self._note_written(func, args, kwargs)
            args, kwargs = tree_map_only(Tensor, on_meta, (args, kwargs))
        elif _device(kwargs).type == "meta" or _is_state(name, args, operands):
            is_exact = _is_exact(name, args, kwargs, operands)
            kwargs["device"] = CPU if is_exact else META
        if touched and kwargs.get("device") is not None:  # the device of a real operand elsewhere in the model
            kwargs["device"] = META
        return _Call(args, kwargs, touched, bool(operands), bool(real))

    def _run(self, func: Any, name: str, call: _Call) -> Any:
        """Run an operator; raise InputError if torch cannot run it without values."""
        try:
            if call.touched and not call.has_real:
                return _cached_result(func, call.args, call.kwargs)
            return func(*call.args, **call.kwargs)
        except NotImplementedError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise InputError(
                f"The operator {name} in {self.where()} cannot run without data ({reason}): give a part of the model "
                "that does without it."
            ) from error

    def _is_written(self, x: Tensor) -> bool:
        """Return True if an operator wrote an abstract operand into the memory of the real tensor `x`."""
        return bool(self._written) and x.untyped_storage().data_ptr() in self._written

    def _note_written(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Note the real operands written by an operator with an abstract operand."""
        for x in _destinations(func, args, kwargs):
            if not x.is_meta:
                self._written[x.untyped_storage().data_ptr()] = x

    def _with_known_masks(self, name: str, args: tuple) -> tuple:
        """Replace masks in an index by the numbers of the picked entries.

        Raises InputError if the shape of the result depends on unknown values.
        """
        indices = args[1] if name in ("index", "index_put") else []
        masks = [x for x in indices if _is_mask(x)]
        unknown = any(mask.is_meta for mask in masks)
        if name in DATA_DEPENDENT or (name == "index" and unknown):
            raise InputError(
                f"The forward pass depends on the values of its activations ({name} in {self.where()}), so that what "
                "hangs together may change from input to input: give a part of the model that does not."
            )
        if not masks or unknown:
            return args
        return (args[0], _numbered(args[1]), *args[2:])


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the indices of an `index` with each real mask replaced by the numbers of the picked entries."""
    numbers: list[Tensor | None] = []
    for x in indices:
        if _is_mask(x):
            numbers += x.nonzero(as_tuple=True)
        else:
            numbers.append(x)
    return numbers


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in MASKS


def _destinations(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the operands to be written by an operator."""
    specs = func._schema.arguments
    names = [spec.name for spec in specs]
    operands = dict(zip(names, args, strict=False)) | kwargs
    destinations = []
    for spec in specs:
        is_written = spec.alias_info is not None and spec.alias_info.is_write
        if is_written and isinstance(operands.get(spec.name), Tensor):
            destinations.append(operands[spec.name])
    return destinations


# --- tensors made by the pass -----------------------------------------------------------------------------------------


def _device(kwargs: dict) -> torch.device:
    """Return the device for an operator's result, by default the CPU."""
    return torch.device(kwargs.get("device") or CPU)


def _casts_zeros_to_integers(x: Tensor, kwargs: dict) -> bool:
    """Return True for a cast of unwritten zeros to integers: the values are known."""
    dtype = kwargs.get("dtype") or x.dtype
    stays_zero = traced(x).is_zero and x._version == 0
    return stays_zero and not dtype.is_floating_point


def _is_state(name: str, args: tuple, operands: Sequence[Tensor]) -> bool:
    """Return True for a tensor made to be written or added to, larger than the start of a sum."""
    return name in ("zeros", "empty") and not operands and math.prod(args[0]) > 1


def _is_exact(name: str, args: tuple, kwargs: dict, operands: Sequence[Tensor]) -> bool:
    """Return True if a tensor made on the meta device should have values nonetheless.

    Integers and booleans should, and tensors filled with a number: a decoder's mask, made in the pass.
    """
    dtype = kwargs.get("dtype")
    if name in ("ones", "full"):
        return True
    if dtype is not None:
        return not dtype.is_floating_point and not dtype.is_complex
    if operands:
        return not operands[0].is_floating_point()
    if name == "arange":
        return all(isinstance(arg, int) for arg in args)
    return name == "scalar_tensor" and isinstance(args[-1], int)  # True and False are ints


# --- results by shape -------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """The properties of an abstract tensor on which results depend."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _cached_result(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return the result of an operator on abstract operands only.

    Torch takes 0.3 ms for a sum on the meta device. An operator with a new tensor or the first operand as result runs
    once for each choice of layouts.
    """
    kind = _kind(func)
    if kind == "other":
        return func(*args, **kwargs)
    layout = _layout(func, _frozen(args), _frozen(tuple(kwargs.items())))
    if kind == "new":
        return _thawed(layout)
    if layout == _frozen(args[0]):
        torch.autograd.graph.increment_version(args[0])
        return args[0]
    return func(*args, **kwargs)


@functools.cache
def _kind(func: Any) -> str:
    """Return the kind of an operator's result.

    "new": a new tensor, and the operator writes into no operand. "in place": the first operand, and the operator writes
    into no further operand. "other": a view, say.
    """
    arguments, returns = list(func._schema.arguments), func._schema.returns
    aliased = [spec for spec in arguments if spec.alias_info is not None]
    if not aliased and all(spec.alias_info is None for spec in returns):
        return "new"
    writes_into_first = aliased == arguments[:1] and arguments[0].alias_info.is_write
    return "in place" if writes_into_first and len(returns) == 1 else "other"


@functools.lru_cache(2**14)
def _layout(func: Any, args: tuple, kwargs: tuple) -> Any:
    """Run an operator on operands of the given layouts, and return the layout of its result."""
    return _frozen(func(*_thawed(args), **dict(_thawed(kwargs))))


def _frozen(value: Any) -> Any:
    """Return arguments or results with layouts in the place of tensors, ready to be a key."""
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    """Return frozen arguments or results with abstract tensors in the place of layouts."""
    if isinstance(value, _Layout):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=META)
    return tuple(map(_thawed, value)) if isinstance(value, tuple) else value
