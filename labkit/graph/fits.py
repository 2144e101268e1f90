"""A trial cut: does the model's forward pass do the same without some entries?

The cut model runs on the meta device. The operators have to come in the same order as in the trace, and to give the
traced shapes without the removed entries. Sizes written down as numbers are detected even if the pass happens to run.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import first_line
from labkit.graph.abstract import Abstract, abstract
from labkit.graph.attributes import Attributes, Keep, set_attributes_, shape
from labkit.graph.operators import COMPARED
from labkit.graph.passes import on_copy, tensors_of
from labkit.graph.record import Operation, Record


class Mismatch(NamedTuple):
    """The place where a trial goes wrong.

    why: the sentence for a user.
    module: the name of the running module.
    after: numbers of operators before the place, (compared, all).
    """

    why: str
    module: str
    after: tuple[int, int]


class _Differs(Exception):
    """The cut model's pass differs from the traced pass."""


def trial(
    model: nn.Module, record: Record, gone: np.ndarray, keep: Keep, attributes: Attributes, args: tuple, kwargs: Mapping
) -> Mismatch | None:
    """Run `model` without some entries, and return the first mismatch with the trace, None for a success.

    record: record of the traced call.
    gone: [labels], bool, True for removed labels.
    keep, attributes: the remaining entries, and the attributes changed by the cut.
    args, kwargs: the example input of the trace.
    """
    tensors = {name: _cut(x, keep.get(name, {})) for name, x in tensors_of(model)}
    comparing, stack = _Comparing(record.operations, gone), [""]
    try:
        for training in (False, True) if record.trained else (False,):
            with on_copy(model, tensors, args, kwargs, copy_input=abstract, training=training) as cut:
                stack = cut.stack
                set_attributes_(cut.model, attributes)
                with Abstract() if training else comparing:
                    cut.run()
        comparing.finish()
    except Exception as error:  # a forward pass can fail in any way
        return Mismatch(first_line(error), stack[-1], comparing.reached)
    return None


def _cut(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return a parameter or buffer after the cut, floating-point tensors without values."""
    if x.is_floating_point() or x.is_complex():
        return torch.empty(shape(x, keep), dtype=x.dtype, device="meta")
    for dim, indices in keep.items():
        x = x.index_select(dim, indices.to(x.device))
    return abstract(x)


class _Comparing(Abstract):
    """Compares the shapes of results with the shapes in the trace, without the labels in `gone`.

    Only operators of `operators.COMPARED` are compared.
    """

    def __init__(self, operations: list[Operation], gone: np.ndarray) -> None:
        super().__init__()
        self._expected = [operation for operation in operations if operation.name in COMPARED]
        self._gone = gone
        self._compared = 0  # operators so far
        self._all = 0

    @property
    def reached(self) -> tuple[int, int]:
        """The numbers of operators so far, (compared, all)."""
        return self._compared, self._all

    def observe(self, name: str, args: tuple, kwargs: dict, out: Any, touched: bool) -> None:
        self._all += 1
        result = out[0] if isinstance(out, (list, tuple)) and out else out
        if touched and name in COMPARED and isinstance(result, Tensor):
            operation = self._next_operation(name)
            self._check_start(operation, args)
            self._check_shape(operation, result)

    def _next_operation(self, name: str) -> Operation:
        """Return the next operation of the trace; raise _Differs if `name` is not the operator."""
        if self._compared < len(self._expected):
            operation = self._expected[self._compared]
            if operation.name == name:
                self._compared += 1
                return operation
        raise _Differs(f"{name} comes where it did not before")

    def _check_start(self, operation: Operation, args: tuple) -> None:
        """Raise _Differs if a slice does not start right behind the remaining entries in front of the traced slice."""
        if operation.before is None:
            return
        x, dim, start = args[:3]
        start, _, _ = slice(start, None).indices(x.shape[dim])
        expected = int((~self._gone[operation.before]).sum())
        if start != expected:
            place = operation.module or "the model"
            raise _Differs(f"slice in {place} starts at {start}, not {expected}")

    def _check_shape(self, operation: Operation, result: Tensor) -> None:
        """Raise _Differs if the result's shape is not the traced shape without the removed entries."""
        expected = operation.shape_without(self._gone)
        shape = list(result.shape)
        if shape != expected and result.numel():  # nothing is known of an empty part
            place = operation.module or "the model"
            raise _Differs(f"{operation.name} in {place} gives {shape}, not {expected}")

    def finish(self) -> None:
        """Raise _Differs if operations of the trace are missing."""
        if self._compared < len(self._expected):
            raise _Differs(f"{self._expected[self._compared].name} does not come any more")
