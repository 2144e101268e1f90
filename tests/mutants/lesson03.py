"""Answers to the exercises of lesson 03: right ones, written differently, and plausible wrong ones."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn


def _set(module, name, tensor):
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad)


def _cut_by_name(conv, norm, consumer, keep):
    conv, norm, consumer = (copy.deepcopy(module) for module in (conv, norm, consumer))
    _set(conv, "weight", conv.weight[keep])
    if conv.bias is not None:
        _set(conv, "bias", conv.bias[keep])
    if norm.affine:
        _set(norm, "weight", norm.weight[keep])
        _set(norm, "bias", norm.bias[keep])
    norm.running_mean, norm.running_var = norm.running_mean[keep], norm.running_var[keep]
    _set(consumer, "weight", consumer.weight[:, keep])
    conv.out_channels = norm.num_features = consumer.in_channels = len(keep)
    return conv, norm, consumer


def _cut_by_shape(conv, norm, consumer, keep):
    conv, norm, consumer = [copy.deepcopy(module) for module in (conv, norm, consumer)]
    for module in (conv, norm):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim:
                tensor.data = tensor.data.index_select(0, keep)
    consumer.weight.data = consumer.weight.data.index_select(1, keep)
    conv.out_channels = norm.num_features = consumer.in_channels = keep.numel()
    return [conv, norm, consumer]


def _first_columns(conv, norm, consumer, keep):
    new = _cut_by_name(conv, norm, consumer, keep)
    _set(new[2], "weight", consumer.weight[:, : len(keep)])
    return new


def _first_statistics(conv, norm, consumer, keep):
    new = _cut_by_name(conv, norm, consumer, keep)
    new[1].running_mean, new[1].running_var = norm.running_mean[: len(keep)], norm.running_var[: len(keep)]
    return new


def _new_norm(conv, norm, consumer, keep):
    conv, cut, consumer = _cut_by_name(conv, norm, consumer, keep)
    new = nn.BatchNorm2d(len(keep), affine=norm.affine).double()
    new.load_state_dict(cut.state_dict())
    return conv, new, consumer


def _new_conv(conv, norm, consumer, keep):
    """As the guide does: stride, padding and bias are carried over, dilation and padding_mode are not."""
    cut, norm, consumer = _cut_by_name(conv, norm, consumer, keep)
    new = nn.Conv2d(3, len(keep), conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None).double()
    new.load_state_dict(cut.state_dict())
    new.weight.requires_grad_(False)
    return new.eval(), norm, consumer


def _masked(conv, norm, consumer, keep):
    conv, norm, consumer = (copy.deepcopy(module) for module in (conv, norm, consumer))
    removed = torch.ones(conv.out_channels, dtype=torch.bool)
    removed[keep] = False
    consumer.weight.data[:, removed] = 0
    return conv, norm, consumer


def _in_place(conv, norm, consumer, keep):
    new = _cut_by_name(conv, norm, consumer, keep)
    for old, cut in zip((conv, norm, consumer), new, strict=True):
        old.__dict__ = cut.__dict__
    return conv, norm, consumer


def _the_others(conv, norm, consumer, keep):
    return _cut_by_name(conv, norm, consumer, torch.tensor([c for c in range(conv.out_channels) if c not in keep]))


def _attributes_left(conv, norm, consumer, keep):
    new = _cut_by_name(conv, norm, consumer, keep)
    new[0].out_channels = new[1].num_features = new[2].in_channels = conv.out_channels
    return new


# -------------------------------------------------------------------------------------------------- what is coupled


def _join(sets, labels):
    """The sets, with those that hold one of the labels made one."""
    labels = set(labels)
    return [*(s for s in sets if not s & labels), labels.union(*(s for s in sets if s & labels))]


def _together(net, image, *, offset=True, norms=True, statistics=True, biases=True, adds=True, fixed=False):
    """Right, unless an option takes a part of the answer away."""
    sets, of = [], {}

    def line(name, dim, size):
        return [(name, dim, i) for i in range(size)]

    for node in fx.symbolic_trace(net).graph.nodes:
        inputs = []
        fx.map_arg(node.args, inputs.append)
        labels = [of[other] for other in inputs]
        path, first = node.target, labels[0] if labels else None
        if node.op == "placeholder":
            first = line("image", 1, image.shape[1])
        elif node.op == "output":
            labels += [line("output", 1, len(first))]
        elif node.target is torch.cat:
            first, labels = [label for part in labels for label in part], []
            if not offset:  # the parts lie over each other
                first = [part[i] for part in (of[other] for other in inputs) for i in range(len(part))]
                labels = [of[inputs[0]][: len(of[inputs[1]])], of[inputs[1]][: len(of[inputs[0]])]]
        elif node.target is operator.add:
            labels = labels if adds else []
        elif node.op == "call_module" and isinstance(module := net.get_submodule(path), nn.Conv2d):
            labels += [line(f"{path}.weight", 1, len(first))]
            for label, column in zip(*labels, strict=True):
                sets = _join(sets, [label, column])
            first = line(f"{path}.weight", 0, module.out_channels)
            labels = [first, *([line(f"{path}.bias", 0, len(first))] if biases and module.bias is not None else [])]
        elif node.op == "call_module" and isinstance(module, nn.BatchNorm2d):
            state = module.state_dict() if norms else {}
            names = [name for name, t in state.items() if t.dim() and (statistics or "running" not in name)]
            labels += [line(f"{path}.{name}", 0, len(first)) for name in names]
        else:
            assert node.target is F.relu
        for together in zip(*labels, strict=True):
            sets = _join(sets, together)
        of[node] = first
    return [s for s in sets if fixed or not {"image", "output"} & {name for name, _, _ in s}]


def _by_numbers(net, image):
    """Another way: every label has a number, and the smaller one is handed along until nothing changes."""
    sets = _together(net, image)
    number = {label: i for i, s in enumerate(sets) for label in s}
    return {frozenset(label for label, n in number.items() if n == i) for i in range(len(sets))}


def _dimensions(net, image):
    """One class a dimension, as in the tracer without concatenation."""
    sets = _together(net, image)
    merged = {}
    for s in sets:
        merged.setdefault(frozenset((name, dim) for name, dim, _ in s), set()).update(s)
    return list(merged.values())


def _only_dimensions(net, image):
    return [{(name, dim) for name, dim, _ in s} for s in _together(net, image)]


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
    "03.2": (_together, _by_numbers),
    "03.3": (_choose_one_by_one, _choose_protected),
    "03.4": (_allocate_loop, _allocate_search),
}

WRONG = {
    "03.1": {
        "the consumer's first columns": _first_columns,
        "the statistics of the first channels": _first_statistics,
        "a new norm with defaults, in train mode": _new_norm,
        "a new convolution without all settings": _new_conv,
        "masked, not cut": _masked,
        "the arguments are changed": _in_place,
        "the wrong ones stay": _the_others,
        "the attributes say the old width": _attributes_left,
    },
    "03.2": {
        "the parts of a concatenation lie over each other": lambda n, x: _together(n, x, offset=False),
        "one set for a whole dimension": _dimensions,
        "dimensions without an index": _only_dimensions,
        "no norms": lambda n, x: _together(n, x, norms=False),
        "no running statistics": lambda n, x: _together(n, x, statistics=False),
        "no biases": lambda n, x: _together(n, x, biases=False),
        "an addition ties nothing": lambda n, x: _together(n, x, adds=False),
        "image and output are listed": lambda n, x: _together(n, x, fixed=True),
    },
    "03.3": {
        "raw scores": _raw,
        "divided by the layer's sum": _by_sum,
        "a threshold, repaired": _threshold,
        "the same ratio in each layer": _each_layer,
        "no least": lambda s, r, least: _choose_one_by_one(s, r, 0),
        "truncated": lambda s, r, least: _choose_one_by_one(s, int(r * 10) / 10, least),
        "true where removed": lambda s, r, least: {n: ~k for n, k in _choose_one_by_one(s, r, least).items()},
        "the scores are changed": _in_place_scores,
    },
    "03.4": {
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
