"""The result of post-training quantization: the simulated model, the plan of its layers, and a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from labkit.quantization.simulated import FakeQuantized


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that is quantized.

    name, kind: the name in the model, and the class of the float layer.
    shape: shape of the weight.
    weights, activations: bits of the weight and of the input.
    scales: number of scales of the weight.
    lo, hi: the range of the input's grid.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    activations: int
    scales: int
    lo: float
    hi: float

    def __str__(self) -> str:
        layer = f"{self.name}: {self.kind} {list(self.shape)}"
        weight = f"weights {self.weights} bits x {self.scales} scales"
        ends = f"from {self.lo:.3g} to {self.hi:.3g}"
        return f"{layer}, {weight}, input {self.activations} bits {ends}"


@dataclass(frozen=True)
class QuantizationPlan:
    """The decisions of `ptq.quantize`.

    layers: the quantized layers.
    points: names of the values that are rounded for a sum.
    refused: {layer: the reason to stay float32}.
    traced: True if the model became a graph, in which codes can be handed from layer to layer.
    """

    layers: tuple[PlannedLayer, ...]
    points: tuple[str, ...]
    refused: Mapping[str, str]
    traced: bool

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        lines += [f"{name}: float32, {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Calibrated:
    """The result of `ptq.quantize`.

    model: the quantized model, SIMULATED.
    plan: the decisions, layer by layer.
    report: a row for each layer that the first examples reach, with the signal to quantization noise in dB. Rows:
        "layer"; "weight_db" of the weight; "alone_db" of the layer's result if only this layer is quantized;
        "chain_db" of the layer's result in the quantized model, after all the layers before.
    """

    model: nn.Module
    plan: QuantizationPlan
    report: tuple[dict[str, Any], ...]


def planned(name: str, fake: FakeQuantized) -> PlannedLayer:
    """Describe the simulated layer of this name."""
    weight, grid = fake.weight_grid, fake.input_grid
    scale, zero = float(grid.scale), int(grid.zero)
    return PlannedLayer(
        name=name,
        kind=type(fake.layer).__name__,
        shape=tuple(fake.layer.weight.shape),
        weights=weight.bits,
        activations=grid.bits,
        scales=weight.scale.numel(),
        lo=(grid.lo - zero) * scale,
        hi=(grid.hi - zero) * scale,
    )
