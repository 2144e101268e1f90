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
from typing import Any

import matplotlib
import numpy as np
import torch


def _default_device() -> torch.device:
    return torch.empty(0).device  # by its name torch 2.9 cannot tell it once it was set to None


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
    """All but the backend, which the first figure settles, whoever draws it."""
    style = matplotlib.rcParams.copy()
    return {name: value for name, value in style.items() if name != "backend"}


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {  # name -> how to get it, how to set it
    "torch's gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (_default_device, _set_default_device),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch's precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "numpy's errors": (np.geterr, _set_numpy_errors),
    "matplotlib's style": (_matplotlib_style, matplotlib.rcParams.update),
    "the working folder": (os.getcwd, os.chdir),
}


@contextmanager
def put_back() -> Iterator[list[str]]:
    """Put every setting back on leaving that was changed inside; yields a list, which then holds their names."""
    before = {name: get() for name, (get, _) in _SETTINGS.items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, (get, set_) in _SETTINGS.items():
            if get() != before[name]:
                set_(before[name])
                changed.append(name)


@contextmanager
def silently_put_back() -> Iterator[None]:
    """Put back what an answer may well use: random states, and filters of warnings that are for all messages."""
    python, numpy, filters = random.getstate(), np.random.get_state(), _general_filters()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        special = [entry for entry in warnings.filters if not _is_general(entry)]
        warnings.filters[:] = [*special, *filters]  # in place: the interpreter has this list


def _is_general(warning_filter: tuple) -> bool:
    """Whether a filter is for all messages of all modules; others are mostly of a library that was imported."""
    _, message, _, module, _ = warning_filter
    return message is None and module is None


def _general_filters() -> list[tuple]:
    return list(filter(_is_general, warnings.filters))


def putting_back(fn: Callable) -> Callable:
    """`fn` with the settings put back after every call. A class, a coroutine and a generator stay as they are."""
    if not inspect.isfunction(fn) or inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn):
        return fn

    @functools.wraps(fn)
    def call(*arguments: Any, **options: Any) -> Any:
        with put_back():
            return fn(*arguments, **options)

    return call
