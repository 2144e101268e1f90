"""The formats in which a weight with zeros is stored: FORMATS, a row a format, with how it is packed and unpacked.

Arrays and their bytes only. Files of whole models are in `artifact`, products with packed weights in `pruning.sparse`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import InputError
from labkit.pruning import native

Parts = dict[str, Tensor]
BSR_BLOCKS = (4, 8, 16, 32)


class Format(NamedTuple):
    """pack(weight [out, ...]) -> {name: array}, None if it lacks the form; unpack(arrays, shape) -> weight."""

    pack: Callable[[Tensor], Parts | None]
    unpack: Callable[[Parts, Sequence[int]], Tensor]


def nbytes(weight: Tensor, format: str) -> int:
    """Bytes of the arrays of `weight` [out, ...] in `format`, indices and masks included."""
    return sum(part.nbytes for part in FORMATS[format].pack(weight).values())


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


def _to_bits(numbers: Tensor, width: int) -> Tensor:
    """uint8 [ceil(count width / 8)]: `width` bits of each number, one after the other, lowest first."""
    place = torch.arange(8, dtype=torch.uint8, device=numbers.device)
    stream = (numbers.flatten().to(torch.uint8)[:, None] >> place[:width] & 1).flatten()
    return (F.pad(stream, (0, -len(stream) % 8)).view(-1, 8) << place).sum(1, dtype=torch.uint8)


def _from_bits(data: Tensor, width: int, count: int) -> Tensor:
    """int64 [count]: the numbers that `_to_bits` was given."""
    place = torch.arange(8, dtype=torch.uint8, device=data.device)
    stream = (data[:, None] >> place & 1).flatten()[: count * width]
    return (stream.view(count, width) << place[:width]).sum(1)


def _pack_bitmask(weight: Tensor) -> Parts:
    nonzero = weight != 0
    return {"mask": _to_bits(nonzero, 1), "values": weight[nonzero]}


def _unpack_bitmask(parts: Parts, shape: Sequence[int]) -> Tensor:
    weight = parts["values"].new_zeros(shape)
    weight.view(-1)[_from_bits(parts["mask"], 1, weight.numel()).bool()] = parts["values"]
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
    return {"values": values, "metadata": _to_bits(places, 2)}


def _unpack_nm(parts: Parts, shape: Sequence[int]) -> Tensor:
    values = parts["values"]
    places = _from_bits(parts["metadata"], 2, values.numel()).view(-1, 2)
    movable = _movable(values)
    groups = movable.new_zeros(len(values), 4).scatter_(1, places, movable).view(values.dtype)
    if len(shape) == 1:
        return groups.view(shape)
    out, width, *kernel = shape
    return groups.view(out, *kernel, width).movedim(-1, 1).contiguous()


def _movable(x: Tensor) -> Tensor:
    """torch moves no float8 about, but it does move their bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


# --- the table --------------------------------------------------------------------------------------------------------


def _pack_kernel(weight: Tensor, dtype: torch.dtype | None = None) -> Parts | None:
    """What csrc/sparse_linear.cpp multiplies with, in float32."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return native.pack(weight.flatten(1).to(dtype or weight.dtype))


def _unpack_kernel(parts: Parts, shape: Sequence[int]) -> Tensor:
    return native.unpack(parts, (shape[0], math.prod(shape[1:]))).view(shape)


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
    "nm": Format(_pack_nm, _unpack_nm),
    # n (s + 1) and some padding, s being 2 for bfloat16 and 4 for all else: labkit's CPU kernel, see `pruning.native`
    "kernel": Format(_pack_kernel, _unpack_kernel),
    "kernel-bf16": Format(partial(_pack_kernel, dtype=torch.bfloat16), _unpack_kernel),
}
