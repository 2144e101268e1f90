"""Hold weights at zero with masks: hooks keep the zeros through training, saving and loading."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules.weights import computed, prunable


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks in `model`: {name of the weight: bool tensor, True where the weight is kept}.

    Weights without a mask are absent.
    """
    copies = {}
    for name, weight in prunable(model).items():
        mask = mask_of(weight.module, weight.attribute)
        if mask is not None:
            copies[name] = mask.clone()
    return copies


def hold_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Hold weights of `model` at zero from now on: `unstructured.with_masks` without the copy and the checks.

    masks: {name of a prunable weight: bool tensor of its shape, True where the weight is kept}.
    """
    places = owners(model)
    weights = prunable(model)
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
    """Return a copy of `model` without masks and hooks, its pruned weights plain zeros: to time, export or convert.

    Raises InputError if a weight has masks of torch.nn.utils.prune or a parametrization.
    """
    refuse_foreign(model)
    plain = copy.deepcopy(model)
    _hold_model(plain)
    for module in plain.modules():
        for attribute, _ in list(_masks_in(module)):
            delattr(module, f"{attribute}_mask")
        _remove_hooks_(module._forward_pre_hooks)
        _remove_hooks_(module._state_dict_pre_hooks)
        _remove_hooks_(module._load_state_dict_post_hooks)
    return plain


def _remove_hooks_(hooks: dict[int, Callable]) -> None:
    """Remove the hooks of this file from a table of a module's hooks."""
    for key, hook in list(hooks.items()):
        if hook in (_hold_module, _hold_model):
            del hooks[key]


def refuse_foreign(model: nn.Module) -> None:
    """Raise InputError if a prunable weight of `model` has masks of torch.nn.utils.prune or a parametrization."""
    for name, what, _ in computed(model):
        raise InputError(
            f"{name} has {what}, which labkit's masks cannot be combined with: make it permanent first "
            "(torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations)."
        )


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return {id of a parameter: (module, attribute) of every place at which the parameter is registered}."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    return owners


def mask_of(module: nn.Module, attribute: str) -> Tensor | None:
    """Return the mask of the weight `module.<attribute>`, True where an entry is kept; None without a mask."""
    return module._buffers.get(f"{attribute}_mask")


def _masks_in(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (attribute, mask) of each of the module's own weights with a mask held by this file's hooks."""
    if _hold_module in module._forward_pre_hooks.values():
        for attribute in module._parameters:
            mask = mask_of(module, attribute)
            if mask is not None:
                yield attribute, mask


def _hold_module(module: nn.Module, *_: Any) -> None:
    """Set the module's pruned weights to zero, and keep the gradients of these entries at zero.

    With zero gradients, weight decay and a new optimizer's momentum leave a zero alone; an older momentum moves a zero,
    which the next forward pass or state_dict restores. The write goes through `.data`, so that two forward passes can
    share a backward pass.
    """
    if torch.compiler.is_exporting():  # its weights have no values to change
        return
    for attribute, mask in _masks_in(module):
        parameter = module._parameters[attribute]
        parameter.data.masked_fill_(~mask, 0.0)
        if parameter.requires_grad and not _has_gradient_hook(parameter):
            parameter.register_hook(partial(_mask_gradient, module, attribute))


def _has_gradient_hook(parameter: nn.Parameter) -> bool:
    """Return True if the parameter's gradient is masked; asked at each pass, since deepcopy drops such hooks."""
    hooks = (parameter._backward_hooks or {}).values()
    return any(getattr(hook, "func", None) is _mask_gradient for hook in hooks)


def _hold_model(model: nn.Module, *_: Any) -> None:
    for module in model.modules():
        _hold_module(module)


def _mask_gradient(module: nn.Module, attribute: str, gradient: Tensor) -> Tensor:
    mask = mask_of(module, attribute)
    return gradient if mask is None else gradient.masked_fill(~mask, 0.0)
