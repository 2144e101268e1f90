"""Calls with every step visible: without gradients, fused modules and checks of values."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run calls without gradients, fused attention modules and distributions that check values.

    Fused modules would hide their steps. Autocast takes the meta device for the CPU. Torch's random numbers are
    restored afterwards.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    validates = torch.distributions.Distribution._validate_args
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _autocast_on_meta():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.distributions.Distribution.set_default_validate_args(False)
            yield
        finally:
            torch.distributions.Distribution.set_default_validate_args(validates)
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Let autocast take the meta device, unknown to it, for the CPU: forward passes name the device of an input."""
    functions = ((torch.autocast, "__init__"), (torch, "is_autocast_enabled"), (torch, "get_autocast_dtype"))
    originals = [(owner, name, getattr(owner, name)) for owner, name in functions]
    try:
        for owner, name, function in originals:
            setattr(owner, name, _with_cpu_for_meta(function))
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _with_cpu_for_meta(function: Callable) -> Callable:
    """Wrap a function to get "cpu" in the place of each argument "meta"."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        new_args = [_cpu_for_meta(value) for value in args]
        new_kwargs = {key: _cpu_for_meta(value) for key, value in kwargs.items()}
        return function(*new_args, **new_kwargs)

    return wrapped


def _cpu_for_meta(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value == "meta" else value
