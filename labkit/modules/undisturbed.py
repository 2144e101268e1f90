"""A call whose every step can be seen: without gradients, fused modules and checks of values."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, no fused attention modules (their steps are to be seen), no distribution that looks at values, and
    random numbers as before afterwards.
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
    """Inside, autocast takes the meta device, for which torch has none, for the CPU: passes name the device of x."""

    def known(device: Any) -> Any:
        return "cpu" if isinstance(device, str) and device == "meta" else device

    def on_cpu(call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return call(*map(known, args), **{key: known(x) for key, x in kwargs.items()})

        return wrapped

    names = ((torch.autocast, "__init__"), (torch, "is_autocast_enabled"), (torch, "get_autocast_dtype"))
    before = [(owner, name, getattr(owner, name)) for owner, name in names]
    try:
        for owner, name, call in before:
            setattr(owner, name, on_cpu(call))
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
