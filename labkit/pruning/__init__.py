"""Removing weights, channels, heads and layers: one module an idea, each under the name that the field gives it.

`from labkit.pruning import unstructured` and the like; a module is read only when it is asked for. The names of the
functions stay in their modules, because `prune` means something else in each. What is not listed serves these.
"""

from labkit import submodules

__all__ = [
    "channels", "coupling", "depth", "equality", "heads", "nm", "permutation", "schedules", "scores", "select",
    "semi_structured", "sensitivity", "sparse", "sparsegpt", "sr_ste", "surgery", "transformers", "unstructured",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
