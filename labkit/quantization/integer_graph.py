"""Rewrite the graph of a simulated model into a graph of integer layers that hand codes from layer to layer.

Two passes. `CodePlan` goes from the outputs to the inputs and decides on which grid each value is handed on: if all
readers quantize the value on the same grid, and if the operation before can give codes, on the grid of the readers.
`Lowering` goes from the inputs to the outputs and builds the new graph.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import fx, nn

from labkit.modules.replacing import replace_
from labkit.quantization.affine import Grid
from labkit.quantization.integer_layers import (
    Dequantize,
    Int8Conv2d,
    Int8Linear,
    IntegerLayer,
    PackedLinear,
    PadCodes,
    Quantize,
)
from labkit.quantization.ptq_graph import called, is_sum
from labkit.quantization.simulated import FakeQuantized, QuantizationPoint
from labkit.quantization.weight_only import WeightOnlyLinear

RELU = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
RELU6 = {nn.ReLU6, F.relu6}


def integer_layer(layer: FakeQuantized, output: Grid | None = None, term: Grid | None = None) -> IntegerLayer:
    """Make the integer layer of a simulated layer.

    output: the grid of the codes handed on; None: float32.
    term: the grid of the codes added before rounding, by a convolution.
    """
    if isinstance(layer.layer, nn.Linear):
        return Int8Linear(layer.layer, layer.weight_grid, layer.input_grid, output)
    return Int8Conv2d(layer.layer, layer.weight_grid, layer.input_grid, output, term)


def lower_(model: nn.Module) -> nn.Module:
    """Put integer layers into a simulated model in place, and return the model; a graph hands on codes."""
    if isinstance(model, fx.GraphModule):
        return Lowering(model).run()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FakeQuantized):
            model = replace_(model, name, integer_layer(layer))
        elif isinstance(layer, WeightOnlyLinear):
            model = replace_(model, name, PackedLinear(layer))
    return model


class CodePlan:
    """A plan of the values that a simulated graph hands on in codes.

    model: the graph.
    modules: modules of the graph by name.
    grids: {node: grid} of the values in codes; the rest are floats.
    layer_of_sum: {addition: the convolution that does the addition in a kernel}.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        self.modules = dict(model.named_modules())
        self.grids: dict[fx.Node, Grid] = {}
        self.layer_of_sum: dict[fx.Node, fx.Node] = {}
        wants: dict[fx.Node, list[Grid | None]] = defaultdict(list)  # a grid for each reader; None: floats
        for node in reversed(model.graph.nodes):
            grid, input_grid = self._decide(node, _common_grid(wants[node]))
            if grid is not None:
                self.grids[node] = grid
            for source in node.all_input_nodes:
                wants[source].append(input_grid)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self.modules[node.target] if node.op == "call_module" else None

    def _decide(self, node: fx.Node, common: Grid | None) -> tuple[Grid | None, Grid | None]:
        """Return the grids of a node's value and of its inputs; None stands for floats.

        common: the grid of all readers, or None.
        """
        module = self.module(node)
        if isinstance(module, QuantizationPoint):
            return module.grid, module.grid
        if isinstance(module, FakeQuantized):
            return common, module.input_grid
        if common is None:
            return None, None
        if self._keeps_codes(node, common):
            return common, common
        layer = self._fused_layer(node)
        if layer is not None:
            self.layer_of_sum[node] = layer
            return common, None
        return None, None

    def _keeps_codes(self, node: fx.Node, grid: Grid) -> bool:
        """Return True if a node's operation changes no code of `grid`, or only pads.

        ReLU changes no code if the code of 0 is the lowest, ReLU6 if the code of 6 is also beyond the highest.
        """
        module = self.module(node)
        operation = type(module) if module is not None else called(node)
        starts_at_zero = int(grid.zero) == grid.lo
        if operation in RELU:
            return starts_at_zero
        if operation in RELU6:
            end_of_last_code = grid.scale * (grid.hi - grid.zero - 0.5)
            return starts_at_zero and bool(end_of_last_code < 6)
        return operation is nn.ZeroPad2d

    def _fused_layer(self, node: fx.Node) -> fx.Node | None:
        """Return the convolution that a kernel can sum with a point in this node; else None.

        The sum must be the only reader of the convolution.
        """
        if not is_sum(node):
            return None
        layers = [source for source in node.args if self._is_unshared_convolution(source)]
        points = [source for source in node.args if isinstance(self.module(source), QuantizationPoint)]
        return layers[0] if layers and points else None

    def _is_unshared_convolution(self, node: fx.Node) -> bool:
        module = self.module(node)
        is_convolution = isinstance(module, FakeQuantized) and isinstance(module.layer, nn.Conv2d)
        return is_convolution and len(node.users) == 1


class Lowering:
    """Builds the graph of integer layers that a plan describes.

    model: the simulated graph; its modules are replaced in place.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model
        self.plan = CodePlan(model)
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}  # by the node of the simulated graph
        self.quantized: dict[tuple[fx.Node, str], fx.Node] = {}  # by that node and a grid
        self.dequantized: dict[fx.Node, fx.Node] = {}  # by that node
        self.sums: list[fx.Node] = []

    def run(self) -> fx.GraphModule:
        """Return the model of integer layers."""
        fused_layers = set(self.plan.layer_of_sum.values())
        for node in self.model.graph.nodes:
            if node not in fused_layers:
                self.new[node] = self._lower(node)
        self._spare_terms()
        for name, module in self.plan.modules.items():
            is_unused = isinstance(module, FakeQuantized) and self.model.get_submodule(name) is module
            if is_unused:
                self.model.delete_submodule(name)
        return fx.GraphModule(self.model, self.graph)

    def _lower(self, node: fx.Node) -> fx.Node:
        """Return the new node for a node of the simulated graph."""
        module = self.plan.module(node)
        grid = self.plan.grids.get(node)
        if node in self.plan.layer_of_sum:
            return self._sum(node, grid)
        if isinstance(module, FakeQuantized):
            return self._layer(node, grid)
        if grid is None:
            return self.graph.node_copy(node, self._floats)
        codes = self._codes(node.all_input_nodes[0], grid)
        if type(module) is nn.ZeroPad2d:
            pad = PadCodes(grid, tuple(module.padding))
            return self._call(pad, f"{node.name}_codes", codes)
        return codes  # a point or a ReLU: codes already

    def _sum(self, node: fx.Node, output: Grid) -> fx.Node:
        """Return the convolution that adds a point to its result."""
        layer = self.plan.layer_of_sum[node]
        (point,) = (source for source in node.all_input_nodes if source is not layer)
        term = self.plan.module(point).grid
        new = self._layer(layer, output, term, self._codes(point, term))
        self.sums.append(new)
        return new

    def _layer(
        self,
        node: fx.Node,
        output: Grid | None,
        term: Grid | None = None,
        other: fx.Node | None = None,
    ) -> fx.Node:
        """Return the call of the integer layer; `output` and `term` as for `integer_layer`, other: the codes to add."""
        layer = self.plan.module(node)
        name = node.target
        was_called_before = not isinstance(self.model.get_submodule(name), FakeQuantized)
        if was_called_before:  # with other grids maybe
            name = f"{name}_{node.name}"
        arguments = [self._codes(node.all_input_nodes[0], layer.input_grid)]
        if other is not None:
            arguments.append(other)
        return self._call(integer_layer(layer, output, term), name, *arguments)

    def _codes(self, node: fx.Node, grid: Grid) -> fx.Node:
        """Return the value of a node of the simulated graph in codes of `grid`."""
        if _same(self.plan.grids.get(node), grid):
            return self.new[node]
        key = (node, f"{float(grid.scale)} {int(grid.zero)} {grid.bits}")
        if key not in self.quantized:
            number = len(self.quantized) + len(self.dequantized)
            name = f"{node.name}_quantize_{number}"
            floats = self._floats(node)
            self.quantized[key] = self._call(Quantize(grid), name, floats)
        return self.quantized[key]

    def _floats(self, node: fx.Node) -> fx.Node:
        """Return the value of a node of the simulated graph in floats."""
        if node not in self.plan.grids:
            return self.new[node]
        if node not in self.dequantized:
            dequantize = Dequantize(self.plan.grids[node])
            name = f"{node.name}_dequantize"
            self.dequantized[node] = self._call(dequantize, name, self.new[node])
        return self.dequantized[node]

    def _call(self, module: nn.Module, name: str, *args: fx.Node) -> fx.Node:
        self.model.set_submodule(name, module)
        return self.graph.call_module(name, args)

    def _spare_terms(self) -> None:
        """Copy the term of a sum, which the kernel overwrites, if the term is the sum's input or is read later."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        for node in self.sums:
            source, term = node.args
            last_reader = max(order.get(user, 0) for user in term.users)  # 0: a copy, made before
            if source is term or last_reader > order[node]:
                with self.graph.inserting_before(node):
                    copy = self.graph.call_method("clone", (term,))
                node.update_arg(1, copy)


def _common_grid(grids: list[Grid | None]) -> Grid | None:
    """Return the first of some grids if all are the same; else None."""
    if not grids:
        return None
    first = grids[0]
    return first if all(_same(first, grid) for grid in grids) else None


def _same(a: Grid | None, b: Grid | None) -> bool:
    if a is None or b is None:
        return False
    same_scale = float(a.scale) == float(b.scale)
    same_zero = int(a.zero) == int(b.zero)
    return same_scale and same_zero and a.bits == b.bits
