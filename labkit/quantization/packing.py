"""Pack a quantized tensor into the arrays that a file holds: codes without gaps, scales, zeros."""

import torch
from torch import Tensor

from labkit.bits import to_bits
from labkit.quantization.affine import Quantized
from labkit.quantization.formats import Encoded


def pack_codes(tensor: Quantized | Encoded) -> dict[str, Tensor]:
    """Return the arrays of a quantized tensor by name; `labkit.bits.from_bits` unpacks codes and zeros.

    "codes": uint8 [ceil(count * bits / 8)]; codes of 8 bits keep their shape and dtype.
    "scale": of a `Quantized` as it is; of an `Encoded`, if the format has scales, as bytes (older safetensors have no
        E8M0).
    "tensor_scale": 4 bytes, for a nested format.
    "zero": packed like the codes, if they are unsigned.
    """
    codes = tensor.codes if tensor.bits == 8 else to_bits(tensor.codes, tensor.bits)
    parts = {"codes": codes}
    if isinstance(tensor, Encoded):
        scales = {"scale": tensor.scale, "tensor_scale": tensor.tensor_scale}
        for name, scale in scales.items():
            if scale is not None:
                parts[name] = scale.view(-1).view(torch.uint8)
        return parts
    parts["scale"] = tensor.scale
    if tensor.grid.lo == 0:
        parts["zero"] = to_bits(tensor.zero, tensor.bits)
    return parts
