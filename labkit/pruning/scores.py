"""How much weights matter: each one, or all that belong to a unit (a channel, a neuron, a head) together.

Criteria stand in two tables, CRITERIA for single weights and UNIT_CRITERIA for units, each as one function that can be
laid beside its paper. Nothing is removed here, except by `obs_prune`, whose removal and update are one algorithm.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labkit.arguments import check_real, seeded
from labkit.errors import InputError, check_choice
from labkit.graph.groups import Group, Member
from labkit.modules.batches import check_batches, evaluating, inputs, not_empty, split, valid_tokens
from labkit.modules.hessians import DAMP, hessian, squares, sum_over_rows, watched, wide
from labkit.modules.hooks import reading
from labkit.modules.losses import batch_loss, summed_loss
from labkit.modules.weights import prunable
from labkit.pruning.select import count_to_prune


def _mean_over_batches(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    term: Callable[[dict[str, Tensor]], dict],
    batches: Iterable,
    loss_fn: Callable | None,
    seed: int,
) -> dict:
    """E over batches of each entry of term({name: gradient of the batch's loss}); an absent entry counts as 0.

    parameters: frozen ones have gradients too; one that a batch does not reach is absent. term: gives new tensors.
    """
    frozen = [p for p in parameters.values() if not p.requires_grad]
    sums, count = {}, 0
    with evaluating(model, seed), torch.enable_grad():
        try:
            for p in frozen:
                p.requires_grad_(True)
            for batch in not_empty(batches):
                loss = batch_loss(model, batch, loss_fn)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                reached = {name: wide(g) for name, g in zip(parameters, gradients, strict=True) if g is not None}
                for key, value in term(reached).items():
                    sums[key] = sums[key].add_(value) if key in sums else value
                count += 1
        finally:
            for p in frozen:
                p.requires_grad_(False)
    return {key: total / count for key, total in sums.items()}


# --- criteria of single weights ---------------------------------------------------------------------------------------


def magnitude(w: Tensor) -> Tensor:
    """|w|. Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks."""
    return w.abs()


def taylor(w: Tensor, g2: Tensor) -> Tensor:
    """E[(g w)^2], g the gradient of one batch's mean loss, g2 = E[g^2] over batches.

    The first-order Taylor term of the loss change, squared before averaging, since near a minimum E[g] is almost 0
    while E[g^2] is not. Molchanov et al. 2019, Importance Estimation for Neural Network Pruning. It ranks as `obd`
    does, of which it is the double.
    """
    return w.square() * g2


def taylor_abs(w: Tensor, g1: Tensor) -> Tensor:
    """|E[g] w|, g1 = E[g]: what the mean loss changes by, to first order; goes to 0 where training has converged.

    After Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference, which does this
    for feature maps, and SNIP (Lee et al. 2019), which does it for weights at initialisation.
    """
    return (w * g1).abs()


def obd(w: Tensor, g2: Tensor) -> Tensor:
    """w^2 H_ww / 2 with the Hessian's diagonal H_ww taken as the empirical Fisher diagonal g2 = E[g^2], over batches.

    LeCun, Denker & Solla 1990, Optimal Brain Damage (they compute H_ww by a second back-propagation). A batch's
    gradient averages its examples, so batches of one example give the Fisher itself, and larger ones a smaller number.
    """
    return w.square() * g2 / 2


def obs(w: Tensor, inverse: Tensor) -> Tensor:
    """w_q^2 / (2 [H^-1]_qq), inverse = [H^-1]_qq, H = 2 X^T X + damping, X [N, in] the layer's inputs over all batches.

    What removing one weight adds to the squared error of the layer's output, if the rest of its row then adapts.
    Hassibi & Stork 1993, Optimal Brain Surgeon, eq. 5, per layer as in Optimal Brain Compression (Frantar & Alistarh
    2022). The scores do not move the other weights: `obs_prune` does. Memory in * in numbers a layer.
    """
    return w.square() / (2 * inverse)


def wanda(w: Tensor, x2: Tensor) -> Tensor:
    """|w_ij| * ||X_j||_2, x2 = ||X_j||^2, X_j the j-th input of the layer over all batches and positions (padding too).

    Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, eq. 1. The paper compares within
    an output row: scope="row". For a convolution j is an input channel and a kernel position.
    """
    return w.abs() * x2.sqrt()


def activation(w: Tensor, x1: Tensor) -> Tensor:
    """x1 = E|x_j|, the mean activity of the unit that the weight reads, whatever the weight.

    The activation criterion of Molchanov et al. 2017 (APoZ, Hu et al. 2016, counts zeros instead), read at the input of
    a layer, which is the previous one's output after its nonlinearity.
    """
    return x1


def random(w: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), the same on every device: the baseline that every criterion has to beat."""
    return torch.rand(w.shape, generator=generator).to(w.device)


class Criterion(NamedTuple):
    """score(w, statistic), both in the weight's shape and float32 or wider; without data score(w).

    gradient: what of a batch's gradient is averaged over batches. inputs: what of a layer's inputs is summed over all
    of them; finish(sum, input vectors) makes [groups, in / groups * kernel] of it.
    """

    score: Callable[..., Tensor]
    gradient: Callable[[Tensor], Tensor] | None = None
    inputs: Callable[[nn.Module, Tensor], Tensor] | None = None
    finish: Callable[[Tensor, int], Tensor] = lambda total, count: total

    @property
    def needs_data(self) -> bool:
        return bool(self.gradient or self.inputs)


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "taylor": Criterion(taylor, gradient=torch.square),
    "taylor_abs": Criterion(taylor_abs, gradient=torch.clone),
    "obd": Criterion(obd, gradient=torch.square),
    "obs": Criterion(obs, inputs=hessian, finish=lambda total, count: _inverse(total).diagonal(dim1=-2, dim2=-1)),
    "wanda": Criterion(wanda, inputs=squares),
    "activation": Criterion(
        activation, inputs=lambda layer, x: sum_over_rows(layer, x.abs()), finish=lambda total, count: total / count
    ),
    "random": Criterion(random),
}


def saliency(model: nn.Module, criterion: str, batches=None, *, loss_fn=None, seed: int = 0) -> dict[str, Tensor]:
    """The score of every prunable weight, higher is more important: {name: tensor shaped like the weight}.

    criterion: a key of CRITERIA.
    batches: see `batches.split`; read once, one at a time, none kept.
    loss_fn(output, target): for the criteria that look at gradients, else see `losses.batch_loss`.
    seed: of random numbers, those of the model's forward pass among them.

    A weight that the batches never reached has no entry. The model is left as it was. Scores are at least float32.
    """
    check_criterion(criterion, batches, CRITERIA)
    seed = seeded(seed).initial_seed()
    row, weights = CRITERIA[criterion], prunable(model)
    parameters = {name: weight.parameter for name, weight in weights.items()}
    if not row.needs_data:
        options = (seeded(seed),) if criterion == "random" else ()
        return {name: row.score(wide(p), *options) for name, p in parameters.items()}
    if row.gradient:
        term = lambda gradients: {name: row.gradient(g) for name, g in gradients.items()}  # noqa: E731
        statistics = _mean_over_batches(model, parameters, term, batches, loss_fn, seed)
    else:
        with evaluating(model, seed), torch.no_grad(), watched(weights.values(), row.inputs) as sums:
            for batch in not_empty(batches):
                args, kwargs, _ = split(model, batch)
                model(*args, **kwargs)
        statistics = {name: weights[name].spread(row.finish(*each)) for name, each in sums.items()}
    return {name: row.score(w := wide(parameters[name]), x.to(w)) for name, x in statistics.items()}


def check_criterion(criterion: str, batches: Iterable | None, table: Mapping) -> None:
    """InputError unless the criterion is in the table and has the batches that it needs.

    A criterion of units looks at data where the one of weights with its name does.
    """
    check_choice(criterion, table, "criterion")
    if criterion in CRITERIA and CRITERIA[criterion].needs_data:
        check_batches(batches, criterion)


# --- Optimal Brain Surgeon for one layer ------------------------------------------------------------------------------


def _inverse(hessian: Tensor) -> Tensor:
    """(H + DAMP * mean(diag H) * I)^-1 in float64; an input that is always 0 only has the damping."""
    hessian = hessian.double()
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian + torch.where(mean > 0, DAMP * mean, 1.0) * eye))


def obs_prune(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
    """Removes count_to_prune(in, sparsity) weights of every row, one at a time, the rest of the row adapting each time.

    weight: [out, in]; inputs: [N, in], what the layer y = x W^T gets. Returns a new weight, like `weight`.
    Per row, with H = 2 X^T X + DAMP * mean(diag H) * I (Hassibi & Stork 1993, eq. 5; the exact greedy of Optimal Brain
    Compression, Frantar & Alistarh 2022, Lemma 1):
        q = argmin w_q^2 / [H^-1]_qq        w += -w_q / [H^-1]_qq * H^-1[:, q]
        H^-1 -= H^-1[:, q] H^-1[q, :] / [H^-1]_qq
    Every row has its own H^-1: time out * k * in^2, memory 128 MiB at a time. For layers of some hundred inputs.
    """
    check_real(weight, "weight")
    check_real(inputs, "inputs")
    if weight.dim() != 2 or inputs.dim() != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise InputError(
            f"weight is {list(weight.shape)} and inputs {list(inputs.shape)}, but they must be [out, in] and [N, in]: "
            "flatten the batch and token dimensions of the inputs."
        )
    k = count_to_prune(weight.shape[1], sparsity)
    x = wide(inputs)
    inverse = _inverse(2 * x.t() @ x)
    rows_at_once = max(1, 2**24 // inverse.numel())
    parts = [_obs_rows(rows, inverse, k) for rows in weight.detach().double().split(rows_at_once)]
    return torch.cat(parts).to(weight.dtype)


def _obs_rows(w: Tensor, inverse: Tensor, k: int) -> Tensor:
    w, inverse = w.clone(), inverse.expand(len(w), -1, -1).clone()  # [rows, in], [rows, in, in]
    every, gone = torch.arange(len(w), device=w.device), torch.zeros_like(w, dtype=torch.bool)
    for _ in range(k):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        q = (w.square() / diagonal).masked_fill(gone, torch.inf).argmin(1)
        pivot = diagonal[every, q].clone()
        column = inverse[every, :, q]  # [rows, in]
        gone[every, q] = True
        w = (w - (w[every, q] / pivot)[:, None] * column).masked_fill(gone, 0.0)
        inverse -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
    return w


# --- criteria of units: the channels, heads and other units of coupled groups -----------------------------------------


def unit_scores(
    model: nn.Module,
    groups: Sequence[Group],
    criterion: str | Mapping[str, Tensor] | Callable[[Group], Tensor | None],
    batches: Iterable | None = None,
    *,
    loss_fn: Callable | None = None,
    seed: int = 0,
) -> dict[int, Tensor]:
    """The score of every unit, higher is more important: {number of the group: [units]}, float32 or wider, on the CPU.

    groups: of `coupling.trace`.
    criterion: a key of UNIT_CRITERIA; or {parameter: scores of its output channels}, summed over the channels of a
        unit and over parameters; or a function of a group that gives its scores [units], None for none.
    batches, loss_fn, seed: as in `saliency`.

    A group that a criterion has nothing to say about is absent. Raises InputError where a score is NaN.
    """
    if isinstance(criterion, Mapping):
        scores = _given(model, groups, criterion)
    elif callable(criterion):
        scores = {i: x for i, group in enumerate(groups) if (x := criterion(group)) is not None}
    else:
        check_criterion(criterion, batches, UNIT_CRITERIA)
        scores = UNIT_CRITERIA[criterion](model, groups, batches, loss_fn, seed)
    what = repr(criterion) if isinstance(criterion, str) else "of the caller"
    for i, values in scores.items():
        check_real(values, f"criterion for {groups[i].name!r}")
        if values.shape != (groups[i].units,):
            raise InputError(f"The scores of {groups[i].name!r} must be a tensor of shape [{groups[i].units}].")
        scores[i] = values.detach().cpu().to(torch.promote_types(values.dtype, torch.float32))
        if values.isnan().any():
            raise InputError(
                f"Criterion {what} is NaN for {groups[i].name!r}: look for NaN in the weights, the batches or the loss."
            )
    return scores


def _given(model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Scores of units of {parameter: [output channels]}"""
    makers = {i: [m for m in g.members if m.role == "makes" and m.name in scores] for i, g in enumerate(groups)}
    for name in set(scores) - {m.name for members in makers.values() for m in members}:
        raise InputError(f"criterion has scores for {name!r}, which makes no channels that can go: leave it out.")
    for m in (m for members in makers.values() for m in members):
        check_real(scores[m.name], f"criterion for {m.name!r}")
        if scores[m.name].shape != (len(m.units),):
            raise InputError(f"criterion must have {len(m.units)} scores for {m.name!r}: one for each output channel.")
    return per_unit(lambda name, _: scores[name].detach(), groups, makers)


def _members(group: Group, parameters: Mapping[str, Tensor], role: str) -> list[Member]:
    """The group's matrices and kernels in that role; vectors (biases, scales) only where there is nothing else."""
    members = [m for m in group.members if m.name in parameters]
    matrices = [m for m in members if parameters[m.name].dim() > 1 and parameters[m.name].is_floating_point()]
    return [m for m in matrices if m.role == role] or matrices or members


def _rows(x: Tensor, dim: int) -> Tensor:
    """[size of the dimension, all others]"""
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def per_unit(
    value: Callable[[str, int], Tensor | None], groups: Sequence[Group], members: Mapping[int, Sequence[Member]]
) -> dict[int, Tensor]:
    """Sums over everything that belongs to each unit: {number of the group: [units]}, absent where there is nothing.

    value(parameter, dimension): summed over its other dimensions, a vector; None where there is none.
    members: of each group, those that count.
    """
    values: dict[tuple[str, int], Tensor | None] = {}  # one vector serves all groups of a parameter
    totals: dict[int, Tensor] = {}
    for i, counted in members.items():
        for m in counted:
            if (key := (m.name, m.dim)) not in values:
                values[key] = None if (x := value(*key)) is None else x.cpu()
            if (x := values[key]) is not None:
                inner = m.units >= 0
                total = torch.zeros(groups[i].units, dtype=x.dtype).index_add_(0, m.units[inner], x[inner])
                totals[i] = totals[i] + total if i in totals else total
    return totals


def _sums(values: Mapping[str, Tensor]) -> Callable[[str, int], Tensor | None]:
    return lambda name, dim: _rows(values[name], dim).sum(1) if name in values else None


def norms(
    model: nn.Module, groups: Sequence[Group], members: Mapping[int, Sequence[Member]], power: int = 2
) -> dict[int, Tensor]:
    """(sum |w|^p)^(1/p) of all weights of a unit that `members` has: {number of the group: [units]}"""
    parameters = dict(model.named_parameters())

    def powers(name: str, dim: int) -> Tensor:
        return torch.linalg.vector_norm(_rows(wide(parameters[name]), dim), power, 1) ** power

    return {i: total ** (1 / power) for i, total in per_unit(powers, groups, members).items()}


def unit_norm(power: int, model, groups, batches, loss_fn, seed) -> dict[int, Tensor]:
    """The norm of what makes the unit. Li et al. 2017, Pruning Filters for Efficient ConvNets."""
    parameters = dict(model.named_parameters())
    makers = {i: _members(group, parameters, "makes") for i, group in enumerate(groups)}
    return norms(model, groups, makers, power)


def bn_scale(model, groups, batches, loss_fn, seed) -> dict[int, Tensor]:
    """Mean |gamma| of the unit's batch norms. Liu et al. 2017, Learning Efficient ConvNets through Network Slimming."""
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    names = {f"{name}.weight".lstrip(".") for name in norms}
    scales = {name: wide(p).abs() for name, p in model.named_parameters() if name in names}
    members = {i: [m for m in group.members if m.name in scales] for i, group in enumerate(groups)}
    sums = per_unit(_sums(scales), groups, members)
    return {i: total / len(members[i]) / groups[i].width for i, total in sums.items()}


def unit_taylor(model, groups, batches, loss_fn, seed) -> dict[int, Tensor]:
    """E[(dL/dz)^2] over batches, z = 1 a gate on what reads the unit: dL/dz is the sum of g w over the weights that do.

    `taylor` with all of the unit's weights in one term. Molchanov et al. 2019, eq. 8.
    """
    parameters = dict(model.named_parameters())
    readers = {i: _members(group, parameters, "reads") for i, group in enumerate(groups)}
    weights = {m.name: parameters[m.name] for members in readers.values() for m in members}

    def term(gradients: dict[str, Tensor]) -> dict[int, Tensor]:
        slopes = {name: g * wide(weights[name]) for name, g in gradients.items()}
        return {i: slope**2 for i, slope in per_unit(_sums(slopes), groups, readers).items()}

    return _mean_over_batches(model, weights, term, batches, loss_fn, seed)


def fpgm(model, groups, batches, loss_fn, seed) -> dict[int, Tensor]:
    """Sum of distances to the group's other units: low is replaceable.

    He et al. 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration.
    """
    parameters, scores = dict(model.named_parameters()), {}
    for i, group in enumerate(groups):
        total = torch.zeros(group.units, group.units)  # of squared distances
        for m in _members(group, parameters, "makes"):
            inner = m.units >= 0
            order, counts = m.units[inner].argsort(stable=True), m.units[inner].bincount(minlength=group.units)
            if (counts == counts[0]).all():  # units of different sizes have no distance
                rows = _rows(wide(parameters[m.name]), m.dim)[inner][order].reshape(group.units, -1).cpu()
                total = total + torch.cdist(rows, rows) ** 2
        scores[i] = total.sqrt().sum(1)
    return scores


def unit_random(model, groups, batches, loss_fn, seed) -> dict[int, Tensor]:
    """Uniform in [0, 1) from `seed`: the baseline."""
    generator = seeded(seed)
    return {i: random(torch.empty(group.units), generator) for i, group in enumerate(groups)}


def unit_sum(criterion: str, model, groups, batches, loss_fn, seed) -> dict[int, Tensor]:
    """A criterion of single weights, summed ("activation": averaged) over the weights that read the unit."""
    weights = saliency(model, criterion, batches, loss_fn=loss_fn, seed=seed)
    readers = {i: [m for m in g.members if m.role == "reads" and m.name in weights] for i, g in enumerate(groups)}
    sums = per_unit(_sums(weights), groups, readers)
    if criterion != "activation":
        return sums
    counts = per_unit(_sums({name: torch.ones_like(w) for name, w in weights.items()}), groups, readers)
    return {i: total / counts[i] for i, total in sums.items()}


# score(model, groups, batches, loss_fn, seed) -> {number of the group: [units]}
UNIT_CRITERIA: Mapping[str, Callable[..., dict[int, Tensor]]] = {
    "l1": partial(unit_norm, 1),
    "l2": partial(unit_norm, 2),
    "bn_scale": bn_scale,
    "taylor": unit_taylor,
    "activation": partial(unit_sum, "activation"),
    "fpgm": fpgm,
    "random": unit_random,
    "wanda": partial(unit_sum, "wanda"),
    "obd": partial(unit_sum, "obd"),
    "taylor_abs": partial(unit_sum, "taylor_abs"),
}


# --- criteria of what a module reads: the neurons and heads of a transformer ------------------------------------------


def input_taylor(
    model: nn.Module, readers: Mapping[str, int], batches: Iterable, loss_fn: Callable | None = None
) -> list[Tensor]:
    """(1/N) sum over examples of |dl/dz|, z = 1 a gate on a unit of what a module reads: per module [units] float64.

    readers: {name of the module: units}, as many channels in a row each. dl/dz is the sum of a dl/da over the example's
    valid tokens and the unit's channels; l is the loss summed over the example's terms, N counts the terms of all.
    Molchanov et al. 2017 for neurons, Michel et al. 2019 (Are Sixteen Heads Really Better than One?) for heads.
    """
    names, units = list(readers), list(readers.values())
    sums = [torch.zeros(n, dtype=torch.float64) for n in units]
    reads: dict[int, Tensor] = {}
    terms = 0

    def act(i: int, a: Tensor) -> Tensor:
        reads[i] = a if a.requires_grad else a.detach().requires_grad_(True)
        return reads[i]

    with evaluating(model, seed=0), torch.enable_grad(), reading(model, names, act):
        for batch in not_empty(batches):
            loss, n = summed_loss(model, batch, loss_fn)
            named = inputs(model, batch)
            gradients = torch.autograd.grad(loss, list(reads.values()), allow_unused=True)
            for (i, a), g in zip(reads.items(), gradients, strict=True):
                if g is not None:
                    valid = valid_tokens(model, named, names[i], a)  # [B, T]
                    slopes = (a.detach() * g).double().view(*valid.shape, units[i], -1).sum(-1)  # [B, T, units]
                    sums[i] += (slopes * valid[..., None]).sum(1).abs().sum(0).cpu()
            reads.clear()
            terms += n
    return [total / max(terms, 1) for total in sums]


@torch.no_grad()
def input_squares(model: nn.Module, names: Sequence[str], batches: Iterable) -> list[Tensor]:
    """E[a^2] over the valid tokens of what each module reads: per module [channels] float64."""
    sums: list = [0.0] * len(names)
    counts = [0] * len(names)
    named: dict[str, Tensor] = {}  # of the batch that runs

    def act(i: int, a: Tensor) -> None:
        valid = valid_tokens(model, named, names[i], a).flatten()
        sums[i] = sums[i] + a.flatten(0, -2).double().square().mul(valid[:, None]).sum(0).cpu()
        counts[i] += int(valid.sum())

    with evaluating(model, seed=0), reading(model, names, act):
        for batch in not_empty(batches):
            named.clear()
            named.update(inputs(model, batch))
            model(**named)
    return [total / max(n, 1) for total, n in zip(sums, counts, strict=True)]
