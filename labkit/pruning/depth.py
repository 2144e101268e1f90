"""Depth pruning: how little a whole layer changes, and a model without some of them.

Men et al. 2024 (ShortGPT: Block Influence), Gromov et al. 2024 (The Unreasonable Ineffectiveness of the Deeper Layers:
angular distance of consecutive layers). A removed layer passes its input on; nothing is trained here.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_module, check_several
from labkit.errors import EqualityError, InputError, check_choice, check_whole
from labkit.graph import anatomy, surgery, tracing
from labkit.graph.equality import Report, difference
from labkit.graph.surgery import Plan, Pruned, Units
from labkit.modules import stacks
from labkit.modules.batches import check_batches, evaluating, inputs, not_empty, valid_tokens
from labkit.modules.blocks import loss_increases, skipping
from labkit.modules.hooks import first_tensor
from labkit.modules.returned import outputs
from labkit.modules.stacks import layers_of

DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {  # of inputs and outputs [tokens, width]: [tokens]
    "cosine": lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1),
    "angular": lambda x, y: torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos() / math.pi,
    "l2": lambda x, y: (y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny),
}
METHODS = (*DISTANCES, "loss")


def layer_importance(
    model: nn.Module, batches: Iterable, method: str = "cosine", *, n: int = 1, loss_fn: Callable | None = None
) -> Tensor:
    """Importance of every layer, [layers], float64 on the CPU; higher is more important, 0 changes nothing.

    batches: read once, none is kept. Padding is left out.
    method: over the valid tokens of all batches, x the block's input and y its output at a token:
        "cosine": E[1 - cos(x, y)] (Men et al. 2024, Block Influence, equation 1).
        "angular": E[arccos(cos(x, y))] / pi, in [0, 1] (Gromov et al. 2024, equation 7).
        "l2": E[|y - x| / |x|]: relative, since the residual stream grows from layer to layer.
        "loss": the increase of the mean loss per term without the block, the ground truth; negative where the model is
            better without it. A forward pass from the block on for each batch.
    n: how many layers in a row are taken as one block: entry l is then for layers l to l + n - 1, and there are
        layers - n + 1 entries (Gromov et al. remove the block with the lowest).
    loss_fn: as in `heads.head_importance`, for "loss".

    Raises InputError for a bad argument, or a model with no or several lists of layers (T5).
    """
    check_module(model)
    check_choice(method, METHODS, "method")
    layers = layers_of(model)
    check_whole(n, "n", most=len(layers))
    check_batches(batches, method)
    if method == "loss":
        stack = [layer for _, layer in layers]
        skips = [(first, partial(skipping, stack[first : first + n])) for first in range(len(stack) - n + 1)]
        return loss_increases(model, stack, skips, batches, loss_fn)
    return _distances(model, layers, batches, n, DISTANCES[method])


@torch.no_grad()
def _distances(model: nn.Module, layers, batches: Iterable, n: int, distance: Callable) -> Tensor:
    sums = torch.zeros(len(layers) - n + 1, dtype=torch.float64)
    tokens = 0
    states: list[Tensor] = []  # of one batch: what each layer reads, and what the last one gives, [B, T, width]

    def reads(module, args, kwargs):
        states.append(first_tensor(args, kwargs))

    def gives(module, args, output):
        states.append(output if isinstance(output, Tensor) else output[0])

    with evaluating(model, seed=0), contextlib.ExitStack() as hooks:
        for _, layer in layers:
            hooks.callback(layer.register_forward_pre_hook(reads, with_kwargs=True).remove)
        hooks.callback(layers[-1][1].register_forward_hook(gives).remove)
        for batch in not_empty(batches):
            states.clear()
            named = inputs(model, batch)
            model(**named)
            valid = valid_tokens(model, named, layers[0][0], states[0])  # [B, T]
            vectors = [x.flatten(0, -2)[valid.flatten()].double() for x in states]  # [valid tokens, width]
            sums += torch.stack([distance(x, y).sum().cpu() for x, y in zip(vectors, vectors[n:], strict=False)])
            tokens += int(valid.sum())
    return sums / max(tokens, 1)


@torch.inference_mode(False)
def prune_layers(
    model: nn.Module, layers: Iterable[int], *, kwargs: Mapping[str, Any] | None = None, check: bool = True
) -> Pruned:
    """A new model without the given layers. `model` stays as it was.

    layers: counted from 0; at least one stays. What stays is numbered anew (`layer_idx`, say), so that a cache has one
        entry for each layer, and the config has the new number of layers and the kept entries of its lists by layer.
    kwargs: the input that the model is traced and checked with; None makes a small one from the config.
    check: False leaves the check out. `report`: equality with the dense model whose removed layers pass their input on.

    `plan.kept` names the parameters of removed layers, with no index kept. Raises InputError for a bad index, a layer
    without which the others do not fit together, or a model with no or several lists of layers (T5).
    """
    check_module(model)
    check_several(layers, "layers")
    every, layers = layers_of(model), list(layers)
    for layer in layers:
        anatomy.check_index(layer, len(every), "layer")
    gone = set(layers)
    if not 0 < len(gone) < len(every):
        raise InputError(f"{len(gone)} of {len(every)} layers would go: name at least one, and leave at least one.")
    kwargs = anatomy.called_with(model, kwargs)
    name, stays = stacks.stack(model), [i for i in range(len(every)) if i not in gone]
    attributes: dict[str, dict[str, int]] = {}
    for path, key in _counters([layer for _, layer in every]):
        for new, old in enumerate(stays):
            if new != old:
                attributes.setdefault(f"{every[old][0]}.{path}".rstrip("."), {})[key] = new
    new = surgery.cut(model, {}, attributes, {name: stays})
    before = tracing.record(model, (), kwargs)
    try:
        after = tracing.record(new, (), kwargs)
    except Exception as error:  # a forward pass can fail in any way
        raise InputError(
            f"Without layers {sorted(gone)} the others do not fit together ({error}): remove layers whose output has "
            "the shape of their input."
        ) from error
    removed = [every[i] for i in sorted(gone)]
    report = _check(model, new, [layer for _, layer in removed], kwargs) if check else None
    (n, size), (n_left, size_left) = surgery.parameters(model), surgery.parameters(new)
    plan = Plan(
        kept={
            f"{name}.{path}": {0: torch.zeros(0, dtype=torch.int64)}
            for name, layer in removed
            for path, _ in layer.named_parameters()
        },
        attributes=attributes,
        units=(Units(name, len(every), len(removed), 1),),
        unprunable=(),
        parameters=(n, n_left),
        macs=tuple(sum(cost.macs for cost in record.costs) for record in (before, after)),
        bytes=(size, size_left),
        layers={name: stays},
    )
    return Pruned(new, plan, report)


def _counters(layers: Sequence[nn.Module]) -> set[tuple[str, str]]:
    """(module, attribute) inside every layer that holds the layer's number, as `layer_idx` does for a cache."""
    numbers = (
        {(path, key) for path, m in layer.named_modules() for key, x in vars(m).items() if type(x) is int and x == i}
        for i, layer in enumerate(layers)
    )
    return set.intersection(*numbers)


@torch.no_grad()
def _check(model: nn.Module, new: nn.Module, removed: Sequence[nn.Module], kwargs: Mapping[str, Any]) -> Report:
    """Equal to the last bit, since the same operations come in the same order."""
    cached = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with tracing.unchanged(model), tracing.unchanged(new), evaluating(model), evaluating(new):
        with skipping(removed):
            expected = model(**kwargs, **cached)
        results = new(**kwargs, **cached)
    counts = [len(outputs(value)) for value in (expected, results)]
    if counts[0] != counts[1]:
        raise EqualityError(
            f"The pruned model gives {counts[1]} outputs and the dense one {counts[0]}, one for each layer it seems, "
            "which cannot be compared: give kwargs that leave them out."
        )
    error, scale = difference(expected, results)
    dtype = str(outputs(expected)[0].dtype).removeprefix("torch.")
    report = Report(error, scale, 0.0, dtype, reference="whose removed layers pass their input on")
    if not report.equal:
        raise EqualityError(
            f"The pruned model is {report} It is not returned. Report this model: its layers are not what they seem."
        )
    return report
