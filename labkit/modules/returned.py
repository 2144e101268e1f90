"""Collect the numbers returned by a model: in tensors or as numbers of Python, in containers or objects of any class.

State is no output: a transformer's cache is given back to the model, and may shrink with the removed parts.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Set, ValuesView
from dataclasses import is_dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from labkit.errors import InputError

SEQUENCES = (list, tuple, deque, ValuesView)
CONTAINERS = (Mapping, *SEQUENCES, SimpleNamespace)


def outputs(value: Any) -> list[Tensor]:
    """Return the tensors of a model's output in order: `value` itself, or the tensors in its items and attributes.

    An object is looked into once. Raises InputError for tensors without an order (in a set), readable only once (in an
    iterator), or made later (by a function with a closure).
    """
    return [x for x in _leaves(value, {}) if isinstance(x, Tensor)]


def numbers(value: Any) -> list[complex]:
    """Return the numbers of Python in containers and dataclasses of a model's output, for example a width."""
    return [x for x in _leaves(value, {}) if not isinstance(x, Tensor)]


def _leaves(value: Any, seen: dict[int, Any], with_numbers: bool = True) -> Iterator[Tensor | complex]:
    """Yield the tensors and numbers in `value`, in order.

    seen: {id: object} of the objects that are being looked into, or were and may not be again.
    with_numbers: yield numbers of Python too. Numbers in objects other than containers count calls, or belong to a
        config.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, (int, float, complex)):
        if with_numbers:
            yield value
        return
    if isinstance(value, (type, ModuleType)) or _is_cache(value) or id(value) in seen:
        return
    seen[id(value)] = value  # held, so that no other object gets its id
    _check_readable(value)
    is_container = isinstance(value, CONTAINERS) or is_dataclass(value)
    for item in _content(value):
        yield from _leaves(item, seen, with_numbers and is_container)
    if is_container:
        del seen[id(value)]  # only for cycles: a container that is returned twice counts twice


def _content(value: Any) -> list[Any]:
    """Return the items of a container, and the attributes of an object other than its items."""
    items = []
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, SEQUENCES):
        items = list(value)
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return items  # which are in its attributes too
    return items + _attributes(value, {id(item) for item in items})


def _attributes(value: Any, without: set[int]) -> list[Any]:
    """Return the attributes and slots of an object, except objects with ids in `without`."""
    state = object.__getstate__(value)  # (vars, slots), vars, or None, not asking the class's own __getstate__
    parts = state if isinstance(state, tuple) else (state,)
    attributes = []
    for part in parts:
        if part:
            attributes += [x for x in part.values() if id(x) not in without]
    return attributes


def _is_cache(value: Any) -> bool:
    """Return True if `value` is of a class of transformers for keys, values and states between calls."""
    for kind in type(value).__mro__:
        is_of_transformers = kind.__module__.startswith("transformers.")
        if is_of_transformers and "Cache" in kind.__name__:
            return True
    return False


def _check_readable(value: Any) -> None:
    """Raise InputError unless the numbers in `value` can be compared one by one."""
    is_closure = isinstance(value, FunctionType) and value.__closure__
    is_unordered = isinstance(value, Set) and any(map(outputs, value))
    if is_closure or is_unordered or isinstance(value, Iterator):
        raise InputError(
            f"The model's output holds a {type(value).__name__}, whose numbers cannot be compared one by one: let "
            "forward return them in a tuple, a list, a dictionary or an object."
        )
