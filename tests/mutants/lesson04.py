"""Answers to the exercises of lesson 04: right ones, written differently, and plausible wrong ones."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


def _linear(weight, bias, like):
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=like.bias.requires_grad)
    return new


def _rows(layer, index):
    return _linear(layer.weight[index], None if layer.bias is None else layer.bias[index], layer)


def _columns(layer, index):
    return _linear(layer.weight[:, index], layer.bias, layer)


def _positions(heads, size):
    return torch.cat([torch.arange(int(head) * size, (int(head) + 1) * size) for head in heads])


def _cut_by_index(q, k, v, o, head_dim, keep):
    group = q.out_features // k.out_features
    of_q, of_kv = _positions(keep, group * head_dim), _positions(keep, head_dim)
    return _rows(q, of_q), _rows(k, of_kv), _rows(v, of_kv), _columns(o, of_q)


def _cut_by_view(q, k, v, o, head_dim, keep):
    q, k, v, o = copy.deepcopy([q, k, v, o])
    kv_heads = k.out_features // head_dim
    for layer in (q, k, v):
        for tensor in layer.parameters():
            tensor.data = tensor.data.view(kv_heads, -1, *tensor.shape[1:])[keep].flatten(0, 1)
        layer.out_features = len(layer.weight)
    o.weight.data = o.weight.data.view(len(o.weight), kv_heads, -1)[:, keep].flatten(1)
    o.in_features = o.weight.shape[1]
    return [q, k, v, o]


def _first_columns(q, k, v, o, head_dim, keep):
    q, k, v, old = *_cut_by_index(q, k, v, o, head_dim, keep)[:3], o
    return q, k, v, _columns(old, torch.arange(q.out_features))


def _query_heads_as_kv(q, k, v, o, head_dim, keep):
    """The query heads with the numbers of the KV heads, as if every head had its own keys."""
    index = _positions(keep, head_dim)
    return _rows(q, index), _rows(k, index), _rows(v, index), _columns(o, index)


def _interleaved_groups(q, k, v, o, head_dim, keep):
    """Query head j reads KV head j mod kv_heads, which holds only where each has its own."""
    kv_heads = k.out_features // head_dim
    mine = [j for j in range(q.out_features // head_dim) if j % kv_heads in keep.tolist()]
    of_q, of_kv = _positions(mine, head_dim), _positions(keep, head_dim)
    return _rows(q, of_q), _rows(k, of_kv), _rows(v, of_kv), _columns(o, of_q)


def _strided(q, k, v, o, head_dim, keep):
    """Heads taken to be interleaved: entry i belongs to head i mod heads."""
    kv_heads, group = k.out_features // head_dim, q.out_features // k.out_features
    of_kv = torch.tensor([i for i in range(k.out_features) if i % kv_heads in keep.tolist()])
    of_q = torch.tensor([i for i in range(q.out_features) if i % kv_heads in keep.tolist()])
    assert len(of_q) == group * len(of_kv)
    return _rows(q, of_q), _rows(k, of_kv), _rows(v, of_kv), _columns(o, of_q)


def _divides_the_width(q, k, v, o, head_dim, keep):
    """A head is as wide as the model over its heads, says the guide."""
    heads = q.out_features // head_dim
    return _cut_by_index(q, k, v, o, max(1, q.in_features // heads), keep)


def _masked(q, k, v, o, head_dim, keep):
    q, k, v, o = copy.deepcopy([q, k, v, o])
    columns = o.weight.data.view(len(o.weight), k.out_features // head_dim, -1)
    columns[:, [h for h in range(columns.shape[1]) if h not in keep.tolist()]] = 0
    return q, k, v, o


def _in_place(q, k, v, o, head_dim, keep):
    for old, new in zip((q, k, v, o), _cut_by_index(q, k, v, o, head_dim, keep), strict=True):
        old.__dict__ = new.__dict__
    return q, k, v, o


def _attributes_left(q, k, v, o, head_dim, keep):
    new = _cut_by_index(q, k, v, o, head_dim, keep)
    for layer, old in zip(new, (q, k, v, o), strict=True):
        layer.in_features, layer.out_features = old.in_features, old.out_features
    return new


# ------------------------------------------------------------------------------------------------------- importance


def _scores_einsum(context, grad, mask):
    return torch.einsum("bthd,bthd,bt->bh", context.detach(), grad, mask.to(grad.dtype)).abs().sum(0)


def _scores_loop(context, grad, mask):
    total = torch.zeros(context.shape[2], dtype=grad.dtype)
    for c, g, m in zip(context.detach(), grad, mask.bool(), strict=True):
        total += (c[m] * g[m]).sum((0, 2)).abs()
    return total


def _real(context, grad, mask):
    return context.detach() * grad * mask[:, :, None, None]


# ------------------------------------------------------------------------------------------------------------ bound


def _bound_by_sum(width, ffn, tokens, heads, neurons):
    attention, feed_forward = 8 * width**2 + 4 * tokens * width, 4 * width * ffn
    return (attention + feed_forward) / (heads * attention + neurons * feed_forward)


def _bound_by_amdahl(width, ffn, tokens, heads, neurons):
    share = (2 * width + tokens) / (2 * width + tokens + ffn)
    return 1 / (1 - share * (1 - heads) - (1 - share) * (1 - neurons))


# --------------------------------------------------------------------------------------------------------- distance


def _distance_stacked(hidden, mask, n):
    h = F.normalize(torch.stack(hidden), dim=-1)  # [layers + 1, B, T, D]
    cosine = (h[:-n] * h[n:]).sum(-1).clamp(-1, 1)
    return (cosine.arccos() / math.pi)[:, mask.bool()].mean(1)


def _distance_loop(hidden, mask, n):
    found = []
    for a, b in zip(hidden, hidden[n:], strict=False):
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        angle = cosine.clamp(-1, 1).acos() / math.pi
        found.append(float((angle * mask).sum() / mask.sum()))
    return found


def _angles(a, b):
    return F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos() / math.pi  # [B, T]


# --------------------------------------------------------------------------------------------------- dropping layers


def _without(model, gone, *, renumber=True, config=True, stays=None):
    new = copy.deepcopy(model)
    stays = [i for i in range(len(new.model.layers)) if i not in set(gone)] if stays is None else stays
    new.model.layers = nn.ModuleList([new.model.layers[i] for i in stays])
    if renumber:
        for number, layer in enumerate(new.model.layers):
            layer.self_attn.layer_idx = number
    if config:
        new.config.num_hidden_layers = len(stays)
    return new


def _deleted_one_by_one(model, gone):
    new = copy.deepcopy(model)
    for number in sorted(gone, reverse=True):
        del new.model.layers[number]
        for layer in new.model.layers[number:]:
            layer.self_attn.layer_idx -= 1
    new.config.num_hidden_layers -= len(gone)
    return new


def _deleted_while_it_shrinks(model, gone):
    new = copy.deepcopy(model)
    for number in gone:
        del new.model.layers[min(number, len(new.model.layers) - 1)]
    return _without(new, [])


def _shared_layers(model, gone):
    new = copy.copy(model)
    new._modules = dict(model._modules) | {"model": copy.copy(model.model)}
    new.model._modules = dict(model.model._modules)
    new.config = new.model.config = copy.deepcopy(model.config)
    stays = [layer for i, layer in enumerate(model.model.layers) if i not in gone]
    new.model.layers = nn.ModuleList(stays)
    for number, layer in enumerate(stays):
        layer.self_attn.layer_idx = number
    new.config.num_hidden_layers = len(stays)
    return new


def _dropped_in_place(model, gone):
    new = _without(model, gone)
    model.model.layers, model.config = new.model.layers, new.config
    model.model.config = new.config
    return model


def _others(model, gone):
    return [i for i in range(len(model.model.layers)) if i not in gone]


RIGHT = {
    "04.1": (_cut_by_index, _cut_by_view),
    "04.2": (_scores_einsum, _scores_loop),
    "04.3": (_bound_by_sum, _bound_by_amdahl),
    "04.4": (_distance_stacked, _distance_loop),
    "04.5": (_without, _deleted_one_by_one),
}

WRONG = {
    "04.1": {
        "the first columns of the output": _first_columns,
        "query heads counted like KV heads": _query_heads_as_kv,
        "groups taken in turn": _interleaved_groups,
        "heads interleaved": _strided,
        "head size from the width": _divides_the_width,
        "masked, not cut": _masked,
        "the arguments are changed": _in_place,
        "the attributes say the old sizes": _attributes_left,
    },
    "04.2": {
        "magnitude before the sum, as the guide has it": lambda c, g, m: _real(c, g, m).abs().sum((0, 1, 3)),
        "magnitude after the sum over sequences": lambda c, g, m: _real(c, g, m).sum((0, 1, 3)).abs(),
        "padding counts": lambda c, g, m: (c.detach() * g).sum((1, 3)).abs().sum(0),
        "mean over the batch": lambda c, g, m: _real(c, g, m).sum((1, 3)).abs().mean(0),
        "the gradient alone": lambda c, g, m: (g * m[:, :, None, None]).sum((1, 3)).abs().sum(0),
        "magnitude for each token": lambda c, g, m: _real(c, g, m).sum(3).abs().sum((0, 1)),
        "still on the graph": lambda c, g, m: (c * g * m[:, :, None, None]).sum((1, 3)).abs().sum(0),
        "the mean over tokens": lambda c, g, m: (_real(c, g, m).sum((1, 3)) / m.sum(1)[:, None]).abs().sum(0),
    },
    "04.3": {
        "no attention products": lambda d, f, n, h, k: (8 * d * d + 4 * d * f) / (8 * d * d * h + 4 * d * f * k),
        "multiply-adds and FLOPs mixed": lambda d, f, n, h, k: (
            (4 * d * d + 4 * n * d + 4 * d * f) / ((4 * d * d + 4 * n * d) * h + 4 * d * f * k)
        ),
        "heads squared": lambda d, f, n, h, k: _bound_by_sum(d, f, n, h * h, k),
        "the output projection stays": lambda d, f, n, h, k: (
            (8 * d * d + 4 * n * d + 4 * d * f) / ((6 * d * d + 4 * n * d) * h + 2 * d * d + 4 * d * f * k)
        ),
        "two bounds multiplied": lambda d, f, n, h, k: _bound_by_sum(d, f, n, h, 1) * _bound_by_sum(d, f, n, 1, k),
        "four times the width, whatever ffn is": lambda d, f, n, h, k: _bound_by_sum(d, 4 * d, n, h, k),
        "upside down": lambda d, f, n, h, k: 1 / _bound_by_sum(d, f, n, h, k),
        "removed, not left": lambda d, f, n, h, k: _bound_by_sum(d, f, n, 1 - h, 1 - k) if h + k else 1.0,
    },
    "04.4": {
        "not clamped": lambda h, m, n: [
            float((((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).arccos() / math.pi)[m.bool()].mean())
            for a, b in zip(h, h[n:], strict=False)
        ],
        "not over pi": lambda h, m, n: [math.pi * d for d in _distance_loop(h, m, n)],
        "padding counts": lambda h, m, n: [float(_angles(a, b).mean()) for a, b in zip(h, h[n:], strict=False)],
        "one minus the cosine": lambda h, m, n: [
            float((1 - F.cosine_similarity(a, b, dim=-1))[m.bool()].mean()) for a, b in zip(h, h[n:], strict=False)
        ],
        "the angle of the means": lambda h, m, n: [
            float(_angles(a[m.bool()].mean(0), b[m.bool()].mean(0))) for a, b in zip(h, h[n:], strict=False)
        ],
        "each sequence counts the same": lambda h, m, n: [
            float(((_angles(a, b) * m).sum(1) / m.sum(1)).mean()) for a, b in zip(h, h[n:], strict=False)
        ],
        "always one layer": lambda h, m, n: _distance_loop(h, m, 1)[: len(h) - n],
        "the last token alone": lambda h, m, n: [
            float(_angles(a, b)[torch.arange(len(m)), m.sum(1) - 1].mean()) for a, b in zip(h, h[n:], strict=False)
        ],
    },
    "04.5": {
        "not numbered anew": lambda m, g: _without(m, g, renumber=False),
        "neither numbers nor config": lambda m, g: _without(m, g, renumber=False, config=False),
        "the config keeps the old number of layers": lambda m, g: _without(m, g, config=False),
        "the layers that should go stay": lambda m, g: _without(m, _others(m, g)),
        "the first layers stay": lambda m, g: _without(m, g, stays=list(range(len(m.model.layers) - len(g)))),
        "deleted by number while the list shrinks": _deleted_while_it_shrinks,
        "the layers are shared with the whole model": _shared_layers,
        "the model that was given is cut": _dropped_in_place,
    },
}
