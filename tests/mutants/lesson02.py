"""Right answers to the exercises of lesson 02, written otherwise than the worked ones."""

import math

import torch
import torch.nn.functional as F

from labkit.pruning import sparse


def keep_mask_by_ranks(weight, sparsity):
    flat = weight.abs().reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda i: flat[i], reverse=True)
    kept = set(order[: len(flat) - math.floor(len(flat) * sparsity + 0.5)])
    return torch.tensor([i in kept for i in range(len(flat))]).reshape(weight.shape)


def to_csr_in_a_loop(weight):
    values, columns, starts = [], [], [0]
    for row in weight:
        for column, value in enumerate(row):
            if value != 0:
                values.append(value)
                columns.append(column)
        starts.append(len(values))
    stacked = torch.stack(values) if values else weight.new_zeros(0)
    return stacked, torch.tensor(columns, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def fair_sides_by_hand(layer, x, format):
    weight = layer.weight.detach().clone()
    fast = sparse.SparseLinear(weight, layer.bias, format)
    return (lambda: F.linear(x, weight, layer.bias)), (lambda: fast(x))


RIGHT = {
    "02.1": keep_mask_by_ranks,
    "02.2": to_csr_in_a_loop,
    "02.3": fair_sides_by_hand,
}
