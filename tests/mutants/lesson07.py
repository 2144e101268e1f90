"""Answers to the exercises of lesson 07: right ones, written differently, and plausible wrong ones."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def _fold_by_hand(conv, norm, *, eps=True, root=True, own_bias=True, mean_scaled=True, gamma=True, beta=True):
    """Right, unless an option takes a part of the answer away."""
    new = copy.deepcopy(conv)
    variance = norm.running_var + (norm.eps if eps else 0)
    factor = 1 / (variance.sqrt() if root else variance)
    if norm.affine and gamma:
        factor = factor * norm.weight.detach()
    bias = conv.bias.detach() if conv.bias is not None and own_bias else torch.zeros_like(norm.running_mean)
    bias = (bias - norm.running_mean) * factor if mean_scaled else bias * factor - norm.running_mean
    if norm.affine and beta:
        bias = bias + norm.bias.detach()
    new.weight = nn.Parameter(conv.weight.detach() * factor[:, None, None, None])
    new.bias = nn.Parameter(bias)
    return new


def _fold_by_torch(conv, norm):
    new = copy.deepcopy(conv)
    parts = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    new.weight, new.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *parts)
    return new


def _fold_in_place(conv, norm):
    new = _fold_by_hand(conv, norm)
    conv.weight, conv.bias = new.weight, new.bias
    return conv


def _fold_new_module(conv, norm):
    """Padding mode, dilation and groups go back to their defaults."""
    folded = _fold_by_hand(conv, norm)
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding).double()
    new.weight, new.bias = folded.weight, folded.bias
    return new


# --------------------------------------------------------------------------------------------------------- percentiles


def _percentile_by_numpy(seen, share):
    values = np.concatenate([x.numpy().ravel() for x in seen])
    lo, hi = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return min(lo, 0.0), max(hi, 0.0)


def _percentile_by_kth(seen, share):
    values = torch.cat([x.reshape(-1) for x in seen])
    k = 1 + int((1 - share) / 2 * len(values) + 1e-9)
    lo, hi = values.kthvalue(k).values, values.kthvalue(len(values) + 1 - k).values
    return lo.clamp(max=0), hi.clamp(min=0)


def _mean_of_batches(seen, share):
    ends = torch.tensor([_percentile_by_numpy([x], share) for x in seen])
    return tuple(ends.mean(0).tolist())


def _without_zero(seen, share):
    values = torch.cat([x.flatten() for x in seen])
    return values.quantile((1 - share) / 2).item(), values.quantile((1 + share) / 2).item()


def _by_magnitude(seen, share):
    end = torch.cat([x.flatten() for x in seen]).abs().quantile(share).item()
    return -end, end


def _only_above(seen, share):
    values = torch.cat([x.flatten() for x in seen])
    return min(values.min().item(), 0.0), max(values.quantile(share).item(), 0.0)


# ------------------------------------------------------------------------------------------------------- equalisation


def _equalise(w1, b1, w2, *, power=0.5, bias=True, guard=True, order=1, mean=False):
    def size(x, dim):
        x = x.abs().transpose(0, dim).flatten(1)
        return x.mean(1) if mean else x.amax(1)

    rows, columns = size(w1, 0), size(w2, 1)
    s = (rows / columns) ** (power * order)
    if guard:
        s[(rows == 0) | (columns == 0)] = 1
    new = w1 / s.reshape(-1, *[1] * (w1.dim() - 1)), b1 / s if bias else b1.clone()
    return *new, w2 * s.reshape(-1, *[1] * (w2.dim() - 2))


def _equalise_rows(w1, b1, w2):
    """One channel after the other."""
    w1, b1, w2 = w1.clone(), b1.clone(), w2.clone()
    for i in range(len(w1)):
        row, column = float(w1[i].abs().max()), float(w2[:, i].abs().max())
        if row and column:
            s = (row / column) ** 0.5
            w1[i], b1[i], w2[:, i] = w1[i] / s, b1[i] / s, w2[:, i] * s
    return [w1, b1, w2]


def _equalise_in_place(w1, b1, w2):
    for old, new in zip((w1, b1, w2), _equalise(w1, b1, w2), strict=True):
        old.copy_(new)
    return w1, b1, w2


def _only_the_first(w1, b1, w2):
    v1, c1, _ = _equalise(w1, b1, w2)
    return v1, c1, w2.clone()


# ----------------------------------------------------------------------------------------------------- corrected biases


def _bias_by_convolution(conv, rounded, mean):
    reach = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = mean.view(1, -1, 1, 1).expand(1, -1, *reach)
    shift = nn.functional.conv2d(x, rounded - conv.weight.detach(), None, 1, 0, conv.dilation, conv.groups)
    return conv.bias.detach() - shift.flatten()


def _bias_by_rows(conv, rounded, mean):
    bias, width = conv.bias.detach().clone(), rounded.shape[1]
    for i in range(len(bias)):
        first = i // (len(bias) // conv.groups) * width
        bias[i] -= ((rounded[i] - conv.weight[i]).detach().sum((1, 2)) * mean[first : first + width]).sum()
    return bias


def _groups_forgotten(conv, rounded, mean):
    error = (rounded - conv.weight.detach()).sum((2, 3))
    return conv.bias.detach() - error @ mean[: error.shape[1]]


def _bias_in_place(conv, rounded, mean):
    conv.bias.data = _bias_by_convolution(conv, rounded, mean)
    return conv.bias.data


# ----------------------------------------------------------------------------------------------- bits within a budget


def _choose(rows, budget, *, price=lambda noise, size: noise / size, decibels=False, strict=False, short=False):
    """Right, unless an option changes the price of a step or the end."""
    ladders = {}
    for row in sorted(rows, key=lambda row: row["bits"], reverse=True):
        noise = -row["db"] if decibels else 10 ** (-row["db"] / 10)
        ladders.setdefault(row["layer"], []).append((row["bits"], row["bytes"], noise))

    def too_large():
        size = sum(steps[0][1] for steps in ladders.values())
        return size >= budget if strict else size > budget

    before = None
    while too_large():
        steps = [
            (price(pair[1][2] - pair[0][2], pair[0][1] - pair[1][1]), name)
            for name, pair in ladders.items()
            if len(pair) > 1
        ]
        before = {name: steps[0][0] for name, steps in ladders.items()}
        if not steps:
            break
        ladders[min(steps)[1]].pop(0)
    plan = {name: steps[0][0] for name, steps in ladders.items()}
    return before if short and before else plan


def _choose_by_index(rows, budget):
    layers = sorted({row["layer"] for row in rows})
    widths = {n: sorted({r["bits"] for r in rows if r["layer"] == n})[::-1] for n in layers}
    at = {(r["layer"], r["bits"]): r for r in rows}
    index = dict.fromkeys(layers, 0)

    def of(n, k=0):
        return at[n, widths[n][index[n] + k]]

    while sum(of(n)["bytes"] for n in layers) > budget:
        best = None
        for n in layers:
            if index[n] + 1 < len(widths[n]):
                noise = 10 ** (-of(n, 1)["db"] / 10) - 10 ** (-of(n)["db"] / 10)
                ratio = noise / (of(n)["bytes"] - of(n, 1)["bytes"])
                if best is None or ratio < best[0]:
                    best = ratio, n
        if best is None:
            break
        index[best[1]] += 1
    return {n: widths[n][index[n]] for n in layers}


def _all_alike(rows, budget):
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        if sum(row["bytes"] for row in rows if row["bits"] == bits) <= budget:
            break
    return {row["layer"]: bits for row in rows}


RIGHT = {
    "07.1": (_fold_by_hand, _fold_by_torch),
    "07.2": (_percentile_by_numpy, _percentile_by_kth),
    "07.3": (_equalise, _equalise_rows),
    "07.4": (_bias_by_convolution, _bias_by_rows),
    "07.5": (_choose, _choose_by_index),
}

WRONG = {
    "07.1": {
        "eps forgotten": lambda c, n: _fold_by_hand(c, n, eps=False),
        "the convolution's own bias forgotten": lambda c, n: _fold_by_hand(c, n, own_bias=False),
        "variance, not its root": lambda c, n: _fold_by_hand(c, n, root=False),
        "the mean is not multiplied": lambda c, n: _fold_by_hand(c, n, mean_scaled=False),
        "gamma forgotten": lambda c, n: _fold_by_hand(c, n, gamma=False),
        "beta forgotten": lambda c, n: _fold_by_hand(c, n, beta=False),
        "the arguments are changed": _fold_in_place,
        "a new convolution without all settings": _fold_new_module,
    },
    "07.2": {
        "mean of the batches' percentiles": _mean_of_batches,
        "all of the rest at each end": lambda seen, share: _percentile_by_numpy(seen, 2 * share - 1),
        "0 may be outside": _without_zero,
        "symmetric, by magnitude": _by_magnitude,
        "only the upper end is cut": _only_above,
        "the first batch only": lambda seen, share: _percentile_by_numpy(seen[:1], share),
        "min-max": lambda seen, share: _percentile_by_numpy(seen, 1.0),
    },
    "07.3": {
        "the bias is not divided": lambda *w: _equalise(*w, bias=False),
        "no root": lambda *w: _equalise(*w, power=1.0),
        "the wrong way round": lambda *w: _equalise(*w, order=-1),
        "a channel of zeros gives NaN": lambda *w: _equalise(*w, guard=False),
        "mean magnitudes": lambda *w: _equalise(*w, mean=True),
        "the second weight as it was": _only_the_first,
        "the arguments are changed": _equalise_in_place,
    },
    "07.4": {
        "the wrong sign": lambda c, w, m: 2 * c.bias.detach() - _bias_by_convolution(c, w, m),
        "mean over the kernel": lambda c, w, m: (
            c.bias.detach() + (_bias_by_convolution(c, w, m) - c.bias.detach()) / w[0, 0].numel()
        ),
        "groups forgotten": _groups_forgotten,
        "the shift alone": lambda c, w, m: _bias_by_convolution(c, w, m) - c.bias.detach(),
        "nothing is corrected": lambda c, w, m: c.bias.detach().clone(),
        "the arguments are changed": _bias_in_place,
    },
    "07.5": {
        "noise alone": lambda rows, budget: _choose(rows, budget, price=lambda noise, size: noise),
        "bytes alone": lambda rows, budget: _choose(rows, budget, price=lambda noise, size: -size),
        "decibels per byte": lambda rows, budget: _choose(rows, budget, decibels=True),
        "the most noise per byte": lambda rows, budget: _choose(rows, budget, price=lambda n, s: -n / s),
        "under the budget, not within": lambda rows, budget: _choose(rows, budget, strict=True),
        "one step short": lambda rows, budget: _choose(rows, budget, short=True),
        "one width for all": _all_alike,
    },
}
