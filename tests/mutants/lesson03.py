"""Right answers to the exercises of lesson 03, written otherwise than the worked ones."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn


def _set(module, name, tensor):
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad)


def cut_by_name(conv, norm, consumer, keep):
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


def _join(sets, labels):
    """The sets, with those that hold one of the labels made one."""
    labels = set(labels)
    return [*(s for s in sets if not s & labels), labels.union(*(s for s in sets if s & labels))]


def couple_by_hand(net):
    """The sets as a list, joined label by label along a graph that torch.fx traced."""
    sets, label_of = [], {}
    for node in fx.symbolic_trace(net).graph.nodes:
        labels = [label_of[other] for other in node.all_input_nodes]
        first = labels[0] if labels else None
        module = net.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "placeholder":
            first = ("image", 1)
        elif node.op == "output":
            labels.append(("output", 1))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            sets = _join(sets, [first, (f"{node.target}.weight", 1)])
            first = (f"{node.target}.weight", 0)
            labels = [(f"{node.target}.{name}", 0) for name, _ in module.named_parameters()]
        elif isinstance(module, nn.BatchNorm2d):
            names = [name for name, tensor in module.state_dict().items() if tensor.dim()]
            labels += [(f"{node.target}.{name}", 0) for name in names]
        else:
            labels = labels if node.target is operator.add else []
        if labels:
            sets = _join(sets, labels)
        label_of[node] = first
    return [s for s in sets if not {"image", "output"} & {name for name, _ in s}]


def reestimate_by_hooks(model, batches):
    """The sums of each batch's statistics, gathered by hooks in front of the norms."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = {norm: [0.0, 0.0] for norm in norms}

    def normalise(norm, inputs, y):
        (x,) = inputs
        sums[norm][0] += x.mean((0, 2, 3))
        sums[norm][1] += x.var((0, 2, 3))
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)

    hooks = [norm.register_forward_hook(normalise) for norm in norms]
    with torch.inference_mode():
        for images in batches:
            model(images)
    for hook in hooks:
        hook.remove()
    for norm, (mean, variance) in sums.items():
        norm.running_mean.copy_(mean / len(batches))
        norm.running_var.copy_(variance / len(batches))


RIGHT = {
    "03.1": cut_by_name,
    "03.2": couple_by_hand,
    "03.3": reestimate_by_hooks,
}
