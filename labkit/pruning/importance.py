"""How much each unit of a group matters: filter norms, BatchNorm scales, Taylor on the unit's gate, FPGM, and so on.

Li et al. 2017 (L1), Liu et al. 2017 (slimming), Molchanov et al. 2017 and 2019 (Taylor), He et al. 2019 (FPGM), and the
criteria of `criteria` that say what a reader of the unit loses. Nothing is chosen here.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from labkit.batches import batch_loss, check_batches, evaluating, not_empty
from labkit.errors import InputError
from labkit.pruning import criteria
from labkit.pruning.coupling import Coupling, Group, Member

Scores = dict[int, Tensor]  # by the number of the group: [units]


def scores(
    model: nn.Module,
    coupling: Coupling,
    criterion: str,
    batches: Iterable | None = None,
    *,
    loss_fn=None,
    seed: int = 0,
) -> Scores:
    """The score of every unit, higher is more important, float32 or wider on the CPU.

    criterion: "l1", "l2": norm of all weights that make the unit (Li et al. 2017, Pruning Filters for Efficient
    ConvNets, for one filter). "bn_scale": mean |gamma| of its batch norms (Liu et al. 2017, Network Slimming).
    "taylor": E[(dL/dz)^2] over batches, z = 1 a gate on what reads the unit: the first-order change of the loss on
    removing it, squared (Molchanov et al. 2019). "fpgm": sum of distances to the group's other units (He et al. 2019,
    Filter Pruning via Geometric Median). "random": uniform, the baseline. "activation", "wanda", "obd", "taylor_abs":
    as in `criteria`, over the weights that read the unit. A group that a criterion has nothing to say about is absent.
    """
    check(criterion, batches)
    found = CRITERIA[criterion](model, coupling, batches, loss_fn, seed)
    for i, values in found.items():
        if values.isnan().any():
            raise InputError(
                f"Criterion {criterion!r} is NaN for {coupling.groups[i].name!r}: look for NaN in the weights, the "
                "batches or the loss."
            )
    return found


def check(criterion: str, batches: Iterable | None) -> None:
    """InputError unless the criterion exists and has the batches that it needs."""
    if criterion not in CRITERIA:
        raise InputError(f"There is no criterion {criterion!r}: choose one of {', '.join(CRITERIA)}.")
    if criterion not in WITHOUT_DATA:
        check_batches(batches, criterion)


def per_unit(values: Tensor, member: Member, units: int) -> Tensor:
    """Sums `values`, shaped like the member's parameter, over everything that belongs to each unit: [units]."""
    values = values.sum([d for d in range(values.dim()) if d != member.dim]) if values.dim() > 1 else values
    inside = member.units >= 0
    total = torch.zeros(units, dtype=values.dtype)
    return total.index_add_(0, member.units[inside], values.cpu()[inside])


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _weights(parameters: Mapping[str, Tensor], group: Group, role: str) -> list[tuple[Member, Tensor]]:
    """The group's matrices and kernels in that role; vectors (biases, scales) only where there is nothing else."""
    own = [(m, parameters[m.name]) for m in group.members if m.name in parameters]
    matrices = [(m, p) for m, p in own if p.dim() > 1 and p.is_floating_point()]
    return [(m, p) for m, p in matrices if m.role == role] or matrices or own


def _norm(power: int) -> Callable[..., Scores]:
    def criterion(model, coupling, batches, loss_fn, seed) -> Scores:
        sums: dict[tuple[str, int], Tensor] = {}  # a reader's sum over the other dimensions serves all of its groups
        parameters, found = dict(model.named_parameters()), {}
        for i, group in enumerate(coupling.groups):
            total = torch.zeros(group.units)
            for member, p in _weights(parameters, group, "makes"):
                key = (member.name, member.dim)
                if key not in sums:
                    others = [d for d in range(p.dim()) if d != member.dim]
                    w = _wide(p)
                    sums[key] = torch.linalg.vector_norm(w, power, others) ** power if others else w.abs() ** power
                total = total + per_unit(sums[key], member, group.units)
            found[i] = total ** (1 / power)
        return found

    return criterion


def _bn_scale(model, coupling, batches, loss_fn, seed) -> Scores:
    norms = {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None
    }
    found = {}
    for i, group in enumerate(coupling.groups):
        own = [per_unit(_wide(norms[m.name]).abs(), m, group.units) for m in group.members if m.name in norms]
        if own:
            found[i] = sum(own) / len(own) / group.width
    return found


def _taylor(model, coupling, batches, loss_fn, seed) -> Scores:
    parameters = dict(model.named_parameters())
    readers = {i: _weights(parameters, group, "reads") for i, group in enumerate(coupling.groups)}
    weights = {m.name: p for own in readers.values() for m, p in own}
    frozen = [p for p in weights.values() if not p.requires_grad]
    found = {i: torch.zeros(group.units) for i, group in enumerate(coupling.groups)}
    count = 0
    with evaluating(model, seed), torch.enable_grad():
        try:
            for p in frozen:
                p.requires_grad_(True)
            for batch in not_empty(check_batches(batches, "taylor")):
                loss = batch_loss(model, batch, loss_fn)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                slopes = {
                    name: _wide(p) * _wide(g)
                    for (name, p), g in zip(weights.items(), gradients, strict=True)
                    if g is not None
                }
                for i, own in readers.items():
                    parts = [per_unit(slopes[m.name], m, coupling.groups[i].units) for m, _ in own if m.name in slopes]
                    found[i] = found[i] + (sum(parts) if parts else 0) ** 2
                count += 1
        finally:
            for p in frozen:
                p.requires_grad_(False)
    return {i: total / count for i, total in found.items()}


def _fpgm(model, coupling, batches, loss_fn, seed) -> Scores:
    parameters, found = dict(model.named_parameters()), {}
    for i, group in enumerate(coupling.groups):
        squares = torch.zeros(group.units, group.units)
        for member, p in _weights(parameters, group, "makes"):
            rows = _wide(p).movedim(member.dim, 0).flatten(1).cpu() if p.dim() > 1 else _wide(p)[:, None].cpu()
            inside = member.units >= 0
            order = member.units[inside].argsort(stable=True)
            counts = member.units[inside].bincount(minlength=group.units)
            if (counts != counts[0]).any():
                continue  # units of different sizes have no distance here
            squares = squares + torch.cdist(*[rows[inside][order].reshape(group.units, -1)] * 2) ** 2
        found[i] = squares.sqrt().sum(1)
    return found


def _random(model, coupling, batches, loss_fn, seed) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.rand(group.units, generator=generator) for i, group in enumerate(coupling.groups)}


def _reading(criterion: str, mean: bool = False) -> Callable[..., Scores]:
    """A criterion of `criteria`, summed (or averaged) over the columns that read the unit."""

    def score(model, coupling, batches, loss_fn, seed) -> Scores:
        saliency = criteria.saliency(model, criterion, batches, loss_fn=loss_fn, seed=seed)
        found = {}
        for i, group in enumerate(coupling.groups):
            own = [m for m in group.members if m.role == "reads" and m.name in saliency]
            if own:
                total = sum(per_unit(saliency[m.name], m, group.units) for m in own)
                n = sum(per_unit(torch.ones_like(saliency[m.name]), m, group.units) for m in own)
                found[i] = total / n if mean else total
        return found

    return score


CRITERIA: Mapping[str, Callable[..., Scores]] = {
    "l1": _norm(1),
    "l2": _norm(2),
    "bn_scale": _bn_scale,
    "taylor": _taylor,
    "activation": _reading("activation", mean=True),
    "fpgm": _fpgm,
    "random": _random,
    "wanda": _reading("wanda"),
    "obd": _reading("obd"),
    "taylor_abs": _reading("taylor_abs"),
}
WITHOUT_DATA = ("l1", "l2", "bn_scale", "fpgm", "random")
