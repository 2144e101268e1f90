"""Network slimming: an L1 penalty on BatchNorm scales in training, so that pruning finds channels that do not matter.

Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming. Train with the penalty, then
`channels.prune(..., criterion="bn_scale")`, then fine-tune without it.
"""

import torch
from torch import Tensor, nn

from labkit.errors import InputError


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales gamma of all BatchNorm layers, {name: [channels]}; a shared one is there once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            found[f"{name}.weight" if name else "weight"] = module.weight
    if not found:
        raise InputError("The model has no BatchNorm layer with a scale: slimming is for networks that have them.")
    return found


def penalty(model: nn.Module) -> Tensor:
    """Sum of |gamma| over all BatchNorm scales, differentiable: add it to the loss, times about 1e-5 to 1e-3.

    The paper's eq. 1 with g(s) = |s|; at 0 the subgradient is 0, as torch's abs has it.
    """
    return torch.stack([gamma.abs().sum() for gamma in scales(model).values()]).sum()
