"""Inference optimisation, measured: the tested package that the lessons import.

`labkit.start(...)` begins a lesson. The modules are attributes of the package, each imported when it is first used, so
that `import labkit` costs nothing.
"""

import importlib
from typing import Any

_MODULES = (
    "artifact", "bench", "checks", "claims", "datasets", "deploy", "distillation", "machine", "models", "pruning",
    "records", "roofline", "session", "show", "stats", "training",
)  # fmt: skip

__all__ = ["start"]


def __getattr__(name: str) -> Any:
    if name == "start":
        return importlib.import_module("labkit.session").start
    if name in _MODULES:
        return importlib.import_module(f"labkit.{name}")
    raise AttributeError(f"labkit has no {name!r}; it has start, {', '.join(_MODULES)}")


def __dir__() -> list[str]:
    return ["start", *_MODULES]
