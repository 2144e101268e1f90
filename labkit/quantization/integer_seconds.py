"""Time each layer of a simulated model in integers and in floats, in its place in a call of the model.

In a graph every node is timed (`_TimedGraph`), and the operations around a layer that integers spare or need are
counted with the layer (`_GraphSeconds`). Without a graph each layer is timed alone, by hooks.
"""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from labkit.modules.hooks import forward_hooks
from labkit.quantization import calls
from labkit.quantization.affine import Grid
from labkit.quantization.integer_graph import Lowering, lower_
from labkit.quantization.integer_layers import Dequantize, PadCodes, Quantize
from labkit.quantization.ptq_graph import placeholder_values
from labkit.quantization.simulated import FakeQuantized, QuantizationPoint

ROUNDS = 5  # of calls, at least
LAYERS_S = 2.0  # seconds in which further rounds begin

Seconds = dict[str, float]  # by name


def _now() -> float:
    """Return the time in seconds: of this process on the CPU if torch has a single thread, else of the wall clock.

    Other programs on the machine leave the time on the CPU alone.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class SharedQuantize(NamedTuple):
    """A step from floats to codes: seconds of a call, and the layers that read the codes."""

    seconds: float
    readers: tuple[str, ...]


class LayerSeconds(NamedTuple):
    """Seconds of a call in each layer that the call reaches.

    integer: by layer, with the padding of its codes and their way to floats, if any.
    floats: {type: seconds by layer}, with the operations that integers are spared, such as ReLU.
    quantizes: steps to codes, spared if all readers stay floats.
    conversions: {(giver, reader): seconds if only one of two layers that hand on codes becomes integers}.
    """

    integer: Seconds
    floats: dict[str, Seconds]
    quantizes: tuple[SharedQuantize, ...] = ()
    conversions: Mapping[tuple[str, str], float] = {}

    def of_layer(self, name: str) -> Seconds:
        """Return the seconds of a layer by type, int8 with its share of the steps to codes; {} if it is not called."""
        if name not in self.integer:
            return {}
        shares = [step.seconds / len(step.readers) for step in self.quantizes if name in step.readers]
        in_floats = {dtype: of_layers[name] for dtype, of_layers in self.floats.items()}
        return {"int8": self.integer[name] + sum(shares), **in_floats}

    def fastest_float(self, name: str) -> str:
        """Return the type in which a layer takes the least time besides int8."""
        return min(self.floats, key=lambda dtype: self.floats[dtype][name])


def layer_seconds(
    model: nn.Module,
    in_floats: Mapping[str, nn.Module],
    layers: Collection[str],
    named: Mapping[str, Any],
) -> LayerSeconds:
    """Time each layer of a simulated model that a call reaches.

    model: the simulated model.
    in_floats: {type: the model with all layers in that type}.
    layers: names of the simulated layers.
    named: the arguments of the call, by name.
    """
    if isinstance(model, fx.GraphModule):
        return _GraphSeconds(model, in_floats, named).layer_seconds()
    models = {"int8": lower_(copy.deepcopy(model)), **in_floats}
    seconds = _in_turns({kind: partial(_seconds_of_modules, each, layers, named) for kind, each in models.items()})
    return LayerSeconds(seconds.pop("int8"), seconds)


def _in_turns(runs: Mapping[str, Callable[[], Seconds]]) -> dict[str, Seconds]:
    """Call all runs in turns, after a first round that does not count, and return the medians of each by name."""
    rounds = []
    start = time.perf_counter()
    while len(rounds) <= ROUNDS or time.perf_counter() - start < LAYERS_S:
        rounds.append({kind: run() for kind, run in runs.items()})
    medians = {}
    for kind in runs:
        counted = [seconds[kind] for seconds in rounds[1:]]
        medians[kind] = {name: statistics.median(seconds[name] for seconds in counted) for name in counted[0]}
    return medians


def _seconds_of_modules(model: nn.Module, names: Collection[str], named: Mapping[str, Any]) -> Seconds:
    """Call a model, and return the seconds in each of the named modules that the call reaches."""
    names = list(names)
    modules = [model.get_submodule(name) for name in names]
    seconds = defaultdict(float)
    started = 0.0

    def start(*_: Any) -> None:
        nonlocal started
        started = _now()

    def stop(number: int, *_: Any) -> None:
        seconds[names[number]] += _now() - started

    with forward_hooks(modules, start, before=True), forward_hooks(modules, stop):
        calls.run(model, **named)
    return dict(seconds)


class _TimedGraph(fx.Interpreter):
    """Calls a graph node by node.

    seconds: of the last call, by the name of the node.
    shapes: of the modules' results, by the name of the node.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seconds: Seconds = {}
        self.shapes: dict[str, torch.Size] = {}

    def seconds_of_nodes(self, named: Mapping[str, Any]) -> Seconds:
        """Call the graph, and return the seconds of each node."""
        self.seconds = {}
        self.run(*placeholder_values(self.module, named))
        return self.seconds

    def run_node(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        start = _now()
        result = getattr(self, node.op)(node.target, args, kwargs)
        self.seconds[node.name] = _now() - start
        if node.op == "call_module" and isinstance(result, Tensor):
            self.shapes[node.name] = result.shape
        return result


class _GraphSeconds:
    """Times the nodes of a simulated graph in integers and in floats, and adds them up by layer.

    model: the simulated graph.
    in_floats: {type: the graph with all layers in that type}.
    named: the arguments of a call, by name.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        in_floats: Mapping[str, fx.GraphModule],
        named: Mapping[str, Any],
    ) -> None:
        self.lowering = Lowering(copy.deepcopy(model))
        integers = _TimedGraph(self.lowering.run())
        runs = {"int8": partial(integers.seconds_of_nodes, named)}
        for dtype, graph in in_floats.items():
            runs[dtype] = partial(_TimedGraph(graph).seconds_of_nodes, named)
        self.of_nodes = _in_turns(runs)
        self.graph = integers.module.graph
        self.modules = dict(integers.module.named_modules())
        self.shapes = integers.shapes
        self.simulated_calls = self._simulated_calls()
        self.layers = {new: call.target for new, call in self.simulated_calls.items()}
        self.conversion_s: dict[torch.Size, float] = {}  # by the shape of the value

    def layer_seconds(self) -> LayerSeconds:
        """Return the seconds of the nodes, added up by layer."""
        in_floats = {dtype: of_nodes for dtype, of_nodes in self.of_nodes.items() if dtype != "int8"}
        return LayerSeconds(
            integer=self._integer_seconds(),
            floats={dtype: self._float_seconds(of_nodes) for dtype, of_nodes in in_floats.items()},
            quantizes=self._quantizes(),
            conversions=self._conversions(),
        )

    def _simulated_calls(self) -> dict[fx.Node, fx.Node]:
        """Return {call of an integer layer: call of the same layer in the simulated graph}."""
        plan = self.lowering.plan
        simulated = {}
        for node, new in self.lowering.new.items():
            call = plan.layer_of_sum.get(node, node)
            if isinstance(plan.module(call), FakeQuantized):
                simulated[new] = call
        return simulated

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def _origin(self, node: fx.Node) -> fx.Node:
        """Return the layer or the `Quantize` that makes the codes of a node of the integer graph."""
        while node not in self.layers and type(self._module(node)) is not Quantize:
            (node,) = node.all_input_nodes  # of padding, of a copy, or of a `Dequantize`
        return node

    def _integer_seconds(self) -> Seconds:
        of_nodes = self.of_nodes["int8"]
        seconds = dict.fromkeys(self.layers.values(), 0.0)
        for node in self.graph.nodes:
            if node in self.layers:
                seconds[self.layers[node]] += of_nodes[node.name]
            elif isinstance(self._module(node), Dequantize | PadCodes):
                origin = self._origin(node)
                if origin in self.layers:
                    seconds[self.layers[origin]] += of_nodes[node.name]
        return seconds

    def _float_seconds(self, of_nodes: Seconds) -> Seconds:
        plan = self.lowering.plan
        seconds = dict.fromkeys(self.layers.values(), 0.0)
        for call in self.simulated_calls.values():
            seconds[call.target] += of_nodes[call.name]
        for node in plan.grids:
            is_spared = not isinstance(plan.module(node), FakeQuantized | QuantizationPoint)
            origin = self._origin(self.lowering.new[node])
            if is_spared and origin in self.layers:
                seconds[self.layers[origin]] += of_nodes[node.name]
        return seconds

    def _quantizes(self) -> tuple[SharedQuantize, ...]:
        readers = defaultdict(set)
        for node, layer in self.layers.items():
            for source in node.all_input_nodes:
                origin = self._origin(source)
                if origin not in self.layers:
                    readers[origin].add(layer)
        steps = []
        for node, layers in readers.items():
            steps.append(SharedQuantize(self.of_nodes["int8"][node.name], tuple(sorted(layers))))
        return tuple(steps)

    def _conversions(self) -> dict[tuple[str, str], float]:
        seconds = {}
        for node, reader in self.layers.items():
            for source in node.all_input_nodes:
                origin = self._origin(source)
                giver = self.layers.get(origin, reader)
                if giver != reader:
                    seconds[giver, reader] = self._conversion_seconds(self.shapes[origin.name])
        return seconds

    def _conversion_seconds(self, shape: torch.Size) -> float:
        """Return the seconds of a `Quantize` for a value of this shape; the way back to floats is taken for as long."""
        if shape not in self.conversion_s:
            quantize = Quantize(Grid(torch.tensor(0.01), torch.tensor(0), 8, 0, 255))
            values = torch.rand(shape)
            samples = []
            for _ in range(1 + ROUNDS):
                start = _now()
                quantize(values)
                samples.append(_now() - start)
            self.conversion_s[shape] = statistics.median(samples[1:])
        return self.conversion_s[shape]
