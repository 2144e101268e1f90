"""With this folder on PYTHONPATH a Python process has the pretend device as soon as it has imported torch."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTorch(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        import_torch = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            import_torch(module)
            from pretend import device

            device.install()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterTorch())
