"""Round one weight to few bits in groups: to the nearest points (`rtn`), or by GPTQ, which makes up for each rounding.

GPTQ: Frantar et al. 2022 (arXiv:2210.17323), Algorithm 1. `weight_only.quantize` applies both to a model.
"""

import dataclasses
import itertools

import torch
from torch import Tensor

from labkit.errors import InputError
from labkit.modules.hessians import check_layer, inverse_factor, wide
from labkit.quantization import affine
from labkit.quantization.affine import Grid, Quantized
from labkit.quantization.formats import Encoded

SCALE = torch.float16  # in which a group's scale is stored
BLOCK = 128  # columns whose updates wait for each other, as in GPTQ's paper


def dequantize(weight: Quantized | Encoded) -> Tensor:
    """Return the points of a weight, float32 [out, in]: code times scale, not rounded to the scale's dtype."""
    if isinstance(weight, Encoded):
        return weight.dequantize()
    return weight.grid.dequantize(weight.codes, torch.float32)


def rtn(
    weight: Tensor,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    symmetric: bool | str = False,
) -> Quantized:
    """Round a weight to the nearest points of a grid for each row and group.

    weight: floating point [out, in].
    bits, group_size, symmetric: as for `weight_only.quantize`.

    Returns codes [out, in] and scales [out, groups, 1] in float16. Raises InputError for a weight that is no matrix of
    floating-point numbers.
    """
    is_tensor = isinstance(weight, Tensor)
    is_matrix = is_tensor and weight.dim() == 2 and weight.numel() > 0
    if not is_matrix or not weight.is_floating_point():
        kind = f"{weight.dtype} {list(weight.shape)}" if is_tensor else type(weight).__name__
        raise InputError(f"weight is {kind}, but it must be floating-point numbers [out, in], at least one.")
    grid = group_grid(weight, bits, group_size, symmetric)
    return Quantized(grid.quantize(weight), grid)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    symmetric: bool | str = False,
    act_order: bool = False,
    mask: Tensor | None = None,
) -> Quantized:
    """Round a weight column by column, where the columns to the right make up for each rounding: x W^T stays near.

    weight: floating point [out, in].
    hessian: [in, in], X^T X of the layer's inputs X [N, in]; any positive multiple gives the same result.
    bits, group_size, symmetric: as for `weight_only.quantize`.
    act_order: True to round columns j in the order of H_jj, largest first. Groups stay groups of neighbouring columns,
        with grids chosen from the weights before any change ("static groups"), so that nothing is permuted at run time.
    mask: bool [out, in], False where a weight is to be zero; the other columns make up for a zero as for any rounding.

    Frantar et al. 2022, Algorithm 1. The Hessian is damped as `hessians.inverse_factor` says. With U the upper Cholesky
    factor of H^-1 (H^-1 = U^T U), for the columns j in order:
        q_j = round(w_j) on the grid of j's group     e = (w_j - q_j) / U_jj
        W_:,j: -= e U_j,j:     within a block of columns at once, for later columns once a block (the lazy update)
    A group's grid is chosen when the turn of its first column comes, from the weights after all updates so far: blocks
    end where groups do. (The published code leaves out the updates of the current block.)

    Returns codes [out, in] and scales [out, groups, 1] in float16. With H a multiple of I the result is `rtn`'s to the
    bit. An input that was always zero is rounded to nearest. Time O(in^3 + out in^2), memory O(in^2) in float64.
    Raises InputError for tensors that do not fit together and for a group size that does not divide the inputs.
    """
    _check_arguments(weight, hessian, mask)
    width = weight.shape[1]
    size = check_size(width, group_size)
    diagonal = hessian.diagonal()
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(width, device=diagonal.device)
    group_of = (order // size).tolist()
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    w = wide(weight)
    static = group_grid(w * keep, bits, size, symmetric)
    scale = static.scale[..., 0].t().contiguous()  # [groups, out]
    zero = static.zero[..., 0].t().contiguous()
    w = w.t()[order].contiguous()  # [in, out]: a column of the weight is one piece of memory
    keep = keep.t()[order]
    effect = inverse_factor(hessian[order][:, order]).to(w.dtype)  # U, [in, in]
    effect /= effect.diagonal()[:, None].clone()  # by how much later columns change if a weight changes by 1
    for start, end in itertools.pairwise(_block_edges(width, size)):
        errors = torch.empty_like(w[start:end])
        for j in range(start, end):
            group = group_of[j]
            if not act_order and j % size == 0:
                columns = slice(j, j + size)
                weights_of_group = (w[columns] * keep[columns]).t()
                grid = group_grid(weights_of_group, bits, None, symmetric)
                scale[group] = grid.scale[:, 0, 0]
                zero[group] = grid.zero[:, 0, 0]
            grid_of_column = dataclasses.replace(static, scale=scale[group], zero=zero[group])
            point = grid_of_column.fake(w[j] * keep[j])
            error = w[j] - point
            errors[j - start] = error
            w[j] = point
            later = slice(j + 1, end)
            w[later].addr_(effect[j, later], error, alpha=-1)
        effect_on_rest = effect[start:end, end:]
        w[end:].addmm_(effect_on_rest.t(), errors, alpha=-1)
    scale, zero = scale.t()[..., None], zero.t()[..., None]
    grid = dataclasses.replace(static, scale=scale, zero=zero)
    in_order = w[order.argsort()].t()
    return Quantized(grid.quantize(in_order), grid)


def _check_arguments(weight: Tensor, hessian: Tensor, mask: Tensor | None) -> None:
    if not isinstance(weight, Tensor) or not isinstance(hessian, Tensor):
        raise InputError("weight and hessian must be tensors [out, in] and [in, in]: make them with torch.as_tensor.")
    check_layer(weight, hessian)
    if mask is not None and (mask.shape != weight.shape or mask.dtype is not torch.bool):
        raise InputError(
            f"mask is {mask.dtype} {list(mask.shape)}, but it must be torch.bool {list(weight.shape)}, in the weight's "
            "shape: give True where a weight stays."
        )


def _block_edges(width: int, size: int) -> list[int]:
    """Return the edges of the blocks of columns: about `BLOCK` columns each, and groups of `size` begin at an edge.

    Groups longer than a block hold several blocks.
    """
    block = BLOCK // size * size or BLOCK
    block_starts = range(0, width, block)
    group_starts = range(0, width, max(size, block))
    return sorted({*block_starts, *group_starts, width})


def check_size(width: int, group_size: int | None) -> int:
    """Return the size of a group in rows of this width, the width itself for None; InputError if groups do not fit."""
    if group_size is None:
        return width
    affine.check_group(width, group_size)
    return group_size


def group_grid(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool | str,
) -> Grid:
    """Choose the grids of the groups of a weight [out, in] by least and largest value; scales [out, groups, 1]."""
    size = check_size(weight.shape[1], group_size)
    groups = weight.detach().unflatten(1, (-1, size))
    lo, hi = groups.amin(2, True), groups.amax(2, True)
    return affine.choose(lo, hi, bits, symmetric=symmetric, dtype=SCALE)
