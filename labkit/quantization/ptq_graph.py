"""The graph of a model for post-training quantization: the traced forward pass, and the sums that kernels can do."""

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from labkit.modules.returned import outputs
from labkit.quantization import calls

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class _LeafTracer(fx.Tracer):
    """Records a call of any of `layers`, subclasses of torch's too, as the call of a module."""

    def __init__(self, layers: Collection[str]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name in self.layers or super().is_leaf_module(module, name)


def trace(model: nn.Module, named: Mapping[str, Any], layers: Collection[str]) -> fx.GraphModule | None:
    """Trace a model into a graph that records the shape of each value.

    named: the arguments of an example call, by name.
    layers: names of the modules to keep whole.
    Returns None if the model cannot be traced, if the graph computes something else for the example, or if the model
    itself is the only layer.
    """
    if "" in layers:
        return None
    returned = calls.run(model, **named)
    try:
        expected = outputs(returned)
        traced = fx.GraphModule(model, _LeafTracer(layers).trace(model))
        remove_identities(traced)
        results = outputs(ShapeProp(traced).propagate(*placeholder_values(traced, named)))
        same = len(expected) == len(results) and all(map(_agree, expected, results))
    except Exception:  # a forward pass may do to a stand-in for a tensor whatever Python can do, and return anything
        return None
    has_numbers = any(tensor.numel() for tensor in expected)
    return traced if same and has_numbers else None


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b)


def remove_identities(traced: fx.GraphModule) -> None:
    """Take out calls of nn.Identity, which `fold` puts in the place of a batch norm."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    traced.recompile()


@torch.no_grad()
def compute_constants(traced: fx.GraphModule) -> None:
    """Compute the values that depend on no input of a graph, and store them as buffers in place of the operations.

    A forward pass may keep such a value from call to call, as LeViT keeps its attention biases; a graph would not.
    """
    interpreter = fx.Interpreter(traced)
    constants = interpreter.env
    for node in traced.graph.nodes:
        is_operation = node.op in ("call_function", "call_method") and node.all_input_nodes
        if node.op == "get_attr" or (is_operation and all(source in constants for source in node.all_input_nodes)):
            constants[node] = interpreter.run_node(node)
    for node, value in list(constants.items()):
        is_read = any(reader not in constants for reader in node.users)
        if node.op == "get_attr" or not is_read or not isinstance(value, Tensor):
            continue
        name = f"{node.name}_constant"
        traced.register_buffer(name, value)
        with traced.graph.inserting_before(node):
            node.replace_all_uses_with(traced.graph.get_attr(name))
    for node in reversed(constants):
        if not node.users:
            traced.graph.erase_node(node)
    traced.recompile()


def placeholder_values(traced: fx.GraphModule, named: Mapping[str, Any]) -> list[Any]:
    """Return the value of each input of a graph: from `named`, else the default of the forward pass."""
    values = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            values.append(named.get(node.target, default))
    return values


def insert_points(traced: fx.GraphModule, layers: Collection[str]) -> list[str]:
    """Mark the sums that a convolution can do, and insert a module for the point of the other term of each sum.

    traced: the graph, changed in place.
    layers: names of the layers to be quantized.
    Returns the names of the inserted modules, each an nn.Identity for now.
    """
    graph = traced.graph
    points: list[str] = []
    order = {node: place for place, node in enumerate(graph.nodes)}
    convolutions = {name for name in layers if isinstance(traced.get_submodule(name), nn.Conv2d)}
    for node in list(graph.nodes):
        if not _adds_two_of_one_shape(node):
            continue
        branches = [term for term in node.args if is_call(term, convolutions) and len(term.users) == 1]
        if not branches:
            continue
        branch = max(branches, key=order.get)  # computed last, so that its accumulator can take the sum
        (other,) = (term for term in node.args if term is not branch)
        node.meta["summed"] = True
        if other.target in points:
            continue
        name = f"{other.name}_point"
        points.append(name)
        traced.add_submodule(name, nn.Identity())
        with graph.inserting_after(other):
            point = graph.call_module(name, (other,))
        point.meta["tensor_meta"] = other.meta["tensor_meta"]
        order[point] = order[other]
        other.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
    traced.recompile()
    return points


def _adds_two_of_one_shape(node: fx.Node) -> bool:
    """Return True if a node adds two different values of one shape and does nothing else."""
    if called(node) not in ADDITIONS or len(node.all_input_nodes) != 2 or node.kwargs:
        return False
    first, second = (getattr(term.meta.get("tensor_meta"), "shape", None) for term in node.args)
    return first == second


def points_read(traced: fx.GraphModule, layers: Collection[str], points: Collection[str]) -> dict[str, str]:
    """Return {layer: the point that it reads}, for layers whose input is a point."""
    sources = {}
    for node in traced.graph.nodes:
        if is_call(node, layers):
            sources[node.target] = node.all_input_nodes[0].target
    return {layer: source for layer, source in sources.items() if source in points}


def called(node: fx.Node) -> Any:
    """Return the function, or the name of the method, that a node calls; None for a module or an input of any name."""
    return node.target if node.op in ("call_function", "call_method") else None


def is_call(node: fx.Node, modules: Collection[str]) -> bool:
    """Return True if a node calls a module whose name is in `modules`."""
    return node.op == "call_module" and node.target in modules


def is_sum(node: fx.Node) -> bool:
    """Return True if a node adds a convolution's result and a `QuantizationPoint` of the same shape."""
    return bool(node.meta.get("summed"))
