"""Guards around forward passes: a model restored afterwards, and the names of the running modules."""

import contextlib
import random
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

CONTAINERS = (dict, list, tuple, set, deque)


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
        now = _Contents.of(self.container)
        return not (_identical(now.keys, self.keys) and _identical(now.items, self.items))

    def restore_(self) -> None:
        self.container.clear()
        if isinstance(self.container, dict):
            self.container.update(zip(self.keys, self.items, strict=True))
        elif isinstance(self.container, set):
            self.container.update(self.items)
        else:
            self.container.extend(self.items)


def _identical(a: list[Any], b: list[Any]) -> bool:
    return list(map(id, a)) == list(map(id, b))


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model, and the random numbers of Python and numpy, afterwards.

    Passes run on copies, but a hook may close over a module of the model itself and write into its attributes, into
    containers there, or into buffers.
    """
    containers: dict[int, Any] = {}
    for module in model.modules():
        _collect_containers(vars(module), containers)
    contents = [_Contents.of(container) for container in containers.values()]
    readable = [x for x in model.buffers() if not (x.is_meta or x.is_inference())]
    buffers = [(x, x._version, x.detach().clone()) for x in readable]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
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
def following(model: nn.Module, called: set[str]) -> Iterator[list[str]]:
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
