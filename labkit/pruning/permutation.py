"""Channels in an order that loses less to n:m: groups of m neighbours are a choice, and the network does not mind.

Pool & Yu 2021, Channel Permutations for N:M Sparsity: swap input channels between groups as long as the kept energy
grows. A reader's input channels are its producers' output channels, so whole coupled groups are reordered.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_loaded, check_real
from labkit.errors import InputError
from labkit.graph import equality, surgery
from labkit.graph import groups as coupling
from labkit.modules.weights import prunable
from labkit.pruning import unstructured
from labkit.pruning.pattern import check_pattern

ROUNDS = 100  # rounding could let two swaps follow each other for ever


def search(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The order [in] of the columns of `scores` [rows, in] (such as w^2) that greedy swaps end in.

    The scores that n:m keeps of scores[:, order] are at least those that it keeps of `scores`. A round swaps the two
    columns of each pair of groups that gain most, no group twice; it ends where no swap gains, or after 100 rounds.
    scores: not negative, no NaN, in a multiple of m columns. Deterministic. Memory 4 (in^2 + 2 rows in) bytes.
    """
    check_pattern(n, m)
    check_real(scores, "scores")
    if scores.dim() != 2 or scores.shape[1] % m or not (scores >= 0).all():
        raise InputError(
            f"scores are {list(scores.shape)}, but they must be [rows, in] with in a multiple of m = {m}, none of them "
            "negative or NaN: give the squares of a weight."
        )
    columns = scores.detach().t().to(torch.float64 if scores.dtype == torch.float64 else torch.float32).contiguous()
    width = len(columns)
    order = torch.arange(width, device=scores.device)
    if n == m or width == m:
        return order
    energy = torch.stack([_energy_with(columns, slot, n, m) for slot in range(width)])  # [slot, column put into it]
    for _ in range(ROUNDS):
        swaps = _best_swaps(energy, m)
        if not swaps:
            break
        new = torch.arange(width, device=scores.device)
        for a, b in swaps:
            new[a], new[b] = b, a
        order, columns, energy = order[new], columns[new], energy[:, new]
        for group in {slot // m for swap in swaps for slot in swap}:
            for slot in range(group * m, (group + 1) * m):
                energy[slot] = _energy_with(columns, slot, n, m)
    return order


def _energy_with(columns: Tensor, slot: int, n: int, m: int) -> Tensor:
    """[in]: what n:m keeps of the group of `slot`, summed over rows, if each of the columns [in, rows] stood in it.

    Of the m - 1 others n - 1 stay anyway, and the n-th largest or the newcomer, whichever is larger.
    """
    first = slot // m * m
    rest = torch.cat([columns[first:slot], columns[slot + 1 : first + m]])  # [m - 1, rows]
    top = rest.topk(n, dim=0).values  # [n, rows]
    return top[:-1].sum() + torch.maximum(columns, top[-1]).sum(1)


def _best_swaps(energy: Tensor, m: int) -> list[tuple[int, int]]:
    """Pairs of slots whose columns gain most by changing places, no two pairs in the same group."""
    width, now = len(energy), energy.diagonal()  # the group of each slot as it is
    gain = (energy + energy.t() - now[:, None] - now).view(width // m, m, width // m, m)
    best = gain.amax((1, 3)).triu(1)  # [groups, groups]
    swaps, taken = [], set()
    least = 8 * torch.finfo(energy.dtype).eps * float(now.max())  # a smaller gain may be rounding
    for pair in best.flatten().argsort(descending=True, stable=True).tolist():
        groups = divmod(pair, width // m)
        if best[groups] <= least:
            break
        if not taken & {*groups}:
            taken |= {*groups}
            slots = divmod(int(gain[groups[0], :, groups[1]].flatten().argmax()), m)
            swaps.append((groups[0] * m + slots[0], groups[1] * m + slots[1]))
    return swaps


def permute(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of `model` that computes the same function with its channels in an order that 2:4 keeps more of.

    args, kwargs: an example input, as for `coupling.trace`, which finds what has to be reordered together. Prune the
    result with `nm.prune`. What cannot be reordered (inputs, outputs, attention heads) stays where it is.
    """
    check_loaded(model)
    if unstructured.masks(model):
        raise InputError("The model is pruned already: permute the dense model and prune that.")
    args, kwargs = coupling.arguments(args, kwargs)
    coupled = coupling.Coupling.of(model, args, kwargs)
    orders: dict[str, dict[int, Tensor]] = {}  # of each parameter's dimensions
    for group in coupled.groups:
        scores = _scores(model, group)
        slots = [[member.indices(unit) for unit in range(group.units)] for member in group.members]
        if scores is None or any(len({len(unit) for unit in units}) > 1 for units in slots):
            continue
        order = search(scores).cpu()
        for member, units in zip(group.members, map(torch.stack, slots), strict=True):
            new = orders.setdefault(member.name, {}).setdefault(member.dim, torch.arange(len(member.units)))
            new[units] = units[order]  # other groups may have other parts of the dimension
    permuted = surgery.cut(model, orders, {})
    report = equality.check(model, permuted, coupled.record, coupled.gone({}), args, kwargs)
    # Norms of language models sum in float32 whatever the type of the check, and in another order now.
    tolerance = report.tolerance * torch.finfo(torch.float32).eps / torch.finfo(getattr(torch, report.dtype)).eps
    if report.error > tolerance:
        raise InputError(
            f"The model's outputs depend on the order of its channels (they differ by {report.error:.2g}, tolerance "
            f"{tolerance:.2g}), so it cannot be permuted: prune it as it is."
        )
    return permuted


def _scores(model: nn.Module, group: coupling.Group) -> Tensor | None:
    """w^2 of the weights that read the group's units one by one [rows, units]; None if no 2:4 group lies among them."""
    weights = prunable(model)
    squares = []
    for member in group.members:
        run = (member.units >= 0).nonzero().squeeze(1)
        alone = torch.equal(member.units[run], torch.arange(group.units)) and len(run) == int(run[-1] - run[0]) + 1
        if member.role == "reads" and member.name in weights and alone and not run[0] % 4 and not len(run) % 4:
            weight = weights[member.name].parameter.detach().movedim(member.dim, -1).flatten(0, -2)  # [rows, in]
            squares.append(weight[:, run[0] : run[-1] + 1].square())
    return torch.cat(squares) if squares else None
