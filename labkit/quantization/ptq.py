"""Post-training quantization, SIMULATED: ranges from some batches, then float32 that takes only the values of codes.

Krishnamoorthi 2018 (arXiv:1806.08342); Nagel et al. 2021 (arXiv:2106.08295), sections 2 and 3. A simulation is worth
something where it rounds what an integer engine rounds, and nothing else. Hence three rules:

1. A layer rounds its weight (a symmetric grid per output channel, "restricted") and its input (an asymmetric unsigned
   grid for the tensor, since its scale must leave the sum). Its bias and its result are not rounded: they stand for the
   int32 accumulator. What reads the result next rounds it, after ReLU: one rounding, whose clip at 0 is the ReLU.
2. A sum of two branches is added up in the accumulator of the one that is computed last, so this one is not rounded.
   The other one has been handed over in codes, an identity shortcut as well, and a `QuantizationPoint` rounds it, once
   for all that read it. To leave the shortcut in float32 is the usual mistake, and 7 % of a ResNet's codes are others.
3. Where the graph of the model cannot be traced there are no points: each layer rounds its own input (rule 1).

BatchNorm is folded first, or stays in float32 where the forward pass cannot be followed, as where it branches on a
value; the plan says so. `integer.convert` has the integers, `qat` trains the same modules.
"""

import copy
import inspect
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from labkit.errors import EqualityError, InputError, check_whole
from labkit.graph import surgery
from labkit.graph.subclasses import is_plain, pads_same, same_pads
from labkit.graph.tracing import outputs
from labkit.modules import batches as batching
from labkit.quantization import affine, calls, fold
from labkit.quantization.affine import Grid
from labkit.quantization.observers import Observer

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
FIRST = 4  # examples of the first batch that folding and the graph are proved on, and that the report compares


class Quantizer(nn.Module):
    """SIMULATED: rounds a value to the points of a grid, which moves and is saved with the module.

    `qat` puts others in its place, whose grids training moves.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)
        self.codes = (grid.bits, grid.lo, grid.hi)

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero, *self.codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.fake(x)


class FakeQuantized(nn.Module):
    """SIMULATED: a Linear or Conv2d on rounded input and weight, in float32; its bias and result are not rounded.

    layer: the float one. weight_grid: per output channel. input_grid: for the tensor.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight_grid: Grid, input_grid: Grid) -> None:
        super().__init__()
        self.layer, self.same = layer, pads_same(layer)
        self.weight_quantizer, self.input_quantizer = Quantizer(weight_grid), Quantizer(input_grid)

    @property
    def weight(self) -> Tensor:
        """What is multiplied, for forward passes that look at its type (ViT, T5)."""
        return self.fake_weight()

    @property
    def weight_grid(self) -> Grid:
        return self.weight_quantizer.grid

    @property
    def input_grid(self) -> Grid:
        return self.input_quantizer.grid

    def pads(self, x: Tensor) -> tuple[int, int, int, int]:
        """Zeros that a Conv2d puts around x by its size, besides its padding: see `subclasses.same_pads`."""
        layer = self.layer
        return same_pads(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation) if self.same else (0, 0, 0, 0)

    def fake_input(self, x: Tensor) -> Tensor:
        return self.input_quantizer(x)

    def fake_weight(self) -> Tensor:
        return self.weight_quantizer(self.layer.weight)

    def forward(self, input: Tensor) -> Tensor:
        x, weight, layer = self.fake_input(input), self.fake_weight(), self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if self.same:
            x = F.pad(x, self.pads(x))
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class QuantizationPoint(nn.Module):
    """SIMULATED: rounds a value that is handed over in codes to a sum and to whatever else reads it.

    A layer that reads it has the same grid, and rounding twice on one grid is rounding once.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.quantizer = Quantizer(grid)

    @property
    def grid(self) -> Grid:
        return self.quantizer.grid

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)


@dataclass(frozen=True)
class PlannedLayer:
    """What becomes of a layer. shape: of its weight. scales: how many its weight has. lo, hi: the input's range."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    activations: int
    scales: int
    lo: float
    hi: float


@dataclass(frozen=True)
class QuantizationPlan:
    """layers: those that are quantized. points: values that are rounded for a sum. refused: {layer: why it stays
    float32}. traced: whether the model became a graph, in which codes can be handed from layer to layer."""

    layers: tuple[PlannedLayer, ...]
    points: tuple[str, ...]
    refused: Mapping[str, str]
    traced: bool

    def __str__(self) -> str:
        lines = [
            f"{x.name}: {x.kind} {list(x.shape)}, weights {x.weights} bits x {x.scales} scales, input {x.activations} "
            f"bits from {x.lo:.3g} to {x.hi:.3g}"
            for x in self.layers
        ]
        return "\n".join([*lines, *(f"{name}: float32, {why}" for name, why in self.refused.items())])


@dataclass(frozen=True)
class Calibrated:
    """model: SIMULATED. plan: what was done. report: a row a layer, the signal to quantization noise in dB.

    Rows: "layer"; "weight_db" of the weight; "alone_db" of the layer's result if only this layer is quantized;
    "chain_db" of its result in the quantized model, after all the layers before it. On `FIRST` examples.
    """

    model: nn.Module
    plan: QuantizationPlan
    report: tuple[dict[str, Any], ...]


def quantize(
    model: nn.Module,
    batches: Iterable,
    *,
    weights: int | Mapping[str, int] = 8,
    activations: int | Mapping[str, int] = 8,
    observer: str = "minmax",
    ignore: Collection[str] = (),
) -> Calibrated:
    """A SIMULATED copy of `model` in which every Linear and Conv2d that can be is `FakeQuantized`; see the rules above.

    batches: what the model is called with; the ranges of activations are taken from them. Each is read once.
    weights, activations: bits, 2 to 8, or {name: bits} of layers and of modules whose layers get them, the innermost
        name first; "" is the whole model, with 8 bits where it is not named. A point has the whole model's bits.
    observer: how a range follows from what was observed, a row of `observers.RANGES`.
    ignore: names of layers, or of modules whose layers, stay float32; "" is the whole model.

    The copy runs in eval mode, on `model`'s device. InputError for bits, names, observers and batches that cannot be
    used, for NaN or constant activations, and for a model without a layer to quantize.
    """
    calls.check_model(model)
    if any(isinstance(module, FakeQuantized) for module in model.modules()):
        raise InputError("The model is quantized already: give the float model that it was made from.")
    widths, precisions = _widths(weights, "weights"), _widths(activations, "activations")
    ignore = _names(ignore)
    modules = dict(model.named_modules())
    if unknown := [name for name in (*widths, *precisions, *ignore) if name not in modules]:
        raise InputError(f"There is no module {unknown[0]!r} in the model: take a name of its named_modules().")
    Observer(observer)
    checked = batching.not_empty(batching.check_batches(batches, "calibration"))
    first = next(checked)

    with torch.no_grad(), batching.evaluating(model):
        named = calls.few(model, calls.inputs(model, first), FIRST)
        new, unfolded = _folded(model, named)
        refused = _refused(new, ignore, unfolded)
        modules = new.named_modules()
        layers = [name for name, x in modules if isinstance(x, (nn.Linear, nn.Conv2d)) and name not in refused]
        for kind, named_bits in {"weights": widths, "activations": precisions}.items():
            if strange := [name for name in named_bits if name and not any(_is_within(x, name) for x in layers)]:
                raise InputError(
                    f"{kind} has bits for {strange[0]!r}, which is not quantized "
                    f"({refused.get(strange[0], 'it is no Linear and no Conv2d')}): name layers that are."
                )
        traced = _trace(new, named, layers)
        new, points = (new, []) if traced is None else (traced, _insert_points(traced, layers))
        observers = _observe(new, layers, points, itertools.chain([first], checked), observer, precisions)
        for name in [name for name in layers if not observers[name].extremes]:
            refused[name] = "no batch calls it as a module"
            layers.remove(name)
        if not layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items()) or "it has no Linear and no Conv2d"
            raise InputError(f"The model has no layer to quantize ({reasons}): give another, or ignore less.")
        ranges = {name: observers[name].range() for name in [*layers, *points]}
        grids = {name: affine.choose(*ends, _width(precisions, name), symmetric=False) for name, ends in ranges.items()}
        if traced is not None:
            behind = _behind(traced, layers, points)
            grids |= {layer: grids[x] for layer, x in behind.items() if grids[layer].bits == grids[x].bits}

        before, rows = _seen(new, layers, named), {}
        for name in layers:
            layer = new.get_submodule(name)
            fake = FakeQuantized(layer, weight_grid(layer, _width(widths, name)), grids[name])
            if name in before:  # another batch may call others
                x, y = before[name]
                weight_db, alone_db = affine.sqnr(layer.weight, fake.fake_weight()), affine.sqnr(y, fake(x))
                rows[name] = {"layer": name, "weight_db": weight_db, "alone_db": alone_db}
            new = replaced(new, name, fake)
        for name in points:
            new.set_submodule(name, QuantizationPoint(grids[name]))
        after = _seen(new, layers, named)
    report = tuple(
        {**row, "chain_db": affine.sqnr(before[name][1], after[name][1])} for name, row in rows.items() if name in after
    )
    plan = QuantizationPlan(
        tuple(_planned(name, new.get_submodule(name)) for name in layers), tuple(points), refused, traced is not None
    )
    return Calibrated(new, plan, report)


# --- the plan ---------------------------------------------------------------------------------------------------------


def _widths(bits: int | Mapping[str, int], kind: str) -> dict[str, int]:
    """{module: bits}, the whole model under ""."""
    named = {f"{kind}[{name!r}]": width for name, width in bits.items()} if isinstance(bits, Mapping) else {kind: bits}
    for name, width in named.items():
        check_whole(width, name, 2, 8)
    return {"": 8, **bits} if isinstance(bits, Mapping) else {"": bits}


def _names(ignore: Collection[str]) -> tuple[str, ...]:
    names = (ignore,) if isinstance(ignore, str) or not isinstance(ignore, Iterable) else tuple(ignore)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"ignore is {ignore!r}, but it must hold names of modules: take them of named_modules().")
    return names


def _width(widths: Mapping[str, int], name: str) -> int:
    """Of the innermost module of `widths` in which this layer is."""
    while name not in widths:
        name = name.rpartition(".")[0]
    return widths[name]


def _is_within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def weight_grid(layer: nn.Module, bits: int) -> Grid:
    """The symmetric grid of a Linear's or Conv2d's weight [out, ...], a scale for each output channel."""
    rows = layer.weight.detach().float().flatten(1)
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    return affine.choose(rows.amin(1).view(shape), rows.amax(1).view(shape), bits)


def _folded(model: nn.Module, named: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """(a copy in eval mode with batch norms folded, ""), or, where no copy can be proved, (one as it is, why)."""
    try:
        return fold.fold_batch_norm(model, named).eval(), ""
    except (InputError, EqualityError) as error:
        return surgery.cut(model, {}, {}).eval(), calls.reason(error)


def bypassed(model: nn.Module) -> set[nn.Module]:
    """The layers whose weights torch's fused kernel for encoders takes, so that what replaces them is not called."""
    encoders = [x for x in model.modules() if isinstance(x, nn.TransformerEncoderLayer)]
    return {layer for x in encoders for layer in (x.linear1, x.linear2)}


def _refused(model: nn.Module, ignore: Sequence[str], unfolded: str) -> dict[str, str]:
    """{name: why it stays float32}, of layers with weights. InputError for a weight with NaN.

    unfolded: why batch norms were not folded, "" where they were.
    """
    refused, read = {}, bypassed(model)
    for name, module in model.named_modules():
        if not isinstance(module, (*WEIGHTED, nn.modules.batchnorm._BatchNorm)):
            continue
        if any(_is_within(name, part) for part in ignore):
            refused[name] = "it is ignored"
        elif module in read:
            refused[name] = "nn.TransformerEncoderLayer reads its weight without calling it"
        elif unfolded and isinstance(module, nn.modules.batchnorm._BatchNorm):
            refused[name] = f"no layer could take it in ({unfolded})"
        elif not is_plain(module) and not pads_same(module):
            refused[name] = f"a {type(module).__name__} has no integer kernel, and no layer took it in"
        elif not name and "input" not in inspect.signature(module.forward).parameters:
            refused[name] = (
                "it is the whole model and names its argument otherwise than torch's: put it in an nn.Sequential"
            )
        elif module.weight.dtype is not torch.float32:
            refused[name] = f"its weight is {module.weight.dtype}, and only float32 is quantized"
        elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            refused[name] = f"it pads with {module.padding_mode!r}, and a kernel pads with the zero point"
        elif isinstance(module, nn.Conv2d) and _uneven(module):
            refused[name] = "it pads more on one side, which no kernel does"
        elif not module.weight.numel():
            refused[name] = f"its weight {list(module.weight.shape)} has no numbers"
        elif not module.weight.isfinite().all():
            raise InputError(f"The weight of {name!r} has NaN or infinity: load other weights, or ignore it.")
    return refused


def _uneven(layer: nn.Conv2d) -> bool:
    pad = layer._reversed_padding_repeated_twice  # left and right, above and below
    return pad[0] != pad[1] or pad[2] != pad[3]


class _LeafTracer(fx.Tracer):
    """Leaves calls of `layers`, subclasses of torch's too, as calls of modules."""

    def __init__(self, layers: Collection[str]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name in self.layers or super().is_leaf_module(module, name)


def _trace(model: nn.Module, named: Mapping[str, Any], layers: Collection[str]) -> fx.GraphModule | None:
    """The model as a graph that computes the same for the first batch, with the shapes of its values; or None."""
    if "" in layers:  # the model is one
        return None
    returned = calls.run(model, **named)
    try:
        expected = outputs(returned)
        traced = fx.GraphModule(model, _LeafTracer(layers).trace(model))
        for node in traced.graph.nodes:
            if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Identity):
                node.replace_all_uses_with(node.all_input_nodes[0])  # where a BatchNorm was
                traced.graph.erase_node(node)
        traced.recompile()
        places = [node for node in traced.graph.nodes if node.op == "placeholder"]
        values = [named.get(node.target, node.args[0] if node.args else None) for node in places]
        pairs = list(zip(expected, outputs(ShapeProp(traced).propagate(*values)), strict=True))
        same = all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)
    except Exception:  # a forward pass may do to a stand-in for a tensor whatever Python can do, and return anything
        return None
    return traced if same and any(a.numel() for a, _ in pairs) else None


def _insert_points(traced: fx.GraphModule, layers: Collection[str]) -> list[str]:
    """Marks the sums that a convolution can do, and puts an Identity behind the other term of each; their names."""
    graph, points = traced.graph, []
    order = {node: place for place, node in enumerate(graph.nodes)}
    convolutions = {name for name in layers if isinstance(traced.get_submodule(name), nn.Conv2d)}
    for node in list(graph.nodes):
        if called(node) not in ADDITIONS or len(node.all_input_nodes) != 2 or node.kwargs:
            continue
        shapes = [getattr(term.meta.get("tensor_meta"), "shape", None) for term in node.args]
        branches = [x for x in node.args if _is_call(x, convolutions) and len(x.users) == 1]
        if not branches or shapes[0] != shapes[1]:
            continue
        branch = max(branches, key=lambda x: order[x])
        (other,) = (x for x in node.args if x is not branch)
        node.meta["summed"] = True
        if other.target in points:
            continue
        points.append(f"{other.name}_point")
        traced.add_submodule(points[-1], nn.Identity())
        with graph.inserting_after(other):
            point = graph.call_module(points[-1], (other,))
        point.meta["tensor_meta"], order[point] = other.meta["tensor_meta"], order[other]
        other.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
    traced.recompile()
    return points


ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def called(node: fx.Node) -> Any:
    """The function, or a method's name, that a node calls; None for modules and inputs, whatever their names are."""
    return node.target if node.op in ("call_function", "call_method") else None


def _is_call(node: fx.Node, modules: Collection[str]) -> bool:
    return node.op == "call_module" and node.target in modules


def is_sum(node: fx.Node) -> bool:
    """Whether a convolution and a `QuantizationPoint` of the same shape are added here."""
    return bool(node.meta.get("summed"))


def _behind(traced: fx.GraphModule, layers: Collection[str], points: Collection[str]) -> dict[str, str]:
    """{layer: the point that it reads}"""
    calls = [node for node in traced.graph.nodes if _is_call(node, layers)]
    sources = {node.target: node.all_input_nodes[0].target for node in calls}
    return {layer: source for layer, source in sources.items() if source in points}


def _planned(name: str, fake: FakeQuantized) -> PlannedLayer:
    weight, grid = fake.weight_grid, fake.input_grid
    ends = ((end - int(grid.zero)) * float(grid.scale) for end in (grid.lo, grid.hi))
    shape, scales = tuple(fake.layer.weight.shape), weight.scale.numel()
    return PlannedLayer(name, type(fake.layer).__name__, shape, weight.bits, grid.bits, scales, *ends)


# --- looking at what the layers get -----------------------------------------------------------------------------------


def _observe(
    model: nn.Module, layers: Sequence[str], points: Sequence[str], batches: Iterable, observer: str, widths: Mapping
) -> dict[str, Observer]:
    names = {
        **{name: f"the input of {name!r}" for name in layers},
        **{name: f"the sum's term {name!r}" for name in points},
    }
    observers = {name: Observer(observer, _width(widths, name), where) for name, where in names.items()}

    with batching.watching(model, names, lambda name, x, _: observers[name].observe(x)):
        for batch in batches:
            calls.run(model, **calls.inputs(model, batch))
    return observers


def _seen(model: nn.Module, layers: Sequence[str], named: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (input, result)} of the first batch's first examples."""
    seen = {}

    def keep(name: str, x: Tensor, result: Tensor) -> None:
        seen[name] = x[:FIRST].clone(), result[:FIRST].clone()

    with batching.watching(model, layers, keep):
        calls.run(model, **named)
    return seen


def replaced(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """`model` with `new` in the place of the module of this name, under all names it has; `new` if it is the model."""
    old = model.get_submodule(name)
    for alias in [alias for alias, module in model.named_modules(remove_duplicate=False) if module is old and alias]:
        model.set_submodule(alias, new)
    return model if name else new


# --- mixed precision --------------------------------------------------------------------------------------------------


def sensitivity(calibrated: Calibrated, batches: Iterable, *, bits: Sequence[int] = (8, 4)) -> list[dict[str, Any]]:
    """Rows "layer", "bits", "bytes", "db": the model's output against float32's if this layer alone is quantized.

    bits: of the weight; its input has the calibrated grid. bytes: codes packed without gaps, and float32 scales.
    InputError for anything but `quantize`'s result, for bits that are not 2 to 8, and for a model that returns no
    number.
    """
    if not isinstance(calibrated, Calibrated):
        raise InputError(f"calibrated is a {type(calibrated).__name__}, but it must be what ptq.quantize returns.")
    if not isinstance(bits, Sequence) or not bits:
        raise InputError(f"bits is {bits!r}, but it must be a list of the widths to try, such as (8, 4).")
    for width in bits:
        check_whole(width, "bits", 2, 8)
    batches = list(batching.not_empty(batching.check_batches(batches, "sensitivity")))
    model = copy.deepcopy(calibrated.model)
    fakes = {name: x for name, x in model.named_modules() if isinstance(x, FakeQuantized)}
    for name, fake in fakes.items():
        model = replaced(model, name, fake.layer)
    for name in calibrated.plan.points:
        model.set_submodule(name, nn.Identity())

    def run(model: nn.Module) -> Tensor:
        results = [outputs(calls.run(model, **calls.inputs(model, batch))) for batch in batches]
        first = [tensors[0].flatten() for tensors in results if tensors]
        if not first:
            raise InputError("The model returns no tensor whose noise could be measured: give a part of it that does.")
        return torch.cat(first)

    rows = []
    with torch.no_grad(), batching.evaluating(model):
        reference = run(model)
        for (name, fake), width in itertools.product(fakes.items(), bits):
            grid = weight_grid(fake.layer, width)
            db = affine.sqnr(reference, run(replaced(model, name, FakeQuantized(fake.layer, grid, fake.input_grid))))
            replaced(model, name, fake.layer)
            size = -(-fake.layer.weight.numel() * width // 8) + grid.scale.nbytes
            rows.append({"layer": name, "bits": width, "bytes": size, "db": db})
    return rows


def allocate(rows: Sequence[Mapping[str, Any]], budget: int) -> dict[str, int]:
    """{layer: bits}, for `quantize(weights=)`: of `sensitivity`'s rows one a layer, with the least noise in `budget`.

    The noise of layers is taken to add up. A knapsack with one item of each class, solved exactly (scipy's HiGHS).
    InputError, with the least bytes there are, if the budget is too small; and for rows that are no `sensitivity`'s.
    """
    if not rows or any(not {"layer", "bits", "bytes", "db"} <= row.keys() for row in rows):
        raise InputError("rows must have a layer, bits, bytes and db each, at least one: give those of sensitivity.")
    if any(math.isnan(row["db"]) or row["db"] == -math.inf for row in rows):
        raise InputError("The noise of a row is NaN or infinite: measure it on other batches.")
    check_whole(budget, "budget", 0)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    size = np.array([row["bytes"] for row in rows])
    noise = np.array([10 ** (-row["db"] / 10) for row in rows])
    each = np.array([[row["layer"] == layer for row in rows] for layer in layers], dtype=float)
    least = sum(min(row["bytes"] for row in rows if row["layer"] == layer) for layer in layers)
    if budget < least:
        raise InputError(
            f"The budget is {budget} bytes, but these layers take {least} at least: allow that, or fewer bits."
        )
    solution = scipy.optimize.milp(
        noise * (1e6 / noise.max() if noise.any() else 1),  # HiGHS is content with 1e-6 above the least
        constraints=[(each, 1, 1), (size[None], 0, budget)],
        integrality=1,
        bounds=(0, 1),
        options={"mip_rel_gap": 0},
    )
    return {row["layer"]: row["bits"] for row, share in zip(rows, solution.x, strict=True) if share > 0.5}
