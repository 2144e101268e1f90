"""Right answers to the exercises of lesson 07, written otherwise than the worked ones."""

import copy
import math

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_bn_by_torch(conv, norm):
    new = copy.deepcopy(conv)
    parts = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    new.weight, new.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *parts)
    return new


def percentile_range_by_kth_value(seen, share):
    values = torch.cat([x.reshape(-1) for x in seen])
    k = 1 + int((1 - share) / 2 * len(values) + 1e-9)
    lo, hi = values.kthvalue(k).values, values.kthvalue(len(values) + 1 - k).values
    return lo.clamp(max=0), hi.clamp(min=0)


def equalise_in_a_loop(w1, b1, w2):
    """One channel after the other."""
    w1, b1, w2 = w1.clone(), b1.clone(), w2.clone()
    for i in range(len(w1)):
        row, column = float(w1[i].abs().max()), float(w2[:, i].abs().max())
        if row and column:
            s = (row / column) ** 0.5
            w1[i], b1[i], w2[:, i] = w1[i] / s, b1[i] / s, w2[:, i] * s
    return [w1, b1, w2]


def correct_bias_by_convolution(conv, rounded, mean):
    reach = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = mean.view(1, -1, 1, 1).expand(1, -1, *reach)
    shift = nn.functional.conv2d(x, rounded - conv.weight.detach(), None, 1, 0, conv.dilation, conv.groups)
    return conv.bias.detach() - shift.flatten()


def choose_bits_by_index(rows, budget):
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


def percentile_range_with_a_value_more(seen, share):
    """Of 1000 values and a share of 0.99, 4 or 6 beyond each end do as well as 5."""
    return _kth_of_each_end(seen, math.floor(_beyond(seen, share)) + (share < 1))


def percentile_range_with_a_value_less(seen, share):
    return _kth_of_each_end(seen, math.ceil(_beyond(seen, share)) - (share < 1))


def _beyond(seen, share):
    return round((1 - share) / 2 * sum(x.numel() for x in seen), 6)


def _kth_of_each_end(seen, beyond):
    values = torch.cat([x.flatten() for x in seen])
    lo = values.kthvalue(1 + beyond).values
    hi = values.kthvalue(len(values) - beyond).values
    return lo.clamp(max=0), hi.clamp(min=0)


RIGHT = {
    "07.1": fold_bn_by_torch,
    "07.2": percentile_range_by_kth_value,
    "07.3": equalise_in_a_loop,
    "07.4": correct_bias_by_convolution,
    "07.5": choose_bits_by_index,
}

MORE_RIGHT = {
    "07.2": [percentile_range_with_a_value_more, percentile_range_with_a_value_less],
}
