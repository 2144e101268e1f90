"""Pruning single weights: masks that hold through training, and a sparsity that is what the forward pass sees.

Magnitude pruning of Han et al. 2015 with any criterion of `scores`. A pruned model keeps its parameters and their
names: a pruned weight is a stored zero, and hooks keep it one. Nothing gets smaller or faster here; see `sparse`.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from labkit.arguments import check_loaded, check_mapping, check_real
from labkit.errors import InputError, check_choice
from labkit.modules.masks import hold_, make_permanent, mask_of, masks, refuse_foreign
from labkit.modules.weights import Weight, computed, inside, named_parts, prunable
from labkit.pruning.scores import saliency
from labkit.pruning.select import count_to_prune, fraction, lowest_k

__all__ = ["make_permanent", "masks", "prune", "sparsity", "with_masks"]  # masks are held by labkit.modules.masks

SCOPES = ("global", "layer", "row")


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    criterion: str = "magnitude",
    scope: str = "global",
    batches: Iterable | None = None,
    loss_fn=None,
    ignore: str | Iterable[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` in which the fraction `sparsity` of the prunable weights is held at zero (`weights.prunable`).

    sparsity: of all those weights together, not of those that remain; 1 and 1.0 both mean all. Reached to within half a
        weight in every group that `scope` ranks by itself.
    scope: "global": all weights are one group; "layer": each weight tensor, each expert of a mixture by itself; "row":
        each output unit.
    criterion, batches, loss_fn, seed: see `scores.saliency`.
    ignore: names of modules or weights to leave alone; they then count neither as asked nor as reached.

    Weights that are zero already go first, so pruning again keeps the earlier mask. Frozen weights are pruned too and
    stay frozen; a shared weight is pruned once. The masks outlast optimizer steps, deepcopy and `load_state_dict`;
    `state_dict` has the names and sizes of the dense model's and holds zeros. A model that was loaded from one gets
    its masks back with prune(model, sparsity(model)). Masks cost every call two passes over the weights: for timing
    take `make_permanent` of it. torch.export stores the weights as the last call left them. An optimizer that was made
    before goes on training the dense model.

    Raises InputError for a bad argument, and where masks hold more than is asked for. Warns where weights in other
    stacks of matrices stay dense, and where more weights are zero already than are asked for.
    """
    asked = fraction(sparsity)
    check_choice(scope, SCOPES, "scope")
    weights = checked_targets(model, ignore)
    _refuse_growing_back(weights, asked, scope)
    zeros = sum(int(_zero(weight).sum()) for weight in weights.values())
    if scope == "global" and asked and zeros > count_to_prune(_numel(weights), asked):
        warnings.warn(
            f"{zeros / _numel(weights):.2%} of the weights are zero already, more than the {asked:.2%} asked for: that "
            "many of them are held there from now on, and no other weight is pruned.",
            stacklevel=2,
        )
    scores = _scores(model, weights, criterion, batches, loss_fn, seed)
    return with_masks(model, {name: ~lowest for name, lowest in _lowest(weights, scores, asked, scope).items()})


def sparsity(model: nn.Module, *, ignore: str | Iterable[str] = ()) -> float:
    """The fraction of the prunable weights that is zero in the forward pass, however it became so.

    Masks count, those of torch.nn.utils.prune too, and so do stored zeros and parametrizations; a shared weight counts
    once. An optimizer may have moved a pruned weight since the last forward pass: it is zero in the next one, and here.
    Warns of weights in stacks of matrices that are not counted (`prune`).
    """
    check_loaded(model)
    parts = named_parts(model, ignore, "ignore")
    zero = [value == 0 for name, _, value in computed(model) if not any(inside(name, part) for part in parts)]
    weights = _included(model, parts) if zero else targets(model, parts)
    _warn_of_stacks(model, parts, weights)
    zero += [_zero(weight) for weight in weights.values()]
    return sum(int(x.sum()) for x in zero) / sum(x.numel() for x in zero)


def with_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` that holds `masks` ({name of a prunable weight: bool tensor of its shape, True where kept})."""
    weights = {name: weight.parameter for name, weight in targets(model).items()}
    check_mapping(masks, "masks", "name of a weight: mask")
    for name, mask in masks.items():
        check_real(mask, f"masks[{name!r}]")
        if name not in weights or mask.dtype != torch.bool or mask.shape != weights[name].shape:
            example = name if name in weights else next(iter(weights))
            raise InputError(
                f"masks has {mask.dtype} {list(mask.shape)} for {name!r}, but a mask is torch.bool with the shape of "
                f"a prunable weight: {list(weights[example].shape)} for {example!r}."
            )
    masked = copy.deepcopy(model)
    hold_(masked, masks)
    return masked


def targets(model: nn.Module, ignore: str | Iterable[str] = ()) -> dict[str, Weight]:
    """`weights.prunable` without the modules and weights named in `ignore`; an InputError if none is left."""
    weights = _included(model, named_parts(model, ignore, "ignore"))
    if not _numel(weights):
        raise InputError(
            "The model has no weights to prune: it needs a Linear, Conv1d to Conv3d, transformers Conv1D or "
            "MultiheadAttention that ignore does not name."
        )
    return weights


def checked_targets(model: nn.Module, ignore: str | Iterable[str] = ()) -> dict[str, Weight]:
    """`targets` for pruning: InputError for weights that something else computes, or that have no values to rank."""
    refuse_foreign(model)
    parts = named_parts(model, ignore, "ignore")
    weights = targets(model, parts)
    for name, p in ((name, weight.parameter) for name, weight in weights.items()):
        if p.is_meta or p.itemsize == 1:
            raise InputError(
                f"{name} is {p.dtype} on {p.device}, where weights can neither be ranked nor masked: build the model "
                "with its values, in bfloat16 or wider."
            )
    _warn_of_stacks(model, parts, weights)
    return weights


def _warn_of_stacks(model: nn.Module, parts: list[str], weights: Mapping[str, Weight]) -> None:
    """Says which matrices are not among `weights` that a reader would take for weights: experts of an unknown form."""
    reached = {id(module.weight) for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    reached |= {id(weight.parameter) for weight in weights.values()}
    named = ((name, p) for name, p in model.named_parameters() if not any(inside(name, part) for part in parts))
    stacks = {name: p.numel() for name, p in named if p.dim() == 3 and min(p.shape) > 1 and id(p) not in reached}
    if stacks:
        share = sum(stacks.values()) / (sum(stacks.values()) + _numel(weights))
        warnings.warn(
            f"{share:.0%} of the weights are in stacks of matrices such as {next(iter(stacks))}, of which labkit does "
            "not know the dimensions: they stay dense and do not count; name them in ignore if that is meant.",
            stacklevel=4,
        )


def _numel(weights: Mapping[str, Weight]) -> int:
    return sum(weight.parameter.numel() for weight in weights.values())


def _included(model: nn.Module, parts: list[str]) -> dict[str, Weight]:
    """A shared weight is left out if any of its names is."""
    named = model.named_parameters(remove_duplicate=False)
    excluded = {id(parameter) for name, parameter in named if any(inside(name, part) for part in parts)}
    return {name: weight for name, weight in prunable(model).items() if id(weight.parameter) not in excluded}


# --- choosing ---------------------------------------------------------------------------------------------------------


def _slices(weights: dict[str, Weight], values: Mapping[str, Tensor], scope: str) -> dict[str, Tensor]:
    """The values [slices, n] of each weight, or of the model as one, whose every slice `scope` ranks by itself."""
    rows = {name: weights[name].as_rows(x) for name, x in values.items()}  # [out, in]
    if scope == "row":
        return rows
    if scope == "layer":
        return {name: x.reshape(weights[name].experts or 1, -1) for name, x in rows.items()}
    device = next(iter(rows.values())).device
    return {"the model": torch.cat([x.reshape(1, -1).to(device) for x in rows.values()], 1)}


def _refuse_growing_back(weights: dict[str, Weight], asked: float, scope: str) -> None:
    """Pruned weights do not come back, so asking for less than there is would silently do nothing."""
    for label, gone in _slices(weights, {name: ~_mask_of(weight) for name, weight in weights.items()}, scope).items():
        most, n = int(gone.sum(1).max()), gone.shape[1]
        if most > count_to_prune(n, asked):
            raise InputError(
                f"{label} is already {most / n:.2%} pruned{' in a row' if scope == 'row' else ''}, more than the "
                f"{asked:.2%} asked for, and pruned weights do not come back: ask for more, or take the dense model."
            )


def _scores(model, weights: dict[str, Weight], criterion, batches, loss_fn, seed) -> dict[str, Tensor]:
    """The saliency of `weights`, with weights that are gone already below every other one."""
    scores = saliency(model, criterion, batches, loss_fn=loss_fn, seed=seed)
    if unseen := [name for name in weights if name not in scores]:
        raise InputError(
            f"Criterion {criterion!r} has no score for {', '.join(unseen[:5])}, which the batches did not reach as a "
            "layer's weight: name them in ignore, or use a criterion without data."
        )
    for name in weights:
        if scores[name].isnan().any():
            raise InputError(
                f"Criterion {criterion!r} is NaN for {name!r}: look for NaN in the weights, the batches or the loss."
            )
    return {
        name: scores[name].masked_fill(_zero(weight), -1.0).masked_fill(~_mask_of(weight), -2.0)
        for name, weight in weights.items()
    }


def _lowest(weights: dict[str, Weight], scores: dict[str, Tensor], asked: float, scope: str) -> dict[str, Tensor]:
    """True at the lowest scores of every slice that `scope` ranks by itself."""
    slices = _slices(weights, scores, scope).values()
    lowest = [lowest_k(x, count_to_prune(x.shape[1], asked), dim=1) for x in slices]
    if scope == "global":
        lowest = lowest[0].split([x.numel() for x in scores.values()], 1)
    return {weight.name: weight.from_rows(low) for weight, low in zip(weights.values(), lowest, strict=True)}


def _mask_of(weight: Weight) -> Tensor:
    mask = mask_of(weight.module, weight.attribute)
    return torch.ones_like(weight.parameter, dtype=torch.bool) if mask is None else mask


def _zero(weight: Weight) -> Tensor:
    """True where the forward pass sees a zero."""
    return (weight.parameter.detach() == 0) | ~_mask_of(weight)


# --- holding ----------------------------------------------------------------------------------------------------------
