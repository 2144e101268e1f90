"""REAL int4 with activations in int8 (A8): linear layers on labkit's own kernel, csrc/int4_linear.cpp.

A weight of at most 4 bits from `weight_only` is packed in the kernel's layout; the kernel quantizes the activations,
with a scale for each row and group. `reference` is the same product in torch's operators, to the bit, and stands in
where there is no compiler. CPU only, for inference only.

    >>> import torch
    >>> from labkit.quantization import weight_only
    >>> from labkit.storage import int4
    >>> weight = weight_only.rtn(torch.randn(32, 128), 4, group_size=64)
    >>> layer = int4.Int4Linear(weight)
    >>> x = torch.randn(1, 128)
    >>> bool((layer(x) == int4.reference(x, weight)).all())
    True
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from labkit.arguments import check_module
from labkit.errors import InputError
from labkit.modules.replacing import replace_
from labkit.quantization.affine import Grid, Quantized
from labkit.quantization.formats import Encoded
from labkit.quantization.weight_only import SCALE, WeightOnlyLinear, dequantize
from labkit.storage import native

LANES, STEP, LINE = 16, 8, 64  # outputs of a block, inputs of a step, bytes of a cache line: as in the C++
BITS = 4
LARGEST_GROUP = 2**20  # inputs, whose products fit in 32 bits
LARGEST_CODE = 127  # of an activation
SMALLEST = 2.0**-64  # activations of a group without a larger number count as zero, as in the C++


class Int4Linear(nn.Module):
    """REAL: y = x W^T + b for x [..., in], with W in 4 bits and x quantized to 8 bits at every call.

    weight: codes [out, in] of at most 4 bits, with float16 scales [out, groups, 1], as `weight_only.rtn` returns.
    bias: [out].

    Computed in float32; y has the dtype of x. A row of x with NaN or infinity gives NaN in all outputs. The buffer
    `packed` holds the weight as bytes, so that no cast of the model changes a scale. The weight is not trained, and no
    gradient passes. Raises InputError for other weights, and when called on another device than the CPU.
    """

    def __init__(self, weight: Quantized, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if reason := _refusal(weight):
            raise InputError(f"The int4 kernel cannot multiply by this weight ({reason}): round it by weight_only.rtn.")
        self.out_features, self.in_features = weight.codes.shape
        self.group_size = self.in_features // weight.scale.shape[1]
        self.bias = bias
        self.register_buffer("packed", pack(weight))

    @property
    def weight(self) -> Tensor:
        """The weight as points of its grid, float32 [out, in], also for forward passes that look at its dtype."""
        return dequantize(self.quantized())

    def quantized(self) -> Quantized:
        """Return the stored weight: codes from 0 to 15 [out, in], scales [out, groups, 1]."""
        return unpack(self.packed, self.out_features, self.in_features, self.group_size)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise InputError(f"The input has {input.shape[-1]} features, but the layer takes {self.in_features}.")
        return _multiply(input, self.packed, self.bias, self.out_features, self.group_size)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, groups of {self.group_size}"


def convert(model: nn.Module) -> nn.Module:
    """REAL: return a copy of `model` in which `Int4Linear`s take the place of the `WeightOnlyLinear`s.

    model: a result of `weight_only.quantize` with at most 4 bits. Layers that are not quantized stay as they are.
    Raises InputError for a model without quantized layers and, with the layer's name, for weights that the kernel does
    not take.
    """
    check_module(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WeightOnlyLinear)}
    if not layers:
        raise InputError("The model has no WeightOnlyLinear: call weight_only.quantize first.")
    for name, layer in layers.items():
        if reason := _refusal(layer.quantized()):
            raise InputError(
                f"{name or 'The layer'} cannot be converted ({reason}): quantize it to 4 bits or fewer by rtn, gptq or "
                "awq, or name it in ignore."
            )
    new = copy.deepcopy(model)
    for name in layers:
        old = new.get_submodule(name)
        layer = Int4Linear(old.quantized(), old.bias).train(old.training)
        new = replace_(new, name, layer)
    return new


def joined(layers: Sequence[Int4Linear]) -> Int4Linear:
    """Return a layer with the outputs of all `layers`, one after the other, for a product in a single call.

    layers: of the same inputs and group size, all with a bias or none. Raises InputError for others.
    """
    kinds = {(layer.in_features, layer.group_size, layer.bias is None) for layer in layers}
    if len(kinds) > 1:
        raise InputError(
            "Layers to be joined need the same inputs and group size, and all a bias or none: quantize them alike."
        )
    weights = [layer.quantized() for layer in layers]
    codes = torch.cat([weight.codes for weight in weights])
    scale = torch.cat([weight.scale for weight in weights])
    zero = torch.cat([weight.zero for weight in weights])
    first = weights[0].grid
    bias = None
    if layers[0].bias is not None:
        bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return Int4Linear(Quantized(codes, Grid(scale, zero, BITS, first.lo, first.hi)), bias)


def _refusal(weight: Quantized | Encoded) -> str:
    """Return the reason why the kernel does not take a weight, or ""."""
    if isinstance(weight, Encoded):
        return f"{weight.format} is a table of points, and the kernel multiplies codes by a scale"
    if weight.bits > BITS:
        return f"its codes have {weight.bits} bits, and the kernel's at most {BITS}"
    out_features, in_features = weight.codes.shape
    scale = weight.scale
    has_groups = scale.dim() == 3 and len(scale) == out_features
    if not has_groups or scale.dtype != SCALE or not scale.isfinite().all():
        return f"its scales are {scale.dtype} {list(scale.shape)}, and the kernel's finite {SCALE} [out, groups, 1]"
    if in_features // scale.shape[1] > LARGEST_GROUP:
        return f"its groups have more than {LARGEST_GROUP:,} inputs, whose sum may not fit in 32 bits"
    return ""


# --- the layout, which csrc/int4_linear.cpp describes -----------------------------------------------------------------


def pack(weight: Quantized) -> Tensor:
    """Return a weight in the kernel's layout, uint8 [blocks of 16 outputs, bytes], on the CPU."""
    out_features, in_features = weight.codes.shape
    groups = weight.scale.shape[1]
    group_size = in_features // groups
    lowest = -(2 ** (BITS - 1)) if weight.grid.lo < 0 else 0
    codes = (weight.codes.cpu().short() - lowest).to(torch.uint8).view(out_features, groups, group_size)
    scale = weight.scale.cpu().squeeze(2)
    zero = (weight.zero.cpu().squeeze(2) - lowest).to(torch.uint8)
    missing_outputs = -out_features % LANES
    missing_inputs = -group_size % STEP
    codes = F.pad(codes, (0, missing_inputs, 0, 0, 0, missing_outputs))
    nibbles = codes.view(-1, LANES, groups, codes.shape[2] // STEP, 2, STEP // 2)
    low, high = nibbles.unbind(4)  # [blocks, lanes, groups, steps, 4]
    pairs = low | high << BITS
    parts = [pairs.permute(0, 2, 3, 1, 4)]
    for table in (scale, zero):
        padded = F.pad(table, (0, 0, 0, missing_outputs))
        parts.append(padded.view(-1, LANES, groups).transpose(1, 2))
    octets = [part.flatten(1).contiguous().view(torch.uint8) for part in parts]
    block = torch.cat(octets, 1)
    return F.pad(block, (0, -block.shape[1] % LINE))


def unpack(packed: Tensor, out_features: int, in_features: int, group_size: int) -> Quantized:
    """Return the weight [out, in] that `pack` packed, with codes from 0 to 15."""
    groups = in_features // group_size
    steps = math.ceil(group_size / STEP)
    sizes = [groups * steps * LINE, groups * LANES * SCALE.itemsize, groups * LANES]
    filling = packed.shape[1] - sum(sizes)
    pairs, scale, zero, _ = packed.split([*sizes, filling], 1)
    pairs = pairs.reshape(-1, groups, steps, LANES, STEP // 2)
    nibbles = torch.stack([pairs & 15, pairs >> BITS], 4)  # [blocks, groups, steps, lanes, 2, 4]
    codes = nibbles.permute(0, 3, 1, 2, 4, 5).reshape(-1, groups, steps * STEP)
    codes = codes[:out_features, :, :group_size].reshape(out_features, in_features)
    tables = []
    for table in (scale.contiguous().view(SCALE), zero):
        by_output = table.reshape(-1, groups, LANES).transpose(1, 2).reshape(-1, groups, 1)
        tables.append(by_output[:out_features])
    scale, zero = tables
    return Quantized(codes, Grid(scale, zero.int(), BITS, 0, 2**BITS - 1))


# --- the product ------------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """Multiply as the kernel does, in torch's operators: x W^T + bias in the dtype of x, the same bits.

    x: floating point [..., in], computed in float32.
    weight: codes [out, in], scales [out, groups, 1].
    bias: [out].
    """
    groups = weight.scale.shape[1]
    by_group = x.float().unflatten(-1, (groups, -1))  # [..., groups, inputs]
    largest = by_group.abs().amax(-1)
    is_finite = largest.isfinite()
    x_scale = torch.where(is_finite, largest / LARGEST_CODE, torch.nan)
    has_codes = is_finite & (largest >= SMALLEST)
    # A division of tensors: torch computes `number / tensor` as a product with the reciprocal, rounded twice.
    inverse_scale = torch.full_like(largest, LARGEST_CODE) / largest
    steps = by_group * inverse_scale[..., None]
    x_codes = torch.where(has_codes[..., None], steps.round(), 0.0)
    codes = weight.codes.unflatten(1, (groups, -1)) - weight.zero  # [out, groups, inputs]
    y = by_group.new_zeros(*x.shape[:-1], len(codes))
    for group in range(groups):
        # float64 holds these whole numbers exactly.
        sums = F.linear(x_codes[..., group, :].double(), codes[:, group].double())
        scale = weight.scale[:, group, 0].float()
        y = y + sums.float() * scale * x_scale[..., group, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _on_cpu(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group_size: int) -> Tensor:
    """Multiply x [..., in] by a packed weight, on torch.get_num_threads() threads."""
    in_features = x.shape[-1]
    library = native.load("int4_linear")
    if library is None:
        return reference(x, unpack(packed, out_features, in_features, group_size), bias)
    if x.dtype != torch.float32:
        return _on_cpu(x.float(), packed, bias, out_features, group_size).to(x.dtype)
    x = x.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    library.int4_linear(
        native.best_isa("int4_linear"),
        torch.get_num_threads(),
        in_features,
        out_features,
        group_size,
        x.numel() // in_features,
        x.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def _elsewhere(x: Tensor, *_: object) -> Tensor:
    raise InputError(f"The int4 kernel computes on the CPU, not on {x.device}: move the model and its inputs there.")


def _without_data(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group_size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _flops(x: Tensor, *_: object, out_val: Tensor) -> int:
    """Count x [..., in] against a packed weight: a multiply-add, which is 2, for each weight and row of x."""
    return 2 * x.numel() * out_val.shape[-1]


# As an operator of torch the kernel is seen, with the bytes that it reads, by `roofline.count` and by profilers.
OPERATOR = "labkit::int4_linear"
torch.library.define(OPERATOR, "(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size) -> Tensor")
torch.library.impl(OPERATOR, "cpu", _on_cpu)
torch.library.impl(OPERATOR, "default", _elsewhere)
torch.library.register_fake(OPERATOR, _without_data)
register_flop_formula(torch.ops.labkit.int4_linear, get_raw=True)(_flops)
_multiply = torch.ops.labkit.int4_linear.default
