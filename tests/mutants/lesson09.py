"""Right answers to the exercises of lesson 09, written otherwise than the worked ones."""

import numpy as np
import torch

from labkit.quantization import affine


def most_tokens_by_seconds(weights, bits, kv_numbers, kv_bits, context, batch, bandwidth):
    seconds = np.dot([weights[part] for part in weights], [bits[part] for part in weights]) / 8 / bandwidth
    seconds += context * batch * kv_numbers * kv_bits / (8 * bandwidth)
    return batch / seconds


def grid_share_by_sets(weight, group_size, levels):
    if group_size <= levels:
        return float("nan")
    counts = [len(part.unique()) for row in weight for part in row.split(group_size)]
    return sum(count <= levels for count in counts) / len(counts)


def _grid(values, bits):
    ends = values.amin(1, True), values.amax(1, True)
    return affine.choose(*ends, bits, symmetric=False, dtype=torch.float16)


def gptq_by_inverse(weight, u, bits, group_size):
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


def round_cache_by_groups(k, v, bits, group):
    keys = []
    for tokens in k.split(group, dim=-2):
        if tokens.shape[-2] == group:
            lo, hi = tokens.amin(-2, keepdim=True), tokens.amax(-2, keepdim=True)
            tokens = affine.choose(lo, hi, bits, symmetric=False).fake(tokens)
        keys.append(tokens)
    groups = v.unflatten(-1, (-1, group))
    grid = affine.choose(groups.amin(-1, True), groups.amax(-1, True), bits, symmetric=False)
    return [torch.cat(keys, -2), grid.fake(groups).flatten(-2)]


RIGHT = {
    "09.1": most_tokens_by_seconds,
    "09.2": grid_share_by_sets,
    "09.3": gptq_by_inverse,
    "09.4": round_cache_by_groups,
}
