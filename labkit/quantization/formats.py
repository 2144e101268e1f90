"""Number formats that are sets of points: codebooks, small floats and block floats, a row each in `FORMATS`.

A code is an index into the points of a format. A signed format has the sign in the top bit of a code, so that the code
of a small float is its bit pattern. Sources: E4M3 is torch.float8_e4m3fn (Micikevicius et al. 2022); E2M1 and the MX
formats are those of the OCP Microscaling specification 1.0; NVFP4 is NVIDIA's; NF4 is QLoRA's (Dettmers et al. 2023,
appendix E).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import InputError, check_choice
from labkit.quantization.affine import check_floats, check_group, stored


@dataclass(frozen=True)
class Codebook:
    """A number format.

    points: the numbers of the codes 0, 1, ..., ascending; without the sign if the format is signed.
    bits: width of a code.
    signed: True if the top bit of a code is the sign.
    block: number of values along the last dimension that share a scale; None for a format without scales.
    scale: dtype of a scale. The largest |x| of a block becomes the last point; with E8M0, where scales are powers of
        two, the largest |x| becomes at least half of the last point.
    nested: True if scales are multiples of a float32 for the whole tensor, chosen so that the largest scale is the
        largest number of its dtype.
    """

    points: tuple[float, ...]
    bits: int
    signed: bool = True
    block: int | None = None
    scale: torch.dtype | None = None
    nested: bool = False

    def encode(self, values: Tensor) -> Tensor:
        """Return the code of the nearest point of each value, uint8 in the shape of `values`.

        Of two points equally near, the point with the even code is taken; a value beyond the last point gets the last.
        """
        points = torch.tensor(self.points, device=values.device)
        magnitude = values.abs() if self.signed else values
        middles = (points[1:] + points[:-1]) / 2
        codes = torch.bucketize(magnitude.contiguous(), middles, out_int32=True)  # at a middle, the lower code
        next_middle = middles[codes.clamp(max=len(middles) - 1)]
        is_odd = codes % 2 == 1
        codes += (next_middle == magnitude) & is_odd
        if self.signed:
            codes += values.signbit().int() << self.bits - 1
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the points of `codes`, float32 in the shape of `codes`; NaN for a code without a point."""
        unsigned_codes = 2 ** (self.bits - self.signed)
        table = torch.full((unsigned_codes,), torch.nan)
        table[: len(self.points)] = torch.tensor(self.points)
        if self.signed:
            table = torch.cat([table, -table])
        return table.to(codes.device)[codes.int()]


def _floats(exponent_bits: int, mantissa_bits: int, count: int) -> tuple[float, ...]:
    """List the first `count` non-negative numbers of a small float in the order of the codes, subnormals first."""
    bias = 2 ** (exponent_bits - 1) - 1
    steps = 2**mantissa_bits
    numbers = []
    for code in range(count):
        exponent, mantissa = divmod(code, steps)
        leading_bit = 1 if exponent else 0  # a subnormal number has none, and the exponent of the next binade
        significand = leading_bit + mantissa / steps
        numbers.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return tuple(numbers)


NF4 = (  # quantiles of the normal distribution, 8 to the right of 0 and 7 to the left, over the largest
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1 = _floats(2, 1, 8)  # 0 .5 1 1.5 2 3 4 6
E4M3 = _floats(4, 3, 127)  # to 448; its last code is NaN, and no code is an infinity
E5M2 = _floats(5, 2, 124)  # to 57,344; then an infinity and NaN, as IEEE 754 has it

FORMATS: dict[str, Codebook] = {
    "e4m3": Codebook(E4M3, 8),
    "e5m2": Codebook(E5M2, 8),
    "nf4": Codebook(NF4, 4, signed=False, block=64, scale=torch.float16),  # in bitsandbytes scales are float32
    "mxfp4": Codebook(E2M1, 4, block=32, scale=torch.float8_e8m0fnu),
    "nvfp4": Codebook(E2M1, 4, block=16, scale=torch.float8_e4m3fn, nested=True),
}


@dataclass(frozen=True)
class Encoded:
    """A tensor in a format of `FORMATS`.

    codes: uint8 in the tensor's shape, a code a byte (`packing.pack_codes` packs them).
    scale: [..., blocks, 1] in the format's dtype; None for a format without scales.
    tensor_scale: a float32, the unit of the scales in a nested format; else None.
    format: a name in `FORMATS`.
    """

    codes: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    format: str

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits

    def dequantize(self) -> Tensor:
        """Return point times scale (times the tensor's scale), float32 in the shape of the codes."""
        points = FORMATS[self.format].decode(self.codes)
        if self.scale is None:
            return points
        blocks = points.unflatten(-1, (self.scale.shape[-2], -1))
        values = blocks * _factor(self.scale, self.tensor_scale)
        return values.reshape(self.codes.shape)


def quantize(x: Tensor, format: str) -> Encoded:
    """Encode x in a number format, with scales from the largest |x| of each block.

    x: floating point. A format with blocks needs a last dimension that whole blocks fill.
    format: a name in `FORMATS`.

    x / scale is computed in float32 and rounded half to even; values beyond the last point become the last point (a
    cast to float8 may give an infinity or NaN there).
    Raises InputError for an unknown format, for NaN and infinities, for a range beyond the dtype of the scale, and for
    a last dimension that blocks do not fill.
    """
    check_choice(format, FORMATS, "number format")
    check_floats(x)
    codebook = FORMATS[format]
    values = x.detach().float()
    if not values.isfinite().all():
        raise InputError("The values have NaN or infinities: look for their origin before you quantize.")
    if codebook.block is None:
        return Encoded(codebook.encode(values), None, None, format)
    check_group(x.shape[-1] if x.dim() else 1, codebook.block)
    blocks = values.unflatten(-1, (-1, codebook.block))
    largest = blocks.abs().amax(-1, keepdim=True)
    last_point = codebook.points[-1]
    tensor_scale = None
    if codebook.nested:
        largest_scale = torch.finfo(codebook.scale).max
        tensor_scale = stored(largest.max() / last_point / largest_scale, torch.float32)
    if codebook.scale == torch.float8_e8m0fnu:
        scale = _power_of_two_scale(largest, last_point)
    else:
        unit = 1 if tensor_scale is None else tensor_scale
        scale = stored(largest / last_point / unit, codebook.scale)
    codes = codebook.encode(blocks / _factor(scale, tensor_scale))
    return Encoded(codes.reshape(x.shape), scale, tensor_scale, format)


def fake(x: Tensor, format: str) -> Tensor:
    """SIMULATED: return quantize(x, format).dequantize() in x's shape and dtype."""
    return quantize(x, format).dequantize().to(x.dtype)


def with_better_exponent(x: Tensor) -> Encoded:
    """Encode x in MXFP4 with the better of two exponents for each block, by squared error.

    x: floating point, with a last dimension that blocks of 32 fill.

    The specification's exponent lets values between 6 and 8 times the scale become 6; the next exponent clips nothing,
    at twice the step. A block takes the next one only if the error is less.
    """
    first = quantize(x, "mxfp4")
    doubled = (2 * first.scale.float()).clamp(max=2.0**127).to(first.scale.dtype)
    blocks = x.detach().float().unflatten(-1, (-1, FORMATS["mxfp4"].block))
    codes = FORMATS["mxfp4"].encode(blocks / _factor(doubled, None))
    second = Encoded(codes.reshape(x.shape), doubled, None, "mxfp4")
    errors = []
    for encoded in (first, second):
        change = encoded.dequantize().view(blocks.shape) - blocks
        errors.append(change.square().sum(-1, keepdim=True))
    better = errors[1] < errors[0]  # [..., blocks, 1]
    scale = torch.where(better, second.scale.float(), first.scale.float()).to(first.scale.dtype)
    first_codes, second_codes = (encoded.codes.view(blocks.shape) for encoded in (first, second))
    codes = torch.where(better, second_codes, first_codes).view(x.shape)
    return Encoded(codes, scale, None, "mxfp4")


def _power_of_two_scale(largest: Tensor, last_point: float) -> Tensor:
    """Return 2^(floor(log2 largest) - floor(log2 last_point)) in E8M0: OCP specification 1.0, section 6.3."""
    exponent = torch.frexp(largest).exponent - torch.frexp(torch.tensor(last_point)).exponent
    return torch.exp2(exponent.float().clamp(-127, 127)).to(torch.float8_e8m0fnu)


def _factor(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    return scale.float() if tensor_scale is None else scale.float() * tensor_scale
