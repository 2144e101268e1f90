"""Cut a model: make a new model with the kept entries of every parameter and buffer, and attributes to match.

A `Plan` says which entries are kept and which values module attributes get; `pruning.channels` makes plans. `cut` only
reads the model that is cut. Hooks, training flags, requires_grad, dtype, device and memory format stay as they are;
gradients are not copied.

`save` writes a pruned model together with its plans, and `load` rebuilds the model from the dense one: no configuration
can describe layers that have lost different numbers of channels. Nothing is unpickled.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.arguments import check_loaded, check_module, check_several
from labkit.errors import DataError, InputError
from labkit.files import replacing
from labkit.graph import anatomy
from labkit.graph.attributes import Attributes, Keep, set_attributes_, shape
from labkit.graph.equality import Report
from labkit.graph.groups import Coupling
from labkit.graph.passes import batch_experts_, collecting_later, duplicate_model, full_copy, tensors_of, with_entries
from labkit.modules.weights import is_mixture

METADATA = "labkit.pruning"  # key of the plans in the file's metadata
ALIGNMENT = 16  # bytes that the rows of experts must be a multiple of in torch's product of groups


@dataclass(frozen=True)
class Units:
    """A group of coupled channels, and how much of it is removed.

    name: name of the group.
    units: number of units before.
    removed: number of units removed.
    width: channels in a unit.
    reason: if no unit is removed because the plan could not, the cause; else "".
    """

    name: str
    units: int
    removed: int
    width: int
    reason: str = ""

    @property
    def left(self) -> int:
        return self.units - self.removed


@dataclass(frozen=True, eq=False)
class Plan:
    """The entries of parameters and buffers to be kept, and the sizes before and after.

    kept: {parameter or buffer: {dimension: kept indices}}, only for tensors that lose entries; a shared tensor goes by
        the first name in `named_parameters` and `named_buffers`.
    attributes: {module: {attribute: new value}}.
    units: a row for each group of coupled channels.
    unprunable: (parameter and dimension, reason) of dimensions that cannot lose entries.
    parameters: numbers of parameters, (before, after).
    macs: multiply-adds of the example call, (before, after).
    bytes: bytes of parameters and buffers, (before, after).
    coupling, gone: the trace, and [labels] bool, True for removed labels; None if whole layers are removed.
    layers: {list of layers: numbers of the layers that stay}.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[str, Mapping[str, Any]]
    units: tuple[Units, ...]
    unprunable: tuple[tuple[str, str], ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    coupling: Coupling | None = field(default=None, repr=False)
    gone: np.ndarray | None = field(default=None, repr=False)
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        names = ["group", *(row.name for row in self.units)]
        name_width = max(map(len, names))
        lines = [f"{'group':{name_width}}  channels  removed     left"]
        lines += [_row_of_table(row, name_width) for row in self.units]
        totals = {"parameters": self.parameters, "multiply-adds": self.macs, "bytes": self.bytes}
        for label, (before, after) in totals.items():
            sizes = f"{before:,} -> {after:,}"
            share = f" (-{1 - after / before:.1%})" if before else ""
            lines.append(f"{label}: {sizes}{share}")
        if self.unprunable:
            lines.append(f"stays: {len(self.unprunable)} dimensions, see .unprunable")
        return "\n".join(lines)


def _row_of_table(row: Units, name_width: int) -> str:
    """Format a group as a row of a plan's table, in channels."""
    channels = row.units * row.width
    removed = row.removed * row.width
    remaining = row.left * row.width
    unit = f"  in units of {row.width}" if row.width > 1 else ""
    reason = f"  {row.reason}" if row.reason else ""
    numbers = f"{channels:8}  {removed:7}  {remaining:7}"
    name = row.name.ljust(name_width)
    return f"{name}  {numbers}{unit}{reason}"


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model, the plan of its cut, and the report of the equality check (None if it was left out)."""

    model: nn.Module
    plan: Plan
    report: Report | None


@torch.inference_mode(False)  # the new model is to be trained, wherever it was cut
@collecting_later()
def cut(
    model: nn.Module, keep: Keep, attributes: Attributes, layers: Mapping[str, Sequence[int]] | None = None
) -> nn.Module:
    """Return a copy of `model` with the kept entries only.

    keep: {parameter or buffer: {dimension: kept indices}}; tensors that are not named are copied whole.
    attributes: {module: {attribute: new value}}.
    layers: {list of layers: numbers of the layers that stay}; lists that are not named stay whole.

    If the widths of experts no longer suit torch's product of groups, transformers multiplies the experts in batches.
    Raises InputError if the model has no such tensors or indices.
    """
    tensors = dict(tensors_of(model))
    for name, dims in keep.items():
        if name not in tensors or not _has_indices(tensors[name], dims):
            raise InputError(f"The plan is of another model: this one has no {name!r} with the indices that it keeps.")
    remaining = {name: _sliced(x, keep.get(name, {})) for name, x in tensors.items()}
    new = duplicate_model(model, remaining)
    set_attributes_(new, attributes)
    for name, kept_layers in (layers or {}).items():
        _keep_layers_(new, name, kept_layers)
    if _has_unaligned_experts(new):
        batch_experts_(new)
    return new


def _has_indices(x: Tensor, dims: Mapping[int, Tensor]) -> bool:
    """Return True if `x` has all of the dimensions and the indices {dimension: indices}."""
    for dim, indices in dims.items():
        exists = dim < x.dim() and bool((indices < x.shape[dim]).all())
        if not exists:
            return False
    return True


def _has_unaligned_experts(model: nn.Module) -> bool:
    """Return True if experts of a mixture have rows that torch's product of groups refuses."""
    for module in model.modules():
        if not is_mixture(module):
            continue
        for x in module.parameters(recurse=False):
            if x.dim() != 3:
                continue
            bytes_of_row = x.stride(1) * x.element_size()
            if bytes_of_row % ALIGNMENT:
                return True
    return False


def _sliced(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return the kept entries of `x` in new memory, as a Parameter if `x` is a Parameter.

    keep: {dimension: kept indices}.
    """
    data = x.detach() if keep else x.detach().clone()
    for dim in sorted(keep):  # rows first: they are copied as a whole
        data = data.index_select(dim, keep[dim].to(x.device))
    if keep and _is_channels_last(x):
        data = data.contiguous(memory_format=torch.channels_last)
    return with_entries(x, data)


def _is_channels_last(x: Tensor) -> bool:
    """Return True if `x` is stored in the memory format channels_last and in no other."""
    if x.dim() != 4 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def _keep_layers_(model: nn.Module, name: str, kept_layers: Sequence[int]) -> None:
    """Leave only `kept_layers` in the list `name`, numbered anew from 0, and correct the configs.

    A config's number of layers and its lists with an entry for each layer follow.
    """
    stack = model.get_submodule(name)
    before = list(stack._modules.items())
    stack._modules.clear()
    for number, old in enumerate(kept_layers):
        key, layer = before[old]
        new_key = str(number) if key.isdigit() else key
        stack._modules[new_key] = layer
    for config in anatomy.configs(model):
        for key, value in vars(config).items():
            is_list = isinstance(value, (list, tuple))
            if is_list and "layer" in key and len(value) == len(before):
                setattr(config, key, [value[old] for old in kept_layers])
        if getattr(config, "num_hidden_layers", None) == len(before):
            config.num_hidden_layers = len(kept_layers)


def parameters(model: nn.Module, keep: Keep | None = None) -> tuple[int, int]:
    """Return (number of parameters, bytes of parameters and buffers) after a cut; shared tensors count once.

    keep: as in `cut`; None for the model as it is.
    """
    count = 0
    size = 0
    for name, x in tensors_of(model):
        dims = keep.get(name, {}) if keep else {}
        entries = math.prod(shape(x, dims))
        size += entries * x.element_size()
        if isinstance(x, nn.Parameter):
            count += entries
    return count, size


# --- files ------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, plans: Sequence[Plan], file: str | Path) -> None:
    """Write a pruned model to a safetensors file for `load`; a file of this name is replaced when all is written.

    model: may have been trained since the cut.
    plans: plans of all cuts of the model, in order.

    The file has all parameters and buffers, also those outside the state dict, and the whole numbers of the configs.
    Raises InputError if `load` could not restore the model: the model is not the result of the plans, or has a sparse
    tensor.
    """
    check_loaded(model)
    check_several(plans, "plans")
    plans = list(plans)
    for plan in plans:
        if not isinstance(plan, Plan):
            raise InputError(f"plans has a {type(plan).__name__}: give the plans that the model was cut by.")
    for name, x in tensors_of(model):
        if x.layout is not torch.strided:
            raise InputError(f"{name!r} is sparse, which the file cannot hold: register it again as to_dense().")
    if plans:
        _check_cut_by(model, plans[-1])
    content = {
        "plans": [_to_json(plan) for plan in plans],
        "configs": [_whole_numbers(config) for config in anatomy.configs(model)],
    }
    metadata = {METADATA: json.dumps(content)}
    with replacing(Path(file)) as partial:
        tensors = {}
        for name, x in tensors_of(model):
            data = x.detach().cpu()
            tensors[name] = data.clone(memory_format=torch.contiguous_format)
        save_file(tensors, partial, metadata=metadata)


def _check_cut_by(model: nn.Module, plan: Plan) -> None:
    """Raise InputError unless the sizes in `model` are those that the plan leaves."""
    wrong = []
    for name, kept_layers in plan.layers.items():
        if len(model.get_submodule(name)) != len(kept_layers):
            wrong.append(name)
    if not plan.layers:
        tensors = dict(tensors_of(model))
        for name, dims in plan.kept.items():
            for dim, indices in dims.items():
                if name in tensors and tensors[name].shape[dim] != len(indices):
                    wrong.append(name)
    if wrong:
        raise InputError(f"{wrong[0]!r} is not what the last plan left of it: give the model that was cut by it.")


def _to_json(plan: Plan) -> dict[str, Any]:
    """Return the part of a plan that `cut` needs, in types of JSON."""
    dims_of_tensor = {}
    for name, dims in plan.kept.items():
        dims_of_tensor[name] = {dim: indices.tolist() for dim, indices in dims.items()}
    return {"kept": dims_of_tensor, "attributes": plan.attributes, "layers": plan.layers}


def _whole_numbers(config: Any) -> dict[str, int]:
    """Return the attributes of a config that are whole numbers, truth values left out."""
    attributes = vars(config).items()
    return {key: value for key, value in attributes if type(value) is int}


@torch.inference_mode(False)
def load(model: nn.Module, file: str | Path) -> nn.Module:
    """Return the pruned model that `save` wrote, cut from a dense model of the same architecture.

    model: the dense model, with any weights; it is only read.
    file: path given to `save`.

    Raises DataError if the file is missing or damaged, InputError if it is of another architecture or dtype.
    """
    check_module(model)
    content, stored = _read(file)
    try:
        new = _cut_as_saved(model, content)
    except (InputError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{file} is of another architecture than {type(model).__name__} ({error}).") from error
    tensors = dict(tensors_of(new))
    for name in sorted(tensors.keys() | stored.keys()):
        in_file = _shape_and_dtype(stored.get(name))
        in_model = _shape_and_dtype(tensors.get(name))
        if in_file != in_model:
            raise InputError(f"{file} is of another model: {name!r} is {in_file} there and {in_model} here.")
    with torch.no_grad():
        for name, x in stored.items():
            tensors[name].copy_(x)
    return new


def _read(file: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (plans and configs, {name: tensor}) of a file of `save`; raise DataError if the file cannot be read."""
    try:
        with safe_open(file, "pt") as stored:
            content = json.loads(stored.metadata()[METADATA])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{file} holds no pruned model that can be read ({error}): save it again.") from error
    return content, tensors


def _cut_as_saved(model: nn.Module, content: Mapping[str, Any]) -> nn.Module:
    """Return `model` cut by the plans of a file in turn, with the configs stored there; the weights are the model's."""
    new = model
    for plan in content["plans"]:
        attributes = _attributes_of(plan, new)
        new = cut(new, _keep_of(plan), attributes, plan["layers"])
    if not content["plans"]:
        new = full_copy(model)
    for config, numbers in zip(anatomy.configs(new), content["configs"], strict=True):
        vars(config).update(numbers)
    return new


def _keep_of(plan: Mapping[str, Any]) -> Keep:
    """Return the kept indices of a plan in JSON: {parameter: {dimension: indices}}."""
    keep: dict[str, dict[int, Tensor]] = {}
    for name, dims in plan["kept"].items():
        keep[name] = {}
        for dim, indices in dims.items():
            keep[name][int(dim)] = torch.tensor(indices, dtype=torch.int64)
    return keep


def _attributes_of(plan: Mapping[str, Any], model: nn.Module) -> Attributes:
    """Return the attributes of a plan in JSON, in the types of the model's attributes, as JSON knows no tuples."""
    attributes: dict[str, dict[str, Any]] = {}
    for name, values in plan["attributes"].items():
        module = model.get_submodule(name)
        attributes[name] = {}
        for key, value in values.items():
            kind = type(attrgetter(key)(module))
            attributes[name][key] = kind(value)
    return attributes


def _shape_and_dtype(x: Tensor | None) -> tuple[list[int], torch.dtype] | str:
    return "not" if x is None else (list(x.shape), x.dtype)
