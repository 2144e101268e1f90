"""Copies of models and inputs, with tensors exchanged, for passes without a trace on the model."""

import contextlib
import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labkit.errors import InputError, first_line

CopyTensor = Callable[[Tensor], Tensor]


class _CopyingTensors(TorchFunctionMode):
    """Makes deepcopy copy tensors by a function; deepcopy alone refuses tensors with a graph."""

    def __init__(self, copy_tensor: CopyTensor) -> None:
        super().__init__()
        self._copy_tensor = copy_tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memory = args
        memory[id(x)] = self._copy_tensor(x)
        return memory[id(x)]


def clone(x: Tensor) -> Tensor:
    """Copy `x` without the graph."""
    return x.detach().clone()


def duplicate(value: Any, copy_tensor: CopyTensor = clone, memory: Mapping[int, Any] | None = None) -> Any:
    """Return a deep copy of any object.

    copy_tensor: copies the tensors.
    memory: {id of an object: object to take the place of the copy}.
    Raises InputError if a part of the object cannot be copied, an open file, say.
    """
    try:
        with _CopyingTensors(copy_tensor):
            return copy.deepcopy(value, dict(memory or {}))
    except Exception as error:
        raise InputError(
            f"The model cannot be copied, or its example input cannot ({first_line(error)}): remove what they hold "
            "besides tensors, numbers and functions, such as open files or locks."
        ) from error


def duplicate_model(model: nn.Module, tensors: Mapping[int, Tensor], copy_tensor: CopyTensor = clone) -> nn.Module:
    """Return a copy of `model` with new parameters and buffers.

    tensors: {id of a parameter or buffer: tensor to take the place of the copy}.
    copy_tensor: copies all remaining tensors.
    """
    memory: dict[int, Any] = dict(tensors)
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict, set) and not value:
                memory[id(value)] = type(value)()  # a dozen for hooks, which deepcopy would take to pieces
    return duplicate(model, copy_tensor, memory)


def skeleton(
    model: nn.Module, tensors: Mapping[int, Tensor], copy_tensor: CopyTensor = clone, *, training: bool = False
) -> nn.Module:
    """Return a copy of `model` to run instead of the model, with experts multiplied in batches.

    tensors, copy_tensor: as for `duplicate_model`.
    training: the mode of all modules but batch norms: batch norms refuse single values in training.
    """
    new = duplicate_model(model, tensors, copy_tensor)
    for module in new.modules():
        module.training = training and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    batch_experts_(new)
    return new


def batch_experts_(model: nn.Module) -> None:
    """Multiply the experts of transformers in batches, not in groups: devices and widths set limits on groups."""
    for module in model.modules():
        switch = getattr(module, "set_experts_implementation", None)
        if switch and getattr(module.config, "_experts_implementation", None) == "grouped_mm":
            switch("batched_mm")


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Suspend garbage collection: copies make thousands of objects, all in use, and a search among them frees none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
