"""Answers to the exercises of lesson 09: right ones, written differently, and plausible wrong ones."""

import math
import struct

import numpy as np
import torch

from labkit.quantization import affine


def _bound(
    weights, bits, kv_numbers, kv_bits, context, batch, bandwidth, *, per_sequence=False, own_bits=True, eighth=8,
    caches=None, tokens=None,
):  # fmt: skip
    """Right, unless an option takes a part of the answer away."""
    widths = bits if own_bits else dict.fromkeys(weights, next(iter(bits.values())))
    read = sum(count * widths[part] for part, count in weights.items()) * (batch if per_sequence else 1)
    read += (batch if caches is None else caches) * context * kv_numbers * kv_bits
    return bandwidth * (batch if tokens is None else tokens) / (read / eighth)


def _bound_by_seconds(weights, bits, kv_numbers, kv_bits, context, batch, bandwidth):
    seconds = np.dot([weights[part] for part in weights], [bits[part] for part in weights]) / 8 / bandwidth
    seconds += context * batch * kv_numbers * kv_bits / (8 * bandwidth)
    return batch / seconds


# ------------------------------------------------------------------------------------------------------ a Q4_1 block


def _read(block, *, order="<ee", first_low=True, pairs=False, around=0, swapped=False):
    d, m = struct.unpack(order, block[:4])
    d, m = (m, d) if swapped else (d, m)
    halves = [(byte & 15, byte >> 4) if first_low else (byte >> 4, byte & 15) for byte in block[4:]]
    codes = [code for pair in halves for code in pair] if pairs else [p[0] for p in halves] + [p[1] for p in halves]
    return [d * (code - around) + m for code in codes]


def _read_by_torch(block):
    d, m = torch.frombuffer(bytearray(block[:4]), dtype=torch.float16).float()
    data = torch.frombuffer(bytearray(block[4:]), dtype=torch.uint8)
    return torch.cat([data % 16, data // 16]) * d + m


# ----------------------------------------------------------------------------------------- a grid that is there already


def _share(weight, group_size, levels):
    if group_size <= levels:
        return math.nan
    groups = weight.reshape(-1, group_size).sort(dim=1).values
    return ((groups.diff(dim=1) != 0).sum(1) + 1 <= levels).double().mean().item()


def _share_by_sets(weight, group_size, levels, *, guard=True, fewer=False, percent=1):
    if guard and group_size <= levels:
        return float("nan")
    counts = [len(part.unique()) for row in weight for part in row.split(group_size)]
    hits = [count < levels if fewer else count <= levels for count in counts]
    return percent * sum(hits) / len(hits)


def _share_of_columns(weight, group_size, levels):
    return _share(weight.t().contiguous(), group_size, levels)


def _share_of_rows(weight, group_size, levels):
    if group_size <= levels:
        return math.nan
    return float(np.mean([len(row.unique()) <= levels for row in weight]))


def _share_of_runs(weight, group_size, levels):
    """Counts changes from one neighbour to the next without sorting."""
    if group_size <= levels:
        return math.nan
    groups = weight.reshape(-1, group_size)
    return ((groups.diff(dim=1) != 0).sum(1) + 1 <= levels).double().mean().item()


# ----------------------------------------------------------------------------------------------------------------- GPTQ


def _grid(values, bits, symmetric=False):
    ends = values.amin(1, True), values.amax(1, True)
    return affine.choose(*ends, bits, symmetric=symmetric, dtype=torch.float16)


def _gptq(
    weight, u, bits, group_size, *, in_place=False, updated=True, divided=True, sign=1, row=True, rounds=True,
    whole=False, symmetric=False,
):  # fmt: skip
    """Right, unless an option takes a part of the answer away."""
    w, new = weight if in_place else weight.clone(), torch.zeros_like(weight)
    start = weight.clone()
    for j in range(w.shape[1]):
        if j % group_size == 0:
            source = w if updated else start
            grid = _grid(source if whole else source[:, j : j + group_size], bits, symmetric)
        new[:, j] = grid.fake(w[:, [j]])[:, 0]
        error = w[:, j] - new[:, j]
        if not rounds:
            new[:, j] = w[:, j]
        effect = u[j, j + 1 :] if row else u[j + 1 :, j]
        w[:, j + 1 :] -= sign * torch.outer(error / (u[j, j] if divided else 1), effect)
    return new


def _gptq_by_inverse(weight, u, bits, group_size):
    """The inverse of what is left, one elimination after the other."""
    inverse, w = u.t() @ u, weight.clone()
    for j in range(w.shape[1]):
        if j % group_size == 0:
            grid = _grid(w[:, j : j + group_size], bits)
        before = w[:, j].clone()
        w[:, j] = grid.fake(w[:, j : j + 1]).flatten()
        w[:, j + 1 :] += (w[:, j] - before)[:, None] * inverse[j, j + 1 :] / inverse[j, j]
        inverse = inverse - inverse[:, [j]] @ inverse[[j]] / inverse[j, j]
    return w


# ------------------------------------------------------------------------------------------------------------- KV cache


def _fake(x, bits, group, symmetric=False):
    return affine.fake_quantize(x.contiguous(), bits, symmetric=symmetric, group_size=group)


def _cache(k, v, bits, group, *, symmetric=False, from_end=False, guard=True, rest=False):
    whole = k.shape[-2] // group * group
    keys = k.clone()
    if whole or not guard:
        part = slice(k.shape[-2] - whole, None) if from_end else slice(0, whole)
        keys[..., part, :] = _fake(k[..., part, :].transpose(-1, -2), bits, group, symmetric).transpose(-1, -2)
    if rest and whole < k.shape[-2]:
        last = k[..., whole:, :]
        keys[..., whole:, :] = _fake(last.transpose(-1, -2), bits, last.shape[-2]).transpose(-1, -2)
    return keys, _fake(v, bits, group, symmetric)


def _cache_by_groups(k, v, bits, group):
    keys = []
    for tokens in k.split(group, dim=-2):
        if tokens.shape[-2] == group:
            lo, hi = tokens.amin(-2, keepdim=True), tokens.amax(-2, keepdim=True)
            tokens = affine.choose(lo, hi, bits, symmetric=False).fake(tokens)
        keys.append(tokens)
    groups = v.unflatten(-1, (-1, group))
    grid = affine.choose(groups.amin(-1, True), groups.amax(-1, True), bits, symmetric=False)
    return [torch.cat(keys, -2), grid.fake(groups).flatten(-2)]


def _cache_in_place(k, v, bits, group):
    keys, values = _cache(k, v, bits, group)
    return k.copy_(keys), v.copy_(values)


def _keys_per_token(k, v, bits, group):
    whole = k.shape[-2] // group * group
    keys = _fake(k, bits, group)
    keys[..., whole:, :] = k[..., whole:, :]
    return keys, _fake(v, bits, group)


def _both_per_channel(k, v, bits, group):
    return _cache(k, v, bits, group)[0], _cache(v, k, bits, group)[0]


RIGHT = {
    "09.1": (_bound, _bound_by_seconds),
    "09.2": (_read, _read_by_torch),
    "09.3": (_share, _share_by_sets),
    "09.4": (_gptq, _gptq_by_inverse),
    "09.5": (_cache, _cache_by_groups),
}

WRONG = {
    "09.1": {
        "weights are read for each sequence": lambda *a: _bound(*a, per_sequence=True),
        "one cache for the batch": lambda *a: _bound(*a, caches=1),
        "one token for the batch": lambda *a: _bound(*a, tokens=1),
        "bits taken for bytes": lambda *a: _bound(*a, eighth=1),
        "the bits of the first part for all": lambda *a: _bound(*a, own_bits=False),
        "no cache": lambda *a: _bound(*a, caches=0),
    },
    "09.2": {
        "neighbours share a byte": lambda block: _read(block, pairs=True),
        "the high half first": lambda block: _read(block, first_low=False),
        "codes around 8, as Q4_0 has them": lambda block: _read(block, around=8),
        "d and m in the wrong order": lambda block: _read(block, swapped=True),
        "the highest byte first": lambda block: _read(block, order=">ee"),
        "only the low halves": lambda block: _read(block)[:16],
    },
    "09.3": {
        "small groups prove something": lambda *a: _share_by_sets(*a, guard=False),
        "fewer values than levels": lambda *a: _share_by_sets(*a, fewer=True),
        "per cent": lambda *a: _share_by_sets(*a, percent=100),
        "groups along the outputs": _share_of_columns,
        "values of a whole row": _share_of_rows,
        "changes between neighbours": _share_of_runs,
    },
    "09.4": {
        "plain rounding": lambda w, u, bits, g: torch.cat([_grid(x, bits).fake(x) for x in w.split(g, 1)], 1),
        "grids of the weights as they were": lambda *a: _gptq(*a, updated=False),
        "not divided by the diagonal": lambda *a: _gptq(*a, divided=False),
        "the error has the wrong sign": lambda *a: _gptq(*a, sign=-1),
        "a column of u": lambda *a: _gptq(*a, row=False),
        "moved and not rounded": lambda *a: _gptq(*a, rounds=False),
        "one grid for a row": lambda *a: _gptq(*a, whole=True),
        "the weight is changed": lambda *a: _gptq(*a, in_place=True),
    },
    "09.5": {
        "keys per token": _keys_per_token,
        "values per channel": _both_per_channel,
        "symmetric grids": lambda *a: _cache(*a, symmetric=True),
        "groups counted from the last token": lambda *a: _cache(*a, from_end=True),
        "fewer tokens than a group": lambda *a: _cache(*a, guard=False),
        "the rest is rounded too": lambda *a: _cache(*a, rest=True),
        "the cache is changed": _cache_in_place,
    },
}
