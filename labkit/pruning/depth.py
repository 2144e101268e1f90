"""Depth pruning: how little a whole layer changes, and a model without some of them.

Men et al. 2024 (ShortGPT: Block Influence), Gromov et al. 2024 (The Unreasonable Ineffectiveness of the Deeper Layers:
angular distance of consecutive layers). A removed layer passes its input on; nothing is trained here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from labkit.pruning.channels import Pruned

METHODS = ("cosine", "angular", "l2", "loss")


def layer_importance(
    model: nn.Module,
    batches: Iterable,
    method: str = "cosine",
    *,
    n: int = 1,
    loss_fn: Callable | None = None,
    label: str = "",
) -> Tensor:
    """Importance of every layer, [layers], float64 on the CPU; higher is more important, 0 changes nothing.

    n: how many layers in a row are taken as one block: entry l is then for layers l to l + n - 1, and there are
    layers - n + 1 entries (Gromov et al. remove the block with the lowest).
    method, over the valid tokens of all batches, x the block's input and y its output at a token:
    "cosine": E[1 - cos(x, y)] (Men et al. 2024, Block Influence).
    "angular": E[arccos(cos(x, y))] / pi, in [0, 1] (Gromov et al. 2024).
    "l2": E[|y - x| / |x|]: relative, since the residual stream grows from layer to layer.
    "loss": the increase of the mean loss per term without the block, the ground truth; negative where the model is
        better without it. One forward pass a block and batch. Loss as in `heads.head_importance`.
    Padding is left out, `batches` is read once, none is kept. label: shown on a progress bar over batches.
    """
    raise NotImplementedError


def prune_layers(
    model: nn.Module, layers: Iterable[int], *, kwargs: Mapping[str, Any] | None = None, check: bool = True
) -> Pruned:
    """A new model without the given layers, counted from 0. At least one stays.

    What is left is numbered anew (`layer_idx`), so that a cache has one entry a layer, and the config has the new
    number of layers and the kept entries of its lists by layer. `plan.kept` names the parameters of removed layers
    with no index kept. report: equality with the dense model whose removed layers pass their input on.
    Raises InputError for a bad index, no layer left, or a model with no or several lists of layers (T5).
    """
    raise NotImplementedError
