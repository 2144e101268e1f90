"""K-quants: 4-bit weights whose scales and minima are codes too, chosen by weighted least squares. SIMULATED.

The format is Q4_K of llama.cpp (ggml, k_quants, 2023), the commonest of four-bit model files: 8 blocks of 32 weights
share two float16 numbers, and each block has a scale and a minimum in 6 bits. `importance` is what llama.cpp calls an
importance matrix: the mean square of each input, so that errors count where inputs are large.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import InputError, check_whole
from labkit.quantization.affine import check_group

BLOCK = 32  # weights that share a scale and a minimum
LEVELS = 15  # the largest code of a weight
SCALE_LEVELS = 63  # the largest code of a scale or a minimum
STEPS = 21  # numbers of levels that the range of a block is laid over, from 14 to 16, to search for the best


class Line(NamedTuple):
    """The line on which the points of a block lie: scale x code - minimum, both not negative, [..., 1]."""

    scale: Tensor
    minimum: Tensor


def bits_per_weight(blocks: int = 8) -> float:
    """Return the stored bits of a weight: its code, the codes of scale and minimum, and two float16 numbers.

    blocks: number of blocks that share the float16 numbers, 8 in Q4_K.
    """
    return 4 + (6 + 6) / BLOCK + 2 * 16 / (BLOCK * blocks)


def fake(weight: Tensor, importance: Tensor | None = None, *, blocks: int = 8) -> Tensor:
    """SIMULATED: return a weight [out, in] after rounding to a K-quant and back.

    importance: mean square of each input [in]; None weighs errors by the weights alone.
    blocks: number of blocks that share the float16 numbers, 8 in Q4_K. Rows must be whole super-blocks: of SmolLM2's
        576 inputs 8 x 32 is no divisor, and llama.cpp takes another format; 6 x 32 is one.

    A block's line is the best of several by weighted squares (`_candidates`). Errors weigh as in llama.cpp: with an
    importance q, q sqrt(s + w^2) with s twice the mean square of the super-block; without, |w| and the root of the
    block's mean square. Scales and minima of a super-block are then rounded to 6 bits, and codes follow them.

    Raises InputError for an importance of another length, and for rows that super-blocks do not fill.
    """
    check_whole(blocks, "blocks")
    check_group(weight.shape[1], BLOCK * blocks)
    x = weight.detach().float().unflatten(1, (-1, blocks, BLOCK))  # [out, super-blocks, blocks, 32]
    line = _best_line(x, _weights(x, importance))
    line = Line(_in_6_bits(line.scale), _in_6_bits(line.minimum))
    return _points(x, line).reshape(weight.shape).to(weight.dtype)


def _weights(x: Tensor, importance: Tensor | None) -> Tensor:
    """Return the weight of each squared error, [out, super-blocks, blocks, 32]."""
    if importance is None:
        return x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    inputs = x[0].numel()
    if importance.shape != (inputs,):
        raise InputError(f"importance is {list(importance.shape)}, but there are {inputs} inputs: give each a number.")
    of_input = importance.to(x).view(x.shape[1:])
    spread = 2 * x.square().mean((-2, -1), keepdim=True)
    return of_input * (spread + x.square()).sqrt()


def _best_line(x: Tensor, weights: Tensor) -> Line:
    """Return the candidate line of each block with the least weighted squared error."""
    best, least = None, None
    for line in _candidates(x, weights):
        error = (weights * (_points(x, line) - x).square()).sum(-1, keepdim=True)
        if best is None:
            best, least = line, error
            continue
        better = error < least
        best = Line(*(torch.where(better, new, old) for new, old in zip(line, best, strict=True)))
        least = torch.where(better, error, least)
    return best


def _candidates(x: Tensor, weights: Tensor) -> Iterator[Line]:
    """Yield lines from the least to the largest weight of a block, then lines fitted to the codes of other ranges.

    A fit is weighted least squares of the weights on their codes; a minimum that would be above 0 stays 0.
    """
    least = x.amin(-1, keepdim=True).clamp(max=0)
    span = (x.amax(-1, keepdim=True) - least).clamp(min=1e-10)
    yield Line(span / LEVELS, -least)
    total = weights.sum(-1, keepdim=True)
    mean_x = (weights * x).sum(-1, keepdim=True) / total
    for levels in torch.linspace(LEVELS - 1, LEVELS + 1, STEPS).tolist():
        codes = ((x - least) * levels / span).round().clamp(0, LEVELS)
        mean_code = (weights * codes).sum(-1, keepdim=True) / total
        away = weights * (codes - mean_code)
        covariance = (away * x).sum(-1, keepdim=True)
        variance = (away * codes).sum(-1, keepdim=True)
        slope = covariance / variance.clamp(min=1e-10)
        minimum = slope * mean_code - mean_x
        product = (weights * codes * x).sum(-1, keepdim=True)
        energy = (weights * codes * codes).sum(-1, keepdim=True)
        through_zero = (product / energy).nan_to_num()
        slope = torch.where(minimum < 0, through_zero, slope)
        yield Line(slope.clamp(min=0), minimum.clamp(min=0))


def _in_6_bits(values: Tensor) -> Tensor:
    """Round the scales or minima [..., blocks, 1] of super-blocks to codes of 6 bits times a float16 number."""
    unit = (values.amax(-2, keepdim=True) / SCALE_LEVELS).half().float()
    codes = (values / unit.clamp(min=1e-10)).round().clamp(0, SCALE_LEVELS)
    return codes * unit


def _points(x: Tensor, line: Line) -> Tensor:
    """Return the nearest points of a line."""
    codes = ((x + line.minimum) / line.scale.clamp(min=1e-10)).round().clamp(0, LEVELS)
    return codes * line.scale - line.minimum
