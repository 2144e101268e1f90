"""Cutting: a new model with the kept entries of every parameter and buffer, and module attributes that agree.

A `Plan` says which entries are kept and what attributes become; `channels` makes one. The model that is cut is only
read. Hooks, training flags, requires_grad, dtype, device and memory format stay as they are; gradients are not copied.
A pruned model is saved with its plans and rebuilt from the dense one: where layers have lost different numbers of
channels no configuration can say so. Nothing is unpickled.
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
from labkit.graph.attributes import Attributes, Keep, set_attributes_, shape, tensors_of
from labkit.graph.copies import batch_experts_, collecting_later, duplicate_model
from labkit.graph.equality import Report
from labkit.graph.groups import Coupling
from labkit.modules.weights import is_mixture


@dataclass(frozen=True)
class Units:
    """What happens to one group: how many units it has, how many of them go, and how many channels a unit is."""

    name: str
    units: int
    removed: int
    width: int
    reason: str = ""  # why none goes, where the plan and not the choice decided it

    @property
    def left(self) -> int:
        return self.units - self.removed


@dataclass(frozen=True, eq=False)
class Plan:
    """Which entries of which parameters stay. Pairs are (before, after); macs are multiply-adds of the example call.

    kept: {parameter or buffer: {dimension: kept indices}}, only where something goes; names are the first ones of
    `named_parameters` and `named_buffers`. attributes: {module: {attribute: new value}}. coupling, gone: the trace, and
    which of its labels go; None where whole layers go. layers: {list of layers: those of it that stay}.
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
        wide = max([len(row.name) for row in self.units] + [5])
        lines = [f"{'group':{wide}}  channels  removed     left"]
        for row in self.units:
            n, gone = row.units * row.width, row.removed * row.width
            unit = f"  in units of {row.width}" if row.width > 1 else ""
            lines.append(f"{row.name:{wide}}  {n:8}  {gone:7}  {n - gone:7}{unit}{'  ' * bool(row.reason)}{row.reason}")
        totals = {"parameters": self.parameters, "multiply-adds": self.macs, "bytes": self.bytes}
        for label, (before, after) in totals.items():
            share = f" (-{1 - after / before:.1%})" if before else ""
            lines.append(f"{label}: {before:,} -> {after:,}{share}")
        if self.unprunable:
            lines.append(f"stays: {len(self.unprunable)} dimensions, see .unprunable")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model, the plan that it was cut by, and what the equality check said (None where it was left out)."""

    model: nn.Module
    plan: Plan
    report: Report | None


@torch.inference_mode(False)  # the new model is to be trained, wherever it was cut
@collecting_later()
def cut(
    model: nn.Module, keep: Keep, attributes: Attributes, layers: Mapping[str, Sequence[int]] | None = None
) -> nn.Module:
    """A copy of `model` with only the entries in `keep` ({parameter: {dimension: indices}}), `attributes` set, and of
    each list of layers in `layers` only those.

    Where the widths of experts no longer suit torch's product of groups, transformers multiplies them in batches.
    """
    check_module(model)
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, dims in keep.items():
        x = named.get(name)
        if x is None or any(d >= x.dim() or (indices >= x.shape[d]).any() for d, indices in dims.items()):
            raise InputError(f"The plan is of another model: this one has no {name!r} with the indices that it keeps.")
    indices = {id(x): keep[name] for name, x in named.items() if name in keep}
    new = duplicate_model(model, {id(x): _sliced(x, indices.get(id(x), {})) for _, x in tensors_of(model)})
    set_attributes_(new, attributes)
    for name, stays in (layers or {}).items():
        _keep_layers_(new, name, stays)
    experts = (x for m in new.modules() if is_mixture(m) for x in m.parameters(recurse=False) if x.dim() == 3)
    if any(x.stride(1) * x.element_size() % 16 for x in experts):  # else torch's product of groups refuses them
        batch_experts_(new)
    return new


def _sliced(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The kept entries of x, a Parameter where x is one; always memory of its own."""
    data = x.detach() if keep else x.detach().clone()
    for dim in sorted(keep):  # rows first: they are copied as a whole
        data = data.index_select(dim, keep[dim].to(x.device))
    if keep and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        data = data.contiguous(memory_format=torch.channels_last)
    if not isinstance(x, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=x.requires_grad)
    parameter.__dict__.update(x.__dict__)
    return parameter


def _keep_layers_(model: nn.Module, name: str, stays: Sequence[int]) -> None:
    """Leaves only these layers in the list `name`, numbered from 0, and says so in the configs and their lists."""
    stack = model.get_submodule(name)
    before = list(stack._modules.items())
    stack._modules.clear()
    for new, old in enumerate(stays):
        key, layer = before[old]
        stack._modules[str(new) if key.isdigit() else key] = layer
    for config in anatomy.configs(model):
        for key, value in vars(config).items():
            if "layer" in key and isinstance(value, (list, tuple)) and len(value) == len(before):
                setattr(config, key, [value[i] for i in stays])
        if getattr(config, "num_hidden_layers", None) == len(before):
            config.num_hidden_layers = len(stays)


def parameters(model: nn.Module, keep: Keep | None = None) -> tuple[int, int]:
    """(number of parameters, bytes of parameters and buffers) after the cut; what is shared counts once."""
    count = size = 0
    for name, x in tensors_of(model):
        numel = math.prod(shape(x, (keep or {}).get(name, {})))
        count += numel if isinstance(x, nn.Parameter) else 0
        size += numel * x.element_size()
    return count, size


# --- on the disk ------------------------------------------------------------------------------------------------------


def save(model: nn.Module, plans: Sequence[Plan], file: str | Path) -> None:
    """Writes `model` to one safetensors file that `load` reads; what was at `file` is replaced at the end.

    plans: those that it was cut by, in their order; it may have been trained since. All parameters and buffers are
    written, those outside the state dict too, and the whole numbers of its configs. Raises InputError where `load`
    could not give it back, since the model is not what the plans made of it, and for a sparse tensor.
    """
    check_loaded(model)
    check_several(plans, "plans")
    plans = list(plans)
    if strange := [plan for plan in plans if not isinstance(plan, Plan)]:
        raise InputError(f"plans has a {type(strange[0]).__name__}: give the plans that the model was cut by.")
    shapes = {name: x.shape for name, x in tensors_of(model)}
    if sparse := [name for name, x in tensors_of(model) if x.layout is not torch.strided]:
        raise InputError(f"{sparse[0]!r} is sparse, which the file cannot hold: register it again as to_dense().")
    for plan in plans[-1:]:
        wrong = [name for name, stays in plan.layers.items() if len(model.get_submodule(name)) != len(stays)]
        for name, dims in () if plan.layers else plan.kept.items():
            if name in shapes and any(shapes[name][d] != len(indices) for d, indices in dims.items()):
                wrong.append(name)
        if wrong:
            raise InputError(f"{wrong[0]!r} is not what the last plan left of it: give the model that was cut by it.")
    cuts = []
    for plan in plans:
        indices = {name: {d: x.tolist() for d, x in dims.items()} for name, dims in plan.kept.items()}
        cuts.append({"kept": indices, "attributes": plan.attributes, "layers": plan.layers})
    configs = [{k: x for k, x in vars(config).items() if type(x) is int} for config in anatomy.configs(model)]
    content = json.dumps({"plans": cuts, "configs": configs})
    with replacing(Path(file)) as partial:
        tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors_of(model)}
        save_file(tensors, partial, metadata={"labkit.pruning": content})


@torch.inference_mode(False)
def load(model: nn.Module, file: str | Path) -> nn.Module:
    """The model that `save` wrote to `file`, cut from `model`: the same architecture, dense, with any weights.

    Raises DataError if the file is missing or damaged, InputError if it is of another architecture or dtype.
    """
    check_module(model)
    try:
        with safe_open(file, "pt") as stored:
            content = json.loads(stored.metadata()["labkit.pruning"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{file} holds no pruned model that can be read ({error}): save it again.") from error
    new = model
    try:
        for plan in content["plans"] or [{"layers": {}, "kept": {}, "attributes": {}}]:
            keep = {
                n: {int(d): torch.tensor(x, dtype=torch.int64) for d, x in dims.items()}
                for n, dims in plan["kept"].items()
            }
            attributes = {  # JSON knows no tuples: values in the type that the module has now
                name: {key: type(attrgetter(key)(new.get_submodule(name)))(x) for key, x in values.items()}
                for name, values in plan["attributes"].items()
            }
            new = cut(new, keep, attributes, plan["layers"])
        for config, numbers in zip(anatomy.configs(new), content["configs"], strict=True):
            vars(config).update(numbers)
    except (InputError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{file} is of another architecture than {type(model).__name__} ({error}).") from error
    targets = dict(tensors_of(new))
    for name in sorted(targets.keys() | tensors.keys()):
        a, b = (None if x is None else (list(x.shape), x.dtype) for x in (targets.get(name), tensors.get(name)))
        if a != b:
            raise InputError(f"{file} is of another model: {name!r} is {b or 'not'} there and {a or 'not'} here.")
    with torch.no_grad():
        for name, x in tensors.items():
            targets[name].copy_(x)
    return new
