"""Post-training quantization, SIMULATED: ranges from some batches, then float32 that takes only the values of codes.

Krishnamoorthi 2018 (arXiv:1806.08342); Nagel et al. 2021 (arXiv:2106.08295), sections 2 and 3. A simulation is useful
if it rounds the same values as an integer engine. Hence three rules:

1. A layer rounds its weight (a symmetric grid per output channel, "restricted") and its input (an asymmetric unsigned
   grid for the tensor, since its scale must leave the sum). Bias and result are not rounded: they stand for the int32
   accumulator. The next reader of the result rounds it, after ReLU: one rounding, whose clip at 0 is the ReLU.
2. A sum of two branches is added up in the accumulator of the branch computed last, so the last branch is not rounded.
   The first branch has been handed over in codes, an identity shortcut as well, and is rounded by a
   `QuantizationPoint`, once for all readers. To leave the shortcut in float32 is the usual mistake, and changes 7 % of
   a ResNet's codes.
3. A model without a traceable graph has no points: each layer rounds its own input (rule 1).

BatchNorm is folded first, or stays in float32 if the forward pass cannot be followed, as with a branch on a value; the
plan gives the reason. `simulated` has the layers, `ptq_graph` traces the model and finds the sums,
`mixed_precision` finds a width for each layer. `integer.convert` has the integers, `qat` trains the same modules.
"""

import inspect
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from labkit.errors import InputError, check_whole
from labkit.graph.passes import full_copy
from labkit.graph.subclasses import is_plain, pads_same
from labkit.modules import batches as batching
from labkit.modules.hooks import watching
from labkit.modules.replacing import replace_
from labkit.modules.weights import inside
from labkit.quantization import affine, calls, fold, ptq_graph
from labkit.quantization.affine import Grid
from labkit.quantization.mixed_precision import allocate, sensitivity
from labkit.quantization.observers import Observer
from labkit.quantization.ptq_plan import Calibrated, QuantizationPlan, planned
from labkit.quantization.simulated import FakeQuantized, QuantizationPoint, Quantizer, bypassed, weight_grid

__all__ = [
    "Calibrated", "FakeQuantized", "QuantizationPlan", "QuantizationPoint", "Quantizer", "allocate", "quantize",
    "sensitivity", "weight_grid",
]  # fmt: skip

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
FIRST = 4  # examples of the first batch that folding and the graph are proved on, and that the report compares


def quantize(
    model: nn.Module,
    batches: Iterable,
    *,
    weights: int | Mapping[str, int] = 8,
    activations: int | Mapping[str, int] = 8,
    observer: str = "minmax",
    ignore: Collection[str] = (),
) -> Calibrated:
    """SIMULATED: return a copy of `model` in which every Linear and Conv2d that can be is `FakeQuantized`.

    batches: batches of inputs, each read once; the ranges of activations are taken from them.
    weights: bits, 2 to 8, or {name: bits} of layers, or of modules for all layers inside; the innermost name counts.
        "" is the whole model, with 8 bits by default.
    activations: bits in the same form; a point has the whole model's bits.
    observer: name of a rule from observed values to a range, a row of `observers.RANGES`.
    ignore: names of layers that stay float32, or of modules for all layers inside; "" is the whole model.

    The rules stand at the top of this file. The copy runs in eval mode, on `model`'s device.
    Raises InputError for bits, names, observers and batches that cannot be used, for NaN or constant activations, and
    for a model without a layer to quantize.
    """
    calls.check_model(model)
    if any(isinstance(module, FakeQuantized) for module in model.modules()):
        raise InputError("The model is quantized already: give the float model that it was made from.")
    widths = _widths(weights, "weights")
    precisions = _widths(activations, "activations")
    ignore = _names(ignore)
    calls.check_names(model, (*widths, *precisions, *ignore))
    Observer(observer)
    checked = batching.not_empty(batching.check_batches(batches, "calibration"))
    first = next(checked)

    with torch.no_grad(), batching.evaluating(model):
        example = calls.few(model, calls.inputs(model, first), FIRST)
        new = full_copy(model)
        unfolded = fold.fold_if_proved_(new, (), example)
        refused = _refused(new, ignore, unfolded)
        candidates = _candidates(new, refused)
        _check_widths_are_used(widths, "weights", candidates, refused)
        _check_widths_are_used(precisions, "activations", candidates, refused)

        traced, points = _traced_with_points(new, example, candidates)
        new = new if traced is None else traced
        all_batches = itertools.chain([first], checked)
        observers = _observe(new, candidates, points, all_batches, observer, precisions)
        refused |= _refused_without_a_call(candidates, observers)
        layers = _layers_that_were_called(candidates, refused)
        grids = _activation_grids(traced, layers, points, observers, precisions)
        new, report = _replace_layers(new, layers, points, grids, widths, example)
    plan = QuantizationPlan(
        layers=tuple(planned(name, new.get_submodule(name)) for name in layers),
        points=tuple(points),
        refused=refused,
        traced=traced is not None,
    )
    return Calibrated(new, plan, report)


# --- arguments --------------------------------------------------------------------------------------------------------


def _widths(bits: int | Mapping[str, int], kind: str) -> dict[str, int]:
    """Return {module: bits}, with the whole model under ""; InputError for bits that are not 2 to 8."""
    if not isinstance(bits, Mapping):
        check_whole(bits, kind, 2, 8)
        return {"": bits}
    for name, width in bits.items():
        check_whole(width, f"{kind}[{name!r}]", 2, 8)
    return {"": 8, **bits}


def _names(ignore: Collection[str]) -> tuple[str, ...]:
    is_collection = isinstance(ignore, Iterable) and not isinstance(ignore, str)
    names = tuple(ignore) if is_collection else (ignore,)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"ignore is {ignore!r}, but it must hold names of modules: take them of named_modules().")
    return names


def _check_widths_are_used(
    widths: Mapping[str, int],
    kind: str,
    layers: Sequence[str],
    refused: Mapping[str, str],
) -> None:
    """Raise InputError for a name in `widths` without a layer that is quantized."""
    for part in widths:
        if part and not any(inside(layer, part) for layer in layers):
            reason = refused.get(part, "it is no Linear and no Conv2d")
            raise InputError(f"{kind} has bits for {part!r}, which is not quantized ({reason}): name layers that are.")


def _width(widths: Mapping[str, int], layer: str) -> int:
    """Return the bits of the innermost module of `widths` that holds the layer."""
    name = layer
    while name not in widths:
        name = name.rpartition(".")[0]
    return widths[name]


# --- the layers -------------------------------------------------------------------------------------------------------


def _candidates(model: nn.Module, refused: Mapping[str, str]) -> list[str]:
    """Return the names of the Linears and Conv2ds that are not refused."""
    kernels = (nn.Linear, nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kernels) and name not in refused]


def _refused(model: nn.Module, ignore: Sequence[str], unfolded: str) -> dict[str, str]:
    """Return {name: the reason to stay float32} of layers with weights and of batch norms.

    unfolded: the reason why batch norms were not folded; "" if they were.
    Raises InputError for a weight with NaN.
    """
    uncalled = bypassed(model)
    refused = {}
    for name, module in model.named_modules():
        if not isinstance(module, (*WEIGHTED, BATCH_NORMS)):
            continue
        if any(part == "" or inside(name, part) for part in ignore):
            refused[name] = "it is ignored"
        elif module in uncalled:
            refused[name] = "nn.TransformerEncoderLayer reads its weight without calling it"
        elif unfolded and isinstance(module, BATCH_NORMS):
            refused[name] = f"no layer could take it in ({unfolded})"
        elif reason := _reason_against(module, is_model=not name):
            refused[name] = reason
        elif not module.weight.isfinite().all():
            raise InputError(f"The weight of {name!r} has NaN or infinity: load other weights, or ignore it.")
    return refused


def _reason_against(module: nn.Module, is_model: bool) -> str:
    """Return the reason why a module with a weight has no integer kernel, or "".

    is_model: True if the module is the whole model.
    """
    if not is_plain(module) and not pads_same(module):
        return f"a {type(module).__name__} has no integer kernel, and no layer took it in"
    if is_model and "input" not in inspect.signature(module.forward).parameters:
        return "it is the whole model and names its argument otherwise than torch's: put it in an nn.Sequential"
    if module.weight.dtype is not torch.float32:
        return f"its weight is {module.weight.dtype}, and only float32 is quantized"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"it pads with {module.padding_mode!r}, and a kernel pads with the zero point"
    if isinstance(module, nn.Conv2d) and _pads_unevenly(module):
        return "it pads more on one side, which no kernel does"
    if not module.weight.numel():
        return f"its weight {list(module.weight.shape)} has no numbers"
    return ""


def _pads_unevenly(layer: nn.Conv2d) -> bool:
    before_x, after_x, before_y, after_y = layer._reversed_padding_repeated_twice
    return before_x != after_x or before_y != after_y


# --- calibration ------------------------------------------------------------------------------------------------------


def _traced_with_points(
    model: nn.Module,
    example: Mapping[str, Any],
    layers: Sequence[str],
) -> tuple[fx.GraphModule | None, list[str]]:
    """Return the model's graph with quantization points in it, and their names; (None, []) if there is no graph."""
    traced = ptq_graph.trace(model, example, layers)
    if traced is None:
        return None, []
    return traced, ptq_graph.insert_points(traced, layers)


def _observe(
    model: nn.Module,
    layers: Sequence[str],
    points: Sequence[str],
    batches: Iterable,
    observer: str,
    precisions: Mapping[str, int],
) -> dict[str, Observer]:
    """Run the model on all batches, and return an observer of the input of each layer and of each point."""
    observers = {}
    for name in layers:
        observers[name] = Observer(observer, _width(precisions, name), f"the input of {name!r}")
    for name in points:
        observers[name] = Observer(observer, _width(precisions, name), f"the sum's term {name!r}")

    def observe(name: str, x: Tensor, _: Tensor) -> None:
        observers[name].observe(x)

    with watching(model, observers, observe):
        for batch in batches:
            calls.run(model, **calls.inputs(model, batch))
    return observers


def _refused_without_a_call(layers: Sequence[str], observers: Mapping[str, Observer]) -> dict[str, str]:
    """Return {name: the reason to stay float32} of the layers without an observed input."""
    return {name: "no batch calls it as a module" for name in layers if not observers[name].extremes}


def _layers_that_were_called(layers: Sequence[str], refused: Mapping[str, str]) -> list[str]:
    """Return the layers that are not refused; InputError, with all reasons, if there is none."""
    called = [name for name in layers if name not in refused]
    if not called:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise InputError(
            f"The model has no layer to quantize ({reasons or 'it has no Linear and no Conv2d'}): give another, or "
            "ignore less."
        )
    return called


def _activation_grids(
    traced: fx.GraphModule | None,
    layers: Sequence[str],
    points: Sequence[str],
    observers: Mapping[str, Observer],
    precisions: Mapping[str, int],
) -> dict[str, Grid]:
    """Return the grid of the input of each layer and of each point; a layer that reads a point has the point's."""
    ranges = {name: observers[name].range() for name in [*layers, *points]}
    grids = {}
    for name, (lo, hi) in ranges.items():
        grids[name] = affine.choose(lo, hi, _width(precisions, name), symmetric=False)
    if traced is not None:
        for layer, point in ptq_graph.points_read(traced, layers, points).items():
            if grids[layer].bits == grids[point].bits:
                grids[layer] = grids[point]
    return grids


def _replace_layers(
    model: nn.Module,
    layers: Sequence[str],
    points: Sequence[str],
    grids: Mapping[str, Grid],
    widths: Mapping[str, int],
    example: Mapping[str, Any],
) -> tuple[nn.Module, tuple[dict[str, Any], ...]]:
    """Put simulated layers and points into the model; return the model and the rows of `Calibrated.report`."""
    before = calls.inputs_and_results(model, layers, example, FIRST)
    rows = {}
    for name in layers:
        layer = model.get_submodule(name)
        fake = FakeQuantized(layer, weight_grid(layer, _width(widths, name)), grids[name])
        if name in before:  # another batch may call others
            x, result = before[name]
            weight_db = affine.sqnr(layer.weight, fake.fake_weight())
            alone_db = affine.sqnr(result, fake(x))
            rows[name] = {"layer": name, "weight_db": weight_db, "alone_db": alone_db}
        model = replace_(model, name, fake)
    for name in points:
        model.set_submodule(name, QuantizationPoint(grids[name]))
    after = calls.inputs_and_results(model, layers, example, FIRST)
    report = []
    for name, row in rows.items():
        if name in after:
            (_, expected), (_, result) = before[name], after[name]
            report.append({**row, "chain_db": affine.sqnr(expected, result)})
    return model, tuple(report)
