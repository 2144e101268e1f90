"""A model as a graph of torch.export, or as an ONNX file with quantized layers between QuantizeLinear and its inverse.

What `ptq.quantize` simulated is written down on the same grids; runtimes fuse the pairs into their int8 kernels.
Activations are unsigned and weights signed, a scale per output channel: that is what one VNNI instruction multiplies
(u8 x s8), and with signed activations ONNX Runtime's convolutions are three times slower. Biases are int32 on the
accumulator's grid. No grid is chosen here, but for results that only some engines have to round.
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
from labkit.graph.tracing import outputs
from labkit.modules import batches as batching
from labkit.quantization import affine, integer
from labkit.quantization.affine import Grid
from labkit.quantization.observers import Observer
from labkit.quantization.ptq import FakeQuantized, QuantizationPoint

CLIPS = integer.RELU | integer.RELU6


@torch.no_grad()
def write_onnx(
    model: nn.Module,
    named: Mapping[str, Any],
    path: Path,
    *,
    batches: Iterable | None = None,
    dynamic: Mapping[int, tuple[int, int]] | None = None,
) -> None:
    """`model`, float or `Calibrated.model`, with the shapes of `named`, its keyword arguments; it is left as it was.

    dynamic: {dimension: (least, most)} that vary, the same in all inputs; everything else is fixed.

    batches: for an engine whose int8 convolutions give 8 bits and nothing else: where a result is not rounded by all
        that read it (before a sum, a mean), it is rounded to the extremes seen in `batches`. None: such results stay
        float32. Only in a model that is a graph (`Calibrated.plan.traced`).

    InputError for a model that torch.export cannot follow.
    """
    if is_quantized(model):
        model = _written(copy.deepcopy(model))
        if isinstance(model, fx.GraphModule):
            _take_in_pads(model)
            if batches is not None:
                _round_results(model, batches)
    names = [name for name, value in named.items() if isinstance(value, Tensor)]
    shapes = _dimensions(named, dynamic) if dynamic else None
    with _exporting("to ONNX"):  # from a model, torch 2.9 exports otherwise: BERT then takes no batch of 1
        graph = torch.export.export(
            model, (), dict(named), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        program = torch.onnx.export(graph, (), kwargs=dict(named), dynamo=True, verbose=False, input_names=names)
        for node in program.model.graph:  # the Python lines that they come from: half of a small file
            node.metadata_props.clear()
        program.save(path)


@torch.no_grad()
def program(
    model: nn.Module, named: Mapping[str, Any], dynamic: Mapping[int, tuple[int, int]] | None = None
) -> torch.export.ExportedProgram:
    """`model` as a graph that takes the tensors of `named` in their order and gives a list of tensors.

    Raises InputError for a model that torch.export cannot follow, and where it would fix a dimension of `dynamic`.
    """
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    shapes = (tuple(_dimensions(tensors, dynamic).values()),) if dynamic else None
    with _exporting("by torch.export"), batching.evaluating(model):
        return torch.export.export(_Bound(model, named), tuple(tensors.values()), dynamic_shapes=shapes)


class _Bound(nn.Module):
    """A model called with tensors by position; what else it takes is fixed."""

    def __init__(self, model: nn.Module, named: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names = model, [name for name, value in named.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in named.items() if name not in self.names}

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return outputs(self.model(**dict(zip(self.names, tensors, strict=True)), **self.constants))


def _dimensions(named: Mapping[str, Any], dynamic: Mapping[int, tuple[int, int]]) -> dict[str, Any]:
    """For the exporter: by input, the dimensions that vary; one of the same number is the same size in all inputs."""
    dims = {d: torch.export.Dim(f"size{d}", min=least, max=most) for d, (least, most) in dynamic.items()}
    return {
        name: {d: dim for d, dim in dims.items() if d < value.dim()} if isinstance(value, Tensor) else None
        for name, value in named.items()
    }


@contextlib.contextmanager
def _exporting(how: str) -> Iterator[None]:
    try:
        with quietly():
            yield
    except Exception as error:  # of any of the exporter's stages
        raise InputError(
            f"The model cannot be exported {how} ({str(error).splitlines()[0][:120]}): make its forward pass one "
            "that torch.export follows, at every size that is to vary."
        ) from error


def is_quantized(model: nn.Module) -> bool:
    """Whether layers of it are simulated."""
    return any(isinstance(module, FakeQuantized) for module in model.modules())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporter's and the tools' warnings, log lines and progress bars."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- what the exporter sees -------------------------------------------------------------------------------------------


def _written(model: nn.Module) -> nn.Module:
    """With modules that the exporter writes as integers; the name of the whole model is empty."""
    if isinstance(model, FakeQuantized):
        return _OnnxLayer(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantized):
            model.set_submodule(name, _OnnxLayer(module))
        elif isinstance(module, QuantizationPoint):
            model.set_submodule(name, _OnnxPoint(module.grid))
    return model


class _OnnxPoint(QuantizationPoint):
    """For the exporter QuantizeLinear and DequantizeLinear; what is beyond a grid of fewer than 8 bits is clipped."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.scale, self.zero = grid.scale.float().reshape(()), grid.zero.to(torch.uint8).reshape(())
        self.most = float((grid.hi - grid.zero) * grid.scale) if grid.hi < 255 else None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        x = x if self.most is None else x.clamp(max=self.most)
        codes = _operator("QuantizeLinear", (x, self.scale, self.zero), x.shape, torch.uint8)
        return _dequantized(codes, self.scale, self.zero)


class _OnnxLayer(nn.Module):
    """For the exporter Gemm or Conv of u8, s8 and an s32 bias, each behind DequantizeLinear; else a padded `fake`."""

    def __init__(self, fake: FakeQuantized) -> None:
        super().__init__()
        layer, weight, self.grid = fake.layer, fake.weight_grid, fake.input_grid
        self.fake, self.point, self.pads = fake, _OnnxPoint(self.grid), (0, 0, 0, 0)  # left, right, top, bottom
        shape, step = weight.scale.shape, self.grid.scale.float()
        scale = weight.scale.float().flatten().expand(len(layer.weight))
        if layer.bias is not None:  # a channel of tiny weights gets wider steps where its bias would not fit in 32 bits
            scale = torch.maximum(scale, layer.bias.abs() / (step * 2**30))
            self.bias, self.bias_scale = (layer.bias / (step * scale)).round().to(torch.int32), step * scale
        grid = Grid(scale.view(shape), weight.zero.expand(shape), weight.bits, weight.lo, weight.hi)
        self.codes, self.scale = grid.quantize(layer.weight), scale.contiguous()
        self.zeros = torch.zeros(len(scale), dtype=torch.int8)

    def forward(self, input: Tensor) -> Tensor:
        layer = self.fake.layer
        if not torch.compiler.is_exporting():
            return self.fake(F.pad(input, self.pads) if any(self.pads) else input)
        terms = [_dequantized(self.codes, self.scale, self.zeros, axis=0)]
        if layer.bias is not None:
            terms.append(_dequantized(self.bias, self.bias_scale, None, axis=0))
        if isinstance(layer, nn.Linear):  # rows first: Gemm, and not Reshape, has to follow DequantizeLinear
            x = self.point(input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input)
            y = _operator("Gemm", (x, *terms), (x.shape[0], layer.out_features), transB=1)
            return y.reshape(*input.shape[:-1], -1) if input.dim() != 2 else y
        usual = layer._reversed_padding_repeated_twice  # numbers where padding is "same"
        x0, x1, y0, y1 = map(sum, zip(usual, self.pads, self.fake.pads(input), strict=True))
        sides = zip(input.shape[2:], (y0 + y1, x0 + x1), layer.dilation, layer.kernel_size, layer.stride, strict=True)
        sizes = [(size + pad - d * (k - 1) - 1) // stride + 1 for size, pad, d, k, stride in sides]
        attributes = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
        shape = (input.shape[0], layer.out_channels, *sizes)
        return _operator("Conv", (self.point(input), *terms), shape, pads=[y0, x0, y1, x1], **attributes)


def _dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None, **attributes: int) -> Tensor:
    return _operator("DequantizeLinear", (codes, scale, zero), codes.shape, **attributes)


def _operator(kind: str, inputs: Sequence[Tensor | None], shape: Sequence[int], dtype=torch.float32, **attributes):
    attributes = {name: list(x) if isinstance(x, tuple) else x for name, x in attributes.items()}
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape)


def _take_in_pads(model: fx.GraphModule) -> None:
    """Takes ZeroPad2d out of the graph where only convolutions read it: these pad, and with the zero point."""
    modules, calls = dict(model.named_modules()), Counter(node.target for node in model.graph.nodes)
    for node in list(model.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        readers = {user.target: modules.get(user.target) for user in node.users}
        if type(module) is nn.ZeroPad2d and all(_is_convolution(x) and calls[name] == 1 for name, x in readers.items()):
            for layer in readers.values():
                layer.pads = module.padding
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()


def _is_convolution(module: nn.Module | None) -> bool:
    return isinstance(module, _OnnxLayer) and isinstance(module.fake.layer, nn.Conv2d)


def _round_results(model: fx.GraphModule, batches: Iterable) -> None:
    """A point behind each convolution, or its ReLU, whose result is not rounded by all that read it, or returned."""
    modules, places, graph = dict(model.named_modules()), {}, model.graph
    for node in [node for node in graph.nodes if _is_convolution(modules.get(node.target))]:
        value, (reader, *more) = node, node.users
        if not more and (type(modules.get(reader.target)) in CLIPS or reader.target in CLIPS):
            value = reader
        readers = [modules.get(user.target) for user in value.users]
        grids = [x.grid for x in readers if isinstance(x, (_OnnxLayer, _OnnxPoint))]
        if len(grids) == len(readers) or any(user.op == "output" for user in value.users):
            continue
        name = f"{value.name}_result"
        places[name] = _OnnxPoint(grids[0]) if grids else nn.Identity()
        model.add_submodule(name, places[name])
        with graph.inserting_after(value):
            point = graph.call_module(name, (value,))
        value.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
    model.recompile()
    observers = {name: Observer("minmax", where=name) for name, x in places.items() if isinstance(x, nn.Identity)}
    for name in observers:
        places[name].register_forward_hook(lambda _, args, result, name=name: observers[name].observe(result))
    for batch in batches if observers else ():
        model(**batching.inputs(model, batch))
    for name, observer in observers.items():
        model.set_submodule(name, _OnnxPoint(affine.choose(*observer.range(), 8, symmetric=False)))
