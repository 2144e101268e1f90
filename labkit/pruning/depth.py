"""Depth pruning: how much each layer changes its input, and a model without the layers that change least.

Men et al. 2024 (ShortGPT: Block Influence), Gromov et al. 2024 (The Unreasonable Ineffectiveness of the Deeper Layers:
angular distance of consecutive layers). In the dense reference a removed layer returns its input. Training is left to
the caller.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_module, check_several
from labkit.errors import EqualityError, InputError, check_choice, check_index, check_whole
from labkit.graph import anatomy, surgery, tracing
from labkit.graph.equality import Report, difference
from labkit.graph.rules import Record
from labkit.graph.surgery import Plan, Pruned, Units
from labkit.modules import stacks
from labkit.modules.batches import check_batches, evaluating, inputs, not_empty, valid_tokens
from labkit.modules.blocks import loss_increases, skipping
from labkit.modules.hooks import first_tensor, forward_hooks
from labkit.modules.returned import outputs
from labkit.modules.stacks import layers_of
from labkit.pruning.scores import LossFn


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x, y): Block Influence, Men et al. 2024, equation 1."""
    return 1 - torch.cosine_similarity(x, y, dim=-1)


def angular(x: Tensor, y: Tensor) -> Tensor:
    """arccos(cos(x, y)) / pi, in [0, 1]: Gromov et al. 2024, equation 7."""
    return torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos() / math.pi


def l2(x: Tensor, y: Tensor) -> Tensor:
    """|y - x| / |x|: relative, because the residual stream grows from layer to layer."""
    tiny = torch.finfo(x.dtype).tiny
    return (y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(tiny)


# Distance of a block's input and output, both [tokens, width]: [tokens]. A new distance is a function and a row.
DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "angular": angular, "l2": l2}
METHODS = (*DISTANCES, "loss")
NamedLayers = Sequence[tuple[str, nn.Module]]


def layer_importance(
    model: nn.Module,
    batches: Iterable,
    method: str = "cosine",
    *,
    n: int = 1,
    loss_fn: LossFn | None = None,
) -> Tensor:
    """Score every layer, or every block of n layers; higher is more important: [layers - n + 1] float64 on the CPU.

    batches: input of `model`, read once, not stored. Padding does not count.
    method: "cosine", "angular" or "l2": the mean distance of a block's input x and output y over all valid tokens, see
            the functions above. 0 for a block that changes nothing.
        "loss": the exact increase of the mean loss per term without the block; negative if the model is better without
            it. Runs a forward pass from the block on for each block and batch.
    n: number of consecutive layers in a block; entry l is for layers l to l + n - 1 (Gromov et al. remove the block
        with the lowest entry).
    loss_fn: as in `heads.head_importance`, for "loss".

    Raises InputError for a bad argument, or a model with no list of layers or with several (T5).
    """
    check_module(model)
    check_choice(method, METHODS, "method")
    layers = [layer for _, layer in layers_of(model)]
    check_whole(n, "n", most=len(layers))
    check_batches(batches, method)
    if method == "loss":
        skips = []
        for first in range(len(layers) - n + 1):
            skips.append((first, partial(skipping, layers[first : first + n])))
        return loss_increases(model, layers, skips, batches, loss_fn)
    return _mean_distances(model, batches, n, DISTANCES[method])


@torch.no_grad()
def _mean_distances(
    model: nn.Module,
    batches: Iterable,
    n: int,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Average the distance between the input and output of each block of n layers over valid tokens."""
    names, layers = zip(*layers_of(model), strict=True)
    sums = torch.zeros(len(layers) - n + 1, dtype=torch.float64)
    n_tokens = 0
    states: list[Tensor] = []  # of a batch: the input of each layer and the output of the last layer, [B, T, width]

    def add_input(number: int, args: tuple, kwargs: Mapping[str, Any]) -> None:
        states.append(first_tensor(args, kwargs))

    def add_output(
        number: int,
        args: tuple,
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    inputs_of_layers = forward_hooks(layers, add_input, before=True)
    output_of_last = forward_hooks(layers[-1:], add_output)
    with evaluating(model, seed=0), inputs_of_layers, output_of_last:
        for batch in not_empty(batches):
            states.clear()
            named = inputs(model, batch)
            model(**named)
            valid = valid_tokens(model, named, names[0], states[0]).flatten()  # [B * T]
            vectors = [state.flatten(0, -2)[valid].double() for state in states]  # [valid tokens, width]
            for block in range(len(sums)):
                distances = distance(vectors[block], vectors[block + n])
                sums[block] += distances.sum().cpu()
            n_tokens += int(valid.sum())
    return sums / max(n_tokens, 1)


@torch.inference_mode(False)
def prune_layers(
    model: nn.Module,
    layers: Iterable[int],
    *,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """Return a copy of `model` without the layers in `layers`, proved equal to `model` with these layers skipped.

    layers: numbers from 0; at least a single layer stays. Remaining layers are numbered anew (`layer_idx`, say), for
        caches with an entry for each layer; the config gets the new number of layers, and its lists with an entry for
        each layer lose the entries of removed layers.
    kwargs: input for the trace and the proof; None makes a small input from the config.
    check: False leaves the proof out (`report` is None).

    `plan.kept` names the parameters of removed layers, with no index kept. Raises InputError for a bad index, a layer
    without which the remaining layers do not fit together, or a model with no list of layers or with several (T5).
    """
    check_module(model)
    check_several(layers, "layers")
    all_layers = layers_of(model)
    removed = _checked_numbers(layers, len(all_layers))
    remaining = [number for number in range(len(all_layers)) if number not in removed]
    kwargs = anatomy.called_with(model, kwargs)
    name = stacks.stack(model)
    attributes = _new_numbers(all_layers, remaining)
    pruned_model = surgery.cut(model, {}, attributes, {name: remaining})
    record_before = tracing.record(model, (), kwargs)
    record_after = _trace_pruned(pruned_model, kwargs, removed)
    removed_layers = [all_layers[number] for number in removed]
    report = None
    if check:
        report = _prove(model, pruned_model, [layer for _, layer in removed_layers], kwargs)
    parameters_before, bytes_before = surgery.parameters(model)
    parameters_after, bytes_after = surgery.parameters(pruned_model)
    plan = Plan(
        kept=_no_indices(removed_layers),
        attributes=attributes,
        units=(Units(name, len(all_layers), len(removed), 1),),
        unprunable=(),
        parameters=(parameters_before, parameters_after),
        macs=(_macs(record_before), _macs(record_after)),
        bytes=(bytes_before, bytes_after),
        layers={name: remaining},
    )
    return Pruned(pruned_model, plan, report)


def _checked_numbers(layers: Iterable[int], n_layers: int) -> list[int]:
    """Return the numbers of the layers to remove, sorted, each once; raise InputError for bad numbers, none or all."""
    numbers = list(layers)
    for number in numbers:
        check_index(number, n_layers, "layer")
    removed = sorted(set(numbers))
    if not 0 < len(removed) < n_layers:
        raise InputError(f"{len(removed)} of {n_layers} layers would go: name at least one, and leave at least one.")
    return removed


def _new_numbers(all_layers: NamedLayers, remaining: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return {module: {attribute: new value}} for the attributes with the number of a remaining layer."""
    attributes: dict[str, dict[str, int]] = {}
    for path, attribute in _number_attributes([layer for _, layer in all_layers]):
        for new, old in enumerate(remaining):
            if new != old:
                layer_name, _ = all_layers[old]
                module_name = f"{layer_name}.{path}".rstrip(".")
                attributes.setdefault(module_name, {})[attribute] = new
    return attributes


def _number_attributes(layers: Sequence[nn.Module]) -> set[tuple[str, str]]:
    """Return the places of the layer's own number in every layer, (module inside the layer, attribute): `layer_idx`."""
    places_by_layer = []
    for number, layer in enumerate(layers):
        places = set()
        for path, module in layer.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int and value == number:
                    places.add((path, attribute))
        places_by_layer.append(places)
    return set.intersection(*places_by_layer)


def _trace_pruned(pruned_model: nn.Module, kwargs: Mapping[str, Any], removed: Sequence[int]) -> Record:
    try:
        return tracing.record(pruned_model, (), kwargs)
    except Exception as error:  # a forward pass can fail in any way
        raise InputError(
            f"Without layers {removed} the others do not fit together ({error}): remove layers whose output has "
            "the shape of their input."
        ) from error


def _no_indices(removed_layers: NamedLayers) -> dict[str, dict[int, Tensor]]:
    """Return {parameter of a removed layer: {dimension 0: no index}}."""
    no_indices = {}
    for layer_name, layer in removed_layers:
        for path, _ in layer.named_parameters():
            no_indices[f"{layer_name}.{path}"] = {0: torch.zeros(0, dtype=torch.int64)}
    return no_indices


def _macs(record: Record) -> int:
    return sum(cost.macs for cost in record.costs)


@torch.no_grad()
def _prove(
    model: nn.Module,
    pruned_model: nn.Module,
    removed: Sequence[nn.Module],
    kwargs: Mapping[str, Any],
) -> Report:
    """Compare the pruned model with the dense model whose removed layers are skipped: equal to the last bit.

    The same operations run in the same order, so the tolerance is 0. Raises EqualityError if the models differ.
    """
    uses_cache = hasattr(getattr(model, "config", None), "use_cache")
    no_cache = {"use_cache": False} if uses_cache else {}
    with tracing.unchanged(model), tracing.unchanged(pruned_model), evaluating(model), evaluating(pruned_model):
        with skipping(removed):
            expected = model(**kwargs, **no_cache)
        results = pruned_model(**kwargs, **no_cache)
    n_expected, n_results = len(outputs(expected)), len(outputs(results))
    if n_expected != n_results:
        raise EqualityError(
            f"The pruned model gives {n_results} outputs and the dense one {n_expected}, one for each layer it seems, "
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
