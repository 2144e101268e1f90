"""Inference optimisation, measured: the tested package that the lessons import.

`labkit.start(...)` begins a lesson. The modules are attributes of the package, each imported when it is first used, so
that `import labkit` costs nothing.
"""

import importlib
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

_MODULES = (
    "artifact", "attention", "bench", "checks", "claims", "datasets", "deploy", "distillation", "machine", "models",
    "pruning", "quantization", "records", "roofline", "session", "show", "stats", "training",
)  # fmt: skip

__all__ = ["start"]


def submodules(package: str, names: Collection[str]) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package that imports each of its modules when it is first used."""

    def module(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no {name!r}; it has {', '.join(names)}")

    return module


_module = submodules("labkit", ("start", *_MODULES))


def __getattr__(name: str) -> Any:
    return importlib.import_module("labkit.session").start if name == "start" else _module(name)


def __dir__() -> list[str]:
    return ["start", *_MODULES]
