"""What the functions of `labkit.pruning` are called with: one sentence for what cannot be used, before work starts."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import nn

from labkit.arguments import check_module, check_tensor
from labkit.errors import InputError


def check_loaded(model: nn.Module) -> None:
    """InputError unless `model` is a module whose parameters and buffers have values."""
    check_module(model)
    if any(x.is_meta for x in (*model.parameters(), *model.buffers())):
        raise InputError("The model is on the meta device and has no weights: load them first.")


def check_real(x: Any, name: str) -> None:
    """InputError unless `x` is a dense tensor of real numbers that has values."""
    check_tensor(x, name)
    if x.is_complex():
        raise InputError(f"{name} is {x.dtype}, but it must be of real numbers: take its .abs(), say.")


def check_mapping(value: Any, name: str, content: str) -> None:
    """InputError unless `value` is a mapping of what `content` says, such as "layer: channels"."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is a {type(value).__name__}, but it must be {{{content}}}.")


def check_several(values: Any, name: str) -> None:
    """InputError unless `values` can be gone through, and is no text."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise InputError(f"{name} is {values!r}, but it must be a list: put a single one in brackets.")


def check_function(value: Any, name: str) -> None:
    """InputError unless `value` can be called."""
    if not isinstance(value, Callable):
        raise InputError(f"{name} is {value!r}, but it must be a function.")


def seeded(seed: Any) -> torch.Generator:
    """A generator that starts at `seed`; InputError if that is no whole number."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed is {seed!r}, but it must be a whole number.")
    return torch.Generator().manual_seed(int(seed))
