"""Unstructured pruning: single weights held at zero by masks, through training, saving and loading.

Magnitude pruning of Han et al. 2015, or any criterion of `scores.CRITERIA`. The pruned model is a copy with the same
parameters under the same names; a pruned weight is a stored zero, and hooks keep it there. The model gets neither
smaller nor faster here; `sparse.convert` does that. A pruned model trains like any model:

    >>> import torch
    >>> from labkit.pruning import unstructured
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> pruned = unstructured.prune(model, 0.75)  # a copy without 75 % of the weights of both layers together
    >>> unstructured.sparsity(pruned), unstructured.sparsity(model)
    (0.75, 0.0)
    >>> optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    >>> pruned(torch.ones(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> unstructured.sparsity(pruned)
    0.75
"""

import copy
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from labkit.arguments import check_loaded, check_mapping, check_real
from labkit.errors import InputError, check_choice
from labkit.modules.masks import hold_, make_permanent, mask_of, masks, refuse_foreign
from labkit.modules.weights import Weight, computed, inside, named_parts, prunable
from labkit.pruning.scores import LossFn, saliency
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
    loss_fn: LossFn | None = None,
    ignore: str | Iterable[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` with the fraction `sparsity` of the prunable weights (`weights.prunable`) held at zero.

    sparsity: a fraction of all prunable weights, earlier zeros included; 1 and 1.0 both mean all. Reached to within
        half a weight in every group ranked together.
    scope: which weights are ranked together. "global": all weights of the model; "layer": each weight tensor, and each
        expert of a mixture; "row": the weights of each output unit.
    criterion, batches, loss_fn, seed: see `scores.saliency`.
    ignore: names of modules or weights to leave alone; ignored weights do not count for the sparsity.

    Weights that are zero already go first, so that pruning again keeps the earlier mask. Frozen weights are pruned too
    and stay frozen; a shared weight is pruned once. Masks outlast optimizer steps, deepcopy and `load_state_dict`.
    `state_dict` has the names and sizes of the dense model's, and zeros; a model loaded from a state_dict gets masks
    back with prune(model, sparsity(model)). Masks cost every call two passes over the weights: for timing, take
    `make_permanent` of the model. torch.export stores the weights as the last call left them. An optimizer made before
    pruning goes on training the dense model.

    Raises InputError for a bad argument, and if masks already hold more than the sparsity asked for. Warns if weights
    in other stacks of matrices stay dense, and if more weights are zero already than asked for.
    """
    asked = fraction(sparsity)
    check_choice(scope, SCOPES, "scope")
    weights = checked_targets(model, ignore)
    _refuse_growing_back(weights, asked, scope)
    if scope == "global":
        _warn_of_zeros(weights, asked)
    scores = _ranking_scores(model, weights, criterion, batches, loss_fn, seed)
    lowest = _lowest(weights, scores, asked, scope)
    return with_masks(model, {name: ~goes for name, goes in lowest.items()})


def sparsity(model: nn.Module, *, ignore: str | Iterable[str] = ()) -> float:
    """Return the fraction of the prunable weights that is zero in the forward pass, for whatever reason.

    ignore: names of modules or weights not to count.

    Masks count, also of torch.nn.utils.prune, and so do stored zeros and parametrizations; a shared weight counts once.
    A pruned weight counts as zero even if an optimizer has moved it since the last forward pass. Warns of
    weights in stacks of matrices that are not counted (see `prune`).
    """
    check_loaded(model)
    parts = named_parts(model, ignore, "ignore")
    zeros = []  # bool, of each weight
    for name, _, value in computed(model):
        if not _is_inside_any(name, parts):
            zeros.append(value == 0)
    weights = _included(model, parts) if zeros else targets(model, parts)
    _warn_of_stacks(model, parts, weights)
    zeros += [_zero(weight) for weight in weights.values()]
    n_zeros = sum(int(zero.sum()) for zero in zeros)
    return n_zeros / sum(zero.numel() for zero in zeros)


def with_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of `model` holding `masks`: {name of a prunable weight: bool of the same shape, True where kept}.

    Raises InputError for a name without a prunable weight, and for a mask of a wrong type or shape.
    """
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


# --- the weights to prune ---------------------------------------------------------------------------------------------


def targets(model: nn.Module, ignore: str | Iterable[str] = ()) -> dict[str, Weight]:
    """Return `weights.prunable` without the modules and weights named in `ignore`; raise InputError if none is left."""
    weights = _included(model, named_parts(model, ignore, "ignore"))
    if not _numel(weights):
        raise InputError(
            "The model has no weights to prune: it needs a Linear, Conv1d to Conv3d, transformers Conv1D or "
            "MultiheadAttention that ignore does not name."
        )
    return weights


def checked_targets(model: nn.Module, ignore: str | Iterable[str] = ()) -> dict[str, Weight]:
    """Return `targets` for pruning; raise InputError for weights computed by other code, or without values to rank."""
    refuse_foreign(model)
    parts = named_parts(model, ignore, "ignore")
    weights = targets(model, parts)
    for name, weight in weights.items():
        parameter = weight.parameter
        if parameter.is_meta or parameter.itemsize == 1:
            raise InputError(
                f"{name} is {parameter.dtype} on {parameter.device}, where weights can neither be ranked nor masked: "
                "build the model with its values, in bfloat16 or wider."
            )
    _warn_of_stacks(model, parts, weights)
    return weights


def _warn_of_stacks(model: nn.Module, parts: list[str], weights: Mapping[str, Weight]) -> None:
    """Warn of three-dimensional parameters outside `weights` and `parts`, such as experts of an unknown form."""
    understood = {id(module.weight) for module in model.modules() if isinstance(module, _ConvNd)}
    understood |= {id(weight.parameter) for weight in weights.values()}
    stacks = {}
    for name, parameter in model.named_parameters():
        is_stack = parameter.dim() == 3 and min(parameter.shape) > 1
        if is_stack and id(parameter) not in understood and not _is_inside_any(name, parts):
            stacks[name] = parameter.numel()
    if stacks:
        in_stacks = sum(stacks.values())
        share = in_stacks / (in_stacks + _numel(weights))
        warnings.warn(
            f"{share:.0%} of the weights are in stacks of matrices such as {next(iter(stacks))}, of which labkit does "
            "not know the dimensions: they stay dense and do not count; name them in ignore if that is meant.",
            stacklevel=4,
        )


def _numel(weights: Mapping[str, Weight]) -> int:
    return sum(weight.parameter.numel() for weight in weights.values())


def _is_inside_any(name: str, parts: Iterable[str]) -> bool:
    return any(inside(name, part) for part in parts)


def _included(model: nn.Module, parts: list[str]) -> dict[str, Weight]:
    """Return the prunable weights outside `parts`; a shared weight is left out if any of its names is inside."""
    excluded = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _is_inside_any(name, parts):
            excluded.add(id(parameter))
    return {name: weight for name, weight in prunable(model).items() if id(weight.parameter) not in excluded}


# --- choosing ---------------------------------------------------------------------------------------------------------


def _slices(weights: Mapping[str, Weight], values: Mapping[str, Tensor], scope: str) -> dict[str, Tensor]:
    """Return values as matrices [slices, n], so that each row holds the weights ranked together in `scope`.

    values: {name of the weight: tensor shaped like the weight}.
    Returns {name: matrix}, a single matrix for "global".
    """
    rows = {name: weights[name].as_rows(x) for name, x in values.items()}  # [out, in]
    if scope == "row":
        return rows
    if scope == "layer":
        return {name: x.reshape(weights[name].experts or 1, -1) for name, x in rows.items()}
    device = next(iter(rows.values())).device
    flat = [x.reshape(1, -1).to(device) for x in rows.values()]
    return {"the model": torch.cat(flat, 1)}


def _refuse_growing_back(weights: Mapping[str, Weight], asked: float, scope: str) -> None:
    """Raise InputError if more weights are pruned already than asked for: pruned weights do not come back."""
    pruned = {name: ~_mask_of(weight) for name, weight in weights.items()}
    for label, rows in _slices(weights, pruned, scope).items():
        most, n = int(rows.sum(1).max()), rows.shape[1]
        if most > count_to_prune(n, asked):
            where = " in a row" if scope == "row" else ""
            raise InputError(
                f"{label} is already {most / n:.2%} pruned{where}, more than the "
                f"{asked:.2%} asked for, and pruned weights do not come back: ask for more, or take the dense model."
            )


def _warn_of_zeros(weights: Mapping[str, Weight], asked: float) -> None:
    """Warn if more weights of the model are zero already than asked for."""
    n = _numel(weights)
    zeros = sum(int(_zero(weight).sum()) for weight in weights.values())
    if asked and zeros > count_to_prune(n, asked):
        warnings.warn(
            f"{zeros / n:.2%} of the weights are zero already, more than the {asked:.2%} asked for: that "
            "many of them are held there from now on, and no other weight is pruned.",
            stacklevel=3,
        )


def _ranking_scores(
    model: nn.Module,
    weights: Mapping[str, Weight],
    criterion: str,
    batches: Iterable | None,
    loss_fn: LossFn | None,
    seed: int,
) -> dict[str, Tensor]:
    """Return the saliency of `weights`, with zeros below all other weights and pruned weights below zeros."""
    scores = saliency(model, criterion, batches, loss_fn=loss_fn, seed=seed)
    unreached = [name for name in weights if name not in scores]
    if unreached:
        raise InputError(
            f"Criterion {criterion!r} has no score for {', '.join(unreached[:5])}, which the batches did not reach as "
            "a layer's weight: name them in ignore, or use a criterion without data."
        )
    for name in weights:
        if scores[name].isnan().any():
            raise InputError(
                f"Criterion {criterion!r} is NaN for {name!r}: look for NaN in the weights, the batches or the loss."
            )
    ranking = {}
    for name, weight in weights.items():
        zeros_low = scores[name].masked_fill(_zero(weight), -1.0)
        ranking[name] = zeros_low.masked_fill(~_mask_of(weight), -2.0)
    return ranking


def _lowest(
    weights: Mapping[str, Weight],
    scores: Mapping[str, Tensor],
    asked: float,
    scope: str,
) -> dict[str, Tensor]:
    """Return {name: bool shaped like the weight, True at the lowest scores of the weights ranked together}."""
    slices = _slices(weights, scores, scope).values()
    lowest = [lowest_k(rows, count_to_prune(rows.shape[1], asked), dim=1) for rows in slices]
    if scope == "global":
        sizes = [x.numel() for x in scores.values()]
        lowest = lowest[0].split(sizes, 1)
    return {weight.name: weight.from_rows(rows) for weight, rows in zip(weights.values(), lowest, strict=True)}


def _mask_of(weight: Weight) -> Tensor:
    """Return the mask of a weight, True where it is kept, all True without a mask."""
    mask = mask_of(weight.module, weight.attribute)
    return torch.ones_like(weight.parameter, dtype=torch.bool) if mask is None else mask


def _zero(weight: Weight) -> Tensor:
    """Return a bool tensor, True where the forward pass sees a zero."""
    return (weight.parameter.detach() == 0) | ~_mask_of(weight)
