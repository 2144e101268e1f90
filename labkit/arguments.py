"""Checks of arguments that are models, tensors, functions or lists: a sentence in place of an error deep inside torch.

Numbers and choices are checked in `labkit.errors`, which imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError, is_whole

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # floating-point types with arithmetic


def check_module(model: object, name: str = "model") -> None:
    """Raise InputError unless `model` is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} is {_kind(model)}, but it must be a torch.nn.Module: give the model itself.")


def check_tensor(x: object, name: str) -> None:
    """Raise InputError unless `x` is a dense tensor with numbers in memory; `name` is for the error's sentence."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} is {_kind(x)}, but it must be a tensor: make it one with torch.as_tensor.")
    if x.is_nested or x.layout is not torch.strided:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise InputError(f"{name} is a tensor of layout {layout}, but it must be dense: call .to_dense() first.")
    if x.is_meta:
        raise InputError(f"{name} is on the meta device, where tensors have no numbers: load it on a real device.")


def check_floats(x: object, name: str = "x") -> None:
    """Raise InputError unless `x` is a dense tensor of floating-point numbers with at least one element."""
    check_tensor(x, name)
    if x.dtype not in FLOATS or not x.numel():
        raise InputError(f"{name} is {x.dtype} {list(x.shape)}, but it must hold floating-point numbers, at least one.")


def check_alike(**tensors: Tensor) -> None:
    """Raise InputError unless all `tensors`, by name, are floating-point tensors of the same dtype and device."""
    for name, x in tensors.items():
        check_floats(x, name)
    kinds = {(x.dtype, x.device) for x in tensors.values()}
    if len(kinds) > 1:
        places = [f"{name} {x.dtype} on {x.device}" for name, x in tensors.items()]
        listed = ", ".join(places)
        raise InputError(f"All must have one dtype and one device, but got {listed}: convert them with .to.")


def check_shapes(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Raise InputError unless tensors that share a named dimension have the same size there, and return the sizes.

    tensors: (tensor, names of the dimensions), such as q=(q, "B H Q D"). No dimension may be empty.
    Returns the size of each named dimension.
    """
    sizes: dict[str, int] = {}
    fits = True
    for x, form in tensors.values():
        dimensions = form.split()
        fits &= x.dim() == len(dimensions)
        for dimension, size in zip(dimensions, x.shape, strict=False):
            expected = sizes.setdefault(dimension, size)
            fits &= size > 0 and size == expected
    if not fits:
        raise InputError(_misfit(tensors))
    return sizes


def _misfit(tensors: Mapping[str, tuple[Tensor, str]]) -> str:
    shapes, forms = [], []
    for name, (x, form) in tensors.items():
        dimensions = ", ".join(form.split())
        shapes.append(f"{name} {list(x.shape)}")
        forms.append(f"{name} [{dimensions}]")
    return f"{', '.join(shapes)} do not fit together: give {', '.join(forms)}."


def check_groups(heads: int, groups: int) -> None:
    """Raise InputError unless the number of query heads is a multiple of the number of KV heads (`groups`)."""
    if heads % groups:
        raise InputError(f"{heads} query heads do not fit {groups} of keys and values: H must be a multiple of Hkv.")


def check_loaded(model: nn.Module) -> None:
    """Raise InputError unless `model` is a torch.nn.Module, with parameters and buffers in memory."""
    check_module(model)
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise InputError("The model is on the meta device, where weights have no numbers: load it on a real device.")


def check_real(x: Any, name: str) -> None:
    """Raise InputError unless `x` is a dense tensor of real numbers with values."""
    check_tensor(x, name)
    if x.is_complex():
        raise InputError(f"{name} is {x.dtype}, but it must be of real numbers: take its .abs(), say.")


def check_mapping(value: Any, name: str, content: str) -> None:
    """Raise InputError unless `value` is a mapping; `content` describes the entries, such as "layer: channels"."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is a {type(value).__name__}, but it must be {{{content}}}.")


def arguments(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    """Return (args, kwargs) as for a call; InputError if kwargs are no {name: value}."""
    if isinstance(args, (Tensor, Mapping)) or not isinstance(args, (tuple, list)):
        args = (args,)
    if kwargs is not None:
        check_mapping(kwargs, "kwargs", "name: value")
    return tuple(args), dict(kwargs or {})


def check_several(values: Any, name: str) -> None:
    """Raise InputError unless `values` is iterable, and neither text nor an array of no dimensions."""
    is_text = isinstance(values, (str, bytes))
    is_scalar_array = getattr(values, "ndim", 1) == 0
    if is_text or is_scalar_array or not isinstance(values, Iterable):
        raise InputError(f"{name} is {values!r}, but it must be a list: put a single one in brackets.")


def check_function(value: Any, name: str) -> None:
    """Raise InputError unless `value` can be called."""
    if not isinstance(value, Callable):
        raise InputError(f"{name} is {value!r}, but it must be a function.")


def seeded(seed: Any) -> torch.Generator:
    """Return a generator that starts at `seed`; raise InputError for a seed that is no whole number."""
    if not is_whole(seed):
        raise InputError(f"seed is {seed!r}, but it must be a whole number.")
    return torch.Generator().manual_seed(int(seed))


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
