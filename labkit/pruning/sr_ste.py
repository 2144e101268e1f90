"""N:M masks that move during training: SR-STE, a straight-through gradient that also pulls pruned weights to zero.

Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch. For fixed masks, train the
result of `nm.prune` instead.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.arguments import check_loaded, check_module
from labkit.errors import InputError
from labkit.modules import masks as masking
from labkit.modules.weights import named_parts, prunable, qualified
from labkit.pruning.blockwise import check_widths, weights_of
from labkit.pruning.pattern import check_pattern, mask

DECAY = 2e-4  # the paper's lambda_W; 0 would be a plain straight-through gradient


def prepare(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    ignore: str | Iterable[str] = (),
) -> nn.Module:
    """Return a copy of `model` for training, where every forward pass uses the n largest of every m weights.

    n, m: the pattern, n weights kept of every m along the input dimension.
    ignore: names of modules or weights to leave dense. `nm.prune` takes the same weights.

    The parameters stay dense and get the gradient of the pruned weights (straight through), plus DECAY * w where w is
    pruned (the sparse-refined term). `unstructured.sparsity` and `artifact.size` count pruned weights as zeros. After
    training call `finish`.
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
    """Return a copy of a `prepare`d model with weights exactly n:m, held by fixed masks as after `nm.prune`.

    Raises InputError for a model without moving masks.
    """
    check_module(model)
    if not list(_moving(model)):
        raise InputError("The model has no weights with moving masks: give one that sr_ste.prepare returned.")
    fixed = copy.deepcopy(model)
    masks = {}
    for name, module, attribute, moving in list(_moving(fixed)):
        masks[name] = moving.mask(module.parametrizations[attribute].original)
        _own_class_(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    masking.hold_(fixed, {name: masks[name] for name in prunable(fixed) if name in masks})
    return fixed


def _own_class_(module: nn.Module) -> None:
    """Give a copied module a class of its own.

    torch made the class for the module before it was copied; removing a parametrization would change the class of both.
    """
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


class _Moving(nn.Module):
    """The parametrization of a weight: dense parameter in, n of every m out.

    transposed: True for a weight stored as [in, out].
    stacked: True for a stack of matrices [experts, out, in].
    """

    def __init__(
        self,
        n: int,
        m: int,
        transposed: bool,
        stacked: bool,
    ) -> None:
        super().__init__()
        self.n, self.m, self.transposed, self.stacked = n, m, transposed, stacked

    def mask(self, weight: Tensor) -> Tensor:
        weight = weight.mT if self.transposed else weight
        rows = weight.flatten(0, 1) if self.stacked else weight
        keep = mask(rows, self.n, self.m).view(weight.shape)
        return keep.mT.contiguous() if self.transposed else keep

    def forward(self, weight: Tensor) -> Tensor:
        return _SparseRefined.apply(weight, self.mask(weight))


class _SparseRefined(torch.autograd.Function):
    """w where kept, else 0; the gradient passes straight through, plus DECAY * w where w was pruned."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(weight, keep)
        return weight.masked_fill(~keep, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, keep = ctx.saved_tensors
        return gradient + DECAY * weight.masked_fill(keep, 0.0), None


def _moving(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, _Moving]]:
    """Yield (name of the weight, module, attribute, parametrization), all places of a shared weight."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not parametrize.is_parametrized(module):
            continue
        for attribute, steps in module.parametrizations.items():
            if isinstance(steps[0], _Moving):
                yield qualified(path, attribute), module, attribute, steps[0]
