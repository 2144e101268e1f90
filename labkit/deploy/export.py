"""A model as a graph of torch.export, or as an ONNX file with quantized layers between QuantizeLinear and its inverse.

The file holds the grids simulated by `ptq.quantize`; runtimes fuse each pair of QuantizeLinear and DequantizeLinear
into int8 kernels. Activations are unsigned and weights signed, with a scale per output channel: a VNNI
instruction multiplies u8 by s8, and with signed activations ONNX Runtime's convolutions are three times slower. Biases
are int32 on the accumulator's grid. The only grids chosen here are for results that some engines have to round.
"""

import contextlib
import copy
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from labkit.errors import InputError
from labkit.modules import batches as batching
from labkit.modules import hooks
from labkit.modules.returned import outputs
from labkit.quantization import affine, integer_graph
from labkit.quantization.affine import Grid
from labkit.quantization.observers import Observer
from labkit.quantization.ptq import FakeQuantized, QuantizationPoint

CLIPS = integer_graph.RELU | integer_graph.RELU6


@torch.no_grad()
def write_onnx(
    model: nn.Module,
    named: Mapping[str, Any],
    path: Path,
    *,
    batches: Iterable | None = None,
    dynamic: Mapping[int, tuple[int, int]] | None = None,
) -> None:
    """Write `model` to the ONNX file `path`.

    model: a float model, or `Calibrated.model` of `ptq.quantize`; unchanged afterwards.
    named: example of the keyword arguments, which fixes the shapes.
    dynamic: {dimension: (least, most)} of the dimensions that vary, the same in all inputs; all else is fixed.
    batches: calibration data for an engine with int8 convolutions of 8-bit results only: a result is rounded to the
        extremes seen in `batches` if a reader does not round the result (a sum, a mean). Without `batches` the result
        stays float32. Only in a model that is a graph (`Calibrated.plan.traced`).
    Raises InputError for a model that torch.export cannot follow.
    """
    if is_quantized(model):
        model = _with_integer_layers(copy.deepcopy(model))
        if isinstance(model, fx.GraphModule):
            _take_in_pads(model)
            if batches is not None:
                _round_results(model, batches)
    named = batching.placed(model, dict(named))
    names = [name for name, value in named.items() if isinstance(value, Tensor)]
    shapes = _dimensions(named, dynamic) if dynamic else None
    with _exporting("to ONNX"):  # from a model, torch 2.9 exports otherwise: BERT then takes no batch of 1
        graph = torch.export.export(
            model,
            (),
            named,
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program = torch.onnx.export(graph, (), kwargs=named, dynamo=True, verbose=False, input_names=names)
        for node in program.model.graph:  # the Python lines that the nodes come from: half of a small file
            node.metadata_props.clear()
        program.save(path)


@torch.no_grad()
def program(
    model: nn.Module, named: Mapping[str, Any], dynamic: Mapping[int, tuple[int, int]] | None = None
) -> torch.export.ExportedProgram:
    """Export `model` as a graph from the tensors of `named`, in order, to a list of tensors.

    named, dynamic: as for `write_onnx`.
    Raises InputError for a model that torch.export cannot follow, or cannot follow without fixing a dimension.
    """
    named = batching.placed(model, dict(named))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    shapes = None
    if dynamic:
        shapes = (tuple(_dimensions(tensors, dynamic).values()),)
    with _exporting("by torch.export"), batching.evaluating(model):
        return torch.export.export(_Bound(model, named), tuple(tensors.values()), dynamic_shapes=shapes)


class _Bound(nn.Module):
    """A model called with the tensors of `named` by position; the rest of `named` is constant."""

    def __init__(self, model: nn.Module, named: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in named.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in named.items() if name not in self.names}

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        named = dict(zip(self.names, tensors, strict=True))
        return outputs(self.model(**named, **self.constants))


def _dimensions(named: Mapping[str, Any], dynamic: Mapping[int, tuple[int, int]]) -> dict[str, Any]:
    """Return the varying dimensions for the exporter, by input; inputs without tensors get None.

    A Dim used in several inputs has the same size in all.
    """
    dims = {}
    for dimension, (least, most) in dynamic.items():
        dims[dimension] = torch.export.Dim(f"size{dimension}", min=least, max=most)
    by_input: dict[str, Any] = {}
    for name, value in named.items():
        by_input[name] = None
        if isinstance(value, Tensor):
            by_input[name] = {dimension: dim for dimension, dim in dims.items() if dimension < value.dim()}
    return by_input


@contextlib.contextmanager
def _exporting(how: str) -> Iterator[None]:
    """Turn an error of any stage of the exporter into an InputError."""
    try:
        with silenced():
            yield
    except Exception as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"The model cannot be exported {how} ({reason}): make its forward pass one "
            "that torch.export follows, at every size that is to vary."
        ) from error


def is_quantized(model: nn.Module) -> bool:
    """Return True if the quantization of a layer of `model` is simulated."""
    return any(isinstance(module, FakeQuantized) for module in model.modules())


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence warnings, log lines and progress bars of exporters and tools."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- layers as the exporter sees them ---------------------------------------------------------------------------------


def _with_integer_layers(model: nn.Module) -> nn.Module:
    """Replace the simulated layers and points of `model` by modules for the exporter, which writes integers."""
    if isinstance(model, FakeQuantized):  # the whole model, which has no name to be replaced under
        return _OnnxLayer(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantized):
            model.set_submodule(name, _OnnxLayer(module))
        elif isinstance(module, QuantizationPoint):
            model.set_submodule(name, _OnnxPoint(module.grid))
    return model


class _OnnxPoint(QuantizationPoint):
    """Quantization point, exported as QuantizeLinear and DequantizeLinear.

    Values beyond a grid of fewer than 8 bits are clipped first, since QuantizeLinear saturates at 255.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.scale = grid.scale.float().reshape(())
        self.zero = grid.zero.to(torch.uint8).reshape(())
        self.most = None
        if grid.hi < 255:
            self.most = float((grid.hi - grid.zero) * grid.scale)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        if self.most is not None:
            x = x.clamp(max=self.most)
        codes = _operator("QuantizeLinear", (x, self.scale, self.zero), x.shape, torch.uint8)
        return _dequantized(codes, self.scale, self.zero)


class _OnnxLayer(nn.Module):
    """Simulated layer, exported as Gemm or Conv of u8, s8 and an s32 bias, each behind DequantizeLinear.

    fake: the simulated layer, which runs outside an export.
    pads: zeros at the left, right, top and bottom of a convolution's input, in place of a ZeroPad2d.
    """

    def __init__(self, fake: FakeQuantized) -> None:
        super().__init__()
        layer, weight = fake.layer, fake.weight_grid
        self.fake = fake
        self.grid = fake.input_grid
        self.point = _OnnxPoint(self.grid)
        self.pads = (0, 0, 0, 0)
        channels = len(layer.weight)
        scale = weight.scale.float().flatten().expand(channels)
        if layer.bias is not None:
            step = self.grid.scale.float()
            # a channel of tiny weights gets wider steps if its bias would not fit in 32 bits
            least = layer.bias.abs() / (step * 2**30)
            scale = torch.maximum(scale, least)
            self.bias_scale = step * scale
            self.bias = (layer.bias / self.bias_scale).round().to(torch.int32)
        shape = weight.scale.shape
        zero = weight.zero.expand(shape)
        grid = Grid(scale.view(shape), zero, weight.bits, weight.lo, weight.hi)
        self.codes = grid.quantize(layer.weight)
        self.scale = scale.contiguous()
        self.zeros = torch.zeros(channels, dtype=torch.int8)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            padded = F.pad(input, self.pads) if any(self.pads) else input
            return self.fake(padded)
        terms = [_dequantized(self.codes, self.scale, self.zeros, axis=0)]
        if self.fake.layer.bias is not None:
            terms.append(_dequantized(self.bias, self.bias_scale, None, axis=0))
        if isinstance(self.fake.layer, nn.Linear):
            return self._linear(input, terms)
        return self._convolution(input, terms)

    def _linear(self, input: Tensor, terms: list[Tensor]) -> Tensor:
        rows = input
        if input.dim() != 2:  # before the point: Gemm, and not Reshape, has to follow DequantizeLinear
            rows = input.reshape(-1, input.shape[-1])
        x = self.point(rows)
        shape = (rows.shape[0], self.fake.layer.out_features)
        y = _operator("Gemm", (x, *terms), shape, transB=1)
        if input.dim() != 2:
            y = y.reshape(*input.shape[:-1], -1)
        return y

    def _convolution(self, input: Tensor, terms: list[Tensor]) -> Tensor:
        layer = self.fake.layer
        usual = layer._reversed_padding_repeated_twice  # numbers where padding is "same"
        all_pads = zip(usual, self.pads, self.fake.pads(input), strict=True)
        at_left, at_right, at_top, at_bottom = map(sum, all_pads)
        _, _, height, width = input.shape
        padded = (height + at_top + at_bottom, width + at_left + at_right)
        height, width = map(_convolved, padded, layer.kernel_size, layer.dilation, layer.stride)
        return _operator(
            "Conv",
            (self.point(input), *terms),
            (input.shape[0], layer.out_channels, height, width),
            pads=[at_top, at_left, at_bottom, at_right],
            strides=layer.stride,
            dilations=layer.dilation,
            group=layer.groups,
        )


def _convolved(size: int, kernel: int, dilation: int, stride: int) -> int:
    """Return the size of a convolution's result along a dimension of `size` numbers, padding included."""
    last = size - dilation * (kernel - 1) - 1
    return last // stride + 1


def _dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None, **attributes: int) -> Tensor:
    return _operator("DequantizeLinear", (codes, scale, zero), codes.shape, **attributes)


def _operator(
    kind: str,
    inputs: Sequence[Tensor | None],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **attributes: Any,
) -> Tensor:
    """Stand for the ONNX operator `kind` in a graph; the result has `shape` and `dtype`."""
    attributes = {name: list(x) if isinstance(x, tuple) else x for name, x in attributes.items()}
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape)


# --- the graph --------------------------------------------------------------------------------------------------------


def _take_in_pads(model: fx.GraphModule) -> None:
    """Remove each ZeroPad2d read by convolutions only: the convolutions pad instead, and with the zero point."""
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in model.graph.nodes)
    for node in list(model.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if type(module) is not nn.ZeroPad2d:
            continue
        readers = [user.target for user in node.users]
        if all(_is_convolution(modules.get(name)) and calls[name] == 1 for name in readers):
            for name in readers:
                modules[name].pads = module.padding
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()


def _is_convolution(module: nn.Module | None) -> bool:
    return isinstance(module, _OnnxLayer) and isinstance(module.fake.layer, nn.Conv2d)


def _round_results(model: fx.GraphModule, batches: Iterable) -> None:
    """Put a point behind each convolution, or behind the convolution's ReLU, unless all readers round the result.

    Returned results stay as they are. The point takes the grid of a reader, or spans the extremes seen in `batches`.
    """
    modules = dict(model.named_modules())
    convolutions = [node for node in model.graph.nodes if _is_convolution(modules.get(node.target))]
    observers: dict[str, Observer] = {}
    for node in convolutions:
        result = _after_clip(node, modules)
        readers = [modules.get(user.target) for user in result.users]
        grids = [module.grid for module in readers if isinstance(module, (_OnnxLayer, _OnnxPoint))]
        is_rounded = len(grids) == len(readers)
        is_returned = any(user.op == "output" for user in result.users)
        if is_rounded or is_returned:
            continue
        name = f"{result.name}_result"
        if grids:
            model.add_submodule(name, _OnnxPoint(grids[0]))
        else:
            observers[name] = Observer("minmax", where=name)
            model.add_submodule(name, nn.Identity())
        _insert_after(result, name)
    model.recompile()
    if not observers:
        return

    def observe(name: str, _: Tensor, result: Tensor) -> None:
        observers[name].observe(result)

    with hooks.watching(model, observers, observe):
        for batch in batches:
            model(**batching.inputs(model, batch))
    for name, observer in observers.items():
        grid = affine.choose(*observer.range(), 8, symmetric=False)
        model.set_submodule(name, _OnnxPoint(grid))


def _after_clip(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Return the only reader of a convolution if it is a ReLU or ReLU6, else the convolution `node`."""
    first, *more = node.users
    is_clip = type(modules.get(first.target)) in CLIPS or first.target in CLIPS
    return first if is_clip and not more else node


def _insert_after(node: fx.Node, name: str) -> None:
    """Let all readers of `node` read the module `name`, called with `node`'s result, instead."""
    with node.graph.inserting_after(node):
        point = node.graph.call_module(name, (node,))
    node.replace_all_uses_with(point, delete_user_cb=lambda user: user is not point)
