"""Bytes of a call: memory from before the call that operators read and write."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.errors import InputError
from labkit.modules.tensors import dense_parts
from labkit.timing.operators import GATHERS, OVERWRITES, SCATTERS, has_no_product


class Piece(NamedTuple):
    """Memory of a tensor: `nbytes` bytes within the bytes `low` to `high` of a storage, by the storage's identity."""

    storage: int
    low: int
    high: int
    nbytes: int

    def at_most(self, nbytes: int) -> "Piece":
        """Return the piece with `nbytes` bytes, if it has more."""
        return self._replace(nbytes=min(self.nbytes, nbytes))


def pieces(tensors: Iterable[Tensor]) -> list[Piece]:
    """Return the memory behind tensors: each element once, however permuted, reshaped or expanded."""
    return [_piece(tensor) for tensor in dense_parts(tensors)]


def _piece(tensor: Tensor) -> Piece:
    size = tensor.element_size()
    elements = 1
    span = 1  # from the first element to the last
    for stride, length in zip(tensor.stride(), tensor.shape, strict=True):
        if stride:  # an expanded dimension has stride 0 and repeats the same elements
            elements *= length
            span += stride * (length - 1)
    if not tensor.numel():
        span = 0
    low = tensor.storage_offset() * size
    nbytes = min(elements, span) * size  # windows that overlap touch no more than their span
    return Piece(_identity(tensor), low, low + span * size, nbytes)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def distinct_bytes(touched: Iterable[Piece]) -> int:
    """Return the distinct bytes of pieces of memory.

    The bytes are the sum over distinct pieces, but in each storage no more than the pieces span together.
    """
    by_storage: dict[int, list[Piece]] = defaultdict(list)
    for piece in set(touched):
        by_storage[piece.storage].append(piece)
    total = 0
    for same_storage in by_storage.values():
        span = max(piece.high for piece in same_storage) - min(piece.low for piece in same_storage)
        total += min(span, sum(piece.nbytes for piece in same_storage))
    return total


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements of tensors."""
    return sum(part.numel() * part.element_size() for part in dense_parts(tensors))


class Traffic(TorchDispatchMode):
    """Watch every operator of a call, and note the memory that it reads and writes.

    Only memory from before the call counts: intermediate results may stay in a cache.

    with_formula: names of the operators whose products are counted.
    made: storages that the call allocated, by identity.
    reads, writes: touched memory of other storages.
    uncounted: number of calls of each operator that may compute products but has no formula.
    """

    supports_higher_order_operators = True

    def __init__(self, with_formula: set[str]) -> None:
        super().__init__()
        self.with_formula = with_formula
        self.made: set[int] = set()
        self.reads: set[Piece] = set()
        self.writes: set[Piece] = set()
        self.uncounted: Counter[str] = Counter()
        self._alive: dict[int, StorageWeakRef] = {}  # keeps the identity of a freed storage from being used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _leaves((args, kwargs))
        if any(operand.is_nested for operand in operands):
            raise InputError("count can't see into nested tensors: pad the sequences, or count each length by itself.")
        before = self._storages(operands)
        out = func(*args, **kwargs)
        results = _leaves(out)
        new = self._storages(results) - before
        arguments = _named(func, args, kwargs)
        written = _written(func)
        is_view = not new and (not written or torch.Tag.inplace_view in func.tags)
        if is_view:
            return out
        self.made |= new
        name = _name(func)
        self._note_memory(name, arguments, written, results)
        self._note_uncounted(func, name)
        return out

    def _storages(self, tensors: Iterable[Tensor]) -> set[int]:
        identities = set()
        for part in dense_parts(tensors):
            storage = part.untyped_storage()
            self._alive.setdefault(storage._cdata, StorageWeakRef(storage))
            identities.add(storage._cdata)
        return identities

    def _note_memory(
        self, name: str, arguments: Mapping[str, Any], written: set[str], results: Sequence[Tensor]
    ) -> None:
        """Note the memory of an operator's arguments.

        name: name of the operator.
        arguments: values by name.
        written: names of the arguments that the operator changes.
        """
        for argument, value in arguments.items():
            touched = pieces(_leaves(value))
            if GATHERS.get(name) == argument:
                touched = [piece.at_most(results[0].nbytes) for piece in touched]
            if argument in written:
                if name in SCATTERS:
                    source = _leaves(arguments[SCATTERS[name]])
                    most = sum(tensor.numel() for tensor in source) * value.element_size()
                    touched = [piece.at_most(most) for piece in touched]
                self.writes |= self._from_before(touched)
                if name in OVERWRITES or argument == "out":
                    continue
            if not _takes_only_shape(name):
                self.reads |= self._from_before(touched)

    def _from_before(self, touched: Iterable[Piece]) -> set[Piece]:
        return {piece for piece in touched if piece.storage not in self.made}

    def _note_uncounted(self, func: Any, name: str) -> None:
        packet = _packet(func)
        is_pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
        is_counted = packet in self.with_formula
        if not (is_counted or is_pointwise or _takes_only_shape(name) or has_no_product(name)):
            self.uncounted[packet] += 1


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _packet(func: Any) -> str:
    """Return the name of an operator without its overload, such as "aten.add"."""
    return str(getattr(func, "_overloadpacket", func))


def _name(func: Any) -> str:
    return _packet(func).removeprefix("aten.")


def _takes_only_shape(name: str) -> bool:
    """Return True if an operator takes the shape of its operand and reads no element."""
    return name.endswith("_like") or name.startswith("new_")


def _named(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator by name; operators of higher order have numbers for names."""
    if isinstance(func, HigherOrderOperator):
        names = [str(position) for position in range(len(args))]
    else:
        names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _written(func: Any) -> set[str]:
    """Return the names of the arguments that an operator changes in place."""
    if isinstance(func, HigherOrderOperator):
        return set()
    arguments = func._schema.arguments
    return {argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write}
