"""Modules and names that are imported on first use."""

import importlib
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any


def submodules(package: str, names: Collection[str]) -> Callable[[str], ModuleType]:
    """Make the `__getattr__` of a package, to import each module of the package on first use.

    package: dotted name of the package.
    names: names of the modules in the package.
    """

    def module(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no {name!r}; it has {', '.join(names)}")

    return module


def names_on_demand(module: str, origins: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module, to offer names from further modules and import each on first use.

    module: dotted name of the offering module.
    origins: dotted name of the defining module, by name.
    """

    def value(name: str) -> Any:
        if name in origins:
            return getattr(importlib.import_module(origins[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return value
