"""Cutting: a new model with the kept entries of every parameter and buffer, and module attributes that agree.

Which entries are kept, and what attributes become, is a plan's business (`channels`). The model that is cut is only
read. Hooks, training flags, requires_grad, dtype, device and memory format stay as they are; gradients are not copied.
"""

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError

Kept = Mapping[str, Mapping[int, Tensor]]
Attributes = Mapping[str, Mapping[str, Any]]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PIECE = 2**20  # bytes


@torch.inference_mode(False)  # the new model is to be trained, wherever it was cut
def cut(model: nn.Module, kept: Kept, attributes: Attributes) -> nn.Module:
    """A copy of `model` with only the kept entries, and `attributes` set."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    memory: dict[int, Any] = {}
    unknown = set(kept) - {name for name, _ in named}
    if unknown:
        raise InputError(f"The plan is of another model: this one has no {sorted(unknown)[0]!r}.")
    chosen: dict[int, Mapping[int, Tensor]] = {id(x): kept[name] for name, x in named if name in kept}
    for _, x in named:
        if id(x) not in memory:
            memory[id(x)] = _sliced(x, chosen.get(id(x), {}))
    for module in model.modules():  # each has a dozen dictionaries for hooks, which deepcopy would take to pieces
        memory |= {id(x): type(x)() for x in vars(module).values() if type(x) in (dict, OrderedDict, set) and not x}
    try:
        new = copy.deepcopy(model, memory)
    except Exception as error:
        raise InputError(
            f"The model cannot be copied ({error}): remove what its modules keep besides parameters, such as tensors "
            "with a gradient that a hook has stored."
        ) from error
    _set(new, attributes)
    return new


def _set(model: nn.Module, attributes: Attributes) -> None:
    for name, values in attributes.items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, value)


@contextlib.contextmanager
def as_if_cut(model: nn.Module, kept: Kept, attributes: Attributes) -> Iterator[Callable]:
    """A function that runs `model` as it would be after the cut, on the meta device; afterwards all is as it was."""
    tensors = {}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        own = kept.get(name, {})
        if x.is_floating_point() or x.is_complex():
            shape = [len(own[d]) if d in own else n for d, n in enumerate(x.shape)]
            tensors[name] = torch.empty(shape, dtype=x.dtype, device="meta")
        else:
            tensors[name] = _sliced(x, own).cpu()
    before = {
        name: {key: getattr(model.get_submodule(name), key) for key in values} for name, values in attributes.items()
    }
    try:
        _set(model, attributes)
        yield lambda *args, **kwargs: torch.func.functional_call(model, tensors, args, kwargs)
    finally:
        _set(model, before)


def _sliced(x: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept entries of x, a Parameter where x is one; always memory of its own."""
    for dim, indices in kept.items():
        if dim >= x.dim() or (len(indices) and int(indices.max()) >= x.shape[dim]):
            raise InputError(
                f"The plan keeps index {int(indices.max())} of dimension {dim} of a parameter of shape "
                f"{list(x.shape)}: it is a plan of another model."
            )
    data = _chosen(x.detach(), sorted((dim, indices.to(x.device)) for dim, indices in kept.items()))
    if kept and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        data = data.contiguous(memory_format=torch.channels_last)
    if not isinstance(x, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=x.requires_grad)
    parameter.__dict__.update(x.__dict__)
    return parameter


def _chosen(x: Tensor, kept: Sequence[tuple[int, Tensor]]) -> Tensor:
    """x.index_select along each dimension, by pieces that stay in a cache: what only one dimension chose is large."""
    if not kept:
        return x.clone()
    (dim, rows), *rest = kept
    if not rest or dim > 0:
        for dim, indices in kept:
            x = x.index_select(dim, indices)
        return x
    shape = [len(dict(kept).get(d, range(n))) for d, n in enumerate(x.shape)]
    chosen, start = x.new_empty(shape), 0
    for piece in rows.split(max(PIECE * len(x) // max(x.nbytes, 1), 1)):
        chosen[start : start + len(piece)] = _chosen(x.index_select(0, piece), rest)
        start += len(piece)
    return chosen


# --- attributes -------------------------------------------------------------------------------------------------------


def attributes(model: nn.Module, kept: Kept, sizes: Mapping[str, Mapping[int, int]]) -> dict[str, dict[str, Any]]:
    """{module: {attribute: new value}} that agree with the kept entries.

    Layers of torch.nn follow from the shapes of their parameters. Of any other module an integer that equals a size
    which its forward pass wrote down as a number (a view's 768, 12 heads) becomes what that size becomes.
    """
    found: dict[str, dict[str, Any]] = {}
    shapes = _shapes(model, kept)
    for name, module in model.named_modules():
        new = _layer(module, shapes) | _numbers(module, sizes.get(name, {}))
        if changed := {key: value for key, value in new.items() if getattr(module, key) != value}:
            found[name] = changed
    return found


def _shapes(model: nn.Module, kept: Kept) -> dict[int, list[int]]:
    """{id of a parameter or buffer: its shape after the cut}"""
    shapes = {}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        own = kept.get(name, {})
        shapes[id(x)] = [len(own[d]) if d in own else n for d, n in enumerate(x.shape)]
    return shapes


def _layer(module: nn.Module, shapes: Mapping[int, list[int]]) -> dict[str, Any]:
    """The attributes of a layer of torch.nn (or transformers' Conv1D) by the shapes of its parameters."""
    weight = module._parameters.get("weight")
    shape = None if weight is None else shapes[id(weight)]
    if isinstance(module, nn.MultiheadAttention):
        return {}  # its numbers are written down in its forward pass
    if shape is None:
        return {}
    if isinstance(module, CONVOLUTIONS):
        groups = module.groups * shape[0] // weight.shape[0] if module.groups > 1 else 1
        first, second = shape[0], shape[1] * groups
        into, out = (first, second) if module.transposed else (second, first)
        return {"in_channels": into, "out_channels": out, "groups": groups}
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups if module.num_groups == 1 else module.num_groups * shape[0] // weight.shape[0]
        return {"num_channels": shape[0], "num_groups": groups}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if {"nf", "nx"} <= vars(module).keys():
        return {"nx": shape[0], "nf": shape[1]}
    return {}


def _numbers(module: nn.Module, sizes: Mapping[int, int]) -> dict[str, int]:
    if type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.MultiheadAttention):
        return {}
    return {name: sizes[value] for name, value in vars(module).items() if type(value) is int and value in sizes}


# --- sizes ------------------------------------------------------------------------------------------------------------


def parameters(model: nn.Module, kept: Kept | None = None) -> tuple[int, int]:
    """(number of parameters, bytes of parameters and buffers) after the cut; what is shared counts once."""
    count = size = 0
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        own = (kept or {}).get(name, {})
        numel = math.prod(len(own[d]) if d in own else n for d, n in enumerate(x.shape))
        count += numel if isinstance(x, nn.Parameter) else 0
        size += numel * x.element_size()
    return count, size
