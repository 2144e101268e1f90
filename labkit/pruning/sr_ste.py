"""N:M masks that move during training: SR-STE, a straight-through gradient that also pulls pruned weights to zero.

Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch. For masks that stay as they
are, train what `nm.prune` returns.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.arguments import check_loaded, check_module
from labkit.errors import InputError
from labkit.modules import masks as masking
from labkit.modules.weights import named_parts, prunable
from labkit.pruning.blockwise import check_widths, weights_of
from labkit.pruning.pattern import check_pattern, mask

DECAY = 2e-4  # the paper's lambda_W; 0 would be a plain straight-through gradient


def prepare(model: nn.Module, n: int = 2, m: int = 4, *, ignore: str | Iterable[str] = ()) -> nn.Module:
    """A copy of `model` to train: every forward pass uses n of every m weights, by magnitude at that moment.

    The parameters stay dense and all get the gradient of the pruned weights (straight through), plus DECAY * w where w
    is pruned (the sparse-refined term). Which weights: as in `nm.prune`.
    `finish` makes the trained model plain. `unstructured.sparsity` and `artifact.size` see what the forward pass sees.
    """
    check_pattern(n, m)
    check_loaded(model)
    masking.refuse_foreign(model)
    if masking.masks(model):
        raise InputError("The model holds masks already, and pruned weights do not move: make_permanent it first.")
    ignore = named_parts(model, ignore, "ignore")
    check_widths(weights_of(model, ignore), (n, m))
    trainable = copy.deepcopy(model)
    owners = masking.owners(trainable)
    for weight in weights_of(trainable, ignore).values():
        moving = _Moving(n, m, weight.transposed, weight.experts is not None)
        for module, attribute in owners[id(weight.parameter)]:
            parametrize.register_parametrization(module, attribute, moving)
    return trainable


def finish(model: nn.Module) -> nn.Module:
    """A copy of a `prepare`d model whose weights are exactly n:m, held by fixed masks as in what `nm.prune` returns."""
    check_module(model)
    if not any(True for _ in _moving(model)):
        raise InputError("The model has no weights with moving masks: give one that sr_ste.prepare returned.")
    fixed = copy.deepcopy(model)
    masks = {}
    for name, module, attribute, moving in list(_moving(fixed)):
        masks[name] = moving.mask(module.parametrizations[attribute].original)
        made = type(module)  # by torch for the module that was copied, and removing would change it for both
        module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    masking.hold_(fixed, {name: masks[name] for name in prunable(fixed) if name in masks})
    return fixed


class _Moving(nn.Module):
    """The parametrization of one weight: dense parameter in, n of every m out."""

    def __init__(self, n: int, m: int, transposed: bool, stacked: bool) -> None:
        super().__init__()
        self.n, self.m, self.transposed, self.stacked = n, m, transposed, stacked

    def mask(self, weight: Tensor) -> Tensor:
        weight = weight.mT if self.transposed else weight
        keep = mask(weight.flatten(0, 1) if self.stacked else weight, self.n, self.m).view(weight.shape)
        return keep.mT.contiguous() if self.transposed else keep

    def forward(self, weight: Tensor) -> Tensor:
        return _SparseRefined.apply(weight, self.mask(weight))


class _SparseRefined(torch.autograd.Function):
    """w where kept, else 0; its gradient passes straight through, plus DECAY * w where w was pruned."""

    @staticmethod
    def forward(ctx, weight: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(weight, keep)
        return weight.masked_fill(~keep, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        weight, keep = ctx.saved_tensors
        return gradient + DECAY * weight.masked_fill(keep, 0.0), None


def _moving(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, _Moving]]:
    """(name of the weight, its module and attribute, its parametrization), each place of a shared one."""
    for path, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            for attribute, steps in module.parametrizations.items():
                if isinstance(steps[0], _Moving):
                    yield f"{path}.{attribute}" if path else attribute, module, attribute, steps[0]
