"""Run a forward pass with every operator visible: without gradients, fused modules and checks of values."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

ASKS_DEVICE = ((torch.autocast, "__init__"), (torch, "is_autocast_enabled"), (torch, "get_autocast_dtype"))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let every step of a model be seen, as long as the `with` block runs.

    Gradients, torch's fused attention modules, and the checks of values by torch's distributions are off, and the
    random state is as before afterwards.
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
    """Treat meta as the CPU: forward passes ask autocast for x.device, and torch has no autocast for meta."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in ASKS_DEVICE]
    try:
        for owner, name, call in originals:
            setattr(owner, name, _with_cpu_for_meta(call))
        yield
    finally:
        for owner, name, call in originals:
            setattr(owner, name, call)


def _with_cpu_for_meta(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call` with "cpu" for every argument "meta"."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args = [_cpu_for_meta(x) for x in args]
        kwargs = {name: _cpu_for_meta(x) for name, x in kwargs.items()}
        return call(*args, **kwargs)

    return wrapped


def _cpu_for_meta(device: Any) -> Any:
    return "cpu" if isinstance(device, str) and device == "meta" else device
