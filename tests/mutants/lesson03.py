"""Answers to the exercises of lesson 03: right ones, written differently, and plausible wrong ones."""

import copy

import torch
from torch import nn


def _set(module, name, tensor):
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad)


def _cut_by_name(conv, norm, reader, keep):
    conv, norm, reader = (copy.deepcopy(module) for module in (conv, norm, reader))
    _set(conv, "weight", conv.weight[keep])
    if conv.bias is not None:
        _set(conv, "bias", conv.bias[keep])
    if norm.affine:
        _set(norm, "weight", norm.weight[keep])
        _set(norm, "bias", norm.bias[keep])
    norm.running_mean, norm.running_var = norm.running_mean[keep], norm.running_var[keep]
    _set(reader, "weight", reader.weight[:, keep])
    conv.out_channels = norm.num_features = reader.in_channels = len(keep)
    return conv, norm, reader


def _cut_by_shape(conv, norm, reader, keep):
    conv, norm, reader = [copy.deepcopy(module) for module in (conv, norm, reader)]
    for module in (conv, norm):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim:
                tensor.data = tensor.data.index_select(0, keep)
    reader.weight.data = reader.weight.data.index_select(1, keep)
    conv.out_channels = norm.num_features = reader.in_channels = keep.numel()
    return [conv, norm, reader]


def _first_columns(conv, norm, reader, keep):
    new = _cut_by_name(conv, norm, reader, keep)
    _set(new[2], "weight", reader.weight[:, : len(keep)])
    return new


def _first_statistics(conv, norm, reader, keep):
    new = _cut_by_name(conv, norm, reader, keep)
    new[1].running_mean, new[1].running_var = norm.running_mean[: len(keep)], norm.running_var[: len(keep)]
    return new


def _new_norm(conv, norm, reader, keep):
    conv, cut, reader = _cut_by_name(conv, norm, reader, keep)
    new = nn.BatchNorm2d(len(keep), affine=norm.affine).double()
    new.load_state_dict(cut.state_dict())
    return conv, new, reader


def _new_conv(conv, norm, reader, keep):
    """As the guide does: stride, padding and bias are carried over, dilation and padding_mode are not."""
    cut, norm, reader = _cut_by_name(conv, norm, reader, keep)
    new = nn.Conv2d(3, len(keep), conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None).double()
    new.load_state_dict(cut.state_dict())
    new.weight.requires_grad_(False)
    return new.eval(), norm, reader


def _masked(conv, norm, reader, keep):
    conv, norm, reader = (copy.deepcopy(module) for module in (conv, norm, reader))
    removed = torch.ones(conv.out_channels, dtype=torch.bool)
    removed[keep] = False
    reader.weight.data[:, removed] = 0
    return conv, norm, reader


def _in_place(conv, norm, reader, keep):
    new = _cut_by_name(conv, norm, reader, keep)
    for old, cut in zip((conv, norm, reader), new, strict=True):
        old.__dict__ = cut.__dict__
    return conv, norm, reader


def _the_others(conv, norm, reader, keep):
    return _cut_by_name(conv, norm, reader, torch.tensor([c for c in range(conv.out_channels) if c not in keep]))


def _attributes_left(conv, norm, reader, keep):
    new = _cut_by_name(conv, norm, reader, keep)
    new[0].out_channels = new[1].num_features = new[2].in_channels = conv.out_channels
    return new


# ------------------------------------------------------------------------------------------------------ one ranking


def _choose_one_by_one(scores, ratio, least):
    return _raw({name: s / s.mean() for name, s in scores.items()}, ratio, least)


def _choose_protected(scores, ratio, least):
    """The best `least` of each layer are set aside; the rest is one sort."""
    flat = []
    for s in scores.values():
        part = s / s.mean()
        part = part.index_fill(0, part.argsort(descending=True)[:least], float("inf"))
        flat.append(part)
    joined = torch.cat(flat)
    lowest = joined.argsort(stable=True)[: round(ratio * len(joined))]
    kept = torch.ones(len(joined), dtype=torch.bool)
    kept[lowest] = False
    kept |= joined.isinf()
    return dict(zip(scores, kept.split([len(s) for s in scores.values()]), strict=True))


def _raw(scores, ratio, least):
    ranked = sorted((float(s[i]), name, i) for name, s in scores.items() for i in range(len(s)))
    kept = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    to_go = round(ratio * len(ranked))
    for _, name, i in ranked:
        if to_go and kept[name].sum() > least:
            kept[name][i] = False
            to_go -= 1
    return kept


def _by_sum(scores, ratio, least):
    return _raw({name: s / s.sum() for name, s in scores.items()}, ratio, least)


def _threshold(scores, ratio, least):
    parts = {name: s / s.mean() for name, s in scores.items()}
    joined = torch.cat(list(parts.values()))
    k = round(ratio * len(joined))
    limit = joined.kthvalue(k).values if k else joined.min() - 1
    kept = {}
    for name, part in parts.items():
        mask = part > limit
        if mask.sum() < least:
            mask = torch.zeros_like(mask)
            mask[part.topk(min(least, len(part))).indices] = True
        kept[name] = mask
    return kept


def _each_layer(scores, ratio, least):
    return {name: _choose_one_by_one({name: s}, ratio, least)[name] for name, s in scores.items()}


def _in_place_scores(scores, ratio, least):
    for s in scores.values():
        s /= s.mean()
    return _raw(scores, ratio, least)


# ------------------------------------------------------------------------------------------------------- allocation


def _allocate_loop(baseline, curves, tolerance):
    ratios = {}
    for name, curve in curves.items():
        ratios[name] = 0.0
        for ratio in sorted(curve):
            if baseline - curve[ratio] > tolerance:
                break
            ratios[name] = ratio
    return ratios


def _allocate_search(baseline, curves, tolerance):
    def fits(curve, ratio):
        return all(curve[r] >= baseline - tolerance for r in curve if r <= ratio)

    return {name: max([r for r in curve if fits(curve, r)], default=0) for name, curve in curves.items()}


def _no_order(baseline, curves, tolerance):
    ratios = {}
    for name, curve in curves.items():
        ratios[name] = 0.0
        for ratio, accuracy in curve.items():
            if baseline - accuracy > tolerance:
                break
            ratios[name] = ratio
    return ratios


RIGHT = {
    "03.1": (_cut_by_name, _cut_by_shape),
    "03.2": (_choose_one_by_one, _choose_protected),
    "03.3": (_allocate_loop, _allocate_search),
}

WRONG = {
    "03.1": {
        "the reader's first columns": _first_columns,
        "the statistics of the first channels": _first_statistics,
        "a new norm with defaults, in train mode": _new_norm,
        "a new convolution without all settings": _new_conv,
        "masked, not cut": _masked,
        "the arguments are changed": _in_place,
        "the wrong ones stay": _the_others,
        "the attributes say the old width": _attributes_left,
    },
    "03.2": {
        "raw scores": _raw,
        "divided by the layer's sum": _by_sum,
        "a threshold, repaired": _threshold,
        "the same ratio in each layer": _each_layer,
        "no least": lambda s, r, least: _choose_one_by_one(s, r, 0),
        "truncated": lambda s, r, least: _choose_one_by_one(s, int(r * 10) / 10, least),
        "true where removed": lambda s, r, least: {n: ~k for n, k in _choose_one_by_one(s, r, least).items()},
        "the scores are changed": _in_place_scores,
    },
    "03.3": {
        "against the smallest ratio tried": lambda b, curves, t: {
            name: _allocate_loop(curve[min(curve)], {name: curve}, t)[name] for name, curve in curves.items()
        },
        "the largest that fits, whatever lies below": lambda b, curves, t: {
            name: max([r for r in curve if b - curve[r] <= t], default=0.0) for name, curve in curves.items()
        },
        "less than the tolerance": lambda b, curves, t: _allocate_loop(b, curves, t - 1e-9),
        "relative to the baseline": lambda b, curves, t: _allocate_loop(b, curves, t * b),
        "in the order given": _no_order,
        "what stays, not what goes": lambda b, curves, t: {
            name: 1 - ratio for name, ratio in _allocate_loop(b, curves, t).items()
        },
        "groups without a ratio are left out": lambda b, curves, t: {
            name: ratio for name, ratio in _allocate_loop(b, curves, t).items() if ratio
        },
    },
}
