"""The numbers that a model returns, in tensors or not, in containers and in objects of any class.

State is no output: the cache that a transformer returns is given back to it, and may shrink with what is removed.
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
    """The tensors of a model's output, in order: `value` itself, or what its items and its attributes hold.

    An object is looked into once. Raises InputError for what holds tensors in no order (a set), or can be read only
    once (an iterator), or makes them later (a function with a closure).
    """
    return [x for x in _leaves(value, {}) if isinstance(x, Tensor)]


def numbers(value: Any) -> list[complex]:
    """The numbers of Python in containers and dataclasses of a model's output: a width beside the logits, say."""
    return [x for x in _leaves(value, {}) if not isinstance(x, Tensor)]


def _leaves(value: Any, seen: dict[int, Any], counts: bool = True) -> Iterator[Tensor | complex]:
    """counts: whether numbers of Python are given too; those in other objects count calls, or stand in a config."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, (int, float, complex)):
        if counts:
            yield value
        return
    if isinstance(value, (type, ModuleType)) or _is_cache(value) or id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that no other object gets its number
    _check_readable(value)
    contained = isinstance(value, (Mapping, *SEQUENCES, SimpleNamespace)) or is_dataclass(value)
    for item in _held(value):
        yield from _leaves(item, seen, counts and contained)
    if contained:
        del seen[id(value)]  # only for cycles: what is returned twice is there twice


def _held(value: Any) -> list[Any]:
    """The items of a container, and the attributes of an object that are none of them."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, SEQUENCES) else ()
    held = list(items)
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return held  # which stand in its attributes
    state = object.__getstate__(value)  # (vars, slots), vars, or None, whatever the class says of itself
    parts = state if isinstance(state, tuple) else (state,)
    identities = {id(item) for item in held}
    return held + [x for part in parts if part for x in part.values() if id(x) not in identities]


def _is_cache(value: Any) -> bool:
    """Whether a class of transformers made it to keep keys, values and states from one call to the next."""
    return any("Cache" in kind.__name__ and kind.__module__.startswith("transformers.") for kind in type(value).__mro__)


def _check_readable(value: Any) -> None:
    made_here = isinstance(value, FunctionType) and value.__closure__
    unordered = isinstance(value, Set) and any(map(outputs, value))
    if made_here or unordered or isinstance(value, Iterator):
        raise InputError(
            f"The model's output holds a {type(value).__name__}, whose numbers cannot be compared one by one: let "
            "forward return them in a tuple, a list, a dictionary or an object."
        )
