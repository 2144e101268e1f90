"""A cut of named modules of a transformer: what is kept of them, made into a plan, cut, proved, and said in the config.

`transformers` and `depth` say what goes; here is what they share. The proof's reference is the dense model in which
nothing reads what was removed, as in `equality`.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import EqualityError
from labkit.models import quietly
from labkit.pruning import anatomy, equality, surgery
from labkit.pruning.channels import Plan, Pruned, Units
from labkit.pruning.coupling import fits, tracing


def outputs_kept(model: nn.Module, name: str, kept: Tensor) -> fits.Keep:
    """`kept` of the outputs of the linear module `name`: rows of its matrix (columns of a Conv1D) and of its bias."""
    module = model.get_submodule(name)
    found = {f"{name}.weight": {anatomy.out_dim(module): kept}}
    if getattr(module, "bias", None) is not None:
        found[f"{name}.bias"] = {0: kept}
    return found


def inputs_kept(model: nn.Module, name: str, kept: Tensor) -> fits.Keep:
    """`kept` of what the linear module `name` reads."""
    return {f"{name}.weight": {1 - anatomy.out_dim(model.get_submodule(name)): kept}}


def cut(
    model: nn.Module,
    kept: fits.Keep,
    attributes: fits.Attributes,
    units: tuple[Units, ...],
    *,
    kwargs: Mapping[str, Any] | None,
    check: bool,
    config: Mapping[str, Any],
) -> Pruned:
    """A copy of `model` cut to `kept` and proved on `kwargs` (None: `anatomy.example`), with `config` where it fits."""
    kwargs = anatomy.example(model) if kwargs is None else dict(kwargs)
    linear = fits.attributes(model, kept, {})
    attributes = {name: {**linear.get(name, {}), **attributes.get(name, {})} for name in {**linear, **attributes}}
    record = tracing.record(model, (), kwargs)
    gone = _gone(record, kept)
    new = surgery.cut(model, kept, attributes)
    report = equality.check(model, new, record, gone, (), kwargs) if check else None
    if report is not None and not report.equal:
        raise EqualityError(
            f"The pruned model is {report} It is not returned. Report this model: its parts are not what they seem."
        )
    state_config(new, config)
    return Pruned(new, _plan(model, new, kept, attributes, units, record, kwargs), report)


def _plan(model, new, kept, attributes, units, record: tracing.Record, kwargs) -> Plan:
    (n, size), (n_left, size_left) = surgery.parameters(model), surgery.parameters(model, kept)
    return Plan(
        kept=kept,
        attributes=attributes,
        units=units,
        unprunable=(),
        parameters=(n, n_left),
        macs=(macs(record), macs(tracing.record(new, (), kwargs))),
        bytes=(size, size_left),
    )


def macs(record: tracing.Record) -> int:
    """Multiply-adds of a traced call."""
    return sum(cost.macs for cost in record.costs)


def _gone(record: tracing.Record, kept: fits.Keep) -> np.ndarray:
    """Which labels go."""
    gone = np.zeros(record.labels.count, dtype=bool)
    for axis in record.axes:
        if axis.dim in kept.get(axis.name, {}):
            stays = np.zeros(axis.size, dtype=bool)
            stays[kept[axis.name][axis.dim].numpy()] = True
            gone[axis.base : axis.base + axis.size] = ~stays
    return gone


# --- the config -------------------------------------------------------------------------------------------------------


def state_config(model: nn.Module, new: Mapping[str, Any]) -> bool:
    """Puts `new` in the config of `model` if the architecture that it then describes is the model's.

    That is, it has its shapes, and the same factors where a config makes them from a size (Gemma scales embeddings by
    the root of the width, which a narrower model would do otherwise).
    """
    if not new or not hasattr(model, "config"):
        return False
    candidate = copy.deepcopy(model.config)
    try:
        _set(candidate, new)
        fresh = architecture(type(model), candidate)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError):
        return False  # the architecture cannot be built so
    fits = shapes(fresh) == shapes(model) and not differing(fresh, model, (float,))
    if fits:
        for config in configs(model):
            _set(config, new)
    return fits


def configs(model: nn.Module) -> Iterator[Any]:
    """Every config object in the model, once: an encoder-decoder's two halves have copies of their own."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    yield from found.values()


def architecture(kind: type[nn.Module], config: Any, device: str = "meta") -> nn.Module:
    """A model of the class `kind` as `config` describes it. On the meta device it has shapes and takes no time."""
    with quietly(), torch.random.fork_rng(devices=[]), torch.device(device):
        return kind(copy.deepcopy(config)).eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{parameter: shape}"""
    return {name: tuple(x.shape) for name, x in model.named_parameters()}


def differing(fresh: nn.Module, model: nn.Module, types: tuple[type, ...]) -> dict[str, dict[str, Any]]:
    """{module: {attribute: value}} of the values of these types that modules have written down and fresh ones have not.

    Only where a fresh one has another value of the same type.
    """
    modules = dict(fresh.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            before = getattr(modules[path], name, None)
            if type(value) in types and type(before) is type(value) and before != value and not name.startswith("_"):
                found.setdefault(path, {})[name] = value
    return found


def _set(config: Any, new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        setattr(config, name, value)
