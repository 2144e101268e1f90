"""Right answers to the exercises of lesson 04, written otherwise than the worked ones."""

import copy

import torch
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


def cut_heads_by_index(q, k, v, o, head_dim, keep):
    group = q.out_features // k.out_features
    of_q, of_kv = _positions(keep, group * head_dim), _positions(keep, head_dim)
    return _rows(q, of_q), _rows(k, of_kv), _rows(v, of_kv), _columns(o, of_q)


def speedup_bound_by_amdahl(width, ffn, tokens, heads, neurons):
    share = (2 * width + tokens) / (2 * width + tokens + ffn)
    return 1 / (1 - share * (1 - heads) - (1 - share) * (1 - neurons))


def drop_layers_one_by_one(model, gone):
    new = copy.deepcopy(model)
    for number in sorted(gone, reverse=True):
        del new.model.layers[number]
        for layer in new.model.layers[number:]:
            layer.self_attn.layer_idx -= 1
    new.config.num_hidden_layers -= len(gone)
    return new


def speedup_bound_in_float32(width, ffn, tokens, heads=1.0, neurons=1.0):
    work = torch.tensor([8.0 * width**2 + 4.0 * tokens * width, 4.0 * width * ffn])
    return work.sum() / (work @ torch.tensor([heads, neurons]))


RIGHT = {
    "04.1": cut_heads_by_index,
    "04.2": speedup_bound_by_amdahl,
    "04.3": drop_layers_one_by_one,
}

MORE_RIGHT = {
    "04.2": [speedup_bound_in_float32],
}
