"""A pruned model on the disk: its weights in safetensors, the plan it was cut by in JSON, rebuilt from the dense model.

Nothing is unpickled. Where layers have lost different numbers of channels no configuration file can say so; the plan
can, and turns a freshly made dense model into the pruned one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labkit.errors import DataError, InputError
from labkit.files import replacing
from labkit.pruning import surgery
from labkit.pruning.channels import Plan, Pruned, Units

WEIGHTS, PLAN = "weights.safetensors", "plan.json"


def save(pruned: Pruned, folder: str | Path) -> None:
    """Writes `weights.safetensors` and `plan.json` into `folder`, which is made; older ones are replaced at the end."""
    folder = Path(folder)
    with replacing(folder / WEIGHTS) as partial:
        save_file(_state(pruned.model), partial)
    plan = pruned.plan
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
        cut = surgery.cut(model, plan.kept, _as_they_are(model, plan.attributes))
    except (IndexError, AttributeError) as error:
        raise InputError(f"The plan in {folder} is of another architecture ({error}).") from error
    own = _state(cut)
    wrong = [name for name in {**own, **state} if name not in own or name not in state or _differ(own, state, name)]
    if wrong:
        raise InputError(
            f"The plan in {folder} is of another architecture: {', '.join(sorted(wrong)[:3])} do not agree with it."
        )
    with torch.no_grad():
        target = cut.state_dict(keep_vars=True)
        for name, value in state.items():
            target[name].copy_(value)
    return Pruned(cut, plan, None)


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


def _as_they_are(model: nn.Module, attributes: surgery.Attributes) -> dict[str, dict[str, Any]]:
    """JSON knows no tuples: values in the type that the module has now."""
    found = {}
    for name, values in attributes.items():
        module = model.get_submodule(name)
        found[name] = {key: type(getattr(module, key))(value) for key, value in values.items()}
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict without second names of the same memory."""
    seen: dict[Any, str] = {}
    state = {}
    for name, x in model.state_dict().items():
        if x.numel() == 0 or (x.data_ptr(), x.shape, x.stride()) not in seen:
            seen[x.data_ptr(), x.shape, x.stride()] = name
            state[name] = x.detach().cpu().contiguous()
    return state


def _differ(own: dict[str, Tensor], state: dict[str, Tensor], name: str) -> bool:
    return own[name].shape != state[name].shape or own[name].dtype != state[name].dtype
