"""Affine quantization: codes = clip(round(x / scale) + zero, lo, hi), and x is about (codes - zero) scale.

Jacob et al. 2018, equation 1; Krishnamoorthi 2018 (arXiv:1806.08342), section 2; the round is half to even, as in torch
and ONNX. Zero is a point of every grid, so that padding, ReLU and pruned weights cost nothing: symmetric or not is
whether the code of zero is 0. Granularity is a matter of shape: a scale broadcasts, or has a dimension more for groups.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from labkit.arguments import FLOATS, check_floats, check_tensor
from labkit.errors import InputError, check_choice, check_whole

# The symmetric conventions in circulation: the largest |x| divided by this is the scale, and the lowest code.
SYMMETRIC = {
    "restricted": lambda half: (half - 1, 1 - half),  # TensorRT's weights, most int8 kernels: codes -127..127
    "full": lambda half: (half - 0.5, -half),  # GPTQ: the whole range of codes, x / scale from -127.5 to 127.5
    "clipped": lambda half: (half, -half),  # a positive extreme loses a step
    "signed": lambda half: (-half, -half),  # llama.cpp's Q4_0: the extreme of either sign gets the lowest code
}
PLAIN = {True: "restricted", False: "asymmetric"}


@dataclass(frozen=True)
class Grid:
    """The points (code - zero) scale for lo <= code <= hi.

    scale, zero: of a shape that broadcasts against x, or with one dimension more, [..., groups, 1], for groups along
        x's last dimension. zero holds int32. scale is never 0 and, but for "signed", positive.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    lo: int
    hi: int

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x, in its shape: int8, or uint8 if the grid has no negative ones. InputError for NaN."""
        check_tensor(x, "x")
        codes = self._nearest(x)
        if codes.isnan().any():
            raise InputError("x has NaN, for which there is no code: look for its origin before you quantize.")
        return codes.to(torch.int8 if self.lo < 0 else torch.uint8).reshape(x.shape)

    def dequantize(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The points of these codes, in their shape, as dtype or that of the scale; computed in float32 or wider."""
        check_tensor(codes, "codes")
        return self._points(self._grouped(codes)).reshape(codes.shape).to(dtype or self.scale.dtype)

    def fake(self, x: Tensor) -> Tensor:
        """dequantize(quantize(x)) in x's dtype, without a detour through integers; NaN stays NaN."""
        codes = self._nearest(x)
        return codes.sub_(self.zero).mul_(_wide(self.scale)).reshape(x.shape).to(x.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.scale.shape[-2], -1)) if self.scale.dim() == x.dim() + 1 else x

    def _nearest(self, x: Tensor) -> Tensor:
        """Codes as floating-point numbers, grouped as the scale is."""
        steps = self._grouped(_wide(x)) / _wide(self.scale)
        return steps.round_().add_(self.zero).clamp_(self.lo, self.hi)

    def _points(self, codes: Tensor) -> Tensor:
        scale = _wide(self.scale)
        return (codes.to(scale.dtype) - self.zero) * scale


@dataclass(frozen=True)
class Quantized:
    """A tensor as integers: codes in its shape and the grid that they count on."""

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
    lo: Tensor, hi: Tensor, bits: int, *, symmetric: bool | str = True, dtype: torch.dtype | None = None
) -> Grid:
    """The grid for values from lo to hi, two tensors of a shape that broadcasts against x as `Grid.scale` does.

    bits: 2 to 8.
    symmetric: False: codes 0..2^bits - 1 over the range, which is widened to have 0 in it. Else codes are signed, that
        of zero is 0, and a name from `SYMMETRIC` says which scale belongs to m = max |x|, with h = 2^(bits - 1):
        "restricted" m / (h - 1), "full" 2 m / (2 h - 1), "clipped" m / h, and "signed" -m / h if the extreme is
        positive. True is "restricted" at every width: what int8 kernels take, as no code is -128. The difference is
        .2 dB at 8 bits, and large at 4.
    dtype: in which the scale is stored, lo's without; the codes belong to the scale as stored. A scale that would be 0
        in it becomes its least number; without any range (all values 0) it is 1.

    InputError for a range that is not finite.
    """
    check_whole(bits, "bits", 2, 8)
    kind = PLAIN[symmetric] if isinstance(symmetric, bool) else symmetric
    check_choice(kind, ("asymmetric", *SYMMETRIC), "kind of symmetric grid")
    check_floats(lo, "lo")
    check_floats(hi, "hi")
    dtype = dtype or lo.dtype
    if dtype not in FLOATS:
        raise InputError(f"dtype is {dtype!r}, but a scale is a floating-point number: take torch.float32 or narrower.")
    lo, hi = _wide(lo).clamp(max=0), _wide(hi).clamp(min=0)
    half = 2 ** (bits - 1)
    if kind == "asymmetric":
        scale = stored((hi - lo) / (2 * half - 1), dtype)
        zero = (-lo / _wide(scale)).round().clamp(0, 2 * half - 1).to(torch.int32)
        return Grid(scale, zero, bits, 0, 2 * half - 1)
    steps, lowest = SYMMETRIC[kind](half)
    extreme = torch.where(hi > -lo, hi, lo) if kind == "signed" else torch.maximum(hi, -lo)
    scale = stored(extreme / steps, dtype)
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), bits, lowest, half - 1)


def quantize(
    x: Tensor, bits: int = 8, *, symmetric: bool | str = True, axis: int | None = None, group_size: int | None = None
) -> Quantized:
    """x as codes of `bits` (2 to 8) on the grid that `choose` makes from the least and the largest value.

    symmetric: True, False or a convention, see `choose`.
    axis: a scale for each index of this dimension (an output channel); without, a scale for the tensor.
    group_size: a scale for each group of so many values along the last dimension, which it must divide, and that in
        each row (the whole row for a token); with `axis` too, in each index of `axis`.

    .codes has x's shape. .scale (x's dtype) and .zero have x's number of dimensions, those shared being 1, or with
    groups one more, [..., groups, 1]. Inside the range |x - dequantize()| <= |scale| / 2, but for the positive end of
    "clipped" and "signed" grids.
    """
    grid = _grid(x, bits, symmetric, axis, group_size)
    return Quantized(grid.quantize(x), grid)


def fake_quantize(
    x: Tensor, bits: int = 8, *, symmetric: bool | str = True, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """SIMULATED: x after `quantize` and back, to the bit, in its shape and dtype; the arguments are `quantize`'s."""
    return _grid(x, bits, symmetric, axis, group_size).fake(x)


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum r^2 / sum (r - a)^2) in dB, summed in float64; inf if all is equal."""
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
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def check_group(width: int, group_size: int) -> None:
    """InputError, with the sizes that are possible, unless groups of `group_size` fill a dimension of `width`."""
    check_whole(group_size, "group_size")
    if width % group_size:
        divisors = [size for size in range(1, width + 1) if width % size == 0]
        usual = [size for size in divisors if size % 32 == 0] or divisors
        raise InputError(
            f"group_size is {group_size}, but groups must fill the last dimension: take a divisor of "
            f"{width}: {', '.join(map(str, usual))}."
        )


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, float32 or wider, as dtype holds it, and not 0 there; InputError for NaN and infinities.

    A scale of 0 becomes 1; what dtype rounds to 0, its least number, or the least whose reciprocal float32 has.
    """
    info = torch.finfo(dtype)
    rounded = torch.where(scale == 0, 1, scale).to(dtype).to(scale.dtype)
    if not rounded.isfinite().all():
        raise InputError(
            f"The values have NaN, infinities or a range beyond {dtype}: look for their origin, or clamp them first."
        )
    least = max(info.smallest_normal * info.eps, 2.0**-126)
    return rounded.abs().clamp(min=least).copysign(rounded).to(dtype)  # after the cast: 1e-9 is 0 in float16


def _grid(x: Tensor, bits: int, symmetric: bool | str, axis: int | None, group_size: int | None) -> Grid:
    check_floats(x)
    whole = isinstance(axis, Integral) and not isinstance(axis, bool)
    if axis is not None and not (whole and -x.dim() <= axis < x.dim()):
        raise InputError(
            f"axis is {axis!r}, but x has {x.dim()} dimensions: take one from {-x.dim()} to {x.dim() - 1}."
        )
    separate = set() if axis is None else {axis % x.dim()}
    if group_size is not None:
        if not x.dim() or x.dim() - 1 in separate:
            raise InputError("Groups run along the last dimension, so axis must be another: leave one of the two out.")
        check_group(x.shape[-1], group_size)
        separate = (separate or set(range(x.dim() - 1))) | {x.dim() - 1}
        x = x.unflatten(-1, (-1, group_size))
    shared = [d for d in range(x.dim()) if d not in separate]
    values = x.detach()
    lo, hi = (values.amin(shared, True), values.amax(shared, True)) if shared else (values, values)
    return choose(lo, hi, bits, symmetric=symmetric)


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider: a product of bfloat16 has 8 bits, too few for code times scale."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
