"""The formats in which a weight is stored: tables with a row a format, each with a function to pack and to unpack.

`FORMATS` has all of them. Those for a weight with zeros give the weight back as it was; those of few bits, `ROUNDED`,
give the nearest values of the format. Arrays and their bytes only: files of whole models are in `artifact`, products
with packed weights in `pruning.sparse`.

    >>> import torch
    >>> from labkit import storage
    >>> weight = torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.5, 0.0, 0.0, -1.0]])
    >>> parts = storage.FORMATS["csr"].pack(weight)
    >>> parts["col"].tolist(), parts["values"].tolist()
    ([1, 0, 3], [2.0, 1.5, -1.0])
    >>> bool((storage.FORMATS["csr"].unpack(parts, weight.shape) == weight).all())
    True
    >>> {name: storage.nbytes(weight, name) for name in ("dense", "csr", "bitmask", "int4")}
    {'dense': 32, 'csr': 36, 'bitmask': 13, 'int4': 9}
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.bits import from_bits, to_bits
from labkit.errors import InputError
from labkit.quantization import affine, formats
from labkit.quantization.affine import Quantized
from labkit.quantization.packing import pack_codes
from labkit.storage import sell

Parts = dict[str, Tensor]
BSR_BLOCKS = (4, 8, 16, 32)
GROUP = 64  # weights of an output channel that share a scale in integer formats of few bits
SCALE = torch.float16  # in which scales of integer formats are stored


class Format(NamedTuple):
    """A storage format.

    pack: takes a weight [out, ...]; returns {name: array}, or None if the weight does not have the form.
    unpack: takes these arrays and the shape of the weight; returns the weight.
    form: the form that a weight needs to be stored so, in words; "" if every weight has it.
    """

    pack: Callable[[Tensor], Parts | None]
    unpack: Callable[[Parts, Sequence[int]], Tensor]
    form: str = ""


def nbytes(weight: Tensor, format: str) -> int:
    """Return the bytes of a weight in a format of `FORMATS`, indices, masks and scales included.

    weight: [out, ...].
    Raises InputError if the weight does not have the form of the format.
    """
    parts = FORMATS[format].pack(weight)
    if parts is None:
        form = FORMATS[format].form
        raise InputError(f"The weight {list(weight.shape)} does not have {form}: choose another format.")
    return sum(part.nbytes for part in parts.values())


# --- dense, coo, csr, bsr ---------------------------------------------------------------------------------------------


def _pack_dense(weight: Tensor) -> Parts:
    return {"values": weight.clone()}


def _unpack_dense(parts: Parts, shape: Sequence[int]) -> Tensor:
    return parts["values"].view(shape)


def _pack_coo(weight: Tensor) -> Parts:
    rows = weight.flatten(1)
    nonzero = rows != 0
    indices = nonzero.nonzero().t().contiguous()  # int64: torch has no other
    return {"indices": indices, "values": rows[nonzero]}


def _unpack_coo(parts: Parts, shape: Sequence[int]) -> Tensor:
    weight = parts["values"].new_zeros(shape)
    row, column = parts["indices"]
    weight.flatten(1)[row, column] = parts["values"]
    return weight


def _pack_rows(weight: Tensor, block: int = 1) -> Parts:
    """Pack compressed rows of single values or of blocks [block, block]; the weight is padded to whole blocks.

    Returns crow [rows + 1], the index of the first block of each row of blocks; col [n], the column of each block;
    values [n], or [n, block, block] for blocks.
    """
    rows = weight.flatten(1)  # [out, in]
    out_features, in_features = rows.shape
    missing_rows, missing_columns = -out_features % block, -in_features % block
    rows = F.pad(rows, (0, missing_columns, 0, missing_rows))
    tiles = rows.unfold(0, block, block).unfold(1, block, block)  # [out / block, in / block, block, block]
    nonzero = (tiles != 0).flatten(2).any(2)
    tiles_of_row = nonzero.sum(1)
    crow = F.pad(tiles_of_row.cumsum(0), (1, 0))
    if crow[-1] > torch.iinfo(torch.int32).max:
        raise InputError("a weight has more non-zeros than int32 row pointers can count: choose the format bitmask.")
    col = nonzero.nonzero()[:, 1]
    values = tiles[nonzero]
    if block == 1:
        values = values.flatten()
    return {
        "crow": crow.int(),
        "col": col.int(),
        "values": values,
    }


def _unpack_rows(parts: Parts, shape: Sequence[int]) -> Tensor:
    values = parts["values"]
    crow, column = parts["crow"].long(), parts["col"].long()
    block = values.shape[-1] if values.dim() == 3 else 1
    out_features = shape[0]
    in_features = math.prod(shape[1:])
    tile_rows = math.ceil(out_features / block)
    tile_columns = math.ceil(in_features / block)
    tiles = values.new_zeros(tile_rows, tile_columns, block, block)
    every_row = torch.arange(tile_rows, device=crow.device)
    row = every_row.repeat_interleave(crow.diff())
    tiles[row, column] = values.view(-1, block, block)
    padded = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    weight = padded[:out_features, :in_features]
    return weight.reshape(shape).contiguous()


# --- bitmask and 2:4: bits, the lowest of the first byte first --------------------------------------------------------


def _pack_bitmask(weight: Tensor) -> Parts:
    nonzero = weight != 0
    return {"mask": to_bits(nonzero, 1), "values": weight[nonzero]}


def _unpack_bitmask(parts: Parts, shape: Sequence[int]) -> Tensor:
    weight = parts["values"].new_zeros(shape)
    mask = from_bits(parts["mask"], 1, weight.numel()).bool()
    weight.view(-1)[mask] = parts["values"]
    return weight


def _pack_nm(weight: Tensor) -> Parts | None:
    """Pack two values of each four along the input dimension, and their places; None if a group has more nonzeros.

    weight: [out, in], [C_out, C_in, *kernel] or [in].

    values [groups, 2]: group after group, each along the input dimension (for a convolution the kernel positions of an
        output channel one after the other). A group with fewer than two nonzeros is filled up with its first zeros.
    metadata uint8: the place of each value in its group in 2 bits, as NVIDIA's sparse tensor cores have it (Mishra et
        al. 2021), without their reordering for a GPU.
    """
    rows = weight.detach()
    if weight.dim() > 1:
        rows = rows.movedim(1, -1)  # the input dimension last
    if rows.shape[-1] % 4:
        return None
    groups = rows.reshape(-1, 4)
    zero = groups == 0
    nonzeros = (~zero).sum(1)
    if (nonzeros > 2).any():
        return None
    # A stable sort by "is zero" puts the nonzeros first, then zeros, each in order. The first two are stored in order.
    nonzero_first = zero.byte().argsort(dim=1, stable=True)
    places = nonzero_first[:, :2].sort(dim=1).values  # [groups, 2]
    values = _movable(groups).gather(1, places)
    return {"values": values.view(weight.dtype), "metadata": to_bits(places, 2)}


def _unpack_nm(parts: Parts, shape: Sequence[int]) -> Tensor:
    values = parts["values"]
    places = from_bits(parts["metadata"], 2, values.numel())
    movable = _movable(values)
    groups = movable.new_zeros(len(values), 4)
    groups.scatter_(1, places.long().view(-1, 2), movable)
    groups = groups.view(values.dtype)
    if len(shape) == 1:
        return groups.view(shape)
    out, width, *kernel = shape
    rows = groups.view(out, *kernel, width)
    return rows.movedim(-1, 1).contiguous()


def _movable(x: Tensor) -> Tensor:
    """View float8 as bytes, since torch gathers and scatters no float8."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


# --- labkit's CPU kernel ----------------------------------------------------------------------------------------------


def _pack_kernel(weight: Tensor, dtype: torch.dtype | None = None) -> Parts | None:
    """Pack what csrc/sparse_linear.cpp multiplies with (see `sell`), in `dtype` or the weight's own."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    matrix = weight.flatten(1)
    return sell.pack(matrix.to(dtype or weight.dtype))


def _unpack_kernel(parts: Parts, shape: Sequence[int]) -> Tensor:
    out_features, *rest = shape
    matrix = sell.unpack(parts, (out_features, math.prod(rest)))
    return matrix.view(shape)


# --- integers of few bits, block floats -------------------------------------------------------------------------------


def _pack_int8(weight: Tensor) -> Parts:
    """Pack int8 codes on a symmetric grid for each output channel."""
    rows = weight.flatten(1)
    lo, hi = rows.amin(1, True), rows.amax(1, True)
    grid = affine.choose(lo, hi, 8, symmetric=True, dtype=SCALE)
    codes = grid.quantize(rows).view(weight.shape)
    return {"codes": codes, "scale": grid.scale.flatten()}


def _unpack_int8(parts: Parts, shape: Sequence[int]) -> Tensor:
    scale = parts["scale"].float()[:, None]
    values = parts["codes"].flatten(1) * scale
    return values.view(shape)


def _pack_integers(weight: Tensor, bits: int) -> Parts:
    """Pack unsigned codes on asymmetric grids, one for each group of 64 weights of an output channel.

    Where 64 does not divide the channel, the whole channel is a group.
    """
    rows = weight.flatten(1)
    channel = rows.shape[1]
    group_size = GROUP if channel % GROUP == 0 else channel
    groups = rows.unflatten(1, (-1, group_size))
    lo, hi = groups.amin(2, True), groups.amax(2, True)
    grid = affine.choose(lo, hi, bits, symmetric=False, dtype=SCALE)
    codes = grid.quantize(groups)
    parts = pack_codes(Quantized(codes, grid))
    parts["scale"] = parts["scale"][..., 0]  # [out, groups]
    return parts


def _unpack_integers(parts: Parts, shape: Sequence[int], bits: int) -> Tensor:
    scale = parts["scale"].float()[..., None]  # [out, groups, 1]
    out, groups, _ = scale.shape
    codes = from_bits(parts["codes"], bits, math.prod(shape))
    codes = codes.view(out, groups, -1).int()
    zero = from_bits(parts["zero"], bits, scale.numel())
    zero = zero.view(scale.shape).int()
    values = (codes - zero) * scale
    return values.view(shape)


def _pack_blocks(weight: Tensor, format: str) -> Parts | None:
    """Pack a weight in a format of `quantization.formats.FORMATS`; None if blocks do not fill a row."""
    rows = weight.flatten(1)
    if rows.shape[1] % formats.FORMATS[format].block:
        return None
    encoded = formats.quantize(rows, format)
    parts = pack_codes(encoded)
    parts["scale"] = parts["scale"].view(len(rows), -1)
    if encoded.tensor_scale is not None:
        parts["tensor_scale"] = encoded.tensor_scale
    return parts


def _unpack_blocks(parts: Parts, shape: Sequence[int], format: str) -> Tensor:
    codebook = formats.FORMATS[format]
    scale = parts["scale"].view(codebook.scale)[..., None]
    codes = from_bits(parts["codes"], codebook.bits, math.prod(shape))
    codes = codes.view(len(scale), -1)
    encoded = formats.Encoded(codes, scale, parts.get("tensor_scale"), format)
    return encoded.dequantize().view(shape)


# --- Q4_1: blocks of 32 weights, to the bit those of ggml-quants.c ----------------------------------------------------


def _pack_q4_1(weight: Tensor) -> Parts | None:
    """Pack blocks uint8 [count, 20]; None if blocks of 32 weights do not fill a row.

    A block holds a scale and a least value as float16, then 16 bytes with code i in the lower and code i + 16 in the
    upper half of byte i: weight = scale * code + least.
    """
    rows = weight.flatten(1)
    if rows.shape[1] % 32:
        return None
    blocks = rows.float().reshape(-1, 32)
    least = blocks.amin(1, True)
    scale = (blocks.amax(1, True) - least) / 15
    header = torch.cat([scale, least], 1).half()
    if not header.isfinite().all():
        raise InputError("A weight has NaN, infinities or a scale beyond float16: look for their origin first.")
    reciprocal = torch.where(scale == 0, 0, 1 / scale)
    steps = (blocks - least) * reciprocal
    codes = (steps + 0.5).trunc().clamp(0, 15).to(torch.uint8)
    first_half, second_half = codes.split(16, 1)
    data = first_half | second_half << 4
    return {"blocks": torch.cat([header.view(torch.uint8), data], 1)}


def _unpack_q4_1(parts: Parts, shape: Sequence[int]) -> Tensor:
    header, data = parts["blocks"].split([4, 16], 1)
    scale, least = header.contiguous().view(torch.float16).float().split(1, 1)
    codes = torch.cat([data & 15, data >> 4], 1).float()
    values = codes * scale + least
    return values.view(shape)


# --- the tables -------------------------------------------------------------------------------------------------------
# To add a format: write a function that packs a weight [out, ...] into named arrays and a function that unpacks these
# arrays, and add a row with both. `labkit.bits.to_bits` packs numbers of 1 to 8 bits, `from_bits` unpacks these, and
# `packing.pack_codes` packs a quantized tensor. Integers of 6 bits in groups of 64 need only the row, since the two
# functions for integers take any width:
#     "int6": Format(partial(_pack_integers, bits=6), partial(_unpack_integers, bits=6)),
# Then `labkit.artifact.size(model, format="int6")` works, and tests/labkit/test_storage.py tests the row.

KERNEL_VALUES = "float32, float16 or bfloat16 values"


def _blocks(name: str) -> Format:
    """Return the row of a format with block scales, such as "nf4"."""
    form = f"rows of whole blocks of {formats.FORMATS[name].block} weights"
    return Format(
        pack=partial(_pack_blocks, format=name),
        unpack=partial(_unpack_blocks, format=name),
        form=form,
    )


# Bytes of N weights in R rows, with scales of 2 bytes:
ROUNDED: dict[str, Format] = {
    # N + 2 R
    "int8": Format(_pack_int8, _unpack_int8),
    # N / 2 + 5/2 N / 64: 4.31 bits a weight; 5/2 R for groups where 64 does not divide a row
    "int4": Format(
        pack=partial(_pack_integers, bits=4),
        unpack=partial(_unpack_integers, bits=4),
    ),
    # N / 2 + 2 N / 64: 4.25 bits
    "nf4": _blocks("nf4"),
    # N / 2 + N / 32: 4.25 bits
    "mxfp4": _blocks("mxfp4"),
    # N / 2 + N / 16 + 4: 4.5 bits
    "nvfp4": _blocks("nvfp4"),
    # 20 bytes for 32 weights: 5 bits
    "q4_1": Format(_pack_q4_1, _unpack_q4_1, form="rows of whole blocks of 32 weights"),
}

# Bytes with n of N weights of s bytes not zero, in R rows:
FORMATS: dict[str, Format] = {
    # N s
    "dense": Format(_pack_dense, _unpack_dense),
    # n (s + 16)
    "coo": Format(_pack_coo, _unpack_coo),
    # n (s + 4) + 4 (R + 1): smaller than dense above 50 % zeros at fp32, above 66.7 % at 2 bytes
    "csr": Format(_pack_rows, _unpack_rows),
    # k (b^2 s + 4) + 4 (R / b + 1), where k blocks of b x b are not zero
    **{
        f"bsr{block}": Format(
            pack=partial(_pack_rows, block=block),
            unpack=_unpack_rows,
        )
        for block in BSR_BLOCKS
    },
    # n s + N / 8: 13.1 % of dense at 90 % zeros and fp32
    "bitmask": Format(_pack_bitmask, _unpack_bitmask),
    # N s / 2 + N / 8, for a weight of 2:4 along the input channels: 56.25 % of dense at 2 bytes, 53.1 % at fp32
    "nm": Format(
        pack=_pack_nm,
        unpack=_unpack_nm,
        form="two zeros in each four input channels",
    ),
    # n (s + 1) and some padding, s being 2 for bfloat16 and 4 for all else: labkit's CPU kernel, see `sell`
    "kernel": Format(
        pack=_pack_kernel,
        unpack=_unpack_kernel,
        form=KERNEL_VALUES,
    ),
    "kernel-bf16": Format(
        pack=partial(_pack_kernel, dtype=torch.bfloat16),
        unpack=_unpack_kernel,
        form=KERNEL_VALUES,
    ),
    **ROUNDED,
}
