"""The formats in which a weight is stored: FORMATS, a row a format, with how it is packed and unpacked.

Those for a weight with zeros give it back as it was; those of few bits (ROUNDED) give the nearest that they have.

Arrays and their bytes only. Files of whole models are in `artifact`, products with packed weights in `pruning.sparse`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.bits import from_bits, pack4, to_bits, unpack4
from labkit.errors import InputError
from labkit.quantization import affine, formats
from labkit.storage import native

Parts = dict[str, Tensor]
BSR_BLOCKS = (4, 8, 16, 32)


class Format(NamedTuple):
    """pack(weight [out, ...]) -> {name: array}, None if it lacks the form; unpack(arrays, shape) -> weight."""

    pack: Callable[[Tensor], Parts | None]
    unpack: Callable[[Parts, Sequence[int]], Tensor]
    form: str = ""  # what not every weight has


def nbytes(weight: Tensor, format: str) -> int:
    """Bytes of the arrays of `weight` [out, ...] in `format`, indices, masks and scales included."""
    parts = FORMATS[format].pack(weight)
    if parts is None:
        raise InputError(
            f"The weight {list(weight.shape)} does not have {FORMATS[format].form}: choose another format."
        )
    return sum(part.nbytes for part in parts.values())


# --- dense, coo, csr, bsr ---------------------------------------------------------------------------------------------


def _pack_coo(weight: Tensor) -> Parts:
    rows = weight.flatten(1)
    nonzero = rows != 0
    return {"indices": nonzero.nonzero().t().contiguous(), "values": rows[nonzero]}  # int64: torch has no other


def _unpack_coo(parts: Parts, shape: Sequence[int]) -> Tensor:
    weight = parts["values"].new_zeros(shape)
    weight.flatten(1)[tuple(parts["indices"])] = parts["values"]
    return weight


def _pack_rows(weight: Tensor, block: int = 1) -> Parts:
    """Compressed rows: crow [rows + 1], where each begins; col [n]; values [n], of blocks [n, block, block].

    For blocks the weight is padded with zeros to whole ones.
    """
    rows = weight.flatten(1)  # [out, in]
    rows = F.pad(rows, (0, -rows.shape[1] % block, 0, -rows.shape[0] % block))
    tiles = rows.unfold(0, block, block).unfold(1, block, block)  # [out / b, in / b, b, b]
    nonzero = (tiles != 0).flatten(2).any(2)
    crow = F.pad(nonzero.sum(1).cumsum(0), (1, 0))
    if crow[-1] > torch.iinfo(torch.int32).max:
        raise InputError("a weight has more non-zeros than int32 row pointers can count: choose the format bitmask.")
    values = tiles[nonzero]
    return {
        "crow": crow.int(),
        "col": nonzero.nonzero()[:, 1].int(),
        "values": values if block > 1 else values.flatten(),
    }


def _unpack_rows(parts: Parts, shape: Sequence[int]) -> Tensor:
    crow, values = parts["crow"].long(), parts["values"]
    block = values.shape[-1] if values.dim() == 3 else 1
    out_features, in_features = shape[0], math.prod(shape[1:])
    tiles = values.new_zeros(-(-out_features // block), -(-in_features // block), block, block)
    rows = torch.arange(len(crow) - 1, device=crow.device).repeat_interleave(crow.diff())
    tiles[rows, parts["col"].long()] = values.view(-1, block, block)
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :in_features].reshape(shape).contiguous()


# --- bitmask and 2:4: bits, the lowest of the first byte first --------------------------------------------------------


def _pack_bitmask(weight: Tensor) -> Parts:
    nonzero = weight != 0
    return {"mask": to_bits(nonzero, 1), "values": weight[nonzero]}


def _unpack_bitmask(parts: Parts, shape: Sequence[int]) -> Tensor:
    weight = parts["values"].new_zeros(shape)
    weight.view(-1)[from_bits(parts["mask"], 1, weight.numel()).bool()] = parts["values"]
    return weight


def _pack_nm(weight: Tensor) -> Parts | None:
    """`weight` [out, in], [C_out, C_in, *kernel] or [in] as 2 values of every 4 and their places; None if it has more.

    values [groups, 2]: group after group, each along the input dimension (for a convolution the kernel positions of an
        output channel one after the other). A group with fewer than two nonzeros is filled up with its first zeros.
    metadata uint8: the place of each value in its group in 2 bits, as NVIDIA's sparse tensor cores have it (Mishra et
        al. 2021), without their reordering for a GPU.
    """
    rows = weight.detach() if weight.dim() == 1 else weight.detach().movedim(1, -1)
    if rows.shape[-1] % 4:
        return None
    groups = rows.reshape(-1, 4)  # [groups, 4]
    zero = groups == 0
    if ((~zero).sum(1) > 2).any():
        return None
    # The nonzeros first, then zeros, each in order: a stable sort by "is zero". Then those two in the group's order.
    places = zero.byte().argsort(dim=1, stable=True)[:, :2].sort(dim=1).values  # [groups, 2]
    values = _movable(groups).gather(1, places).view(weight.dtype)
    return {"values": values, "metadata": to_bits(places, 2)}


def _unpack_nm(parts: Parts, shape: Sequence[int]) -> Tensor:
    values = parts["values"]
    places = from_bits(parts["metadata"], 2, values.numel()).long().view(-1, 2)
    movable = _movable(values)
    groups = movable.new_zeros(len(values), 4).scatter_(1, places, movable).view(values.dtype)
    if len(shape) == 1:
        return groups.view(shape)
    out, width, *kernel = shape
    return groups.view(out, *kernel, width).movedim(-1, 1).contiguous()


def _movable(x: Tensor) -> Tensor:
    """torch moves no float8 about, but it does move their bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


# --- integers of few bits, block floats -------------------------------------------------------------------------------


def _pack_int8(weight: Tensor) -> Parts:
    """A symmetric scale for each output channel."""
    rows = weight.flatten(1)
    grid = affine.choose(rows.amin(1, True), rows.amax(1, True), 8, symmetric=True, dtype=torch.float16)
    return {"codes": grid.quantize(rows).view(weight.shape), "scale": grid.scale.flatten()}


def _unpack_int8(parts: Parts, shape: Sequence[int]) -> Tensor:
    return (parts["codes"].flatten(1) * parts["scale"].float()[:, None]).view(shape)


def _pack_int4(weight: Tensor) -> Parts:
    """Asymmetric, in groups of 64 weights of an output channel; where 64 does not divide it, the channel is a group."""
    rows = weight.flatten(1)
    groups = rows.unflatten(1, (-1, 64 if rows.shape[1] % 64 == 0 else rows.shape[1]))
    grid = affine.choose(groups.amin(2, True), groups.amax(2, True), 4, symmetric=False, dtype=torch.float16)
    return {"codes": pack4(grid.quantize(groups)), "scale": grid.scale[..., 0], "zero": pack4(grid.zero)}


def _unpack_int4(parts: Parts, shape: Sequence[int]) -> Tensor:
    scale = parts["scale"].float()[..., None]  # [out, groups, 1]
    codes = unpack4(parts["codes"], math.prod(shape)).view(*scale.shape[:2], -1)
    zero = unpack4(parts["zero"], scale.numel()).view(scale.shape)
    return ((codes.int() - zero.int()) * scale).view(shape)


def _pack_blocks(weight: Tensor, format: str) -> Parts | None:
    row, rows = formats.FORMATS[format], weight.flatten(1)
    if rows.shape[1] % row.block:
        return None
    encoded = formats.quantize(rows, format)
    codes = pack4(encoded.codes) if row.bits == 4 else encoded.codes
    scale = encoded.scale[..., 0].view(torch.uint8)  # the bytes: older safetensors have no E8M0
    parts = {"codes": codes, "scale": scale}
    return parts if encoded.tensor_scale is None else parts | {"tensor_scale": encoded.tensor_scale}


def _unpack_blocks(parts: Parts, shape: Sequence[int], format: str) -> Tensor:
    row = formats.FORMATS[format]
    codes, scale = parts["codes"], parts["scale"].view(row.scale)[..., None]
    if row.bits == 4:
        codes = unpack4(codes, math.prod(shape))
    encoded = formats.Encoded(codes.view(len(scale), -1), scale, parts.get("tensor_scale"), format)
    return encoded.dequantize().view(shape)


# --- GGUF: blocks of 32 weights, to the bit those of ggml-quants.c ----------------------------------------------------


def _pack_gguf(weight: Tensor, quantize: Callable[[Tensor], tuple[Tensor, ...]]) -> Parts | None:
    """blocks uint8 [count, bytes]: float16 numbers, then int8 codes, or 16 bytes with code i below code i + 16."""
    rows = weight.flatten(1)
    if rows.shape[1] % 32:
        return None
    codes, *numbers = quantize(rows.float().reshape(-1, 32))
    halves = torch.cat(numbers, 1).half()
    if not halves.isfinite().all():
        raise InputError("A weight has NaN, infinities or a scale beyond float16: look for their origin first.")
    data = codes.view(torch.uint8) if codes.dtype == torch.int8 else codes[:, :16] | codes[:, 16:] << 4
    return {"blocks": torch.cat([halves.view(torch.uint8), data], 1)}


def _unpack_gguf(parts: Parts, shape: Sequence[int]) -> Tensor:
    blocks = parts["blocks"]
    header = blocks.shape[1] % 16  # 2 bytes: a scale; 4: and a least value
    numbers, data = blocks[:, :header].contiguous().view(torch.float16).float(), blocks[:, header:]
    if data.shape[1] == 32:
        return (numbers * data.view(torch.int8)).view(shape)
    codes = torch.cat([data & 15, data >> 4], 1).float()
    return ((codes - 8) * numbers if header == 2 else codes * numbers[:, :1] + numbers[:, 1:]).view(shape)


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _q8_0(x: Tensor) -> tuple[Tensor, ...]:
    scale = x.abs().amax(1, True) / 127
    steps = x * _reciprocal(scale)
    whole = steps.abs().floor()
    whole += steps.abs() - whole >= 0.5  # half away from zero
    return whole.copysign(steps).to(torch.int8), scale


def _q4_0(x: Tensor) -> tuple[Tensor, ...]:
    scale = x.gather(1, x.abs().argmax(1, True)) / -8  # the extreme of either sign gets code 0
    return (x * _reciprocal(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8), scale


def _q4_1(x: Tensor) -> tuple[Tensor, ...]:
    least = x.amin(1, True)
    scale = (x.amax(1, True) - least) / 15
    return ((x - least) * _reciprocal(scale) + 0.5).trunc().clamp(0, 15).to(torch.uint8), scale, least


# --- the table --------------------------------------------------------------------------------------------------------


def _pack_kernel(weight: Tensor, dtype: torch.dtype | None = None) -> Parts | None:
    """What csrc/sparse_linear.cpp multiplies with, in float32."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return native.pack(weight.flatten(1).to(dtype or weight.dtype))


def _unpack_kernel(parts: Parts, shape: Sequence[int]) -> Tensor:
    return native.unpack(parts, (shape[0], math.prod(shape[1:]))).view(shape)


# Bytes of N weights in R rows, with scales of 2 bytes:
ROUNDED: dict[str, Format] = {
    # N + 2 R
    "int8": Format(_pack_int8, _unpack_int8),
    # N / 2 + 5/2 N / 64: 4.31 bits a weight; 5/2 R for groups where 64 does not divide a row
    "int4": Format(_pack_int4, _unpack_int4),
    # N / 2 + N / 32: 4.25 bits, as NF4 with 2 N / 64; 8.25 bits with E4M3; 4.5 bits, N / 2 + N / 16 + 4, for NVFP4
    **{
        name: Format(
            partial(_pack_blocks, format=name),
            partial(_unpack_blocks, format=name),
            f"rows of whole blocks of {formats.FORMATS[name].block} weights",
        )
        for name in ("nf4", "mxfp4", "mxfp8", "nvfp4")
    },
    # 34, 18 and 20 bytes for 32 weights: 8.5, 4.5 and 5 bits
    **{
        name: Format(partial(_pack_gguf, quantize=quantize), _unpack_gguf, "rows of whole blocks of 32 weights")
        for name, quantize in {"q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1}.items()
    },
}

# Bytes with n of N weights of s bytes not zero, in R rows:
FORMATS: dict[str, Format] = {
    # N s
    "dense": Format(lambda weight: {"values": weight.clone()}, lambda parts, shape: parts["values"].view(shape)),
    # n (s + 16)
    "coo": Format(_pack_coo, _unpack_coo),
    # n (s + 4) + 4 (R + 1): smaller than dense above 50 % zeros at fp32, above 66.7 % at 2 bytes
    "csr": Format(_pack_rows, _unpack_rows),
    # k (b^2 s + 4) + 4 (R / b + 1), where k blocks of b x b are not zero
    **{f"bsr{block}": Format(partial(_pack_rows, block=block), _unpack_rows) for block in BSR_BLOCKS},
    # n s + N / 8: 13.1 % of dense at 90 % zeros and fp32
    "bitmask": Format(_pack_bitmask, _unpack_bitmask),
    # N s / 2 + N / 8, for a weight of 2:4 along the input channels: 56.25 % of dense at 2 bytes, 53.1 % at fp32
    "nm": Format(_pack_nm, _unpack_nm, "two zeros in each four input channels"),
    # n (s + 1) and some padding, s being 2 for bfloat16 and 4 for all else: labkit's CPU kernel, see `pruning.native`
    "kernel": Format(_pack_kernel, _unpack_kernel, "float32, float16 or bfloat16 values"),
    "kernel-bf16": Format(
        partial(_pack_kernel, dtype=torch.bfloat16), _unpack_kernel, "float32, float16 or bfloat16 values"
    ),
    **ROUNDED,
}
