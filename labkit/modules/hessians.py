"""Sums over the inputs of layers, for example squares or X^T X, and a factor of the inverse of X^T X.

SparseGPT, GPTQ, AWQ and Wanda are built on such sums. `watched` collects a sum while the model runs; the caller chooses
the model, the layers and the batches.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules.hooks import forward_hooks
from labkit.modules.weights import CONVOLUTIONS, Weight

DAMP = 0.01  # added to the diagonal of the Hessian, as a fraction of its mean, as in SparseGPT and GPTQ
TRIES = 6  # of a damping ten times the one before
SMALL = 96  # size up to which a triangle is inverted by one call

Statistic = Callable[[nn.Module, Tensor], Tensor]  # statistic(layer, input) of one call, to be summed over calls
Sum = tuple[Tensor, int | Tensor]  # (sum of a statistic, number of input vectors)


def wide(x: Tensor) -> Tensor:
    """Return `x` without its graph, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(dtype)


# --- sums over a layer's inputs ---------------------------------------------------------------------------------------


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors that a row of the layer's weight is multiplied with, as a view of the padded input.

    x: input of the layer.
    Returns [..., in]; of a convolution [N, *out, C, *kernel].
    """
    if not isinstance(layer, CONVOLUTIONS):
        return x
    spatial_dims = len(layer.kernel_size)
    if x.dim() == spatial_dims + 1:  # no batch dimension
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patches = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    windows = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for i, (kernel, stride, dilation) in enumerate(windows):
        span = dilation * (kernel - 1) + 1
        patches = patches.unfold(2 + i, span, stride)[..., ::dilation]  # [N, C, *out, *kernel so far]
    return patches.movedim(1, 1 + spatial_dims)


def _inner_dims(layer: nn.Module) -> int:
    """Return how many of the last dimensions of `_patches` are a single input vector: C and the kernel's."""
    return 1 + len(getattr(layer, "kernel_size", ()))


def sum_over_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the sum of x_j over a layer's input vectors: [groups, in / groups * kernel].

    layer: a Linear, a convolution, or a module with a weight of the same use.
    x: input of the layer.
    """
    patches = _patches(layer, x)
    outer = patches.dim() - _inner_dims(layer)
    groups = getattr(layer, "groups", 1)
    return patches.sum(tuple(range(outer))).reshape(groups, -1)


def squares(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the sum of x_j^2 over a layer's input vectors: [groups, in / groups * kernel]."""
    return sum_over_rows(layer, x.square())


def hessian(layer: nn.Module, x: Tensor) -> Tensor:
    """Return 2 X^T X of a layer's input vectors X, the Hessian of the squared error of its output: [groups, in, in]."""
    groups = getattr(layer, "groups", 1)
    patches = _patches(layer, x)
    outer = patches.dim() - _inner_dims(layer)
    count = patches.shape[:outer].numel()
    width = patches.shape[outer:].numel() // groups
    rows = patches.reshape(count, groups, width)
    rows = rows.transpose(0, 1)  # [groups, count, in]
    return 2 * rows.transpose(1, 2) @ rows


@contextmanager
def watched(weights: Iterable[Weight], statistic: Statistic) -> Iterator[dict[str, Sum]]:
    """Sum a statistic over the inputs of the weights' layers, in all calls made inside the `with` block.

    weights: nn.MultiheadAttention's are left out, since the module has three inputs.
    statistic: sum over the inputs of a call, such as `squares` or `hessian`.

    Gives a dict that is filled meanwhile: {name of the weight: (sum, number of input vectors)}.

    Linear layers that are called with the same tensor one after another (queries, keys, values) share a statistic. The
    inputs of an expert are the tokens that are routed to it, and each expert has a number of vectors, [experts,
    1]. An expert that no token reaches counts as if each of its inputs had been 1 once, alone, so that all inputs
    matter alike, and a warning says so.
    """
    weights = [weight for weight in weights if not isinstance(weight.module, nn.MultiheadAttention)]
    sums = _InputSums(weights, statistic)
    with forward_hooks([weight.module for weight in weights], sums.add, before=True):
        yield sums.by_name
    for weight in weights:
        if weight.experts is not None and weight.name in sums.by_name:
            _reach_all_(weight, *sums.by_name[weight.name], statistic)


class _InputSums:
    """The statistic of each weight's inputs so far, and the number of input vectors."""

    def __init__(self, weights: list[Weight], statistic: Statistic) -> None:
        self.by_name: dict[str, Sum] = {}
        self._weights = weights
        self._statistic = statistic
        self._latest: tuple[Tensor, int, Tensor] | None = None  # input of a Linear, its version, its statistic

    @torch.no_grad()
    def add(self, number: int, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Add the inputs of a call of the layer that has weight `number`."""
        weight = self._weights[number]
        values = (*args, *kwargs.values())
        if weight.experts is None:
            term, count = self._of_layer(weight, values[0])
        else:
            term, count = self._of_experts(weight, *values[:2])
        total, vectors = self.by_name.get(weight.name, (0, 0))
        self.by_name[weight.name] = (total + term, vectors + count)

    def _of_layer(self, weight: Weight, x: Tensor) -> tuple[Tensor, int]:
        """Return (statistic of the input x, number of vectors in x)."""
        layer = weight.module
        term = self._shared_statistic(layer, x)
        groups = getattr(layer, "groups", 1)
        vector_length = weight.as_rows(weight.parameter).shape[1] * groups
        return term, _patches(layer, x).numel() // vector_length

    def _shared_statistic(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the statistic of x, computed once if Linear layers read the same unchanged tensor in turn."""
        if isinstance(layer, CONVOLUTIONS) or x.is_inference():  # such a tensor has no version
            return self._statistic(layer, wide(x))
        if self._latest is not None:
            latest_x, version, latest_statistic = self._latest
            if latest_x is x and version == x._version:
                return latest_statistic
        statistic = self._statistic(layer, wide(x))
        self._latest = (x, x._version, statistic)
        return statistic

    def _of_experts(self, weight: Weight, x: Tensor, routed: Tensor) -> tuple[Tensor, Tensor]:
        """Return (statistic [experts, ...], number of vectors [experts, 1])."""
        inputs = expert_inputs(weight, x, routed)
        terms = [self._statistic(weight.module, wide(tokens)) for tokens in inputs]
        term = torch.cat(terms)
        counts = [[len(tokens)] for tokens in inputs]
        return term, torch.tensor(counts, device=term.device)


def expert_inputs(weight: Weight, x: Tensor, routed: Tensor) -> list[Tensor]:
    """Return the inputs of each expert's matrix in one call of a mixture: [tokens routed to the expert, in].

    weight: a stack of the experts' matrices.
    x: [..., width], input of the mixture.
    routed: [..., k], the numbers of the experts that each token goes to.
    """
    layer = weight.module
    tokens = x.flatten(0, -2)
    experts_of_token = routed.flatten(0, -2)
    inputs = []
    for expert in range(weight.experts):
        is_routed = (experts_of_token == expert).any(-1)
        inputs.append(tokens[is_routed])
    if weight.attribute != "down_proj":
        return inputs

    # the last matrix reads the activation of the first
    name = "gate_up_proj" if layer.has_gate else "up_proj"
    activation = layer._apply_gate if layer.has_gate else layer.act_fn
    biases = [None] * weight.experts
    if layer.has_bias:
        biases = getattr(layer, f"{name}_bias")
    matrices = getattr(layer, name)
    if layer.is_transposed:
        matrices = matrices.mT
    hidden = []
    for expert_tokens, matrix, bias in zip(inputs, matrices, biases, strict=True):
        hidden.append(activation(F.linear(expert_tokens, matrix, bias)))
    return hidden


def _reach_all_(weight: Weight, total: Tensor, count: Tensor, statistic: Statistic) -> None:
    """Fill in the sums of experts that no token was routed to, as if each input had been 1 once, alone, and warn.

    total: [experts, ...] sums of the statistic.
    count: [experts, 1] numbers of input vectors. Both tensors are changed in place.
    """
    missed = (count == 0).flatten()
    if missed.any():
        width = weight.as_rows(weight.parameter).shape[1]
        unit_inputs = torch.eye(width, dtype=total.dtype, device=total.device)
        total[missed] = statistic(weight.module, unit_inputs)
        count[missed] = width
        warnings.warn(
            f"No token of the batches is routed to {int(missed.sum())} of the {len(missed)} experts of {weight.name}: "
            "all of its inputs are taken to matter alike; give more batches.",
            stacklevel=4,
        )


# --- the factor of one layer ------------------------------------------------------------------------------------------


def check_layer(weight: Tensor, hessian: Tensor) -> None:
    """Raise InputError unless weight [out, in] and hessian [in, in] are finite and fit together."""
    is_matrix = weight.dim() == 2 and weight.is_floating_point()
    inputs = weight.shape[1] if is_matrix else 0
    if not is_matrix or hessian.shape != (inputs, inputs):
        raise InputError(
            f"weight is {list(weight.shape)} and hessian {list(hessian.shape)}, but they must be [out, in] and "
            "[in, in]: X^T X of the layer's inputs X [N, in]."
        )
    if not hessian.isfinite().all() or not weight.isfinite().all():
        raise InputError("The weight or the Hessian holds NaN or infinity: look for the batch that it comes from.")


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return U [in, in], upper triangular, float64, with U^T U = (H + damping)^-1: GPTQ's Cholesky factor.

    hessian: H = X^T X of a layer's inputs, [in, in].

    The damping raises the diagonal by DAMP times its mean, and by ten times more, with a warning, as often as the
    decomposition fails. The diagonal of an input that was always zero is set to the mean, as it has no part in
    any other. U is the inverse of the upper R with H + damping = R R^T, and R is the flipped Cholesky factor of the
    flipped matrix. Raises InputError if the decomposition fails TRIES times.
    """
    flipped = hessian.double().flip(0, 1)
    diagonal = flipped.diagonal().clone()
    always_zero = diagonal <= 0
    mean = diagonal.new_ones(()) if always_zero.all() else diagonal[~always_zero].mean()
    diagonal[always_zero] = mean
    for tenfold in range(TRIES):
        damping = DAMP * 10**tenfold
        flipped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
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
    """Invert an upper triangle [in, in] by halves, with a third of the products of solving for the identity."""
    size = len(upper)
    if size <= SMALL:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, eye, upper=True)
    half = size // 2
    first = _inverse(upper[:half, :half])
    last = _inverse(upper[half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = first
    inverse[half:, half:] = last
    corner = upper[:half, half:]
    inverse[:half, half:] = first @ corner @ -last
    return inverse
