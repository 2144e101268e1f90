"""A quantised tensor as the arrays that are stored: codes of few bits without gaps, scales and zeros."""

import torch
from torch import Tensor

from labkit.bits import to_bits
from labkit.quantization.affine import Quantized
from labkit.quantization.formats import Encoded


def pack_codes(tensor: Quantized | Encoded) -> dict[str, Tensor]:
    """The arrays of a quantised tensor: codes of its bits one after the other, scales, zeros where codes are unsigned.

    Zeros have as many bits as codes. Scales of a format are given as bytes.
    """
    parts = {"codes": tensor.codes if tensor.bits == 8 else to_bits(tensor.codes, tensor.bits)}
    if isinstance(tensor, Encoded):
        scales = {"scale": tensor.scale, "tensor_scale": tensor.tensor_scale}
        return parts | {name: x.view(-1).view(torch.uint8) for name, x in scales.items() if x is not None}
    zero = {"zero": to_bits(tensor.zero, tensor.bits)} if tensor.grid.lo == 0 else {}
    return parts | {"scale": tensor.scale} | zero
