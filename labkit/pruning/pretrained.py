"""A pruned transformer on the disk: config, weights in safetensors, and what the config cannot say.

`load` needs no dense model and no history: it builds the architecture from the config and sets the shapes and numbers
(heads of each layer, widths) in which the pruned model differs from it. Heals and several prunings in a row are fine.
Nothing is unpickled.
"""

from pathlib import Path

from torch import nn

from labkit.pruning.channels import Pruned


def save(pruned: Pruned | nn.Module, folder: str | Path) -> None:
    """Writes config.json, weights.safetensors and plan.json into `folder`, each atomically."""
    raise NotImplementedError


def load(folder: str | Path) -> Pruned:
    """The pruned model in eval mode and the plan of its last cut; report is None, the proof is not repeated.

    Raises DataError where files are missing or damaged.
    """
    raise NotImplementedError
