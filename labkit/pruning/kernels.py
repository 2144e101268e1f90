"""The sparse CPU kernel: how its layout is packed from a weight, and how its C++ is called.

The layout is SELL-C-sigma (Kreutzer et al. 2014) in blocks of inputs; csrc/sparse_linear.cpp says how and why. Without
a compiler load() is None (see compiling). Not for CUDA or training.
"""

import ctypes
import functools

import torch
from torch import Tensor

from labkit.errors import InputError
from labkit.pruning import compiling
from labkit.pruning.compiling import ISAS

LANES = 16  # rows of a chunk, as in the C++
VALUES = (torch.float32, torch.bfloat16)


# --- load -------------------------------------------------------------------------------------------------------------


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is none (compiling.load says why)."""
    library = compiling.load("sparse_linear")
    if library:
        pointer, index = ctypes.c_void_p, ctypes.c_int64
        library.sparse_linear.argtypes = [ctypes.c_int] * 3 + [index] * 4 + [pointer, index] + [pointer] * 7
        library.sparse_linear.restype = None
    return library


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine's kernel can use, the best one last; empty without a kernel."""
    library = load()
    return ISAS[: library.sparse_linear_best_isa() + 1] if library else ()


# --- the layout -------------------------------------------------------------------------------------------------------


def _group(out_features: int) -> int:
    """Outputs of a group, a multiple of 16.

    Large groups pad less, since rows are sorted in them; but a group's sums must stay in the second level cache (512
    rows x 64 columns of float32 are 128 KiB), and a thread works on a whole group.
    """
    group = min(512, max(64, out_features // 8))
    return _up(-(-out_features // -(-out_features // group)))


def _block(in_features: int, density: float) -> int:
    """Inputs of a block, a multiple of 16 and all blocks equally long.

    Sums are read and written once a block, so few nonzeros want long blocks; many want room beside x in a cache of 32
    KiB: 128 inputs x 64 columns of float32 fill it.
    """
    longest = 80 if density > 1 / 3 else 112 if density > 1 / 14 else 128
    return _up(-(-in_features // -(-in_features // longest)))


def _geometry(layout: dict[str, Tensor], out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """(block, blocks, group, groups) of a layout; its blocks are counted, since _block depends on the density."""
    group = _group(out_features)
    groups = -(-out_features // group)
    blocks = max(1, len(layout["order"]) // (groups * group))
    return _up(-(-in_features // blocks)), blocks, group, groups


def _up(n: int) -> int:
    return -(-n // LANES) * LANES


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The layout of `weight` [out, in]: values keep bfloat16 and are float32 otherwise; zeros are left out.

    values, columns [padded nonzeros]; order [groups * blocks * group]; lengths [groups * blocks * group / 16];
    starts [groups]: where each group's values begin.
    """
    out_features, in_features = weight.shape
    group, block = _group(out_features), _block(in_features, int(weight.count_nonzero()) / max(1, weight.numel()))
    groups, blocks = -(-out_features // group), -(-in_features // block)
    dense = weight.detach().to("cpu", torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
    dense = torch.nn.functional.pad(dense, (0, blocks * block - in_features, 0, groups * group - out_features))
    packed = [_pack_group(rows.view(group, blocks, block).transpose(0, 1)) for rows in dense.split(group)]
    values, columns, order, lengths = (torch.cat(parts) for parts in zip(*packed, strict=True))
    sizes = torch.tensor([len(part[0]) for part in packed])
    return {"values": values, "columns": columns, "order": order, "lengths": lengths, "starts": sizes.cumsum(0) - sizes}


def _pack_group(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, columns, order and lengths of one group of rows [blocks, group, block]."""
    kept = rows != 0
    counts, order = kept.sum(-1).sort(stable=True)  # [blocks, group], ascending: a chunk's last row is its longest
    lengths = counts[:, LANES - 1 :: LANES]  # [blocks, chunks]
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths) * LANES
    place = order.argsort(-1)  # [blocks, group]: where the sort put each row
    first = starts.gather(-1, place // LANES) + place % LANES  # [blocks, group]
    position = (first.unsqueeze(-1) + LANES * (kept.cumsum(-1) - 1))[kept]
    values = torch.zeros(int(lengths.sum()) * LANES, dtype=rows.dtype)
    columns = torch.zeros(len(values), dtype=torch.uint8)
    values[position] = rows[kept]
    columns[position] = torch.arange(rows.shape[-1], dtype=torch.uint8).expand(rows.shape)[kept]
    return values, columns, order.flatten().to(torch.int16), lengths.flatten().to(torch.uint8)


def unpack(layout: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
    """The dense weight [out, in] of a layout."""
    block, blocks, group, groups = _geometry(layout, out_features, in_features)
    chunks = group // LANES
    values = layout["values"]
    chunk = torch.repeat_interleave(
        layout["lengths"].long() * LANES
    )  # of each value: (group, block, chunk) as one number
    lane = torch.arange(len(values)) % LANES
    row = chunk // (blocks * chunks) * group + layout["order"].view(-1, LANES)[chunk, lane]
    column = chunk // chunks % blocks * block + layout["columns"]
    dense = values.new_zeros(groups * group, blocks * block)
    dense[row[values != 0], column[values != 0]] = values[values != 0]
    return dense[:out_features, :in_features].contiguous()


def check(layout: dict[str, Tensor], out_features: int, in_features: int) -> None:
    """Raises InputError unless `layout` is one of such a weight: the kernel itself believes what it is given."""
    block, blocks, group, groups = _geometry(layout, out_features, in_features)
    values, columns, order, lengths, starts = (layout[k] for k in ("values", "columns", "order", "lengths", "starts"))
    rows = groups * blocks * group
    sound = order.dtype == torch.int16 and lengths.dtype == columns.dtype == torch.uint8 and starts.dtype == torch.int64
    sound = sound and values.dtype in VALUES and len(order) == rows == len(lengths) * LANES
    if sound:
        sizes = lengths.view(groups, -1).sum(1) * LANES
        sound = len(values) == len(columns) == int(sizes.sum()) and torch.equal(starts, sizes.cumsum(0) - sizes)
        sound = sound and not (columns >= block).any() and not ((order < 0) | (order >= group)).any()
    if not sound:
        raise InputError(
            f"The stored layout is damaged or belongs to another shape than {out_features} x {in_features}: "
            "convert the dense model again."
        )


# --- the call ---------------------------------------------------------------------------------------------------------


def multiply(
    x: Tensor, layout: dict[str, Tensor], out_features: int, bias: Tensor | None = None, isa: str | None = None
) -> Tensor:
    """x W^T + bias on the CPU: x [batch, in] float32 -> [batch, out] float32, with torch.get_num_threads() threads.

    isa: one of isas(); None takes the best. Inf and NaN in x may reach outputs whose weight for them is zero, as in a
    dense product they would.
    """
    batch, in_features = x.shape
    block, _, group, _ = _geometry(layout, out_features, in_features)
    x = x.contiguous()
    y = x.new_empty(batch, out_features)
    library = load()
    best = library.sparse_linear_best_isa()
    library.sparse_linear(
        best if isa is None else ISAS.index(isa),
        torch.get_num_threads(),
        layout["values"].dtype == torch.bfloat16,
        in_features,
        out_features,
        block,
        group,
        x.data_ptr(),
        batch,
        layout["values"].data_ptr(),
        layout["columns"].data_ptr(),
        layout["order"].data_ptr(),
        layout["lengths"].data_ptr(),
        layout["starts"].data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y
