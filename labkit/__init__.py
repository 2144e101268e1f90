"""Inference optimisation, measured: the tested package behind the lessons.

`labkit.start(...)` begins a lesson. The modules lie in rooms, a folder each (see CONTRIBUTING.md). Modules for lessons
have a short name as well: `labkit.bench` is `labkit/timing/bench.py`. A module is imported on first use, and `import
labkit` by itself takes no time.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from labkit.on_demand import submodules

__all__ = ["start"]

# Short name of a module, and its place. `import labkit.bench` and `from labkit import bench` give the same module.
SHORT_NAMES = {
    "labkit.artifact": "labkit.storage.artifact",
    "labkit.batches": "labkit.modules.batches",
    "labkit.bench": "labkit.timing.bench",
    "labkit.claims": "labkit.lesson.claims",
    "labkit.clocks": "labkit.timing.clocks",
    "labkit.counting": "labkit.timing.counting",
    "labkit.datasets": "labkit.data.datasets",
    "labkit.fetch": "labkit.data.fetch",
    "labkit.machine": "labkit.timing.machine",
    "labkit.models": "labkit.data.models",
    "labkit.records": "labkit.lesson.records",
    "labkit.resnet": "labkit.data.resnet",
    "labkit.roofline": "labkit.timing.roofline",
    "labkit.session": "labkit.lesson.session",
    "labkit.shapes": "labkit.timing.shapes",
    "labkit.stats": "labkit.timing.stats",
    "labkit.training": "labkit.data.training",
    "labkit.pruning.coupling": "labkit.graph.groups",
    "labkit.pruning.equality": "labkit.graph.equality",
    "labkit.pruning.surgery": "labkit.graph.surgery",
}
ROOMS = ("attention", "data", "deploy", "graph", "lesson", "modules", "pruning", "quantization", "storage", "timing")


class _ShortNames(MetaPathFinder, Loader):
    """Import a module of SHORT_NAMES by importing the module in its room."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in SHORT_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(SHORT_NAMES[spec.name])
        spec.loader_state = module.__spec__  # the import system overwrites the module's spec with the short name's
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _ShortNames())


_SHORT = [name.removeprefix("labkit.") for name in SHORT_NAMES if name.count(".") == 1]
_MODULES = tuple(sorted({*_SHORT, *ROOMS, "distillation", "show", "triton_kernels"}))
_module = submodules("labkit", ("start", *_MODULES))


def __getattr__(name: str) -> Any:
    if name == "start":
        return importlib.import_module("labkit.lesson.session").start
    return _module(name)


def __dir__() -> list[str]:
    return ["start", *_MODULES]
