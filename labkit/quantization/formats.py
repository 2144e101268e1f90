"""Formats that are sets of points: codebooks, small floats, and block floats, a row each in FORMATS.

A code is an index into the points. Small floats have a sign bit above it, whose codes are then those of the bits: E4M3
is torch.float8_e4m3fn (Micikevicius et al. 2022), E2M1 and the MX formats are those of the OCP Microscaling
specification 1.0, NVFP4 is NVIDIA's, NF4 that of QLoRA (Dettmers et al. 2023, appendix E).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import InputError, check_choice
from labkit.quantization.affine import check_floats, check_group, stored


@dataclass(frozen=True)
class Codebook:
    """points: the numbers of the codes 0, 1, ..., ascending; if signed, those without the sign, which is the top bit.

    bits: of a code. block: values along the last dimension that share a scale, None for a format without. scale: its
    type; the block's largest |x| becomes the last point, but with E8M0 powers of two, it becomes at least half of it.
    nested: scales are multiples of one float32 a tensor, which puts the largest of them at the end of their type.
    """

    points: tuple[float, ...]
    bits: int
    signed: bool = True
    block: int | None = None
    scale: torch.dtype | None = None
    nested: bool = False

    @property
    def stored_bits(self) -> float:
        """Bits a value, scales included (not the 32 bits a tensor of a nested one)."""
        return self.bits + (8 * self.scale.itemsize / self.block if self.block else 0)

    def encode(self, values: Tensor) -> Tensor:
        """uint8: the codes of the nearest points, of two as near the even code; beyond the last point, that one."""
        points = torch.tensor(self.points, device=values.device)
        magnitude = (values.abs() if self.signed else values).contiguous()
        middles = (points[1:] + points[:-1]) / 2
        codes = torch.bucketize(magnitude, middles, out_int32=True)  # of two, the lower
        codes += (middles[codes.clamp(max=len(middles) - 1)] == magnitude) & (codes % 2 == 1)
        if self.signed:
            codes += values.signbit().int() << self.bits - 1
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32: the points of the codes, NaN for what is none."""
        half = torch.full((2 ** (self.bits - self.signed),), torch.nan)
        half[: len(self.points)] = torch.tensor(self.points)
        return (torch.cat([half, -half]) if self.signed else half).to(codes.device)[codes.int()]


def _floats(exponent: int, mantissa: int, points: int) -> tuple[float, ...]:
    """The non-negative numbers of a float with so many bits, in the order of their codes; the first are subnormal."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    return tuple(
        (code % steps + steps * (code >= steps)) / steps * 2.0 ** (max(code // steps, 1) - bias)
        for code in range(points)
    )


NF4 = (  # quantiles of the normal distribution, 8 to the right of 0 and 7 to the left, over the largest
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1 = _floats(2, 1, 8)  # 0 .5 1 1.5 2 3 4 6
E4M3 = _floats(4, 3, 127)  # to 448; its last code is NaN, and no code is an infinity
E5M2 = _floats(5, 2, 124)  # to 57,344; then an infinity and NaN, as IEEE 754 has it

FORMATS: dict[str, Codebook] = {
    "e2m1": Codebook(E2M1, 4),
    "e4m3": Codebook(E4M3, 8),
    "e5m2": Codebook(E5M2, 8),
    "nf4": Codebook(NF4, 4, signed=False, block=64, scale=torch.float16),  # in bitsandbytes scales are float32
    "mxfp4": Codebook(E2M1, 4, block=32, scale=torch.float8_e8m0fnu),
    "mxfp8": Codebook(E4M3, 8, block=32, scale=torch.float8_e8m0fnu),
    "nvfp4": Codebook(E2M1, 4, block=16, scale=torch.float8_e4m3fn, nested=True),
}


@dataclass(frozen=True)
class Encoded:
    """A tensor in one of FORMATS. codes: uint8, in its shape, a code a byte (`storage` packs them).

    scale: [..., blocks, 1] in the format's type. tensor_scale: a float32, of a nested format. None where there is none.
    """

    codes: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    format: str

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits

    def dequantize(self) -> Tensor:
        """float32, in the shape of the codes: point times scale, times the tensor's."""
        points = FORMATS[self.format].decode(self.codes)
        if self.scale is None:
            return points
        blocks = points.unflatten(-1, (self.scale.shape[-2], -1))
        return (blocks * _factor(self.scale, self.tensor_scale)).reshape(self.codes.shape)


def quantize(x: Tensor, format: str) -> Encoded:
    """x, floating point, in one of FORMATS, its scales from the largest |x| of each block of the last dimension.

    Rounded is x / scale in float32, half to even; what exceeds the last point becomes that (a cast to float8 may give
    an infinity or NaN). InputError for a format that is not listed, for NaN and infinities, for a range beyond the
    scale's type, and for a last dimension that blocks do not fill.
    """
    check_choice(format, FORMATS, "number format")
    check_floats(x)
    row = FORMATS[format]
    values = x.detach().float()
    if not values.isfinite().all():
        raise InputError("The values have NaN or infinities: look for their origin before you quantize.")
    if row.block is None:
        return Encoded(row.encode(values), None, None, format)
    check_group(x.shape[-1] if x.dim() else 1, row.block)
    blocks = values.unflatten(-1, (-1, row.block))
    largest, last, tensor_scale = blocks.abs().amax(-1, keepdim=True), row.points[-1], None
    if row.scale == torch.float8_e8m0fnu:  # section 6.3: 2^(floor(log2 largest) - floor(log2 last))
        exponent = torch.frexp(largest).exponent - torch.frexp(torch.tensor(last)).exponent
        scale = torch.exp2(exponent.float().clamp(-127, 127)).to(row.scale)
    else:
        if row.nested:
            tensor_scale = stored(largest.max() / last / torch.finfo(row.scale).max, torch.float32)
        scale = stored(largest / last / (1 if tensor_scale is None else tensor_scale), row.scale)
    codes = row.encode(blocks / _factor(scale, tensor_scale))
    return Encoded(codes.reshape(x.shape), scale, tensor_scale, format)


def fake(x: Tensor, format: str) -> Tensor:
    """SIMULATED: x as `quantize` and back gives it, in its shape and dtype."""
    return quantize(x, format).dequantize().to(x.dtype)


def _factor(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    return scale.float() if tensor_scale is None else scale.float() * tensor_scale
