"""Weights in few bits and activations as they are: for decoding, where reading the weights takes the time. SIMULATED.

Rounding to nearest, and two ways to round by a layer's inputs: in GPTQ (`gptq`) the weights still to be rounded make up
for the rounded weights, and in AWQ (`awq`) important channels are scaled up before rounding and ranges are clipped. Two
formats, NF4 and MXFP4, stand beside these methods.

The bytes are real: a layer stores codes, scales and zeros. The speed is not: a layer multiplies floats computed from
the codes. `integer` has kernels that multiply codes.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.bits import from_bits
from labkit.errors import InputError, check_choice, check_whole
from labkit.graph.dataflow import Dataflow, Route, Source
from labkit.modules.batches import check_batches, evaluating, not_empty, split
from labkit.modules.blocks import inputs_by_block
from labkit.modules.hessians import hessian, sum_over_rows, wide
from labkit.modules.masks import make_permanent, masks
from labkit.modules.replacing import replace_
from labkit.modules.stacks import blocks_of
from labkit.modules.weights import Weight, inside, named_parts, prunable, qualified
from labkit.quantization import affine, calls, fold, formats
from labkit.quantization.affine import Grid, Quantized
from labkit.quantization.awq import awq, clipped
from labkit.quantization.formats import Encoded
from labkit.quantization.gptq import SCALE, check_size, dequantize, gptq, rtn
from labkit.quantization.packing import pack_codes
from labkit.quantization.simulated import bypassed

__all__ = ["METHODS", "SCALE", "WeightOnlyLinear", "awq", "clipped", "dequantize", "gptq", "quantize", "rtn"]

METHODS = ("rtn", "gptq", "awq", "nf4", "mxfp4")
CALIBRATED_METHODS = ("gptq", "awq")  # which look at what layers are called with


class WeightOnlyLinear(nn.Module):
    """SIMULATED: a Linear that stores its weight [out, in] in few bits and dequantizes it at every call; REAL bytes.

    Buffers hold the arrays of `packing.pack_codes` as bytes, so that no cast of the model changes a scale. The product
    is in the dtype of the input. The weight is not trained; gradients pass to the input.
    """

    def __init__(self, weight: Quantized | Encoded, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.bias = weight.bits, bias
        self.format = weight.format if isinstance(weight, Encoded) else ""
        self.range = (0, 0) if self.format else (weight.grid.lo, weight.grid.hi)
        for name, part in pack_codes(weight).items():
            self.register_buffer(name, part.contiguous().flatten().view(torch.uint8))

    def quantized(self) -> Quantized | Encoded:
        """Return the stored weight: codes [out, in], scales [out, groups, 1]."""
        codes = from_bits(self.codes, self.bits, self.out_features * self.in_features)
        codes = codes.view(self.out_features, self.in_features)
        dtype = formats.FORMATS[self.format].scale if self.format else SCALE
        scale = self.scale.view(dtype).view(self.out_features, -1, 1)
        if self.format:
            return Encoded(codes, scale, None, self.format)
        lo, hi = self.range
        if lo < 0:
            half = 2 ** (self.bits - 1)  # two's complement
            codes = (codes ^ half).view(torch.int8) + -half
            zero = torch.zeros_like(scale, dtype=torch.int32)
        else:
            zero = from_bits(self.zero, self.bits, scale.numel()).view(scale.shape).int()
        return Quantized(codes, Grid(scale, zero, self.bits, lo, hi))

    @property
    def weight(self) -> Tensor:
        """The weight that is multiplied, float32 [out, in], also for forward passes that look at its dtype."""
        return dequantize(self.quantized())

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales and zeros included."""
        stored_bits = 8 * sum(buffer.nbytes for buffer in self.buffers())
        return stored_bits / (self.out_features * self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format or f'{self.bits} bits'}"


def quantize(
    model: nn.Module,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    method: str = "rtn",
    symmetric: bool | str = False,
    batches: Iterable | None = None,
    ignore: Collection[str] = (),
    act_order: bool = True,
) -> nn.Module:
    """SIMULATED: return a copy of `model` with the weights of its Linears in few bits, each a `WeightOnlyLinear`.

    bits: width of a code, 2 to 8.
    group_size: inputs of a row that share a scale, a divisor of each layer's inputs; None: the whole row.
    method: "rtn": each weight to the nearest point of its group's grid. "gptq": see `gptq`. "awq": see `awq` and
        `clipped`. "nf4", "mxfp4": of `formats.FORMATS`, with 4 bits and blocks of their own; `group_size` and
        `symmetric` do not apply.
    symmetric: False: codes have a zero point in each group. Else the name of a convention, see `affine.choose`; True is
        "restricted", the worst convention at 4 bits; "signed" is the best.
    batches: inputs of the model, which only "gptq" and "awq" need; read once, the hidden states stay in memory.
    ignore: names of modules or weights that stay in floating point.
    act_order: True for GPTQ's columns in the order of the size of their inputs, with scales from the weights
        before any change.

    Quantized are all Linears (and transformers' Conv1D) in the model's stack of blocks (`stacks.blocks_of`), or in all
    of a model without a stack. The embedding and the head of a language model are outside the stack and stay: often
    they are a single tied weight, and a head in few bits would be a second copy beside the embedding. Norms and biases
    stay too. A weight with masks (`unstructured.masks`) keeps the zeros, and GPTQ compensates around the zeros.

    "gptq" and "awq" go through the model a block at a time: a block's inputs come from the quantized blocks before. In
    memory: the copy, the Hessians of one block, the hidden states of the batches, the codes.

    Raises InputError, before anything is changed, for arguments out of range, a group_size that does not divide (with
    the divisors), weights with NaN, missing batches, and a block with other weights than Linears that `ignore` does
    not name.
    """
    calls.check_model(model)
    check_choice(method, METHODS, "method")
    check_whole(bits, "bits", 2, 8)
    affine.choose(torch.zeros(1), torch.ones(1), bits, symmetric=symmetric)  # raises for an unknown convention
    if method in formats.FORMATS and bits != 4:
        raise InputError(f"{method} has 4 bits, but bits is {bits}: leave it at 4, or take another method.")
    if method in CALIBRATED_METHODS:
        batches = list(not_empty(check_batches(batches, method)))
        _check_run(model, batches)
    size = formats.FORMATS[method].block if method in formats.FORMATS else group_size
    names = _weight_names(model, ignore, size)
    keep = masks(model)
    new = make_permanent(model)
    every_weight = prunable(new)
    weights = {name: every_weight.pop(name) for name in names}
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    with torch.no_grad(), evaluating(new, seed=0):
        if method == "gptq":
            rounded = _gptq_(new, weights, keep, batches, options | {"act_order": act_order})
        elif method == "awq":
            rounded = _awq_(new, weights, batches, options)
        elif method == "rtn":
            rounded = {name: rtn(_rows(weight), **options) for name, weight in weights.items()}
        else:
            rounded = {name: formats.quantize(_rows(weight), method) for name, weight in weights.items()}
    for name in names:  # one after the other, so that few float weights lie in memory beside their codes
        old = weights.pop(name).module
        layer = WeightOnlyLinear(rounded.pop(name), old.bias).train(old.training)
        module_name, _, _ = name.rpartition(".")
        new = replace_(new, module_name, layer)
        del old
    return new


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_run(model: nn.Module, batches: Sequence) -> None:
    """Raise InputError for a batch without examples, and if the model does not run on the first batch."""
    for batch in batches:
        calls.inputs(model, batch)
    args, kwargs, _ = split(model, batches[0])
    with torch.no_grad(), evaluating(model):
        calls.run(model, *args, **kwargs)


def _weight_names(model: nn.Module, ignore: Collection[str], size: int | None) -> list[str]:
    """Return the names of the weights to quantize; raise InputError for a weight that cannot be quantized.

    size: number of inputs in a group; None: the whole row.
    """
    ignored = named_parts(model, ignore, "ignore")
    uncalled = bypassed(model)
    stack = {id(module) for block in blocks_of(model) for module in block.modules()}
    names = []
    for name, weight in prunable(model).items():
        is_outside = stack and id(weight.module) not in stack
        if is_outside or any(inside(name, part) for part in ignored):
            continue
        _check_weight(weight, size, is_called=weight.module not in uncalled)
        names.append(name)
    if not names:
        raise InputError("There is no Linear to quantize: give a model that has some outside of what ignore names.")
    return names


def _check_weight(weight: Weight, size: int | None, is_called: bool) -> None:
    """Raise InputError for a weight of another layer than a Linear, with other groups, or with NaN."""
    name, kind = weight.name, type(weight.module)
    is_linear = kind is nn.Linear or (weight.transposed and weight.experts is None)
    if not is_linear or not is_called:
        reader = "nn.TransformerEncoderLayer, which does not call it" if kind is nn.Linear else f"a {kind.__name__}"
        raise InputError(f"{name} is the weight of {reader}, but only Linears are quantized: name it in ignore.")
    check_size(weight.as_rows(weight.parameter).shape[1], size)
    if not weight.parameter.isfinite().all():
        raise InputError(f"{name} has NaN or infinity: load other weights, or name it in ignore.")


# --- from block to block ----------------------------------------------------------------------------------------------


def _rows(weight: Weight) -> Tensor:
    """Return the weight as [out, in], in float32 or wider."""
    return wide(weight.as_rows(weight.parameter))


def _store_(weight: Weight, rounded: Quantized) -> None:
    """Give the parameter its rounded values, which the next blocks see."""
    weight.parameter.copy_(weight.from_rows(dequantize(rounded)))


def _gptq_(
    model: nn.Module,
    weights: Mapping[str, Weight],
    keep: Mapping[str, Tensor],
    batches: Sequence,
    options: Mapping[str, Any],
) -> dict[str, Quantized]:
    """Round the weights by GPTQ, block after block; return {name: rounded weight}.

    keep: {name: mask} of weights with masks, in the shape of the parameter.
    options: arguments of `gptq`.
    """
    rounded = {}
    for weights_of_block, sums in inputs_by_block(model, weights, hessian, batches):
        for name, weight in weights_of_block.items():
            mask = weight.as_rows(keep[name]) if name in keep else None
            rounded[name] = gptq(_rows(weight), sums.pop(name)[0], **options, mask=mask)
            _store_(weight, rounded[name])
    return rounded


def _awq_(
    model: nn.Module,
    weights: Mapping[str, Weight],
    batches: Sequence,
    options: Mapping[str, Any],
) -> dict[str, Quantized]:
    """Scale and round the weights by AWQ, block after block; return {name: rounded weight}.

    Scales are folded into the layer or norm that makes the channels, if it is in the same block and nothing else reads
    the channels: the norms before attention and before the feed-forward network, and up_proj, whose product with the
    gate down_proj reads. Elsewhere (attention's output) a scale would need a multiplication at run time: there is none.
    """
    args, kwargs, _ = split(model, batches[0])
    sites = fold.scale_sites(model, Dataflow(model, args, kwargs))
    rounded = {}
    for weights_of_block, sums in inputs_by_block(model, weights, _hessian_and_magnitude, batches):
        sites_of_block = [site for site in sites if _is_inside(model, weights_of_block, *site)]
        _scale_(model, weights_of_block, sums, sites_of_block, options)
        for name, weight in weights_of_block.items():
            # No variable holds the Hessian: it goes before those of the next block come.
            rounded[name] = clipped(_rows(weight), sums.pop(name)[0, :-1], **options)
            _store_(weight, rounded[name])
    return rounded


def _hessian_and_magnitude(layer: nn.Module, x: Tensor) -> Tensor:
    """Return X^T X and below it the sums of |x_j|: [1, in + 1, in]."""
    magnitude = sum_over_rows(layer, x.abs())
    return torch.cat([hessian(layer, x), magnitude[:, None]], 1)


def _is_inside(
    model: nn.Module,
    weights: Mapping[str, Weight],
    source: Source,
    route: Route,
) -> bool:
    """Return True if only `weights` read the channels of the source, and the source belongs to the same block."""
    names = {*source.names, *(qualified(layer, "weight") for layer in route.readers)}
    parameters = {id(model.get_parameter(name)) for name in names}
    blocks = [{id(parameter) for parameter in block.parameters()} for block in blocks_of(model)]
    in_one_block = not blocks or any(parameters <= block for block in blocks)
    only_readers = not route.blocked and set(route.readers.values()) == {1}
    readers = names - set(source.names)
    return only_readers and in_one_block and readers <= weights.keys()


def _scale_(
    model: nn.Module,
    weights: Mapping[str, Weight],
    sums: Mapping[str, Tensor],
    sites: Sequence[tuple[Source, Route]],
    options: Mapping[str, Any],
) -> None:
    """Multiply columns by AWQ's scales, and divide the source of the columns' inputs, and the sums, accordingly.

    sums: {name: statistic [1, in + 1, in]} of `_hessian_and_magnitude`.
    """

    def round_(weight: Tensor) -> Tensor:
        return dequantize(rtn(weight, **options))

    for source, route in sites:
        readers = [qualified(layer, "weight") for layer in route.readers]
        statistic = sums[readers[0]][0]
        rows = [_rows(weights[name]) for name in readers]
        s = awq(rows, statistic[:-1], statistic[-1], round_)
        fold.rescale_(model, source, route, s)
        for name in readers:
            sums[name][0, :-1] /= s[:, None] * s
