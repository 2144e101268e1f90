"""The sparse layout of labkit's own CPU kernel: SELL-C-sigma (Kreutzer et al. 2014), in blocks of inputs.

A weight [out, in] is cut into blocks of inputs and groups of outputs. Within a block and a group, rows are sorted by
number of nonzeros, and each 16 neighbours (a chunk) are padded to the longest of the 16, so that a vector register
works on 16 rows at once. csrc/sparse_linear.cpp multiplies with this layout and says why the product is fast. It can
fetch weights in two ways, between which a race at the first product decides.
"""

import functools
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.storage import native

LANES = 16  # rows of a chunk, as in the C++
VALUES = (torch.float32, torch.bfloat16)  # dtypes of the values
FETCHES = ("streamed", "cached")  # ways in which the kernel fetches weights ahead, by their number in the C++
RACE_WIDTH = 1024  # inputs and outputs of a layer in the race between the fetches
RACE_LAYERS = 8  # layers of a round
RACE_ROUNDS = 4  # rounds of a fetch
LARGEST_GROUP = 512  # sums of a thread stay in the second level cache: 512 x 64 float32 are 128 KiB


class Geometry(NamedTuple):
    """Sizes of a layout: inputs of a block, number of blocks, outputs of a group, number of groups."""

    block: int
    blocks: int
    group: int
    groups: int


def pack(weight: Tensor) -> dict[str, Tensor]:
    """Pack a weight [out, in], leaving zeros out; values stay bfloat16 or become float32.

    Returns the arrays, on the CPU:
    values: [padded nonzeros].
    columns: uint8 [padded nonzeros], the place of each value in its block of inputs.
    order: int16 [groups * blocks * group], the rows of each group as they are sorted.
    lengths: uint8 [groups * blocks * group / 16], the padded length of each chunk.
    starts: int64 [groups], the index of the first value of each group.
    """
    out_features, in_features = weight.shape
    nonzeros = int(weight.count_nonzero())
    density = nonzeros / max(1, weight.numel())
    group = _group(out_features)
    block = _block(in_features, density)
    groups = math.ceil(out_features / group)
    blocks = math.ceil(in_features / block)
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    dense = weight.detach().to("cpu", dtype)
    missing_columns = blocks * block - in_features
    missing_rows = groups * group - out_features
    dense = F.pad(dense, (0, missing_columns, 0, missing_rows))
    packed = []
    for rows in dense.split(group):
        by_block = rows.view(group, blocks, block).transpose(0, 1)
        packed.append(_pack_group(by_block))
    sizes = torch.tensor([len(values) for values, *_ in packed])
    starts = sizes.cumsum(0) - sizes
    by_array = zip(*packed, strict=True)
    values, columns, order, lengths = (torch.cat(arrays) for arrays in by_array)
    return {
        "values": values,
        "columns": columns,
        "order": order,
        "lengths": lengths,
        "starts": starts,
    }


def unpack(layout: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Return the dense weight of `shape` (out, in) that was packed."""
    block, blocks, group, groups = _geometry(len(layout["order"]), *shape)
    chunks = group // LANES
    values = layout["values"]
    chunk = torch.repeat_interleave(layout["lengths"].long() * LANES)  # of each value, counted through the whole layout
    lane = torch.arange(len(values)) % LANES
    group_of = chunk // (blocks * chunks)
    block_of = chunk // chunks % blocks
    row_of_lane = layout["order"].view(-1, LANES)
    row = group_of * group + row_of_lane[chunk, lane]
    column = block_of * block + layout["columns"]
    dense = values.new_zeros(groups * group, blocks * block)
    nonzero = values != 0
    dense[row[nonzero], column[nonzero]] = values[nonzero]
    out_features, in_features = shape
    return dense[:out_features, :in_features].contiguous()


def multiply(
    x: Tensor,
    layout: dict[str, Tensor],
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Return x W^T + bias, float32 [batch, out], on torch.get_num_threads() threads of the CPU.

    x: float32 [batch, in].
    layout: W as `pack` returns it.
    bias: float32 [out].

    Inf and NaN in x may reach outputs whose weight for them is zero, as in a dense product.
    """
    return _multiply(x, layout, out_features, bias, fastest_fetch())


def _multiply(
    x: Tensor,
    layout: dict[str, Tensor],
    out_features: int,
    bias: Tensor | None,
    fetch: str,
) -> Tensor:
    batch, in_features = x.shape
    sizes = _geometry(len(layout["order"]), out_features, in_features)
    x = x.contiguous()
    y = x.new_empty(batch, out_features)
    kernel = native.load("sparse_linear").sparse_linear
    kernel(
        native.best_isa("sparse_linear"),
        FETCHES.index(fetch),
        torch.get_num_threads(),
        layout["values"].dtype == torch.bfloat16,
        in_features,
        out_features,
        sizes.block,
        sizes.group,
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


# --- how weights are fetched ------------------------------------------------------------------------------------------


@functools.cache
def fastest_fetch() -> str:
    """Return the faster of `FETCHES` on this machine, by one race a process, which takes about 80 ms."""
    seconds = race()
    return min(seconds, key=seconds.__getitem__)


def race() -> dict[str, float]:
    """Time products with each of `FETCHES`, and return {fetch: seconds}, the least of its rounds.

    The layers of a round exceed a second level cache together, as those of a model do: 21 MB. Rounds of one fetch
    follow one another, and the first does not count, because it reads from the caches that the other fetch has left.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.rand(RACE_WIDTH, RACE_WIDTH, generator=random)
    layout = pack(weight * (weight < 0.5))
    layers = [{**layout, "values": layout["values"].clone()} for _ in range(RACE_LAYERS)]
    x = torch.zeros(LANES, RACE_WIDTH)
    seconds = {}
    for fetch in FETCHES:
        rounds = []
        for _ in range(RACE_ROUNDS):
            began = time.perf_counter()
            for layer in layers:
                _multiply(x, layer, RACE_WIDTH, None, fetch)
            rounds.append(time.perf_counter() - began)
        seconds[fetch] = min(rounds[1:])
    return seconds


# --- sizes ------------------------------------------------------------------------------------------------------------


def _group(out_features: int) -> int:
    """Return the outputs of a group, a multiple of 16.

    Many outputs pad less, since rows are sorted within a group. But a thread takes a whole group, and the sums of a
    group must stay in the second level cache.
    """
    longest = min(LARGEST_GROUP, max(64, out_features // 8))
    return _equal_parts(out_features, longest)


def _block(in_features: int, density: float) -> int:
    """Return the inputs of a block, a multiple of 16.

    Sums are read and written once a block, so few nonzeros want long blocks; many want room beside x in a cache of
    32 KiB: 128 inputs x 64 columns of float32 fill it.
    """
    if density > 1 / 3:
        longest = 80
    elif density > 1 / 14:
        longest = 112
    else:
        longest = 128
    return _equal_parts(in_features, longest)


def _equal_parts(size: int, longest: int) -> int:
    """Return the length of a part if `size` is cut into as few equal parts as `longest` allows, rounded up to 16."""
    parts = math.ceil(size / longest)
    return _round_up(math.ceil(size / parts))


def _round_up(size: int) -> int:
    return math.ceil(size / LANES) * LANES


@functools.cache
def _geometry(ordered: int, out_features: int, in_features: int) -> Geometry:
    """Return the sizes of a layout whose `order` has `ordered` entries.

    Blocks are counted, since `_block` depends on the density of the weight.
    """
    group = _group(out_features)
    groups = math.ceil(out_features / group)
    rows_of_block = groups * group
    blocks = max(1, ordered // rows_of_block)
    block = _round_up(math.ceil(in_features / blocks))
    return Geometry(block, blocks, group, groups)


def _pack_group(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, columns, order and lengths of a group of rows [blocks, group, block]."""
    nonzero = rows != 0
    counts, order = nonzero.sum(-1).sort(stable=True)  # [blocks, group], ascending: a chunk's last row is its longest
    lengths = counts[:, LANES - 1 :: LANES]  # [blocks, chunks]
    chunk_ends = lengths.flatten().cumsum(0)
    chunk_starts = (chunk_ends - lengths.flatten()).view_as(lengths) * LANES
    rank = order.argsort(-1)  # [blocks, group]: where the sort put each row
    chunk, lane = rank // LANES, rank % LANES
    first = chunk_starts.gather(-1, chunk) + lane  # [blocks, group]: where a row's first value lies
    count_before = nonzero.cumsum(-1) - 1
    position = first.unsqueeze(-1) + LANES * count_before
    position = position[nonzero]
    padded_length = int(lengths.sum()) * LANES
    values = torch.zeros(padded_length, dtype=rows.dtype)
    values[position] = rows[nonzero]
    columns = torch.zeros(padded_length, dtype=torch.uint8)
    place_in_block = torch.arange(rows.shape[-1], dtype=torch.uint8)
    columns[position] = place_in_block.expand(rows.shape)[nonzero]
    order = order.flatten().to(torch.int16)
    lengths = lengths.flatten().to(torch.uint8)
    return values, columns, order, lengths
