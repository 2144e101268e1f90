"""Cutting: a new model with the kept entries of every parameter and buffer, and module attributes that agree.

A `Plan` says which entries are kept and what attributes become; `channels` makes one. The model that is cut is only
read. Hooks, training flags, requires_grad, dtype, device and memory format stay as they are; gradients are not copied.
A pruned model is saved as safetensors with its plan in JSON, and rebuilt from the dense model: where layers have lost
different numbers of channels no configuration file can say so. Nothing is unpickled.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labkit.errors import DataError, InputError
from labkit.files import replacing
from labkit.pruning.coupling import Coupling
from labkit.pruning.coupling.fits import Attributes, Keep, set_attributes_, shape, tensors_of
from labkit.pruning.coupling.tracing import duplicate_model
from labkit.pruning.equality import Report

PIECE = 2**20  # bytes
WEIGHTS, PLAN = "weights.safetensors", "plan.json"


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
    which of its labels go; None in a plan that was read from a file.
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
def cut(model: nn.Module, keep: Keep, attributes: Attributes) -> nn.Module:
    """A copy of `model` with only the entries in `keep` ({parameter: {dimension: indices}}), and `attributes` set."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if unknown := set(keep) - {name for name, _ in named}:
        raise InputError(f"The plan is of another model: this one has no {min(unknown)!r}.")
    indices = {id(x): keep[name] for name, x in named if name in keep}
    new = duplicate_model(model, {id(x): _sliced(x, indices.get(id(x), {})) for _, x in tensors_of(model)})
    set_attributes_(new, attributes)
    return new


def _sliced(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The kept entries of x, a Parameter where x is one; always memory of its own."""
    for dim, indices in keep.items():
        if dim >= x.dim() or (len(indices) and int(indices.max()) >= x.shape[dim]):
            raise InputError(
                f"The plan keeps index {int(indices.max())} of dimension {dim} of a parameter of shape "
                f"{list(x.shape)}: it is a plan of another model."
            )
    data = _selected(x.detach(), sorted((dim, indices.to(x.device)) for dim, indices in keep.items()))
    if keep and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        data = data.contiguous(memory_format=torch.channels_last)
    if not isinstance(x, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=x.requires_grad)
    parameter.__dict__.update(x.__dict__)
    return parameter


def _selected(x: Tensor, keep: Sequence[tuple[int, Tensor]]) -> Tensor:
    """x.index_select along each dimension, by pieces that stay in a cache: x cut along one dimension only is large."""
    if not keep:
        return x.clone()
    (dim, rows), *rest = keep
    if not rest or dim > 0:
        for dim, indices in keep:
            x = x.index_select(dim, indices)
        return x
    result, start = x.new_empty(shape(x, dict(keep))), 0
    for piece in rows.split(max(PIECE * len(x) // max(x.nbytes, 1), 1)):
        result[start : start + len(piece)] = _selected(x.index_select(0, piece), rest)
        start += len(piece)
    return result


def parameters(model: nn.Module, keep: Keep | None = None) -> tuple[int, int]:
    """(number of parameters, bytes of parameters and buffers) after the cut; what is shared counts once."""
    count = size = 0
    for name, x in tensors_of(model):
        numel = math.prod(shape(x, (keep or {}).get(name, {})))
        count += numel if isinstance(x, nn.Parameter) else 0
        size += numel * x.element_size()
    return count, size


# --- on the disk ------------------------------------------------------------------------------------------------------


def save(pruned: Pruned, folder: str | Path) -> None:
    """Writes `weights.safetensors` and `plan.json` into `folder`, which is made; older ones are replaced at the end."""
    folder, plan = Path(folder), pruned.plan
    with replacing(folder / WEIGHTS) as partial:
        save_file(_state(pruned.model, plan), partial)
    content = {
        "version": 1,
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "kept": {name: {dim: x.tolist() for dim, x in dims.items()} for name, dims in plan.kept.items()},
        "attributes": plan.attributes,
        "units": [vars(row) for row in plan.units],
        "unprunable": plan.unprunable,
        "parameters": plan.parameters,
        "macs": plan.macs,
        "bytes": plan.bytes,
        "report": None if pruned.report is None else str(pruned.report),
    }
    with replacing(folder / PLAN) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


@torch.inference_mode(False)
def load(model: nn.Module, folder: str | Path) -> Pruned:
    """The pruned model that `folder` holds, cut from `model`: the same architecture, dense, with any weights.

    Raises DataError where the files are missing or damaged, InputError if the plan is of another architecture.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        damaged = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != content["sha256"]
        state = {} if damaged else load_file(folder / WEIGHTS)
        plan = _plan(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no pruned model that can be read ({error}): save it again.") from error
    if damaged:
        raise DataError(f"{folder / WEIGHTS} is damaged, or not of the plan beside it: save the model again.")
    try:
        new = cut(model, plan.kept, _as_they_are(model, plan.attributes))
    except (IndexError, AttributeError) as error:
        raise InputError(f"The plan in {folder} is of another architecture ({error}).") from error
    expected = {name: (x.shape, x.dtype) for name, x in _state(new, plan).items()}
    saved = {name: (x.shape, x.dtype) for name, x in state.items()}
    if wrong := [name for name in {**expected, **saved} if expected.get(name) != saved.get(name)]:
        raise InputError(
            f"The plan in {folder} is of another architecture: {', '.join(sorted(wrong)[:3])} do not agree with it."
        )
    with torch.no_grad():
        target = _tensors(new, plan)
        for name, value in state.items():
            target[name].copy_(value)
    return Pruned(new, plan, None)


def _plan(content: dict[str, Any]) -> Plan:
    return Plan(
        kept={
            n: {int(d): torch.tensor(x, dtype=torch.int64) for d, x in k.items()} for n, k in content["kept"].items()
        },
        attributes=content["attributes"],
        units=tuple(Units(**row) for row in content["units"]),
        unprunable=tuple(map(tuple, content["unprunable"])),
        parameters=tuple(content["parameters"]),
        macs=tuple(content["macs"]),
        bytes=tuple(content["bytes"]),
    )


def _as_they_are(model: nn.Module, attributes: Attributes) -> dict[str, dict[str, Any]]:
    """JSON knows no tuples: values in the type that the module has now."""
    modules = {name: model.get_submodule(name) for name in attributes}
    return {
        name: {key: type(getattr(modules[name], key))(value) for key, value in values.items()}
        for name, values in attributes.items()
    }


def _tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The state_dict, and buffers that were cut though they are not in it: a fresh model has them whole."""
    cut_buffers = {name: x for name, x in model.named_buffers() if name in plan.kept}
    return {**model.state_dict(keep_vars=True), **cut_buffers}


def _state(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """What is saved: the tensors without second names of the same memory."""
    seen: set[Any] = set()
    state = {}
    for name, x in _tensors(model, plan).items():
        memory = (x.data_ptr(), x.shape, x.stride())
        if x.numel() == 0 or memory not in seen:
            state[name] = x.detach().cpu().contiguous()
        seen.add(memory)
    return state
