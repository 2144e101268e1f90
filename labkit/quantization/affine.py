"""Affine quantization: codes = clip(round(x / scale) + zero, lo, hi), and x is about (codes - zero) * scale.

The round is half to even, as in torch and ONNX. The number 0 is a point of every grid, so that padding, ReLU and pruned
weights cost nothing; a grid is symmetric if the code of 0 is 0. Granularity is a matter of shape: a scale broadcasts
against x, or has one dimension more for groups. Sources: Jacob et al. 2018 (arXiv:1712.05877), equation 1;
Krishnamoorthi 2018 (arXiv:1806.08342), section 2.

    >>> import torch
    >>> from labkit.quantization import affine
    >>> weight = torch.tensor([[0.6, -1.0, 0.25], [8.0, 2.0, -3.0]])
    >>> quantized = affine.quantize(weight, bits=4, axis=0)  # a scale for each row
    >>> quantized.codes
    tensor([[ 4, -7,  2],
            [ 7,  2, -3]], dtype=torch.int8)
    >>> quantized.scale.shape
    torch.Size([2, 1])
    >>> error = quantized.dequantize() - weight
    >>> bool((error.abs() <= quantized.scale / 2).all())  # rounding moves a value by half a step at most
    True
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.arguments import FLOATS, check_floats, check_tensor
from labkit.errors import InputError, check_choice, check_whole, is_whole

# --- symmetric conventions --------------------------------------------------------------------------------------------
# Each takes half = 2^(bits - 1) and returns (steps, lowest code): the scale is the largest |x| divided by steps.


def _restricted(half: int) -> tuple[float, int]:
    """Use codes -127 to 127: TensorRT's weights, most int8 kernels."""
    return half - 1, 1 - half


def _full(half: int) -> tuple[float, int]:
    """Use the whole range of codes for x / scale from -127.5 to 127.5: GPTQ."""
    return half - 0.5, -half


def _clipped(half: int) -> tuple[float, int]:
    """Use the whole range of codes; a positive extreme loses a step."""
    return half, -half


def _signed(half: int) -> tuple[float, int]:
    """Give the extreme, positive or negative, the lowest code; the scale may be negative: llama.cpp's Q4_0."""
    return -half, -half


SYMMETRIC: dict[str, Callable[[int], tuple[float, int]]] = {
    "restricted": _restricted,
    "full": _full,
    "clipped": _clipped,
    "signed": _signed,
}
ASYMMETRIC = "asymmetric"
DEFAULT_KINDS = {True: "restricted", False: ASYMMETRIC}


# --- grids ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The points (code - zero) * scale for lo <= code <= hi.

    scale: floating point, of a shape that broadcasts against x, or with one dimension more, [..., groups, 1], for
        groups along x's last dimension. Never 0 and, but for "signed" grids, positive.
    zero: int32 in the shape of the scale, the code of the number 0.
    bits: width of a code, 2 to 8.
    lo, hi: the lowest and the highest code.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    lo: int
    hi: int

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of x in its shape: int8, or uint8 if the grid has no negative codes.

        Raises InputError for NaN.
        """
        check_tensor(x, "x")
        codes = self._nearest(x)
        if codes.isnan().any():
            raise InputError("x has NaN, for which there is no code: look for its origin before you quantize.")
        dtype = torch.int8 if self.lo < 0 else torch.uint8
        return codes.to(dtype).reshape(x.shape)

    def dequantize(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the points of `codes`, in the shape of `codes`.

        dtype: type of the result, by default the scale's. The points are computed in float32 or wider.
        """
        check_tensor(codes, "codes")
        scale = upcast(self.scale)
        points = (self._grouped(codes).to(scale.dtype) - self.zero) * scale
        return points.reshape(codes.shape).to(dtype or self.scale.dtype)

    def fake(self, x: Tensor) -> Tensor:
        """Return dequantize(quantize(x)) in x's dtype, without a detour through integers; NaN stays NaN."""
        codes = self._nearest(x)
        points = codes.sub_(self.zero).mul_(upcast(self.scale))
        return points.reshape(x.shape).to(x.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """Split x's last dimension into groups if the scale has groups."""
        has_groups = self.scale.dim() == x.dim() + 1
        return x.unflatten(-1, (self.scale.shape[-2], -1)) if has_groups else x

    def _nearest(self, x: Tensor) -> Tensor:
        """Return codes as floating-point numbers, grouped as the scale is."""
        steps = self._grouped(upcast(x)) / upcast(self.scale)
        return steps.round_().add_(self.zero).clamp_(self.lo, self.hi)


@dataclass(frozen=True)
class Quantized:
    """A tensor as whole numbers: `codes`, int8 or uint8 in the tensor's shape, and the `grid` of the codes."""

    codes: Tensor
    grid: Grid

    @property
    def scale(self) -> Tensor:
        return self.grid.scale

    @property
    def zero(self) -> Tensor:
        return self.grid.zero

    @property
    def bits(self) -> int:
        return self.grid.bits

    def dequantize(self) -> Tensor:
        return self.grid.dequantize(self.codes)


def choose(
    lo: Tensor,
    hi: Tensor,
    bits: int,
    *,
    symmetric: bool | str = True,
    dtype: torch.dtype | None = None,
) -> Grid:
    """Choose the grid for values from lo to hi.

    lo, hi: two floating-point tensors of one shape, that of the scale (see `Grid`).
    bits: width of a code, 2 to 8.
    symmetric: False: codes 0 to 2^bits - 1 over the range, widened until 0 lies inside. Else codes are signed, the code
        of 0 is 0, and the name of a convention in `SYMMETRIC` gives the scale for m = max |x|, with h = 2^(bits - 1):
        "restricted" m / (h - 1), "full" 2 m / (2 h - 1), "clipped" m / h, "signed" -m / h if the extreme is positive
        and m / h otherwise. True is "restricted" at every width: int8 kernels want no code -128. The conventions differ
        by 0.2 dB at 8 bits, and by much at 4.
    dtype: the type in which the scale is stored, lo's by default. The codes belong to the scale as stored. A scale too
        small for the dtype becomes its least number; without any range (all values 0) the scale is 1.

    Raises InputError for a range that is not finite.
    """
    check_whole(bits, "bits", 2, 8)
    kind = DEFAULT_KINDS[symmetric] if isinstance(symmetric, bool) else symmetric
    check_choice(kind, (ASYMMETRIC, *SYMMETRIC), "kind of symmetric grid")
    check_floats(lo, "lo")
    check_floats(hi, "hi")
    dtype = dtype or lo.dtype
    if dtype not in FLOATS:
        raise InputError(f"dtype is {dtype!r}, but a scale is a floating-point number: take torch.float32 or narrower.")
    lo = upcast(lo).clamp(max=0)
    hi = upcast(hi).clamp(min=0)
    if kind == ASYMMETRIC:
        return _asymmetric_grid(lo, hi, bits, dtype)
    return _symmetric_grid(lo, hi, bits, kind, dtype)


def _asymmetric_grid(
    lo: Tensor,
    hi: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Grid:
    highest = 2**bits - 1
    scale = stored((hi - lo) / highest, dtype)
    zero = (-lo / upcast(scale)).round().clamp(0, highest).to(torch.int32)
    return Grid(scale, zero, bits, 0, highest)


def _symmetric_grid(
    lo: Tensor,
    hi: Tensor,
    bits: int,
    kind: str,
    dtype: torch.dtype,
) -> Grid:
    half = 2 ** (bits - 1)
    steps, lowest = SYMMETRIC[kind](half)
    if kind == "signed":
        extreme = torch.where(hi > -lo, hi, lo)
    else:
        extreme = torch.maximum(hi, -lo)
    scale = stored(extreme / steps, dtype)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return Grid(scale, zero, bits, lowest, half - 1)


# --- tensors ----------------------------------------------------------------------------------------------------------


def quantize(
    x: Tensor,
    bits: int = 8,
    *,
    symmetric: bool | str = True,
    axis: int | None = None,
    group_size: int | None = None,
) -> Quantized:
    """Quantize x on the grid that `choose` makes from the least and the largest value.

    x: floating point, of any shape, at least one value.
    bits: width of a code, 2 to 8.
    symmetric: True, False or the name of a convention, see `choose`.
    axis: a dimension of x; each index of this dimension (an output channel, say) gets a scale. By default the whole
        tensor has a single scale.
    group_size: number of neighbours along the last dimension that share a scale, a divisor of its size. Groups are
        separate for each row (a group as long as the row gives a scale for each token) or, if `axis` is given, for
        each index of `axis`.

    Returns codes in x's shape. The scale (x's dtype) and zero have x's number of dimensions, with size 1 along a
    dimension that shares a scale, or with groups one dimension more, [..., groups, 1]. Inside the range
    |x - dequantize()| <= |scale| / 2, but for the positive end of "clipped" and "signed" grids.
    Raises InputError for an axis beyond x and for groups that do not fill the last dimension.
    """
    grid = _grid(x, bits, symmetric, axis, group_size)
    return Quantized(grid.quantize(x), grid)


def fake_quantize(
    x: Tensor,
    bits: int = 8,
    *,
    symmetric: bool | str = True,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """SIMULATED: return quantize(x, ...).dequantize() to the bit, in x's shape and dtype; same arguments."""
    return _grid(x, bits, symmetric, axis, group_size).fake(x)


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Return the signal to quantization noise ratio, 10 log10(sum r^2 / sum (r - a)^2), in dB.

    reference, approximation: r and a, two tensors of one shape. The sums are taken in float64.
    Returns inf if both are equal, -inf if only the reference is all zero.
    """
    check_tensor(reference, "reference")
    check_tensor(approximation, "approximation")
    if reference.shape != approximation.shape:
        raise InputError(
            f"The reference is {list(reference.shape)} and the approximation {list(approximation.shape)}: give two of "
            "the same shape."
        )
    reference = reference.detach().double()
    noise = float((reference - approximation.detach().double()).square().sum())
    signal = float(reference.square().sum())
    if not noise:
        return math.inf
    if not signal:
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def check_group(width: int, group_size: int) -> None:
    """Raise InputError, naming the possible sizes, unless groups of `group_size` fill a dimension of size `width`."""
    check_whole(group_size, "group_size")
    if width % group_size == 0:
        return
    divisors = [size for size in range(1, width + 1) if width % size == 0]
    usual = [size for size in divisors if size % 32 == 0]
    raise InputError(
        f"group_size is {group_size}, but groups must fill the last dimension: take a divisor of "
        f"{width}: {', '.join(map(str, usual or divisors))}."
    )


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 or wider.

    A product of bfloat16 has 8 bits, too few for code times scale; float16 ends at 65504, which scores may leave.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to the dtype of storage without making an entry 0.

    scale: float32 or wider. A 0 becomes 1. An entry too small for `dtype` becomes the least number of `dtype`, or the
        least number with a reciprocal in float32.

    Raises InputError for NaN and infinities.
    """
    info = torch.finfo(dtype)
    rounded = torch.where(scale == 0, 1, scale).to(dtype).to(scale.dtype)
    if not rounded.isfinite().all():
        raise InputError(
            f"The values have NaN, infinities or a range beyond {dtype}: look for their origin, or clamp them first."
        )
    least = max(info.smallest_normal * info.eps, 2.0**-126)
    magnitude = rounded.abs().clamp(min=least)  # after the cast: 1e-9 is 0 in float16
    return magnitude.copysign(rounded).to(dtype)


def _grid(
    x: Tensor,
    bits: int,
    symmetric: bool | str,
    axis: int | None,
    group_size: int | None,
) -> Grid:
    """Choose the grid of x for the arguments of `quantize`."""
    check_floats(x)
    _check_axis(x, axis)
    separate = set() if axis is None else {axis % x.dim()}  # dimensions whose indices have scales of their own
    if group_size is not None:
        last = x.dim() - 1
        if not x.dim() or last in separate:
            raise InputError("Groups run along the last dimension, so axis must be another: leave one of the two out.")
        check_group(x.shape[-1], group_size)
        rows = separate or set(range(last))
        separate = rows | {last}
        x = x.unflatten(-1, (-1, group_size))
    shared = [dimension for dimension in range(x.dim()) if dimension not in separate]
    lo = hi = x.detach()
    if shared:
        lo, hi = lo.amin(shared, True), hi.amax(shared, True)
    return choose(lo, hi, bits, symmetric=symmetric)


def _check_axis(x: Tensor, axis: int | None) -> None:
    if axis is None:
        return
    dimensions = x.dim()
    if not is_whole(axis) or not -dimensions <= axis < dimensions:
        raise InputError(
            f"axis is {axis!r}, but x has {dimensions} dimensions: take one from {-dimensions} to {dimensions - 1}."
        )
