"""A pruned transformer on the disk: config, weights in safetensors, and what the config cannot say.

`load` needs no dense model and no history: it builds the architecture from the config and cuts it to the shapes and
numbers (heads of each layer, widths) of the pruned model. Healing and several prunings in a row are fine. Files are
written and read by `surgery`; nothing is unpickled.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.errors import DataError, InputError
from labkit.models import quietly
from labkit.pruning import cuts, surgery
from labkit.pruning.channels import Plan, Pruned


def save(pruned: Pruned | nn.Module, folder: str | Path) -> None:
    """Writes config.json, weights.safetensors and plan.json into `folder`, which is made; the last two atomically.

    The plan on the disk is the one that cuts the config's architecture to this model: its `kept` counts places in that
    architecture, which are not the heads of the dense model. InputError for a model that is not one of transformers.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    config = copy.deepcopy(_known(model).config)
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    plan = _difference(cuts.architecture(type(model), config), model)
    if isinstance(pruned, Pruned):
        plan = replace(plan, units=pruned.plan.units, parameters=pruned.plan.parameters, macs=pruned.plan.macs)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with quietly():
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    surgery.save(Pruned(model, plan, pruned.report if isinstance(pruned, Pruned) else None), folder)


def load(folder: str | Path) -> Pruned:
    """The pruned model in eval mode on the CPU; its plan is the one on the disk, its report None: no proof is repeated.

    Raises DataError where files are missing or damaged.
    """
    import transformers

    try:
        with quietly():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(transformers, config.architectures[0])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} holds no pruned transformer that can be read ({error}): save it again.") from error
    with _default_dtype(getattr(config, "dtype", None) or torch.float32):
        dense = cuts.architecture(kind, config, device="cpu")
    found = surgery.load(dense, folder)
    if found.model.can_generate() and (Path(folder) / "generation_config.json").exists():
        found.model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return replace(found, model=found.model.eval())


def _known(model: nn.Module) -> Any:
    import transformers

    kind = type(model)
    if isinstance(model, transformers.PreTrainedModel) and getattr(transformers, kind.__name__, None) is kind:
        return model
    raise InputError(
        f"{type(model).__name__} is no model of transformers, whose config could rebuild it: use surgery.save, and "
        "surgery.load with the dense model."
    )


def _difference(fresh: nn.Module, model: nn.Module) -> Plan:
    """The plan that cuts `fresh`, which may be on the meta device, to the shapes and numbers of `model`."""
    own = dict(fresh.named_parameters(remove_duplicate=False)) | dict(fresh.named_buffers(remove_duplicate=False))
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for name, x in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        wide = own[name].shape
        if found := {dim: torch.arange(n) for dim, n in enumerate(x.shape) if n != wide[dim]}:
            kept[name] = found
    return Plan(
        kept=kept,
        attributes=cuts.differing(fresh, model, (int, float, tuple)),
        units=(),
        unprunable=(),
        parameters=(surgery.parameters(fresh)[0], surgery.parameters(model)[0]),
        macs=(0, 0),
        bytes=(surgery.parameters(fresh)[1], surgery.parameters(model)[1]),
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
