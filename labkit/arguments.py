"""Checks of what labkit's functions are called with: one sentence for what would fail deep inside torch.

Numbers and choices are checked in `labkit.errors`, which imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # those that have arithmetic


def check_module(model: object, name: str = "model") -> None:
    """InputError unless `model` is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} is {_kind(model)}, but it must be a torch.nn.Module: give the model itself.")


def check_tensor(x: object, name: str) -> None:
    """InputError unless `x` is a dense tensor that has its numbers in memory."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} is {_kind(x)}, but it must be a tensor: make it one with torch.as_tensor.")
    if x.is_nested or x.layout is not torch.strided:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise InputError(f"{name} is a tensor of layout {layout}, but it must be dense: call .to_dense() first.")
    if x.is_meta:
        raise InputError(f"{name} is on the meta device, where tensors have no numbers: load it on a real device.")


def check_floats(x: object, name: str = "x") -> None:
    """InputError unless `x` is a dense tensor of floating-point numbers, at least one."""
    check_tensor(x, name)
    if x.dtype not in FLOATS or not x.numel():
        raise InputError(f"{name} is {x.dtype} {list(x.shape)}, but it must hold floating-point numbers, at least one.")


def check_alike(**tensors: Tensor) -> None:
    """InputError unless these floating-point tensors, by name, have one dtype and one device."""
    for name, x in tensors.items():
        check_floats(x, name)
    if len({(x.dtype, x.device) for x in tensors.values()}) > 1:
        places = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise InputError(f"All must have one dtype and one device, but got {places}: convert them with .to.")


def check_shapes(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """The size of each dimension, by its letters; InputError unless tensors with a letter in common have one size.

    tensors: (tensor, its dimensions), such as q=(q, "B H Q D"). No dimension may be empty.
    """
    sizes: dict[str, int] = {}
    fits = True
    for x, form in tensors.values():
        letters = form.split()
        fits &= x.dim() == len(letters)
        for letter, size in zip(letters, x.shape, strict=False):
            fits &= 0 < size == sizes.setdefault(letter, size)
    if not fits:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, (x, _) in tensors.items())
        forms = ", ".join(f"{name} [{', '.join(form.split())}]" for name, (_, form) in tensors.items())
        raise InputError(f"{shapes} do not fit together: give {forms}.")
    return sizes


def check_groups(heads: int, groups: int) -> None:
    """InputError unless the query heads can be shared out evenly among the heads of keys and values."""
    if heads % groups:
        raise InputError(f"{heads} query heads do not fit {groups} of keys and values: H must be a multiple of Hkv.")


def check_loaded(model: nn.Module) -> None:
    """Raise InputError unless `model` is a torch.nn.Module whose parameters and buffers are in memory."""
    check_module(model)
    for x in (*model.parameters(), *model.buffers()):
        if x.is_meta:
            raise InputError(
                "The model is on the meta device, where weights have no numbers: load it on a real device."
            )


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


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
