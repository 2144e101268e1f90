"""Right answers to the exercises of lesson 07, written otherwise than the worked ones."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_bn_by_torch(conv, norm):
    new = copy.deepcopy(conv)
    parts = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    new.weight, new.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *parts)
    return new


def best_scale_in_two_searches(weight, bits):
    """Each channel alone: a coarse search, then a finer one around its best."""
    top = 2 ** (bits - 1) - 1
    scales = []
    for row in weight.detach().double().flatten(1):
        largest = float(row.abs().max()) / top
        if not largest:
            scales.append(1.0)
            continue
        candidates = [largest * i / 300 for i in range(1, 301)]
        errors = [float(((row / s).round().clamp(-top, top) * s - row).square().sum()) for s in candidates]
        middle = candidates[errors.index(min(errors))]
        around = [middle * (1 + i / 3000) for i in range(-10, 11)]
        scales.append(min(around, key=lambda s: float(((row / s).round().clamp(-top, top) * s - row).square().sum())))
    return torch.tensor(scales)


def best_scale_of_all_candidates_at_once(weight, bits):
    rows = weight.detach().reshape(len(weight), -1)
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1) / top
    parts = torch.arange(1, 201) / 200
    scale = (parts[:, None] * largest).clamp(min=1e-12)[:, :, None]
    errors = ((rows / scale).round().clamp(-top, top) * scale - rows).pow(2).sum(2)
    best = scale[errors.argmin(0), torch.arange(len(rows)), 0]
    return torch.where(largest > 0, best, torch.ones_like(best))


def soft_rounding_by_hardtanh(weight, scale, v, bits, beta):
    half = 2 ** (bits - 1)
    h = nn.functional.hardtanh(torch.sigmoid(v) * (1.1 - -0.1) + -0.1, 0.0, 1.0)
    steps = torch.div(weight, scale, rounding_mode="floor") + h
    distance = torch.abs(h - 0.5) / 0.5
    return torch.clamp(steps, 1 - half, half - 1) * scale, torch.sum(1 - distance.pow(beta))


RIGHT = {
    "07.1": fold_bn_by_torch,
    "07.2": best_scale_in_two_searches,
    "07.3": soft_rounding_by_hardtanh,
}

MORE_RIGHT = {"07.2": [best_scale_of_all_candidates_at_once]}
