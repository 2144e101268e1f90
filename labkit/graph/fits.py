"""A trial cut: does the model's forward pass do the same without some entries?

The cut model runs on the meta device. Its operators have to come in the same order as in the trace, and to give the
traced shapes without the entries that are gone. A pass that has its sizes written down is detected in this way even
where it happens to run. Nothing is computed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import first_line
from labkit.graph.abstract import Abstract, abstract
from labkit.graph.attributes import Attributes, Keep, set_attributes_, shape, tensors_of
from labkit.graph.copies import duplicate, skeleton
from labkit.graph.operators import COMPARED
from labkit.graph.passes import following
from labkit.graph.record import Operation, Record
from labkit.modules.undisturbed import undisturbed


class Mismatch(NamedTuple):
    """The place where a trial goes wrong.

    why: told to a user. module: its name.
    after: how many operators ran before, (of the compared ones, of all).
    """

    why: str
    module: str
    after: tuple[int, int]


class _Differs(Exception):
    """The cut model's pass does something else than the traced one."""


def trial(
    model: nn.Module, record: Record, gone: np.ndarray, keep: Keep, attributes: Attributes, args: tuple, kwargs: Mapping
) -> Mismatch | None:
    """Run `model` without some entries, and return the first mismatch, None if every operator gives what it should.

    record: of the traced call. gone: [labels], bool.
    keep, attributes: the entries that stay, and the attributes that agree with them.
    args, kwargs: the example input of the trace.
    """
    tensors = {}
    for name, x in tensors_of(model):
        tensors[id(x)] = _cut(x, keep.get(name, {}))
    comparing, stack = _Comparing(record.operations, gone), [""]
    try:
        for training in (False, True) if record.trained else (False,):
            cut = skeleton(model, tensors, training=training)
            set_attributes_(cut, attributes)
            cut_args, cut_kwargs = duplicate((args, dict(kwargs)), abstract)
            with undisturbed(), following(cut, set()) as stack, Abstract() if training else comparing:
                cut(*cut_args, **cut_kwargs)
        comparing.finish()
    except Exception as error:  # a forward pass can fail in any way
        return Mismatch(first_line(error), stack[-1], comparing.reached)
    return None


def _cut(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return a parameter or buffer after the cut, without values if they are floating-point numbers."""
    if x.is_floating_point() or x.is_complex():
        return torch.empty(shape(x, keep), dtype=x.dtype, device="meta")
    for dim, indices in keep.items():
        x = x.index_select(dim, indices.to(x.device))
    return abstract(x)


class _Comparing(Abstract):
    """Compares the shapes that operators give with those of the trace, without the labels in `gone`.

    Only operators of `operators.COMPARED` are looked at.
    """

    def __init__(self, operations: list[Operation], gone: np.ndarray) -> None:
        super().__init__()
        self._expected = [operation for operation in operations if operation.name in COMPARED]
        self._gone = gone
        self._compared = 0  # operators so far
        self._all = 0

    @property
    def reached(self) -> tuple[int, int]:
        """How many operators ran: of the compared ones, of all."""
        return self._compared, self._all

    def observe(self, name: str, args: tuple, kwargs: dict, out: Any, touched: bool) -> None:
        self._all += 1
        result = out[0] if isinstance(out, (list, tuple)) and out else out
        if touched and name in COMPARED and isinstance(result, Tensor):
            operation = self._next_operation(name)
            self._check_start(operation, args)
            self._check_shape(operation, result)

    def _next_operation(self, name: str) -> Operation:
        """Return the next operation of the trace, of which `name` is to be the operator."""
        if self._compared < len(self._expected):
            operation = self._expected[self._compared]
            if operation.name == name:
                self._compared += 1
                return operation
        raise _Differs(f"{name} comes where it did not before")

    def _check_start(self, operation: Operation, args: tuple) -> None:
        """Raise _Differs if a slice does not start behind the remaining entries that were in front of it."""
        if operation.before is None:
            return
        x, dim, start = args[:3]
        start, _, _ = slice(start, None).indices(x.shape[dim])
        expected = int((~self._gone[operation.before]).sum())
        if start != expected:
            place = operation.module or "the model"
            raise _Differs(f"slice in {place} starts at {start}, not {expected}")

    def _check_shape(self, operation: Operation, result: Tensor) -> None:
        """Raise _Differs if the result's shape is not the traced one without the entries that are gone."""
        expected = operation.shape_without(self._gone)
        shape = list(result.shape)
        if shape != expected and result.numel():  # nothing is known of an empty part
            place = operation.module or "the model"
            raise _Differs(f"{operation.name} in {place} gives {shape}, not {expected}")

    def finish(self) -> None:
        """Raise _Differs if operations of the trace did not come."""
        if self._compared < len(self._expected):
            raise _Differs(f"{self._expected[self._compared].name} does not come any more")
