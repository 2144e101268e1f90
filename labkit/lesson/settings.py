"""Settings of the process that an exercise's answer may change, put back so that the lesson goes on as before.

with settings.put_back() as changed:
    answer()
print(changed)  # ["torch's default dtype"]
"""

import functools
import inspect
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch


class _Setting(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], object]


def _default_device() -> torch.device:
    return torch.empty(0).device  # torch 2.9 cannot tell the device by name after set_default_device(None)


def _set_default_device(device: torch.device) -> None:
    if device.type != "cpu":
        torch.set_default_device(device)
        return
    torch.set_default_device(None)  # "cpu" would be a detour at every new tensor
    with suppress(AttributeError):  # what None leaves there ends torch 2.9's get_default_device
        del torch._GLOBAL_DEVICE_CONTEXT.device_context


def _set_numpy_errors(errors: dict[str, Any]) -> None:
    np.seterr(**errors)


def _matplotlib_style() -> dict[str, Any]:
    """Return all of matplotlib's settings but the backend, which the first figure settles."""
    style = matplotlib.rcParams.copy()
    return {name: value for name, value in style.items() if name != "backend"}


_SETTINGS = {
    "torch's gradients": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "torch's default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": _Setting(_default_device, _set_default_device),
    "torch's deterministic algorithms": _Setting(
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch's precision of products": _Setting(
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "numpy's errors": _Setting(np.geterr, _set_numpy_errors),
    "matplotlib's style": _Setting(_matplotlib_style, matplotlib.rcParams.update),
    "the working folder": _Setting(os.getcwd, os.chdir),
}


@contextmanager
def put_back() -> Iterator[list[str]]:
    """Put every setting changed by the block back at the end; yields a list, filled with the settings' names then."""
    before = {name: setting.get() for name, setting in _SETTINGS.items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, setting in _SETTINGS.items():
            if setting.get() != before[name]:
                setting.set(before[name])
                changed.append(name)


@contextmanager
def silently_put_back() -> Iterator[None]:
    """Put back settings that an answer may well change: random states, and general filters of warnings."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    general_filters = [entry for entry in warnings.filters if _is_general(entry)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        special_filters = [entry for entry in warnings.filters if not _is_general(entry)]
        warnings.filters[:] = [*special_filters, *general_filters]  # in place: the interpreter has this list


def _is_general(warning_filter: tuple) -> bool:
    """Return True for a filter of all messages of all modules; the rest mostly come from an imported library."""
    _, message, _, module, _ = warning_filter
    return message is None and module is None


def putting_back(fn: Callable) -> Callable:
    """Wrap a function to put settings back after each call; return a class, coroutine or generator unchanged."""
    if not inspect.isfunction(fn) or inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn):
        return fn

    @functools.wraps(fn)
    def call(*arguments: Any, **options: Any) -> Any:
        with put_back():
            return fn(*arguments, **options)

    return call
