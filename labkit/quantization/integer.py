"""REAL int8: convert a simulated model into a model of integer kernels, and prove the conversion.

`ptq` decides where values are rounded; the converted model rounds the same values, code by code. `integer_kernels` has
torch's products and the probe that refuses wrong products, `integer_layers` the layers, `integer_graph` the graph in
which codes are handed on, `integer_choice` the layers that are faster in integers. CPU only.
"""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError, check_choice, check_whole
from labkit.modules.replacing import replace_
from labkit.quantization import calls, integer_choice
from labkit.quantization.integer_graph import lower_
from labkit.quantization.integer_kernels import KERNELS, IntegerKernel, available, check_kernel, probe
from labkit.quantization.integer_layers import (
    Dequantize,
    Int8Conv2d,
    Int8Linear,
    IntegerLayer,
    PackedLinear,
    PadCodes,
    Quantize,
    packing,
)
from labkit.quantization.simulated import FakeQuantized, bypassed, weight_grid
from labkit.quantization.weight_only import WeightOnlyLinear

__all__ = [
    "KERNELS", "Dequantize", "Int8Conv2d", "Int8Linear", "IntegerKernel", "IntegerLayer",
    "PackedLinear", "PadCodes", "Quantize", "available", "convert", "convert_dynamic", "probe", "prove",
]  # fmt: skip

WHERE = ("everywhere", "pays")


def convert(model: nn.Module, *, where: str = "everywhere", example: Any = None) -> nn.Module:
    """REAL: return a model of integer kernels, made from a SIMULATED model of `ptq`, `qat` or `weight_only`.

    model: a model with `FakeQuantized` layers or with `WeightOnlyLinear`s; the model is not changed.
    where: "everywhere", or "pays": layers that are slower in integers stay floats, see below.
    example: arguments of a call, for "pays" alone, in any form that `labkit.modules.batches` takes, of the batch size
        and the shapes that the model will serve.

    With `FakeQuantized` layers, the result equals the model code by code. `WeightOnlyLinear`s become `PackedLinear`s
    and differ by rounding to bfloat16. In a graph (`Calibrated.plan.traced`), codes are handed from layer to layer: if
    all readers of a value quantize it on the same grid, the layer gives codes of that grid, ReLU is the clip at the
    zero point, and a sum is added up before its codes are rounded. Elsewhere, and in models without a graph, every
    layer takes float32 and gives float32.

    where="pays" times each layer on the example, on this machine and torch's present number of threads, and chooses the
    layers that become integers so that their time and that of the changes between codes and floats is least. Then the
    result is compared with the model all in integers, all in float32 and, if the CPU multiplies bfloat16 natively, all
    in bfloat16; the fastest is returned, which may hold no integers at all. A layer that stays in floats rounds to no
    grid: its weight is the float model's, or after `qat` the rounded one that was trained. In bfloat16, numbers are
    rounded to 8 significant bits. The result's `integer_report` has a row for the model and for each layer: the
    seconds, the choice and the reason (`integer_choice.report`). Integer layers are those of "everywhere", `prove`
    proves them, and floats are not proved. Takes some 10 s, and memory for six models.

    Codes equal the codes of exact arithmetic, except next to a rounding tie, where the kernel's float32 may round up
    instead of down. Raises InputError without quantized layers, for weights that no kernel takes, if the kernels of
    the machine do not pass `probe`, and for "pays" without an example or with `WeightOnlyLinear`s.
    """
    check_choice(where, WHERE, "where")
    if (where == "pays") != (example is not None):
        raise InputError('where="pays" times the layers on an example: give where="pays" and example=, or neither.')
    calls.check_model(model)
    quantized = FakeQuantized | WeightOnlyLinear
    layers = {name: module for name, module in model.named_modules() if isinstance(module, quantized)}
    if not layers:
        raise InputError("The model has no quantized layer: call ptq.quantize or weight_only.quantize first.")
    for name, layer in layers.items():
        _check_convertible(name, layer)
    if where == "everywhere":
        return lower_(copy.deepcopy(model))
    if any(isinstance(layer, WeightOnlyLinear) for layer in layers.values()):
        raise InputError(
            'where="pays" times integers beside float layers, which a model of weight_only no longer has: leave it out.'
        )
    return integer_choice.convert(model, calls.inputs(model, example))


def _check_convertible(name: str, layer: FakeQuantized | WeightOnlyLinear) -> None:
    """Raise InputError unless a kernel takes the layer's weight and passes the probe."""
    if isinstance(layer, FakeQuantized):
        kernel = "qlinear" if isinstance(layer.layer, nn.Linear) else "qconv"
        check_kernel(kernel, layer.weight_grid.bits, layer.layer)
        return
    kernel, reason = packing(layer)
    if reason:
        raise InputError(f"{name or 'The layer'} cannot be converted ({reason}): quantize it so, or name it in ignore.")
    check_kernel(kernel, layer.bits, layer)


def convert_dynamic(
    model: nn.Module,
    *,
    weights: int = 8,
    rows: int = 1,
) -> nn.Module:
    """REAL: return a copy of `model` with int8 Linears that quantize inputs at every call.

    weights: bits, 2 to 8, with a scale for each output channel. Activations have 8 bits, see `Int8Linear`, and need no
        calibration.
    rows: number of rows that a Linear multiplies in the calls that shall be fast: for a transformer the batch size
        times the tokens of a call, 1 for a decoder that writes a text. On a CPU with AMX the kernel is chosen for this
        number (`integer_kernels.is_faster_by_qlinear`), and a layer's results differ by float32's rounding.
    Raises InputError without a Linear, for less than a row, and if the kernels of this machine do not pass `probe`.
    """
    check_whole(rows, "rows", 1)
    calls.check_model(model)
    uncalled = bypassed(model)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    layers = {name: layer for name, layer in linears.items() if layer not in uncalled}
    if not layers:
        raise InputError("The model has no nn.Linear that is called: give another, or calibrate it with ptq.quantize.")
    grids = {name: weight_grid(layer, weights) for name, layer in layers.items()}
    kernels = ("qlinear", "int_mm") if probe(KERNELS["fbgemm"], weights) else ("fbgemm",)
    for layer in layers.values():
        for kernel in kernels:
            check_kernel(kernel, weights, layer)
    model = copy.deepcopy(model)
    for name, grid in grids.items():
        model = replace_(model, name, Int8Linear(layers[name], grid, rows=rows))
    return model


# --- proof ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prove(model: nn.Module, batch: Any) -> list[dict[str, Any]]:
    """Compare every integer layer of a converted model with exact arithmetic on the codes that the layer gets.

    model: a result of `convert`.
    batch: arguments of a call of the model, in any form that `labkit.modules.batches` takes.

    Returns a row for each call of a layer, with the name "layer" and four counts:
    "codes": codes handed on; 0 for a layer with results in float32.
    "different": codes that differ from a single rounding in float64; for float32 results, numbers that differ by more
        than the rounding of their terms.
    "ties": values so near to the middle between two codes that float32 may round up or down.
    "wrong": different codes that are not at a tie or are off by more than 1. The layer is proved if "wrong" is 0; the
        rest is reported, not tolerated.
    Layers that quantize on the range of each call (dynamic) are left out.

    Raises InputError for a model without integer layers, for a batch with NaN or infinity, and for a batch without a
    number to compare a layer on.
    """
    calls.check_model(model)
    named = calls.inputs(model, batch)
    comparison = _LayerComparison()
    with contextlib.ExitStack() as hooks:
        for name, layer in model.named_modules():
            for handle in comparison.watch(name, layer):
                hooks.callback(handle.remove)
        calls.run(model, **named)
    if not comparison.rows:
        raise InputError("The model has no integer layer with a fixed input grid: convert a calibrated model.")
    return comparison.rows


class _LayerComparison:
    """Hooks on the layers of a converted model that lay each call beside exact arithmetic."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.arguments: dict[nn.Module, list[Tensor]] = {}  # of the calls that go on

    def watch(self, name: str, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook a layer if it quantizes or can be compared; return the handles of the hooks."""
        if type(layer) is Quantize:
            return [layer.register_forward_pre_hook(_check_finite)]
        has_input_grid = isinstance(layer, IntegerLayer) and "input" in layer.highest
        if not has_input_grid and not isinstance(layer, PackedLinear):
            return []

        def compare(layer: IntegerLayer | PackedLinear, _: tuple, result: Tensor) -> None:
            counts = layer.compare(result, *self.arguments.pop(layer))
            self.rows.append({"layer": name, **counts})

        return [
            layer.register_forward_pre_hook(self._remember, with_kwargs=True),
            layer.register_forward_hook(compare),
        ]

    def _remember(self, layer: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        self.arguments[layer] = [x.clone() for x in (*args, *kwargs.values())]  # a sum overwrites its term
        _check_finite(layer, self.arguments[layer])


def _check_finite(_: nn.Module, args: Sequence[Tensor]) -> None:
    if not args[0].isfinite().all():
        raise InputError("The batch makes NaN or infinity, for which there is no code: give other data.")
