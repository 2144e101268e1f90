"""Pruning: removing weights, channels, heads and layers, a module for each idea under its name in the field.

Open `unstructured.py` first; it begins with an example of ten lines. Then `scores.py` (how important is a weight),
`channels.py` (really smaller layers: plan, cut, prove) and `sparse.py` (zeros that make a model faster).

A new pruning criterion is one function and one row of a table in `scores.py`: CRITERIA for single weights,
UNIT_CRITERIA for channels and heads. Every `criterion=` argument then accepts the new name.

Write `from labkit.pruning import unstructured`; a module is loaded when first used. Functions are called through their
module, because `prune` exists in several. Modules outside the list below serve the listed modules.
"""

from labkit import submodules

__all__ = [
    "channels", "coupling", "depth", "equality", "heads", "nm", "permutation", "schedules", "scores", "select",
    "semi_structured", "sensitivity", "sparse", "sparsegpt", "sr_ste", "surgery", "transformers", "unstructured",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
