"""Removing weights, channels, heads and layers: one module an idea, each under the name that the field gives it.

`from labkit.pruning import unstructured` and the like; a module is read only when it is asked for. The names of the
functions stay in their modules, because `prune` means something else in each.
"""

import importlib
import pkgutil

__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
