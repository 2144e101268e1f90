"""How much a neuron of a feed-forward network matters, which ones go, and what to do with their mean.

Wanda's measure (Sun et al. 2023) summed over what reads a neuron, first-order Taylor (Molchanov et al. 2017), weight
norms. Activations are taken where `down` reads them, so biases, the activation function and a gate are accounted for.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from labkit.batches import check_batches
from labkit.errors import InputError
from labkit.pruning import anatomy
from labkit.pruning.anatomy import FeedForward
from labkit.pruning.scores import input_moments, input_taylor
from labkit.pruning.select import count_to_prune, fraction, lowest_k

CRITERIA = ("magnitude", "wanda", "taylor", "random")
SCOPES = ("layer", "global")


def removed(
    model: nn.Module,
    parts: Sequence[FeedForward],
    ratio: float | Mapping[int, float],
    criterion: str,
    batches: Iterable | None,
    loss_fn: Callable | None,
    scope: str,
    round_to: int,
    seed: int,
) -> list[Tensor]:
    """Per network [neurons], true where one goes. The arguments are those of `transformers.prune_ffn`."""
    ratios = _ratios(parts, ratio, scope)
    if criterion not in CRITERIA:
        raise InputError(f"There is no criterion {criterion!r}: choose one of {', '.join(CRITERIA)}.")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"round_to is {round_to!r}, but it must be a whole number from 1.")
    scores = importance(model, parts, criterion, batches, loss_fn, seed)
    if scope == "global":
        ranked = torch.cat([own / mean if (mean := own.mean()) > 0 else own for own in scores])
        lowest = lowest_k(ranked, count_to_prune(len(ranked), ratios[0])).split([len(own) for own in scores])
        counts = [int(own.sum()) for own in lowest]
    else:
        counts = [count_to_prune(len(own), r) for own, r in zip(scores, ratios, strict=True)]
    return [
        lowest_k(own, len(own) - _rounded(len(own) - n, len(own), round_to) if n else 0)
        for own, n in zip(scores, counts, strict=True)
    ]


def _ratios(parts: Sequence[FeedForward], ratio: float | Mapping[int, float], scope: str) -> list[float]:
    if scope not in SCOPES:
        raise InputError(f"There is no scope {scope!r}: choose one of {', '.join(SCOPES)}.")
    if not isinstance(ratio, Mapping):
        ratios = [fraction(ratio, "ratio")] * len(parts)
    elif scope == "global":
        raise InputError('ratio by layer and scope "global" exclude each other: give one number, or scope="layer".')
    else:
        for layer in ratio:
            anatomy.check_index(layer, len(parts), "layer")
        ratios = [fraction(ratio.get(layer, 0.0), f"the ratio of layer {layer}") for layer in range(len(parts))]
    for part, r in zip(parts, ratios, strict=True):
        if count_to_prune(part.neurons, r) == part.neurons:
            raise InputError(f"A ratio of {r} leaves none of the {part.neurons} neurons of {part.up}: give less.")
    return ratios


def _rounded(left: int, neurons: int, round_to: int) -> int:
    """The multiple of round_to that is nearest to `left`, at least one of them, at most all neurons."""
    return min(max(math.floor(left / round_to + 0.5), 1) * round_to, neurons)


def importance(
    model: nn.Module,
    parts: Sequence[FeedForward],
    criterion: str,
    batches: Iterable | None = None,
    loss_fn: Callable | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Per network [neurons] float64 on the CPU, higher is more important; see `transformers.prune_ffn`."""
    if criterion == "magnitude":
        return [_norm(model, part) for part in parts]
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(part.neurons, generator=generator, dtype=torch.float64) for part in parts]
    check_batches(batches, criterion)
    if criterion == "taylor":
        return input_taylor(model, {part.down: part.neurons for part in parts}, batches, loss_fn)
    squares = input_moments(model, [part.down for part in parts], batches, power=2)
    norms = (_norm(model, part, reads=True) for part in parts)
    return [own.sqrt() * norm for own, norm in zip(squares, norms, strict=True)]


def means(model: nn.Module, parts: Sequence[FeedForward], batches: Iterable | None) -> list[Tensor]:
    """E[a_j] of every neuron over the valid tokens: per network [neurons]. InputError where `down` has no bias."""
    for part in parts:
        if getattr(model.get_submodule(part.down), "bias", None) is None:
            raise InputError(f"{part.down} has no bias to fold the removed neurons into: leave fold_bias out.")
    return input_moments(model, [part.down for part in parts], check_batches(batches, "fold_bias"), power=1)


def fold_(
    pruned: nn.Module, model: nn.Module, parts: Sequence[FeedForward], gone: Sequence[Tensor], means: Sequence[Tensor]
) -> None:
    """Adds the mean output of the neurons that are gone from `model` to the biases of `pruned`."""
    with torch.no_grad():
        for part, own, mean in zip(parts, gone, means, strict=True):
            down = model.get_submodule(part.down)
            columns = down.weight if anatomy.out_dim(down) == 0 else down.weight.T  # [width, neurons]
            own = own.to(columns.device)
            output = columns[:, own].double() @ mean.to(columns.device)[own]  # [width]
            pruned.get_submodule(part.down).bias.add_(output.to(columns.dtype))


def _norm(model: nn.Module, part: FeedForward, reads: bool = False) -> Tensor:
    """L2 norm of all weights and biases of each neuron, or of those only that read it: [neurons]"""
    total = torch.zeros(part.neurons, dtype=torch.float64)
    for name in (part.down,) if reads else (part.gate, part.up, part.down):
        if not name:
            continue
        module = model.get_submodule(name)
        over_inputs = anatomy.out_dim(module) == (1 if name != part.down else 0)
        total += module.weight.detach().double().pow(2).sum(0 if over_inputs else 1).cpu()
        if name != part.down and module.bias is not None:
            total += module.bias.detach().double().pow(2).cpu()
    return total.sqrt()
