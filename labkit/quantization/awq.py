"""AWQ for the layers that read the same inputs: scales of the columns of a weight, and clipped ranges of its groups.

Lin et al. 2023 (arXiv:2306.00978). `weight_only.quantize` applies both to a model.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from labkit.errors import InputError
from labkit.modules.hessians import check_layer
from labkit.quantization import affine
from labkit.quantization.affine import Quantized
from labkit.quantization.gptq import SCALE, check_size

STEPS = 20  # of the search for an exponent and, down to a half, of the search for a clipped range


def awq(
    weights: Sequence[Tensor],
    hessian: Tensor,
    magnitude: Tensor,
    round_: Callable[[Tensor], Tensor],
) -> Tensor:
    """Choose the scales by which columns are multiplied before rounding, and their inputs divided.

    weights: [out, in] each, of all layers that read the inputs.
    hessian: H = X^T X [in, in] of the inputs.
    magnitude: m [in], the mean |x_j| of each input.
    round_: Q, a function of a weight that returns its points.

    Returns s [in]. Lin et al. 2023, equations 4 and 5: s = m^alpha, with alpha of 0, .05, ..., .95 the least

        sum over weights of || X (Q(W diag(s)) diag(s)^-1 - W)^T ||^2 = tr(D H D^T)

    As in the published code s is divided by the root of the product of its extremes, and alpha = 0, so s = 1, is tried
    first. Raises InputError for tensors that do not fit together.
    """
    for weight in weights:
        check_layer(weight, hessian)
    if not weights or magnitude.shape != hessian.shape[:1]:
        raise InputError(
            f"There are {len(weights)} weights and {list(magnitude.shape)} magnitudes for a Hessian of "
            f"{list(hessian.shape)}: give a weight at least, and one magnitude an input."
        )
    best, least = torch.ones_like(magnitude), torch.inf
    tiny = torch.finfo(magnitude.dtype).tiny
    relative = magnitude / magnitude.mean().clamp(min=tiny)
    for step in range(STEPS):
        alpha = step / STEPS
        s = relative.clamp(min=1e-4) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights:
            change = round_(weight * s) / s - weight
            error += float(((change @ hessian) * change).sum())
        if error < least:
            best, least = s, error
    return best


def clipped(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    symmetric: bool | str = False,
) -> Quantized:
    """Round a weight to nearest on grids whose ranges are drawn in where this lowers the layer's error.

    weight: [out, in].
    hessian: H = X^T X [in, in].
    bits, group_size, symmetric: as for `weight_only.quantize`.

    Of 1, .95, ..., .55 times the range of a group the share with the least D_g H_gg D_g^T is taken, D_g being the
    change of the group by rounding: the clipping search of AWQ's published code, which leaves out the error that two
    groups make together.
    Returns codes [out, in] and scales [out, groups, 1] in float16.
    """
    check_layer(weight, hessian)
    size = check_size(weight.shape[1], group_size)
    groups = weight.unflatten(1, (-1, size))  # [out, groups, size]
    lo, hi = groups.amin(2, True), groups.amax(2, True)
    blocks = hessian.view(-1, size, len(hessian) // size, size)
    hessian_of_group = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)  # [groups, size, size]
    scale, zero, least = None, None, None
    for step in range(STEPS // 2):
        share = 1 - step / STEPS
        grid = affine.choose(lo * share, hi * share, bits, symmetric=symmetric, dtype=SCALE)
        change = (grid.fake(weight) - weight).unflatten(1, (-1, size)).transpose(0, 1)  # [groups, out, size]
        error = ((change @ hessian_of_group) * change).sum(2).t()[..., None]  # [out, groups, 1]
        if least is None:
            scale, zero, least = grid.scale, grid.zero, error
        better = error < least
        scale = torch.where(better, grid.scale, scale)
        zero = torch.where(better, grid.zero, zero)
        least = torch.where(better, error, least)
    grid = dataclasses.replace(grid, scale=scale, zero=zero)
    return Quantized(grid.quantize(weight), grid)
