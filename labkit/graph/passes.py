"""Forward passes without a trace on the model: copies of models and inputs, the running module, a model restored.

A pass runs on a copy (`on_copy`), with parameters and buffers exchanged: for tensors without values (`tracing`), for
the remaining entries of a cut (`fits`), or for another precision (`equality`). `full_copy` makes a copy to keep.
"""

import contextlib
import copy
import gc
import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from labkit.errors import InputError, first_line
from labkit.modules.undisturbed import undisturbed

CopyTensor = Callable[[Tensor], Tensor]
CONTAINERS = (dict, list, tuple, set, deque)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all parameters and buffers, each once, by the first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


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


# --- copies -----------------------------------------------------------------------------------------------------------


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


def duplicate_model(model: nn.Module, tensors: Mapping[str, Tensor], copy_tensor: CopyTensor = clone) -> nn.Module:
    """Return a copy of `model` with new parameters and buffers.

    tensors: {parameter or buffer: tensor to take the place of the copy}, by the names of `tensors_of`.
    copy_tensor: copies all remaining tensors.
    """
    memory: dict[int, Any] = {}
    for name, x in tensors_of(model):
        if name in tensors:
            memory[id(x)] = tensors[name]
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict, set) and not value:
                memory[id(value)] = type(value)()  # a dozen for hooks, which deepcopy would take to pieces
    return duplicate(model, copy_tensor, memory)


def with_entries(x: Tensor, entries: Tensor) -> Tensor:
    """Return `entries` in the place of `x`: as a Parameter with the attributes of `x` if `x` is a Parameter."""
    if not isinstance(x, nn.Parameter):
        return entries
    parameter = nn.Parameter(entries, requires_grad=x.requires_grad)
    parameter.__dict__.update(x.__dict__)
    return parameter


@torch.inference_mode(False)  # the copy is to be trained, wherever it was made
@collecting_later()
def full_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model`, to be kept and changed: all parameters and buffers in new memory."""
    return duplicate_model(model, {name: with_entries(x, clone(x)) for name, x in tensors_of(model)})


def batch_experts_(model: nn.Module) -> None:
    """Multiply the experts of transformers in batches, not in groups: devices and widths set limits on groups."""
    for module in model.modules():
        switch = getattr(module, "set_experts_implementation", None)
        if switch and getattr(module.config, "_experts_implementation", None) == "grouped_mm":
            switch("batched_mm")


# --- passes -----------------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """A forward pass to be run on a copy of a model.

    model: the copy.
    args, kwargs: the copied input.
    stack: names of the running modules, outermost first; "" is the model. An error leaves the failed module last.
    """

    model: nn.Module
    args: tuple
    kwargs: Mapping[str, Any]
    stack: list[str]

    def run(self) -> Any:
        return self.model(*self.args, **self.kwargs)


@contextlib.contextmanager
def on_copy(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    copy_input: CopyTensor = clone,
    copy_tensor: CopyTensor = clone,
    training: bool = False,
    called: set[str] | None = None,
) -> Iterator[Pass]:
    """Copy a model and an input, and yield the pass to be run in the `with` block with every operator visible.

    Experts are multiplied in batches.

    tensors, copy_tensor: as for `duplicate_model`.
    copy_input: copies the tensors of the input.
    training: the mode of all modules but batch norms: batch norms refuse single values in training.
    called: receives the names of all modules, once run.
    """
    copied = duplicate_model(model, tensors, copy_tensor)
    for module in copied.modules():
        module.training = training and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    batch_experts_(copied)
    args, kwargs = duplicate((args, dict(kwargs)), copy_input)
    with undisturbed(), _following(copied, set() if called is None else called) as stack:
        yield Pass(copied, args, kwargs, stack)


class _Contents(NamedTuple):
    """The items of a container at some time, with `keys` of a dictionary, empty for other containers."""

    container: Any
    keys: list[Any]
    items: list[Any]

    @classmethod
    def of(cls, container: Any) -> "_Contents":
        if isinstance(container, dict):
            return cls(container, list(container.keys()), list(container.values()))
        return cls(container, [], list(container))

    def changed(self) -> bool:
        if not isinstance(self.container, dict):
            return not _identical(self.container, self.items)
        return not (_identical(self.container, self.keys) and _identical(self.container.values(), self.items))

    def restore_(self) -> None:
        self.container.clear()
        if isinstance(self.container, dict):
            self.container.update(zip(self.keys, self.items, strict=True))
        elif isinstance(self.container, set):
            self.container.update(self.items)
        else:
            self.container.extend(self.items)


def _identical(a: Collection[Any], b: Collection[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model, and the random numbers of Python and numpy, afterwards.

    Passes run on copies, but a hook may close over a module of the model itself and write into its attributes, into
    containers there, or into buffers.
    """
    containers: dict[int, Any] = {}
    for module in model.modules():
        _collect_containers(vars(module), containers)
    empty = [container for container in containers.values() if not container]  # most of a module's own are
    contents = [_Contents.of(container) for container in containers.values() if container]
    readable = [x for x in model.buffers() if not (x.is_meta or x.is_inference())]
    buffers = [(x, x._version, x.detach().clone()) for x in readable]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for container in empty:
            if container:
                container.clear()
        for before in contents:
            if before.changed():
                before.restore_()
        for x, version, values in buffers:
            if x._version != version:
                with torch.no_grad():
                    x.copy_(values)


def _collect_containers(value: Any, containers: dict[int, Any]) -> None:
    """Put `value` and all containers inside into `containers`, {id: container}, if `value` is a container."""
    if not isinstance(value, CONTAINERS) or id(value) in containers:
        return
    containers[id(value)] = value
    for item in value.values() if isinstance(value, dict) else value:
        _collect_containers(item, containers)


@contextlib.contextmanager
def _following(model: nn.Module, called: set[str]) -> Iterator[list[str]]:
    """Yield the names of the running modules, outermost first; "" is the model.

    called: receives the names of all modules, once run.
    """
    names = {id(module): name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))
        called.add(stack[-1])

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
