"""How much each weight matters: one function a criterion, all with one signature, in the table CRITERIA.

Magnitude, Taylor, OBD, OBS, Wanda, activations and the random baseline, each from its own paper. Nothing is selected or
removed here (see `unstructured`, `nm`), except by `obs_prune`, whose removal and weight update are one algorithm.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.batches import batch_loss, check_batches, evaluating, not_empty, split
from labkit.errors import InputError
from labkit.pruning.selection import count_to_prune

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# --- the weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One prunable parameter and where it lives. Its rows are output units: [out, in / groups * kernel positions]."""

    name: str
    module: nn.Module
    attribute: str
    transposed: bool  # transformers' Conv1D keeps [in, out]

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.attribute]

    def as_rows(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor.flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows.t() if self.transposed else rows.view(self.parameter.shape)


def prunable_attributes(module: nn.Module) -> tuple[str, ...]:
    """Which of a module's own parameters are prunable weights: the matrices and kernels of products, nothing else."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)) or _is_transposed(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ()


def _is_transposed(module: nn.Module) -> bool:
    loaded = sys.modules.get("transformers.pytorch_utils")  # not imported for this: whoever has such a layer has it
    return loaded is not None and isinstance(module, loaded.Conv1D)


def prunable(model: nn.Module) -> dict[str, Weight]:
    """The weights of Linear, Conv1d to Conv3d, transformers' Conv1D and the projections of nn.MultiheadAttention.

    Keyed by the name in `state_dict()`; a weight that modules share is there once, under its first prunable name.
    Not there: biases, norms, embeddings (unless a Linear shares them), transposed convolutions, recurrent cells, and
    weights kept outside such modules, as in stacked mixture-of-experts layers.
    """
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute in prunable_attributes(module):
            parameter = module._parameters.get(attribute)
            if parameter is None or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{attribute}" if path else attribute
            found[name] = Weight(name, module, attribute, _is_transposed(module))
    return found


# --- what the criteria measure ----------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mean_gradient(model, batches, loss_fn, seed, power: int) -> dict[str, Tensor]:
    """E[g ** power] over batches, g the gradient of a batch's loss; weights that no batch reached are left out."""
    weights = {name: weight.parameter for name, weight in prunable(model).items()}
    frozen = [parameter for parameter in weights.values() if not parameter.requires_grad]
    sums: dict[str, Tensor] = {}
    count = 0
    with evaluating(model, seed), torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for batch in not_empty(batches):
                loss = batch_loss(model, batch, loss_fn)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, g in zip(weights, gradients, strict=True):
                    if g is not None:
                        term = g.to(_wide(g.dtype)) ** power
                        sums[name] = sums[name].add_(term) if name in sums else term
                count += 1
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    return {name: total / count for name, total in sums.items()}


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What a row of the layer's weight is multiplied with, as a view: [..., in]; convolutions [N, *out, C, *kernel]."""
    if not isinstance(layer, CONVOLUTIONS):
        return x
    d = len(layer.kernel_size)
    x = x if x.dim() == d + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (k, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, gap * (k - 1) + 1, step)[..., ::gap]  # [N, C, *out, *kernel so far]
    return x.movedim(1, 1 + d)


@contextmanager
def watched(
    weights: Iterable[Weight], statistic: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Inside, each call of the weights' layers adds to {name: (`statistic` of the inputs summed, input vectors)}.

    Linear layers that are called with one tensor after another (queries, keys, values) share its statistic.
    """
    sums: dict[str, tuple[Tensor, int]] = {}
    last: list = []  # the tensor that a Linear was called with, its version, its statistic

    def term(layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, CONVOLUTIONS) or x.is_inference():
            return statistic(layer, x.to(_wide(x.dtype)))
        if not (last and last[0] is x and last[1] == x._version):
            last[:] = x, x._version, statistic(layer, x.to(_wide(x.dtype)))
        return last[2]

    def watch(weight: Weight):
        def hook(layer, args, kwargs):
            x = next(iter((*args, *kwargs.values())))
            width = weight.as_rows(weight.parameter).shape[1] * getattr(layer, "groups", 1)
            with torch.no_grad():
                new, n = term(layer, x), _patches(layer, x).numel() // width
            total, count = sums.get(weight.name, (0, 0))
            sums[weight.name] = (total + new, count + n)

        return weight.module.register_forward_pre_hook(hook, with_kwargs=True)

    with ExitStack() as stack:
        for weight in weights:
            if not isinstance(weight.module, nn.MultiheadAttention):  # its three inputs are not the layer's one
                stack.callback(watch(weight).remove)
        yield sums


def _input_sums(
    model, batches, seed, statistic: Callable[[nn.Module, Tensor], Tensor]
) -> dict[str, tuple[Tensor, int]]:
    """Per weight: `statistic` of its layer's inputs summed over all batches, and how many input vectors that were."""
    with evaluating(model, seed), torch.no_grad(), watched(prunable(model).values(), statistic) as sums:
        for batch in not_empty(batches):
            args, kwargs, _ = split(model, batch)
            model(*args, **kwargs)
    return sums


def sum_over_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """[groups, in / groups * kernel]: the sum of a layer's input vectors."""
    patches = _patches(layer, x)
    kept = 1 + len(getattr(layer, "kernel_size", ()))
    return patches.sum(tuple(range(patches.dim() - kept))).reshape(getattr(layer, "groups", 1), -1)


def spread(weight: Weight, statistic: Tensor) -> Tensor:
    """A statistic of the inputs, [groups, in / groups * kernel], repeated for every output unit of its group."""
    out = weight.as_rows(weight.parameter).shape[0]
    return weight.from_rows(statistic.repeat_interleave(out // len(statistic), 0))


# --- the criteria -----------------------------------------------------------------------------------------------------


def _magnitudes(model: nn.Module) -> dict[str, Tensor]:
    found = ((name, weight.parameter.detach()) for name, weight in prunable(model).items())
    return {name: w.abs().to(_wide(w.dtype)) for name, w in found}


def magnitude(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """|w|. Needs no data. Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks."""
    return _magnitudes(model)


def taylor(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """E[(g w)^2], g the gradient of one batch's mean loss, E over batches.

    The first-order Taylor term of the loss change, squared before averaging, since near a minimum E[g] is almost 0
    while E[g^2] is not. Molchanov et al. 2019, Importance Estimation for Neural Network Pruning. It ranks as `obd`
    does, of which it is the double.
    """
    squares = _mean_gradient(model, check_batches(batches, "taylor"), loss_fn, seed, power=2)
    w = _magnitudes(model)
    return {name: w[name].square() * square for name, square in squares.items()}


def taylor_abs(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """|E[g] w|: what the mean loss would change by, to first order; goes to 0 where training has converged.

    After Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference, which
    does this for feature maps, and SNIP (Lee et al. 2019), which does it for weights at initialisation.
    """
    means = _mean_gradient(model, check_batches(batches, "taylor_abs"), loss_fn, seed, power=1)
    w = _magnitudes(model)
    return {name: w[name] * mean.abs() for name, mean in means.items()}


def obd(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """w^2 H_ww / 2 with the Hessian's diagonal H_ww taken as the empirical Fisher diagonal E[g^2], E over batches.

    LeCun, Denker & Solla 1990, Optimal Brain Damage (they compute H_ww by a second back-propagation). A batch's
    gradient averages its examples, so batches of one example give the Fisher itself, and larger ones a smaller number.
    """
    fisher = _mean_gradient(model, check_batches(batches, "obd"), loss_fn, seed, power=2)
    w = _magnitudes(model)
    return {name: w[name].square() * diagonal / 2 for name, diagonal in fisher.items()}


def obs(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """w_q^2 / (2 [H^-1]_qq), H = 2 X^T X + damping, X [N, in] the layer's inputs over all batches.

    What removing one weight adds to the squared error of the layer's output, if the rest of its row then adapts.
    Hassibi & Stork 1993, Optimal Brain Surgeon, eq. 5, per layer as in Optimal Brain Compression (Frantar & Alistarh
    2022). The scores do not move the other weights: `obs_prune` does. Memory in * in numbers a layer.
    """
    sums = _input_sums(model, check_batches(batches, "obs"), seed, hessian)
    weights, w = prunable(model), _magnitudes(model)
    scores = {}
    for name, (h, _) in sums.items():
        diagonal = _inverse(h).diagonal(dim1=-2, dim2=-1)  # [groups, in]
        scores[name] = w[name].square() / (2 * spread(weights[name], diagonal.to(w[name])))
    return scores


def wanda(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """|w_ij| * ||X_j||_2, X_j the j-th input of the layer over all batches and positions (padding tokens too).

    Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, eq. 1. The paper compares within
    an output row: scope="row". For a convolution j is an input channel and a kernel position.
    """
    sums = _input_sums(model, check_batches(batches, "wanda"), seed, lambda layer, x: sum_over_rows(layer, x.square()))
    weights, w = prunable(model), _magnitudes(model)
    return {name: w[name] * spread(weights[name], total.sqrt()) for name, (total, _) in sums.items()}


def activation(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """E|x_j|, the mean activity of the unit that the weight reads, whatever the weight: quiet units lose all readers.

    The activation criterion of Molchanov et al. 2017 (APoZ, Hu et al. 2016, counts zeros instead), read at
    the input of a layer, which is the previous one's output after its nonlinearity.
    """
    sums = _input_sums(
        model, check_batches(batches, "activation"), seed, lambda layer, x: sum_over_rows(layer, x.abs())
    )
    weights = prunable(model)
    return {name: spread(weights[name], total / count) for name, (total, count) in sums.items()}


def random(model, batches=None, *, loss_fn=None, seed=0) -> dict[str, Tensor]:
    """Uniform in [0, 1) from `seed`, the same on every device: the baseline that every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    weights = ((name, weight.parameter) for name, weight in prunable(model).items())
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights}


CRITERIA: dict[str, Callable[..., dict[str, Tensor]]] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "taylor_abs": taylor_abs,
    "obd": obd,
    "obs": obs,
    "wanda": wanda,
    "activation": activation,
    "random": random,
}


def saliency(model: nn.Module, criterion: str, batches=None, *, loss_fn=None, seed: int = 0) -> dict[str, Tensor]:
    """The score of every prunable weight, higher is more important: {name: tensor shaped like the weight}.

    criterion: a key of CRITERIA, whose functions all have this signature less the criterion. batches: see `split`; read
    once, one at a time. loss_fn(output, target): for the criteria that need a loss, else see `batch_loss`.
    A weight that the batches never reached has no entry. The model is left as it was. Scores are at least float32.
    """
    if criterion not in CRITERIA:
        raise InputError(f"There is no criterion {criterion!r}: choose one of {', '.join(CRITERIA)}.")
    return CRITERIA[criterion](model, batches, loss_fn=loss_fn, seed=seed)


# --- Optimal Brain Surgeon for one layer ------------------------------------------------------------------------------


def hessian(layer: nn.Module, x: Tensor) -> Tensor:
    """2 X^T X of a layer's inputs: [groups, in, in]."""
    groups = getattr(layer, "groups", 1)
    patches = _patches(layer, x)
    kept = 1 + len(getattr(layer, "kernel_size", ()))
    rows = patches.reshape(patches.shape[: patches.dim() - kept].numel(), groups, -1).transpose(0, 1)  # [groups, N, in]
    return 2 * rows.transpose(1, 2) @ rows


def _inverse(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """(H + damp * mean(diag H) * I)^-1 in float64; an input that is always 0 only has the damping."""
    hessian = hessian.double()
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian + torch.where(mean > 0, damp * mean, 1.0) * eye))


def obs_prune(weight: Tensor, inputs: Tensor, sparsity: float, *, damp: float = 0.01) -> Tensor:
    """Removes count_to_prune(in, sparsity) weights of every row, one at a time, the rest of the row adapting each time.

    weight: [out, in]; inputs: [N, in], what the layer y = x W^T gets. Returns a new weight, like `weight`.
    Per row, with H = 2 X^T X + damp * mean(diag H) * I (Hassibi & Stork 1993, eq. 5; the exact greedy of Optimal Brain
    Compression, Frantar & Alistarh 2022, Lemma 1):
        q = argmin w_q^2 / [H^-1]_qq        w += -w_q / [H^-1]_qq * H^-1[:, q]
        H^-1 -= H^-1[:, q] H^-1[q, :] / [H^-1]_qq
    Every row has its own H^-1: time out * k * in^2, memory 128 MiB at a time. For layers of some hundred inputs.
    """
    if weight.dim() != 2 or inputs.dim() != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise InputError(
            f"weight is {list(weight.shape)} and inputs {list(inputs.shape)}, but they must be [out, in] and [N, in]: "
            "flatten the batch and token dimensions of the inputs."
        )
    k = count_to_prune(weight.shape[1], sparsity)
    x = inputs.detach().to(_wide(inputs.dtype))
    inverse = _inverse(2 * x.t() @ x, damp)
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
