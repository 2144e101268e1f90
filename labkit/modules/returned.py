"""The numbers in a model's output, in tensors or not, in containers and in objects of any class.

State is no output: a transformer's cache is handed to the next call, and may shrink with the removed channels.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Set, ValuesView
from dataclasses import is_dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from labkit.errors import InputError

SEQUENCES = (list, tuple, deque, ValuesView)


def outputs(value: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order.

    value: a tensor, a container, or any object: items and attributes are searched, each object once.
    Raises InputError for tensors without an order (in a set), for an iterator, which can be read only once, and for a
    function with a closure, which makes tensors later.
    """
    return [x for x in _leaves(value, {}) if isinstance(x, Tensor)]


def numbers(value: Any) -> list[complex]:
    """Return Python's numbers in containers and dataclasses of a model's output: a width beside the logits, say."""
    return [x for x in _leaves(value, {}) if not isinstance(x, Tensor)]


def _leaves(value: Any, seen: dict[int, Any], with_numbers: bool = True) -> Iterator[Tensor | complex]:
    """Yield the tensors and numbers inside `value`.

    seen: {id: object} of the objects on the way to `value`, and of all searched objects that are no containers.
    with_numbers: True to yield Python's numbers too; numbers in plain objects count calls, or stand in a config.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, (int, float, complex)):
        if with_numbers:
            yield value
        return
    is_code = isinstance(value, (type, ModuleType))
    if is_code or _is_cache(value) or id(value) in seen:
        return
    seen[id(value)] = value  # held here, so that no later object gets the same id
    _check_readable(value)
    is_container = isinstance(value, (Mapping, *SEQUENCES, SimpleNamespace)) or is_dataclass(value)
    for item in _contents(value):
        yield from _leaves(item, seen, with_numbers and is_container)
    if is_container:
        del seen[id(value)]  # only for cycles: a container returned twice counts twice


def _contents(value: Any) -> list[Any]:
    """Return the items of a container, then the attributes of the object that are not among the items."""
    items: list[Any] = []
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, SEQUENCES):
        items = list(value)
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return items  # its attributes hold the items
    state = object.__getstate__(value)  # (vars, slots), vars, or None, also for a class with a __getstate__
    parts = state if isinstance(state, tuple) else (state,)
    item_ids = set(map(id, items))
    for part in parts:
        if part:
            items += [x for x in part.values() if id(x) not in item_ids]
    return items


def _is_cache(value: Any) -> bool:
    """Return True for an object of transformers that holds keys, values and states from call to call."""
    for kind in type(value).__mro__:
        if "Cache" in kind.__name__ and kind.__module__.startswith("transformers."):
            return True
    return False


def _check_readable(value: Any) -> None:
    """Raise InputError for an object with tensors that cannot be read in order, again and again."""
    has_closure = isinstance(value, FunctionType) and value.__closure__
    is_unordered = isinstance(value, Set) and any(map(outputs, value))
    if has_closure or is_unordered or isinstance(value, Iterator):
        raise InputError(
            f"The model's output holds a {type(value).__name__}, whose numbers cannot be compared one by one: let "
            "forward return them in a tuple, a list, a dictionary or an object."
        )
