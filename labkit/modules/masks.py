"""Masks that hold weights at zero: hooks keep them there through training, saving and loading."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules.weights import computed, prunable


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that `model` holds, {name of the weight: bool tensor, True where kept}; other weights are absent."""
    held = ((name, mask_of(weight.module, weight.attribute)) for name, weight in prunable(model).items())
    return {name: mask.clone() for name, mask in held if mask is not None}


def hold_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """`with_masks` without the copy and the checks, for a model that was copied already."""
    places, weights = owners(model), prunable(model)
    for name, mask in masks.items():
        parameter = weights[name].parameter
        mask = mask.to(parameter.device, copy=True)
        for module, attribute in places[id(parameter)]:
            module.register_buffer(f"{attribute}_mask", mask, persistent=False)
            if _hold_module not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_hold_module)
                module.register_state_dict_pre_hook(_hold_module)
                module.register_load_state_dict_post_hook(_hold_module)
    # Some models read a layer's weight without calling the layer (nn.MultiheadAttention does with out_proj).
    if _hold_model not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hold_model)
    _hold_model(model)


def make_permanent(model: nn.Module) -> nn.Module:
    """A copy of `model` without masks and hooks, its pruned weights plain zeros: to time, export or convert."""
    refuse_foreign(model)
    plain = copy.deepcopy(model)
    _hold_model(plain)
    for module in plain.modules():
        for attribute, _ in list(_masks_in(module)):
            delattr(module, f"{attribute}_mask")
        for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_hold_module, _hold_model)]:
                del hooks[key]
    return plain


def refuse_foreign(model: nn.Module) -> None:
    for name, what, _ in computed(model):
        raise InputError(
            f"{name} has {what}, which labkit's masks cannot be combined with: make it permanent first "
            "(torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations)."
        )


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place at which a parameter is registered, by its id: more than one where it is shared."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    return owners


def mask_of(module: nn.Module, attribute: str) -> Tensor | None:
    return module._buffers.get(f"{attribute}_mask")


def _masks_in(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if _hold_module in module._forward_pre_hooks.values():
        for attribute in module._parameters:
            if (mask := mask_of(module, attribute)) is not None:
                yield attribute, mask


def _hold_module(module: nn.Module, *_) -> None:
    """Zeroes the module's pruned weights, and sees to it that their gradients are zero too.

    With zero gradients, weight decay and a new optimizer's momentum leave a zero alone; an older momentum moves it, and
    the next forward pass or state_dict puts it back. `.data`, so that two forward passes can share one backward pass.
    """
    if torch.compiler.is_exporting():  # its weights have no values to change
        return
    for attribute, mask in _masks_in(module):
        parameter = module._parameters[attribute]
        parameter.data.masked_fill_(~mask, 0.0)
        hooks = (parameter._backward_hooks or {}).values()  # deepcopy does not copy these, so it is looked at each time
        if parameter.requires_grad and not any(getattr(hook, "func", None) is _mask_gradient for hook in hooks):
            parameter.register_hook(partial(_mask_gradient, module, attribute))


def _hold_model(model: nn.Module, *_) -> None:
    for module in model.modules():
        _hold_module(module)


def _mask_gradient(module: nn.Module, attribute: str, gradient: Tensor) -> Tensor:
    mask = mask_of(module, attribute)
    return gradient if mask is None else gradient.masked_fill(~mask, 0.0)
