"""Sums over the inputs of layers, squares or X^T X, and the Cholesky factor of the inverse of X^T X.

SparseGPT, GPTQ and AWQ work on these. What a layer is called with is watched from outside, batch by
batch; which model, which layers and when is the caller's.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules.weights import CONVOLUTIONS, Weight

DAMP = 0.01  # added to the diagonal of the Hessian, as a fraction of its mean, as in SparseGPT and GPTQ
TRIES = 6  # of a damping ten times the one before
SMALL = 96  # size up to which a triangle is inverted by one call


def wide(x: Tensor) -> Tensor:
    """x without its graph, in float32 or wider."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


# --- what a layer's inputs sum up to ----------------------------------------------------------------------------------


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


def sum_over_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Sum of x_j over a layer's input vectors: [groups, in / groups * kernel]."""
    patches = _patches(layer, x)
    inner = 1 + len(getattr(layer, "kernel_size", ()))
    return patches.sum(tuple(range(patches.dim() - inner))).reshape(getattr(layer, "groups", 1), -1)


def squares(layer: nn.Module, x: Tensor) -> Tensor:
    """Sum of x_j^2 over a layer's input vectors: [groups, in / groups * kernel]."""
    return sum_over_rows(layer, x.square())


def hessian(layer: nn.Module, x: Tensor) -> Tensor:
    """2 X^T X of a layer's inputs: [groups, in, in]."""
    groups = getattr(layer, "groups", 1)
    patches = _patches(layer, x)
    inner = 1 + len(getattr(layer, "kernel_size", ()))
    outer = patches.dim() - inner
    n, width = patches.shape[:outer].numel(), patches.shape[outer:].numel() // groups
    rows = patches.reshape(n, groups, width).transpose(0, 1)  # [groups, n, in]
    return 2 * rows.transpose(1, 2) @ rows


@contextmanager
def watched(
    weights: Iterable[Weight], statistic: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Inside, each call of the weights' layers adds to {name: (`statistic` of the inputs summed, input vectors)}.

    Linear layers that are called with one tensor after another (queries, keys, values) share its statistic. The inputs
    of an expert are the tokens that are routed to it, and it has its own number of vectors ([experts, 1]). One that no
    token reaches counts as if each of its inputs had been 1 once, alone, so that all matter alike; a warning says so.
    """
    sums: dict[str, tuple[Tensor, int | Tensor]] = {}
    weights = list(weights)
    last: list = []  # the tensor that a Linear was called with, its version, its statistic

    def term(layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, CONVOLUTIONS) or x.is_inference():
            return statistic(layer, wide(x))
        if not (last and last[0] is x and last[1] == x._version):
            last[:] = x, x._version, statistic(layer, wide(x))
        return last[2]

    def watch(weight: Weight):
        def hook(layer, args, kwargs):
            values = (*args, *kwargs.values())
            total, count = sums.get(weight.name, (0, 0))
            if weight.experts is not None:
                with torch.no_grad():
                    inputs = expert_inputs(weight, *values[:2])
                    new = torch.cat([statistic(layer, wide(x)) for x in inputs])
                sums[weight.name] = (total + new, count + torch.tensor([[len(x)] for x in inputs], device=new.device))
                return
            x = values[0]
            width = weight.as_rows(weight.parameter).shape[1] * getattr(layer, "groups", 1)
            with torch.no_grad():
                new, n = term(layer, x), _patches(layer, x).numel() // width
            sums[weight.name] = (total + new, count + n)

        return weight.module.register_forward_pre_hook(hook, with_kwargs=True)

    with ExitStack() as stack:
        for weight in weights:
            if not isinstance(weight.module, nn.MultiheadAttention):  # its three inputs are not the layer's one
                stack.callback(watch(weight).remove)
        yield sums
    for weight in weights:
        if weight.experts is not None and weight.name in sums:
            _reach_all_(weight, *sums[weight.name], statistic)


def expert_inputs(weight: Weight, x: Tensor, routed: Tensor) -> list[Tensor]:
    """What each expert's matrix of `weight` is multiplied with, [tokens that are routed to it, in], of one call.

    x: [..., width], what the mixture reads. routed: [..., k], the numbers of the experts of each token.
    """
    layer, x, routed = weight.module, x.flatten(0, -2), routed.flatten(0, -2)
    inputs = [x[(routed == expert).any(-1)] for expert in range(weight.experts)]
    if weight.attribute != "down_proj":
        return inputs
    name = "gate_up_proj" if layer.has_gate else "up_proj"
    activation = layer._apply_gate if layer.has_gate else layer.act_fn
    biases = getattr(layer, f"{name}_bias") if layer.has_bias else [None] * weight.experts
    matrices = getattr(layer, name).mT if layer.is_transposed else getattr(layer, name)
    return [activation(F.linear(*each)) for each in zip(inputs, matrices, biases, strict=True)]


def _reach_all_(weight: Weight, total: Tensor, count: Tensor, statistic: Callable) -> None:
    """Puts what inputs of 1, each alone, give into the sums [experts, ...] of experts that no token was routed to."""
    missed = (count == 0).flatten()
    if missed.any():
        width = weight.as_rows(weight.parameter).shape[1]
        total[missed] = statistic(weight.module, torch.eye(width, dtype=total.dtype, device=total.device))
        count[missed] = width
        warnings.warn(
            f"No token of the batches is routed to {int(missed.sum())} of the {len(missed)} experts of {weight.name}: "
            "all of its inputs are taken to matter alike; give more batches.",
            stacklevel=4,
        )


# --- the factor of one layer ------------------------------------------------------------------------------------------


def check_layer(weight: Tensor, hessian: Tensor) -> None:
    """InputError unless weight [out, in] and hessian [in, in] are finite and fit."""
    if weight.dim() != 2 or not weight.is_floating_point() or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise InputError(
            f"weight is {list(weight.shape)} and hessian {list(hessian.shape)}, but they must be [out, in] and "
            "[in, in]: X^T X of the layer's inputs X [N, in]."
        )
    if not hessian.isfinite().all() or not weight.isfinite().all():
        raise InputError("The weight or the Hessian holds NaN or infinity: look for the batch that it comes from.")


def inverse_factor(hessian: Tensor) -> Tensor:
    """U [in, in], upper, with (H + damping)^-1 = U^T U, in float64, for the H = X^T X of a layer's inputs.

    The diagonal is raised by DAMP times its mean, and by ten times more, with a warning, as often as the decomposition
    fails. An input that was always zero gets the mean: it has no part in any other. U is the inverse of the upper R
    with H + damping = R R^T, which is the Cholesky factor of the flipped matrix. InputError if none can be had.
    """
    h = hessian.double().flip(0, 1)
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal.new_ones(()) if dead.all() else diagonal[~dead].mean()
    diagonal[dead] = mean
    for tenfold in range(TRIES):
        damping = DAMP * 10**tenfold
        h.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            return _inverse(lower.flip(0, 1))
        warnings.warn(
            f"The Hessian is not positive definite in float64 with a damping of {damping:g}, so {10 * damping:g} is "
            "tried: give more calibration data.",
            stacklevel=3,
        )
    raise InputError(
        f"The Hessian has no Cholesky factor even with a damping of {damping:g}: it is not X^T X of inputs."
    )


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangle [in, in], in halves: a third of the products of solving for the identity."""
    size = len(upper)
    if size <= SMALL:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, eye, upper=True)
    half, inverse = size // 2, torch.zeros_like(upper)
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = first @ upper[:half, half:] @ -last
    return inverse
