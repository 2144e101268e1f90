"""N:M sparsity: n of every m weights kept along the input dimension, as hardware multiplies them; models so pruned.

Here are the names that a user needs; one module an idea behind them: `nm_pattern` (which weights), `nm_packed` (bytes),
`layerwise` (magnitude, Wanda and SparseGPT through a model), `sr_ste` (masks that move in training), `permutation`
(channels in a better order), `semi_structured` (2:4 on a GPU).
"""

from collections.abc import Iterable

from torch import nn

from labkit.pruning import layerwise
from labkit.pruning.nm_packed import Packed, compress, decompress
from labkit.pruning.nm_pattern import check_pattern, density, is_nm, kept_energy, mask

__all__ = ["Packed", "compress", "decompress", "density", "is_nm", "kept_energy", "mask", "prune"]


def prune(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    method: str = "magnitude",
    batches: Iterable | None = None,
    exclude: str | Iterable[str] = (),
    pad: bool = False,
    damp: float = 0.01,
    progress: str = "",
) -> nn.Module:
    """A copy of `model` whose weights keep n of every m along the input dimension; masks hold them through training.

    method: "magnitude" (no data), "wanda" (Sun et al. 2024) or "sparsegpt" (Frantar & Alistarh 2023, the kept weights
        move). The last two look at data: batches, an iterable of what the model is called with, run through it layer
        by layer; the inputs of a layer are those that the layers pruned before it give. See `layerwise.prune`, which
        does the work and takes a fraction as well.
    Which weights: `layerwise.weights_of`: in a stack of blocks, as language models are, those of the blocks, else all
        of `criteria.prunable`; less the modules and weights named in exclude.
    pad: else a weight whose input dimension is no multiple of m is an InputError that names it; see `mask`.
    damp: of SparseGPT. progress: a label for a progress bar, none without.

    The masks are held as those of `unstructured.prune` are (`unstructured.masks` reads them, `make_permanent` takes
    them off): stored zeros that stay zero through optimizer steps, deepcopy and `load_state_dict`. For masks that move
    during training see `sr_ste`.
    """
    check_pattern(n, m)
    return layerwise.prune(
        model, (n, m), method=method, batches=batches, exclude=exclude, pad=pad, damp=damp, progress=progress
    )
