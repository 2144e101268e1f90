"""Models and batches as a caller gives them: checked before any work; a run that fails is told in a sentence."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_loaded, check_module
from labkit.errors import InputError, LabError, first_line
from labkit.modules import batches as batching
from labkit.modules.hooks import watching


def check_model(model: object) -> None:
    """Raise InputError unless `model` is an eager torch.nn.Module whose weights are in memory."""
    check_module(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"The model is wrapped in {type(model).__name__}: give model.module, and wrap the result.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("The model is scripted or traced: give the eager module that it was made from.")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's wrapper
        raise InputError("The model is compiled by torch.compile: give the eager model, and compile the result.")
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(x):
            raise InputError(f"{name} has no shape yet, as its layer is lazy: run the model once on its inputs first.")
    check_loaded(model)


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Raise InputError for a name that is no module of `model`."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise InputError(f"There is no module {name!r} in the model: take a name of its named_modules().")


def inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return the arguments of the model's forward pass for a batch, by name, as `batches.inputs` does.

    Raises InputError for an empty batch, and for more arguments than the forward pass takes.
    """
    try:
        named = batching.inputs(model, batch)
    except TypeError as error:
        raise InputError(
            f"A batch does not fit {type(model).__name__}.forward ({first_line(error)}): give what the model is called "
            "with, a tuple of arguments or a dict of keyword arguments."
        ) from error
    tensors = [x for x in named.values() if isinstance(x, Tensor)]
    if tensors and not any(x.numel() for x in tensors):
        raise InputError(f"A batch of shape {list(tensors[0].shape)} has no examples: leave it out, or give others.")
    return named


def few(model: nn.Module, named: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """Return the first `count` examples of a batch, after the model has run on them.

    named: the arguments of a call, by name.

    Returns the whole batch if its tensors are not equally long, as positions may be, or if the model does not run on a
    part of the batch, as on a part of a graph. Raises InputError if the model does not run on the whole batch.
    """
    tensors = [x for x in named.values() if isinstance(x, Tensor)]
    lengths = {len(x) if x.dim() else 0 for x in tensors}
    if len(lengths) == 1 and all(x.layout is torch.strided for x in tensors):
        part = {name: x[:count] if isinstance(x, Tensor) else x for name, x in named.items()}
        try:
            run(model, **part)
            return part
        except InputError:
            pass
    run(model, **named)
    return named


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the model with these arguments; raise InputError, with the first line of the error, if the call fails."""
    try:
        return model(*args, **kwargs)
    except LabError:
        raise
    except Exception as error:  # a forward pass can fail in any way
        raise InputError(
            f"The model does not run on a batch ({type(error).__name__}: {first_line(error)}): give batches as in "
            "model(*batch) or model(**batch), on the model's device and in its dtype."
        ) from error


def inputs_and_results(
    model: nn.Module, names: Iterable[str], named: Mapping[str, Any], count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the model, and return {module: (input, result)} of `count` examples, for the named modules that are called.

    named: the arguments of a call, by name.
    """
    seen = {}

    def keep(name: str, x: Tensor, result: Tensor) -> None:
        seen[name] = x[:count].clone(), result[:count].clone()

    with watching(model, names, keep):
        run(model, **named)
    return seen
