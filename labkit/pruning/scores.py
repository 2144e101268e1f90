"""Criteria: how important each weight is, or each unit (channel, neuron, attention head) of a coupled group.

A new criterion of single weights is a function score(w, statistic) and a row of CRITERIA; the row says how the
statistic comes from gradients or layer inputs. A new criterion of units is a function of a `UnitTask` and a row of
UNIT_CRITERIA. Every function with an argument `criterion` then accepts the new name.

`saliency` scores weights, `unit_scores` scores units. Each criterion can be laid beside its paper.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from labkit.arguments import check_real, seeded
from labkit.errors import InputError, check_choice
from labkit.graph.groups import Group, Member
from labkit.modules.batches import check_batches, evaluating, inputs, not_empty, split, valid_tokens
from labkit.modules.hessians import DAMP, hessian, squares, sum_over_rows, watched, wide
from labkit.modules.hooks import reading
from labkit.modules.losses import batch_loss, summed_loss
from labkit.modules.weights import Weight, prunable, qualified

LossFn = Callable[[Any, Any], Tensor]  # loss_fn(output, target) -> a scalar

# --- criteria of single weights ---------------------------------------------------------------------------------------


def magnitude(w: Tensor) -> Tensor:
    """|w|. Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks."""
    return w.abs()


def taylor(w: Tensor, g2: Tensor) -> Tensor:
    """E[(g w)^2], g the gradient of the mean loss of a batch, g2 = E[g^2] over batches.

    The first-order Taylor term of the change in loss. The term is squared before averaging, because near a minimum E[g]
    is almost 0 while E[g^2] is not. Molchanov et al. 2019, Importance Estimation for Neural Network Pruning. The
    ranking is the same as of `obd`; the scores are twice as large.
    """
    return w.square() * g2


def taylor_abs(w: Tensor, g1: Tensor) -> Tensor:
    """|E[g] w|, g1 = E[g]: the first-order change of the mean loss, near 0 where training has converged.

    Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference (for feature maps);
    SNIP, Lee et al. 2019 (for weights at initialisation).
    """
    return (w * g1).abs()


def obd(w: Tensor, g2: Tensor) -> Tensor:
    """w^2 H_ww / 2, the Hessian's diagonal H_ww taken as the empirical Fisher diagonal g2 = E[g^2] over batches.

    LeCun, Denker & Solla 1990, Optimal Brain Damage (with H_ww from a second back-propagation). The gradient of a batch
    averages the examples: batches of a single example give the Fisher itself, larger batches a smaller number.
    """
    return w.square() * g2 / 2


def obs(w: Tensor, inverse: Tensor) -> Tensor:
    """w_q^2 / (2 [H^-1]_qq), inverse = [H^-1]_qq, H = 2 X^T X + damping, X [N, in] the layer's inputs over all batches.

    The increase of the squared error of the layer's output if weight q is removed and the rest of the row adapts.
    Hassibi & Stork 1993, Optimal Brain Surgeon, eq. 5, for each layer as in Optimal Brain Compression (Frantar &
    Alistarh 2022). Scores do not move the other weights. Memory: in * in numbers for each layer.
    """
    return w.square() / (2 * inverse)


def wanda(w: Tensor, x2: Tensor) -> Tensor:
    """|w_ij| * ||X_j||_2, x2 = ||X_j||^2, X_j the j-th input of the layer over all batches and positions, padding too.

    Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, eq. 1. The paper compares
    weights within an output row: scope="row". For a convolution j is an input channel and a kernel position.
    """
    return w.abs() * x2.sqrt()


def activation(w: Tensor, x1: Tensor) -> Tensor:
    """x1 = E|x_j|, the mean activity of the input unit of a weight, independent of the weight.

    The activation criterion of Molchanov et al. 2017 (APoZ, Hu et al. 2016, counts zeros instead). The input of a layer
    is the output of the previous layer after the nonlinearity.
    """
    return x1


def random(w: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), the same on every device: the baseline for all other criteria."""
    return torch.rand(w.shape, generator=generator).to(w.device)


def _sum_of_magnitudes(layer: nn.Module, x: Tensor) -> Tensor:
    return sum_over_rows(layer, x.abs())


def _mean(total: Tensor, count: int) -> Tensor:
    return total / count


def _total(total: Tensor, count: int) -> Tensor:
    return total


def _inverse_diagonal(total: Tensor, count: int) -> Tensor:
    return _inverse(total).diagonal(dim1=-2, dim2=-1)


class Criterion(NamedTuple):
    """A row of CRITERIA: a formula, and the statistic of the data in it.

    score(w, statistic): both arguments in the shape of the weight, float32 or wider; without data score(w).
    gradient: function of the gradient of a batch, averaged over batches into the statistic.
    inputs, finish: inputs(layer, x) is summed over all inputs of a layer; finish(sum, number of input vectors) returns
        the statistic [groups, in / groups * kernel].
    draws: True if the second argument of `score` is a random generator.
    """

    score: Callable[..., Tensor]
    gradient: Callable[[Tensor], Tensor] | None = None
    inputs: Callable[[nn.Module, Tensor], Tensor] | None = None
    finish: Callable[[Tensor, int], Tensor] = _total
    draws: bool = False

    @property
    def needs_data(self) -> bool:
        return self.gradient is not None or self.inputs is not None


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "taylor": Criterion(taylor, gradient=torch.square),
    "taylor_abs": Criterion(taylor_abs, gradient=torch.clone),
    "obd": Criterion(obd, gradient=torch.square),
    "obs": Criterion(obs, inputs=hessian, finish=_inverse_diagonal),
    "wanda": Criterion(wanda, inputs=squares),
    "activation": Criterion(activation, inputs=_sum_of_magnitudes, finish=_mean),
    "random": Criterion(random, draws=True),
}


def saliency(
    model: nn.Module,
    criterion: str,
    batches: Iterable | None = None,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every prunable weight; higher is more important: {name: tensor shaped like the weight, float32 or wider}.

    criterion: a name in CRITERIA.
    batches: input of `model`, see `batches.split`; needed by criteria of gradients or activations, and read once.
    loss_fn: loss_fn(output, target), for criteria of gradients; None takes the loss of `losses.batch_loss`.
    seed: seed of all random numbers, the model's dropout included.

    A weight not reached by any batch has no entry. `model` is not changed.
    """
    check_criterion(criterion, batches, CRITERIA)
    seed = seeded(seed).initial_seed()
    row = CRITERIA[criterion]
    weights = prunable(model)
    if row.draws:
        generator = seeded(seed)
        return {name: row.score(wide(weight.parameter), generator) for name, weight in weights.items()}
    if not row.needs_data:
        return {name: row.score(wide(weight.parameter)) for name, weight in weights.items()}
    if row.gradient is not None:
        statistics = _gradient_statistics(model, weights, row.gradient, batches, loss_fn, seed)
    else:
        statistics = _input_statistics(model, weights, row, batches, seed)
    scores = {}
    for name, statistic in statistics.items():
        w = wide(weights[name].parameter)
        scores[name] = row.score(w, statistic.to(w))
    return scores


def _gradient_statistics(
    model: nn.Module,
    weights: Mapping[str, Weight],
    function: Callable[[Tensor], Tensor],
    batches: Iterable,
    loss_fn: LossFn | None,
    seed: int,
) -> dict[str, Tensor]:
    """Average `function` of each weight's gradient over batches: {name: tensor shaped like the weight}."""

    def term(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: function(gradient) for name, gradient in gradients.items()}

    parameters = {name: weight.parameter for name, weight in weights.items()}
    return _mean_over_batches(model, parameters, term, batches, loss_fn, seed)


def _input_statistics(
    model: nn.Module,
    weights: Mapping[str, Weight],
    row: Criterion,
    batches: Iterable,
    seed: int,
) -> dict[str, Tensor]:
    """Sum `row.inputs` over the inputs of every layer, and finish: {name: tensor shaped like the weight}."""
    with evaluating(model, seed), torch.no_grad(), watched(weights.values(), row.inputs) as sums:
        for batch in not_empty(batches):
            args, kwargs, _ = split(model, batch)
            model(*args, **kwargs)
    statistics = {}
    for name, (total, count) in sums.items():
        statistics[name] = weights[name].spread(row.finish(total, count))
    return statistics


def _mean_over_batches(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    term: Callable[[dict[str, Tensor]], dict],
    batches: Iterable,
    loss_fn: LossFn | None,
    seed: int,
) -> dict:
    """Average the entries of term({name: gradient of the loss of a batch}) over batches; a missing entry counts as 0.

    parameters: {name: parameter}; frozen parameters get gradients too.
    term: function of the gradients of the parameters reached by a batch; returns new tensors under any keys.
    """
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    sums, count = {}, 0
    with evaluating(model, seed), torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for batch in not_empty(batches):
                loss = batch_loss(model, batch, loss_fn)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                named = zip(parameters, gradients, strict=True)
                reached = {name: wide(gradient) for name, gradient in named if gradient is not None}
                for key, value in term(reached).items():
                    sums[key] = sums[key].add_(value) if key in sums else value
                count += 1
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    return {key: total / count for key, total in sums.items()}


def check_criterion(criterion: str, batches: Iterable | None, table: Mapping[str, Any]) -> None:
    """Raise InputError unless `criterion` is in `table` (CRITERIA or UNIT_CRITERIA) and has the batches it needs."""
    check_choice(criterion, table, "criterion")
    if table[criterion].needs_data:
        check_batches(batches, criterion)


def _inverse(hessian: Tensor) -> Tensor:
    """(H + DAMP * mean(diag H) * I)^-1 in float64, [.., in, in]. An all-zero H is damped by 1."""
    hessian = hessian.double()
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damping = torch.where(mean > 0, DAMP * mean, 1.0)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.cholesky(hessian + damping * eye)
    return torch.cholesky_inverse(factor)


# --- criteria of units: the channels, heads and other units of coupled groups -----------------------------------------

UnitScores = dict[int, Tensor]  # {number of the group: score of each unit [units]}


@dataclass(frozen=True)
class UnitTask:
    """Input of a unit criterion.

    groups: coupled groups of `model`, from `labkit.graph.groups.trace`.
    batches, loss_fn, seed: as in `saliency`.
    """

    model: nn.Module
    groups: Sequence[Group]
    batches: Iterable | None
    loss_fn: LossFn | None
    seed: int

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def members(self, role: str, parameters: Mapping[str, Tensor]) -> dict[int, list[Member]]:
        """Return the members to score of each group, {number of the group: members}.

        role: "makes" or "reads", for the matrices and kernels that make or read the channels. A group without matrices
        in the role gives all matrices; a group without matrices gives all vectors (biases, scales).
        parameters: {name: parameter}, the parameters to consider.
        """
        return {number: _members(group, parameters, role) for number, group in enumerate(self.groups)}


def unit_scores(
    model: nn.Module,
    groups: Sequence[Group],
    criterion: str | Mapping[str, Tensor] | Callable[[Group], Tensor | None],
    batches: Iterable | None = None,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> UnitScores:
    """Score every unit; higher is more important: {number of the group: [units], float32 or wider, on the CPU}.

    groups: coupled groups from `labkit.graph.groups.trace`.
    criterion: a name in UNIT_CRITERIA; or {parameter: scores of the output channels}, summed over the channels of a
        unit and over parameters; or a function of a group that returns scores [units], or None to leave it out.
    batches, loss_fn, seed: as in `saliency`.

    A group without a score is absent. Raises InputError for scores of another shape, and for NaN.
    """
    if isinstance(criterion, Mapping):
        scores = _scores_of_channels(groups, criterion)
    elif callable(criterion):
        scores = _scores_of_function(groups, criterion)
    else:
        check_criterion(criterion, batches, UNIT_CRITERIA)
        task = UnitTask(model, groups, batches, loss_fn, seed)
        scores = UNIT_CRITERIA[criterion].score(task)
    label = repr(criterion) if isinstance(criterion, str) else "of the caller"
    return {number: _checked(groups[number], values, label) for number, values in scores.items()}


def _checked(group: Group, values: Tensor, label: str) -> Tensor:
    """Check the scores of a group and return them on the CPU; `label` names the criterion in errors."""
    check_real(values, f"criterion for {group.name!r}")
    if values.shape != (group.units,):
        raise InputError(f"The scores of {group.name!r} must be a tensor of shape [{group.units}].")
    if values.isnan().any():
        raise InputError(
            f"Criterion {label} is NaN for {group.name!r}: look for NaN in the weights, the batches or the loss."
        )
    return values.detach().cpu().to(torch.promote_types(values.dtype, torch.float32))


def _scores_of_function(groups: Sequence[Group], function: Callable[[Group], Tensor | None]) -> UnitScores:
    scores = {number: function(group) for number, group in enumerate(groups)}
    return {number: values for number, values in scores.items() if values is not None}


def _scores_of_channels(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> UnitScores:
    """Sum the caller's scores of output channels, {parameter: [channels]}, over the channels of each unit."""
    makers = {}
    for number, group in enumerate(groups):
        made = [member for member in group.members if member.role == "makes"]
        makers[number] = [member for member in made if member.name in scores]
    scored = [member for members in makers.values() for member in members]
    for name in set(scores) - {member.name for member in scored}:
        raise InputError(f"criterion has scores for {name!r}, which makes no channels that can go: leave it out.")
    for member in scored:
        name, n_channels = member.name, len(member.units)
        check_real(scores[name], f"criterion for {name!r}")
        if scores[name].shape != (n_channels,):
            raise InputError(f"criterion must have {n_channels} scores for {name!r}: one for each output channel.")

    def of_channels(name: str, dim: int) -> Tensor:
        return scores[name].detach()

    return per_unit(of_channels, groups, makers)


def _members(group: Group, parameters: Mapping[str, Tensor], role: str) -> list[Member]:
    members = [member for member in group.members if member.name in parameters]
    matrices = []
    for member in members:
        parameter = parameters[member.name]
        if parameter.dim() > 1 and parameter.is_floating_point():
            matrices.append(member)
    in_role = [member for member in matrices if member.role == role]
    return in_role or matrices or members


def _rows(x: Tensor, dim: int) -> Tensor:
    """Return x as [size of the dimension, product of all other sizes]."""
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def per_unit(
    value: Callable[[str, int], Tensor | None],
    groups: Sequence[Group],
    members: Mapping[int, Sequence[Member]],
) -> UnitScores:
    """Sum a value of parameter entries over each unit; a group without any value is absent.

    value: value(parameter, dimension) returns the value at each index of the dimension, summed over the parameter's
        other dimensions, [size of the dimension]; None leaves the parameter out.
    members: {number of the group: members to sum over}.
    """
    vectors: dict[tuple[str, int], Tensor | None] = {}  # of a dimension, shared by all groups of the parameter
    totals: UnitScores = {}
    for number, counted in members.items():
        for member in counted:
            place = (member.name, member.dim)
            if place not in vectors:
                vector = value(*place)
                vectors[place] = None if vector is None else vector.cpu()
            vector = vectors[place]
            if vector is None:
                continue
            total = _sum_by_unit(vector, member, groups[number].units)
            totals[number] = totals[number] + total if number in totals else total
    return totals


def _sum_by_unit(vector: Tensor, member: Member, n_units: int) -> Tensor:
    """Sum the entries of vector [size of member.dim] that belong to the same unit: [units]."""
    in_group = member.units >= 0
    total = torch.zeros(n_units, dtype=vector.dtype)
    return total.index_add_(0, member.units[in_group], vector[in_group])


def _sums(values: Mapping[str, Tensor]) -> Callable[[str, int], Tensor | None]:
    """Return the `value` of `per_unit` for tensors in the shape of parameters, {name: tensor}."""

    def sum_over_others(name: str, dim: int) -> Tensor | None:
        return _rows(values[name], dim).sum(1) if name in values else None

    return sum_over_others


def norms(
    model: nn.Module,
    groups: Sequence[Group],
    members: Mapping[int, Sequence[Member]],
    power: int = 2,
) -> UnitScores:
    """(sum |w|^p)^(1/p) over all weights of a unit in `members`, {number of the group: members}; p is `power`."""
    parameters = dict(model.named_parameters())

    def powers(name: str, dim: int) -> Tensor:
        rows = _rows(wide(parameters[name]), dim)
        return torch.linalg.vector_norm(rows, power, 1) ** power

    totals = per_unit(powers, groups, members)
    return {number: total ** (1 / power) for number, total in totals.items()}


def unit_norm(power: int, task: UnitTask) -> UnitScores:
    """Norm of the weights that make the unit. Li et al. 2017, Pruning Filters for Efficient ConvNets."""
    makers = task.members("makes", task.parameters())
    return norms(task.model, task.groups, makers, power)


def bn_scale(task: UnitTask) -> UnitScores:
    """Mean |gamma| of the unit's batch norms. Liu et al. 2017, Learning Efficient ConvNets through Network Slimming."""
    parameters = task.parameters()
    batch_norms = [name for name, module in task.model.named_modules() if isinstance(module, _BatchNorm)]
    names = {qualified(name, "weight") for name in batch_norms}
    scales = {name: wide(parameters[name]).abs() for name in names & parameters.keys()}
    members = {}
    for number, group in enumerate(task.groups):
        members[number] = [member for member in group.members if member.name in scales]
    means = {}
    for number, total in per_unit(_sums(scales), task.groups, members).items():
        mean_over_norms = total / len(members[number])
        means[number] = mean_over_norms / task.groups[number].width
    return means


def unit_taylor(task: UnitTask) -> UnitScores:
    """E[(dL/dz)^2] over batches, z = 1 a gate on the unit: dL/dz is the sum of g w over the weights reading the unit.

    `taylor` with all weights of the unit in a single term. Molchanov et al. 2019, eq. 8.
    """
    parameters = task.parameters()
    readers = task.members("reads", parameters)
    weights = {member.name: parameters[member.name] for members in readers.values() for member in members}

    def term(gradients: dict[str, Tensor]) -> UnitScores:
        slopes = {name: gradient * wide(weights[name]) for name, gradient in gradients.items()}
        unit_slopes = per_unit(_sums(slopes), task.groups, readers)
        return {number: slope**2 for number, slope in unit_slopes.items()}

    return _mean_over_batches(task.model, weights, term, task.batches, task.loss_fn, task.seed)


def fpgm(task: UnitTask) -> UnitScores:
    """Sum of distances to the other units of the group: a low score marks a replaceable unit.

    He et al. 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration.
    """
    parameters = task.parameters()
    makers = task.members("makes", parameters)
    scores = {}
    for number, group in enumerate(task.groups):
        squared_distances = torch.zeros(group.units, group.units)
        for member in makers[number]:
            weight = wide(parameters[member.name])
            vectors = _unit_vectors(weight, member, group.units)
            if vectors is not None:
                squared_distances = squared_distances + torch.cdist(vectors, vectors) ** 2
        scores[number] = squared_distances.sqrt().sum(1)
    return scores


def _unit_vectors(weight: Tensor, member: Member, n_units: int) -> Tensor | None:
    """Return each unit's weights as a row, [units, weights in a unit]; None for units of different sizes."""
    in_group = member.units >= 0
    units = member.units[in_group]
    counts = units.bincount(minlength=n_units)
    if (counts != counts[0]).any():
        return None
    order = units.argsort(stable=True)
    rows = _rows(weight, member.dim)[in_group][order]
    return rows.reshape(n_units, -1).cpu()


def unit_random(task: UnitTask) -> UnitScores:
    """Uniform in [0, 1) from the seed: the baseline."""
    generator = seeded(task.seed)
    return {number: random(torch.empty(group.units), generator) for number, group in enumerate(task.groups)}


def unit_sum(criterion: str, task: UnitTask) -> UnitScores:
    """Sum of a criterion of CRITERIA over the weights that read the unit."""
    scores, readers = _scored_readers(criterion, task)
    return per_unit(_sums(scores), task.groups, readers)


def unit_mean(criterion: str, task: UnitTask) -> UnitScores:
    """Mean of a criterion of CRITERIA over the weights that read the unit."""
    scores, readers = _scored_readers(criterion, task)
    ones = {name: torch.ones_like(values) for name, values in scores.items()}
    totals = per_unit(_sums(scores), task.groups, readers)
    counts = per_unit(_sums(ones), task.groups, readers)
    return {number: total / counts[number] for number, total in totals.items()}


def _scored_readers(criterion: str, task: UnitTask) -> tuple[dict[str, Tensor], dict[int, list[Member]]]:
    """Return the `saliency` of all weights, and {number of the group: members with scores, reading the group}."""
    scores = saliency(task.model, criterion, task.batches, loss_fn=task.loss_fn, seed=task.seed)
    readers = {}
    for number, group in enumerate(task.groups):
        reading_members = [member for member in group.members if member.role == "reads"]
        readers[number] = [member for member in reading_members if member.name in scores]
    return scores, readers


class UnitCriterion(NamedTuple):
    """A row of UNIT_CRITERIA: a function from a `UnitTask` to scores, and True in needs_data if it reads batches."""

    score: Callable[[UnitTask], UnitScores]
    needs_data: bool = False


UNIT_CRITERIA: Mapping[str, UnitCriterion] = {
    "l1": UnitCriterion(partial(unit_norm, 1)),
    "l2": UnitCriterion(partial(unit_norm, 2)),
    "bn_scale": UnitCriterion(bn_scale),
    "taylor": UnitCriterion(unit_taylor, needs_data=True),
    "activation": UnitCriterion(partial(unit_mean, "activation"), needs_data=True),
    "fpgm": UnitCriterion(fpgm),
    "random": UnitCriterion(unit_random),
    "wanda": UnitCriterion(partial(unit_sum, "wanda"), needs_data=True),
    "obd": UnitCriterion(partial(unit_sum, "obd"), needs_data=True),
    "taylor_abs": UnitCriterion(partial(unit_sum, "taylor_abs"), needs_data=True),
}


# --- criteria of what a module reads: the neurons and heads of a transformer ------------------------------------------


def input_taylor(
    model: nn.Module,
    readers: Mapping[str, int],
    batches: Iterable,
    loss_fn: LossFn | None = None,
) -> list[Tensor]:
    """(1/N) sum over examples of |dl/dz|, z = 1 a gate on a unit in the input of a module.

    readers: {name of the module: number of units}; a unit is that many equal runs of the input's channels.
    batches, loss_fn: as in `saliency`.
    Returns [units] float64 on the CPU for each module.

    dl/dz is the sum of a dl/da over the valid tokens of an example and the channels of the unit, a the input; l is the
    loss summed over the terms of the example, N the number of terms of all examples. Molchanov et al. 2017 for neurons,
    Michel et al. 2019 (Are Sixteen Heads Really Better than One?) for heads.
    """
    names = list(readers)
    sums = [torch.zeros(n_units, dtype=torch.float64) for n_units in readers.values()]
    activations: dict[int, Tensor] = {}  # of the batch that runs, by number of the module
    n_terms = 0

    def keep_with_gradient(i: int, a: Tensor) -> Tensor:
        activations[i] = a if a.requires_grad else a.detach().requires_grad_(True)
        return activations[i]

    with evaluating(model, seed=0), torch.enable_grad(), reading(model, names, keep_with_gradient):
        for batch in not_empty(batches):
            loss, terms = summed_loss(model, batch, loss_fn)
            named = inputs(model, batch)
            gradients = torch.autograd.grad(loss, list(activations.values()), allow_unused=True)
            for (i, a), gradient in zip(activations.items(), gradients, strict=True):
                if gradient is None:
                    continue
                valid = valid_tokens(model, named, names[i], a)  # [B, T]
                slopes = a.detach() * gradient
                sums[i] += _gate_slopes(slopes, valid, len(sums[i])).cpu()
            activations.clear()
            n_terms += terms
    return [total / max(n_terms, 1) for total in sums]


def _gate_slopes(slopes: Tensor, valid: Tensor, n_units: int) -> Tensor:
    """Sum slopes a dl/da [.., channels] to |dl/dz| of each unit, added up over the examples: [units].

    valid: bool [B, T], False at padding.
    """
    by_channel = slopes.double().view(*valid.shape, n_units, -1)  # [B, T, units, channels]
    by_token = by_channel.sum(-1) * valid[..., None]  # [B, T, units]
    by_example = by_token.sum(1)
    return by_example.abs().sum(0)


@torch.no_grad()
def input_squares(model: nn.Module, names: Sequence[str], batches: Iterable) -> list[Tensor]:
    """E[a^2] of each channel of the input a of each module in `names`, over valid tokens: [channels] float64 each."""
    sums: list[Tensor | float] = [0.0] * len(names)
    counts = [0] * len(names)
    named: dict[str, Tensor] = {}  # arguments of the batch that runs

    def add_squares(i: int, a: Tensor) -> None:
        valid = valid_tokens(model, named, names[i], a).flatten()
        squares_of_a = a.flatten(0, -2).double().square().mul(valid[:, None])  # [B * T, channels]
        sums[i] = sums[i] + squares_of_a.sum(0).cpu()
        counts[i] += int(valid.sum())

    with evaluating(model, seed=0), reading(model, names, add_squares):
        for batch in not_empty(batches):
            named.clear()
            named.update(inputs(model, batch))
            model(**named)
    return [total / max(n, 1) for total, n in zip(sums, counts, strict=True)]
