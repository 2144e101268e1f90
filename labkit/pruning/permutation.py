"""Channel permutation for n:m sparsity: an order of input channels in which pruning keeps more.

Pool & Yu 2021, Channel Permutations for N:M Sparsity: swap input channels between groups of m neighbours as long as the
kept energy grows. The input channels of a layer are output channels of layers before, so whole coupled groups of
channels are reordered, and the network computes the same function.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_loaded, check_real
from labkit.errors import InputError
from labkit.graph import equality, groups, surgery
from labkit.modules.batches import placed
from labkit.modules.weights import prunable
from labkit.pruning import unstructured
from labkit.pruning.pattern import check_pattern

ROUNDS = 100  # rounding could let two swaps follow each other for ever


def search(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Find by greedy swaps an order [in] of the columns in which n:m keeps more of `scores`, or as much.

    scores: [rows, in], such as w^2; not negative, no NaN, in a multiple of m.

    scores[:, order] is the reordered matrix. A round swaps, for pairs of groups, the two columns that gain most; no
    group takes part twice. The search ends when no swap gains, or after 100 rounds. Deterministic. Memory 4 (in^2 + 2
    rows in) bytes.
    """
    check_pattern(n, m)
    check_real(scores, "scores")
    if scores.dim() != 2 or scores.shape[1] % m or not (scores >= 0).all():
        raise InputError(
            f"scores are {list(scores.shape)}, but they must be [rows, in] with in a multiple of m = {m}, none of them "
            "negative or NaN: give the squares of a weight."
        )
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    columns = scores.detach().t().to(dtype).contiguous()  # [in, rows]
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
        for slot in _slots_of_groups(swaps, m):
            energy[slot] = _energy_with(columns, slot, n, m)
    return order


def _slots_of_groups(swaps: list[tuple[int, int]], m: int) -> list[int]:
    """Return all slots of the groups that take part in swaps, pairs of slots."""
    swapped_slots = [slot for swap in swaps for slot in swap]
    slots: list[int] = []
    for group in {slot // m for slot in swapped_slots}:
        slots += range(group * m, (group + 1) * m)
    return slots


def _energy_with(
    columns: Tensor,
    slot: int,
    n: int,
    m: int,
) -> Tensor:
    """Return the energy that n:m keeps of the group of `slot` with each of the columns [in, rows] in the slot: [in].

    Of the m - 1 columns outside the slot, n - 1 stay in any case; the n-th largest competes with the new column.
    """
    first = slot // m * m
    rest = torch.cat([columns[first:slot], columns[slot + 1 : first + m]])  # [m - 1, rows]
    top = rest.topk(n, dim=0).values  # [n, rows]
    return top[:-1].sum() + torch.maximum(columns, top[-1]).sum(1)


def _best_swaps(energy: Tensor, m: int) -> list[tuple[int, int]]:
    """Return pairs of slots to swap, the largest gain first, each group at most once.

    energy: [slot, column], of `_energy_with`.
    """
    n_groups = len(energy) // m
    now = energy.diagonal()  # of the group of each slot as it is
    gain = energy + energy.t() - now[:, None] - now  # [slot, slot]
    gain = gain.view(n_groups, m, n_groups, m)
    best = gain.amax((1, 3)).triu(1)  # [groups, groups]
    rounding = 8 * torch.finfo(energy.dtype).eps * float(now.max())
    swaps: list[tuple[int, int]] = []
    taken: set[int] = set()
    for pair in best.flatten().argsort(descending=True, stable=True).tolist():
        a, b = divmod(pair, n_groups)
        if best[a, b] <= rounding:
            break
        if taken.isdisjoint((a, b)):
            taken |= {a, b}
            best_pair = int(gain[a, :, b].flatten().argmax())
            slot_in_a, slot_in_b = divmod(best_pair, m)
            swaps.append((a * m + slot_in_a, b * m + slot_in_b))
    return swaps


def permute(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a copy of `model` with the same function and an order of channels in which 2:4 keeps more.

    args, kwargs: an example input, as for `labkit.graph.groups.trace`. Prune the result with `nm.prune`.

    Channels of inputs, outputs and attention heads stay at their places. Raises InputError for a pruned model, and for
    a model with outputs that depend on the order of channels.
    """
    check_loaded(model)
    if unstructured.masks(model):
        raise InputError("The model is pruned already: permute the dense model and prune that.")
    args, kwargs = placed(model, groups.arguments(args, kwargs))
    coupled = groups.Coupling.of(model, args, kwargs)
    orders: dict[str, dict[int, Tensor]] = {}  # {parameter: {dimension: new order of the indices}}
    for group in coupled.groups:
        _add_order_(orders, model, group)
    permuted = surgery.cut(model, orders, {})
    report = equality.check(model, permuted, coupled.record, coupled.gone({}), args, kwargs)
    # Norms of language models sum in float32 whatever the type of the check, and in another order now.
    eps = torch.finfo(getattr(torch, report.dtype)).eps
    tolerance = report.tolerance * torch.finfo(torch.float32).eps / eps
    if report.error > tolerance:
        raise InputError(
            f"The model's outputs depend on the order of its channels (they differ by {report.error:.2g}, tolerance "
            f"{tolerance:.2g}), so it cannot be permuted: prune it as it is."
        )
    return permuted


def _add_order_(orders: dict[str, dict[int, Tensor]], model: nn.Module, group: groups.Group) -> None:
    """Add the best order of a group's units to `orders`, {parameter: {dimension: order}}, if units can be reordered."""
    scores = _scores(model, group)
    if scores is None:
        return
    indices_of_units = []  # of each member [units, indices]
    for member in group.members:
        units = [member.indices(unit) for unit in range(group.units)]
        if len({len(indices) for indices in units}) > 1:
            return
        indices_of_units.append(torch.stack(units))
    order = search(scores).cpu()
    for member, indices in zip(group.members, indices_of_units, strict=True):
        unchanged = torch.arange(len(member.units))
        new = orders.setdefault(member.name, {}).setdefault(member.dim, unchanged)
        new[indices] = indices[order]  # other groups may have other parts of the dimension


def _scores(model: nn.Module, group: groups.Group) -> Tensor | None:
    """Return w^2 [rows, units] of all weights that read the units of a group, None without a 2:4 group among them."""
    weights = prunable(model)
    squares = []
    for member in group.members:
        run = _run_of_units(member, group.units)
        if member.role == "reads" and member.name in weights and run is not None:
            weight = weights[member.name].parameter.detach()
            rows = weight.movedim(member.dim, -1).flatten(0, -2)  # [rows, in]
            squares.append(rows[:, run].square())
    return torch.cat(squares) if squares else None


def _run_of_units(member: groups.Member, n_units: int) -> slice | None:
    """Return the indices of the units in member.dim if whole groups of 4 consist of one unit after another."""
    indices = (member.units >= 0).nonzero().squeeze(1)
    first, last = int(indices[0]), int(indices[-1])
    is_contiguous = len(indices) == last - first + 1
    in_order = torch.equal(member.units[indices], torch.arange(n_units))
    if is_contiguous and in_order and first % 4 == 0 and len(indices) % 4 == 0:
        return slice(first, last + 1)
    return None
