"""Pruning: removing weights, channels, heads and layers, a module for each idea under its name in the field.

Open `unstructured.py` first: it begins with an example of ten lines.

unstructured.py: single weights held at zero
scores.py: how important a weight or a unit is
select.py: the k lowest scores
channels.py: really smaller layers: plan, cut, prove
allocation.py: how many units each group loses
sensitivity.py: the harm of pruning each group alone
transformers.py: attention heads and neurons removed
heads.py: importance of heads
depth.py: layers removed
nm.py: N:M sparsity
pattern.py: the N:M mask of a weight
permutation.py: channels in an order in which N:M keeps more
sparsegpt.py: kept weights that make up for the pruned
blockwise.py: a whole model pruned block after block
sr_ste.py: N:M masks that move during training
semi_structured.py: 2:4 weights on a GPU
sparse.py: zeros that make a model faster

A new pruning criterion is one function and one row of a table in `scores.py`: CRITERIA for single weights,
UNIT_CRITERIA for channels and heads. Every `criterion=` argument then accepts the new name.

Write `from labkit.pruning import unstructured`; a module is loaded when first used. Functions are called through their
module, because `prune` exists in several. Modules outside `__all__` serve the modules in it.
"""

from labkit.on_demand import submodules

__all__ = [
    "channels", "coupling", "depth", "equality", "heads", "nm", "permutation", "scores", "select",
    "semi_structured", "sensitivity", "sparse", "sparsegpt", "sr_ste", "surgery", "transformers", "unstructured",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
