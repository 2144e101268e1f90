"""REAL int8: layers that store integers and multiply integers, and the steps between floats and codes.

Layers take float32 or, where their input grid is known, uint8 codes; they give float32 or codes of an output grid. Each
can be compared with exact arithmetic (`compare`). CPU only.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.graph.subclasses import pads_same, same_pads
from labkit.quantization.affine import Grid
from labkit.quantization.formats import Encoded
from labkit.quantization.integer_kernels import (
    FEW,
    KERNELS,
    Run,
    ScaleAndZero,
    fbgemm,
    int4pack,
    int_mm,
    is_faster_by_qlinear,
    probe,
    qconv,
    qlinear,
    qlinear_of_floats,
)
from labkit.quantization.weight_only import WeightOnlyLinear

ROUNDING = 2**-22  # of what a float32 kernel adds up: four roundings
NEAR_A_TIE = 2**-16  # of a step: float32's rounding at 256, where codes end
ALIGNMENT = 64  # bytes; the packed kernels load vectors, and the process ends where these lie across

# --- between floats and codes -----------------------------------------------------------------------------------------


class _OnGrid(nn.Module):
    """A module that stores unsigned grids of activations by name, as buffers "<name>_scale" and "<name>_zero".

    `prepare` of a subclass makes the operands of its forward pass from the stored integers, once, at the first call.
    """

    def __init__(self, **grids: Grid | None) -> None:
        super().__init__()
        grids = {name: grid for name, grid in grids.items() if grid is not None}
        if any(grid.lo or grid.scale.numel() > 1 for grid in grids.values()):
            raise InputError("Activations need one unsigned grid for the tensor: choose it with symmetric=False.")
        self.highest = {name: grid.hi for name, grid in grids.items()}
        for name, grid in grids.items():
            scale = grid.scale.detach().float().reshape(())
            zero = grid.zero.detach().int().reshape(())
            self.register_buffer(f"{name}_scale", scale.clone())
            self.register_buffer(f"{name}_zero", zero.clone())
        self._ready: NamedTuple | None = None

    def numbers(self, name: str) -> ScaleAndZero | None:
        """Return (scale, zero) of a grid as Python's numbers, or None without a grid of this name."""
        if name not in self.highest:
            return None
        scale = getattr(self, f"{name}_scale")
        zero = getattr(self, f"{name}_zero")
        return float(scale), int(zero)

    def prepare(self) -> NamedTuple:
        raise NotImplementedError

    def ready(self) -> NamedTuple:
        """Return the result of `prepare`, made once; its layout is for this CPU, and a stored layer is without it."""
        if self._ready is None:
            self._ready = self.prepare()
        return self._ready

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_ready": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args, **kwargs)


class CodeGrid(NamedTuple):
    """A grid of uint8 codes as Python's numbers: its step, its zero point and its highest code."""

    scale: float
    zero: int
    highest: int


class Quantize(_OnGrid):
    """Round floats to the codes of a grid, uint8: `Grid.quantize` without its look at NaN."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid=grid)

    def prepare(self) -> CodeGrid:
        scale, zero = self.numbers("grid")
        return CodeGrid(scale, zero, self.highest["grid"])

    def forward(self, x: Tensor) -> Tensor:
        return _codes(x, *self.ready())  # the scale, the zero point and the highest code


class Dequantize(Quantize):
    """Turn the codes of a grid into floats."""

    def forward(self, codes: Tensor) -> Tensor:
        grid = self.ready()
        return codes.float().sub_(grid.zero).mul_(grid.scale)


class PadCodes(Quantize):
    """Pad codes with the code of the number 0, which is the zero point and not the code 0.

    pad: numbers of codes to add, in F.pad's order.
    """

    def __init__(self, grid: Grid, pad: tuple[int, ...]) -> None:
        super().__init__(grid)
        self.pad = pad

    def forward(self, codes: Tensor) -> Tensor:
        return F.pad(codes, self.pad, value=self.ready().zero)


def _codes(
    x: Tensor,
    scale: float,
    zero: int,
    highest: int = 255,
) -> Tensor:
    """Round x to uint8 codes from 0 to `highest`."""
    codes = x.float().div(scale).round_().add_(zero)
    return codes.clamp_(0, highest).to(torch.uint8)


def _range(x: Tensor) -> ScaleAndZero:
    """Return `affine.choose(min, max, 8, symmetric=False)` as Python's numbers, several times faster for one tensor."""
    least, largest = x.aminmax()
    lo = min(np.float32(float(least)), np.float32(0))
    hi = max(np.float32(float(largest)), np.float32(0))
    with np.errstate(over="ignore"):
        scale = (hi - lo) / np.float32(255)
    _check_finite(math.isfinite(scale))
    if scale:
        scale = max(scale, np.float32(2.0**-126))  # 1 / scale is a number, too
    else:
        scale = np.float32(1)
    zero = round(float(-lo / scale))
    return float(scale), min(max(zero, 0), 255)


def _check_finite(finite: bool) -> None:
    if not finite:
        raise InputError(
            "The input of an int8 layer has NaN or infinity, or a range beyond float32: look for the layer that it "
            "comes from."
        )


# --- layers of integers -----------------------------------------------------------------------------------------------


class ReadyProduct(NamedTuple):
    """The operands of an integer layer's forward pass: its prepared products, and its grids as (scale, zero point).

    product: the kernel with the layer's weight prepared.
    input, output, term: the grids of the layer; None for a grid that the layer is without.
    product_of_few: the kernel for up to `FEW` rows, if there is another.
    """

    product: Run
    input: ScaleAndZero | None
    output: ScaleAndZero | None
    term: ScaleAndZero | None = None
    product_of_few: Run | None = None


class IntegerLayer(_OnGrid):
    """A Linear or convolution that stores int8 codes, a float32 scale [out] and a float32 bias [out].

    layer: the float layer.
    weight: the symmetric grid of its weight, with a scale for the tensor or for each output channel.
    grids: grids of activations by name, each asymmetric and for the whole tensor: "input" for the codes that the layer
        multiplies, "output" for the codes that it hands on (without an output grid the layer gives float32), "term"
        for the codes that are added before the result is rounded.
    """

    def __init__(self, layer: nn.Module, weight: Grid, **grids: Grid | None) -> None:
        super().__init__(**grids)
        is_symmetric = weight.lo < 0 and not weight.zero.any()
        has_scale_per_row = weight.scale.numel() in (1, *weight.scale.shape[:1])
        if not is_symmetric or not has_scale_per_row:
            raise InputError(
                "A weight needs a symmetric grid, one for all or one for each output channel: see weight_grid."
            )
        with torch.no_grad():
            self.register_buffer("codes", weight.quantize(layer.weight).to(torch.int8))
            scale = weight.scale.float().flatten()
            self.register_buffer("scale", scale.expand(len(self.codes)).clone())
            bias = None if layer.bias is None else layer.bias.float().clone()
            self.register_buffer("bias", bias)
        magnitude_of_row = self.codes.int().abs().flatten(1).sum(1)
        if 255 * int(magnitude_of_row.max()) >= 2**31:
            raise InputError(
                f"A sum of {self.codes[0].numel()} products of these codes can leave int32: quantize the weights to "
                "fewer bits, or leave this layer out (ptq.quantize's ignore)."
            )

    @property
    def weight(self) -> Tensor:
        """The points of the codes, for forward passes that look at the dtype of a weight (ViT, T5)."""
        shape = (-1, *[1] * (self.codes.dim() - 1))
        return self.codes * self.scale.view(shape)

    def input_codes(self, x: Tensor) -> Tensor:
        """Return x if x holds codes, else the codes of x on the input grid."""
        if x.dtype is torch.uint8:
            return x
        return _codes(x, *self.ready().input, self.highest["input"])

    def products(self, x: Tensor) -> Tensor:
        """Multiply x, float64 whole numbers, by the codes of the weight."""
        raise NotImplementedError

    def exact(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the layer in float64, which holds every sum of products of codes, an integer below 2^53, exactly.

        x: uint8 codes.
        other: codes of the term, if the layer adds one.
        Returns the result before rounding, and the sum of the magnitudes of its terms.
        """
        scale, zero = self.numbers("input")
        shape = (-1, *[1] * (self.codes.dim() - 2))
        step = scale * self.scale.double().view(shape)
        terms = [self.products(x.double() - zero) * step]
        if self.bias is not None:
            terms.append(self.bias.double().view(shape))
        if other is not None:
            scale, zero = self.numbers("term")
            terms.append((other.double() - zero) * scale)
        return sum(terms), sum(term.abs() for term in terms)

    def compare(self, y: Tensor, x: Tensor, other: Tensor | None = None) -> dict[str, int]:
        """Count, for `integer.prove`, how many entries of a result y differ from `exact`.

        y: the layer's result for x (floats or codes) and other (codes). Returns the counts "codes", "different",
        "ties" and "wrong", see `integer.prove`.
        """
        value, magnitude = self.exact(self.input_codes(x), other)
        rounding = ROUNDING * magnitude
        target = self.numbers("output")
        if target is None:
            off = (y - value).abs() > rounding
            count = int(off.sum())
            return {"codes": 0, "different": count, "ties": 0, "wrong": count}
        scale, zero = target
        steps = value / scale
        expected = (steps.round() + zero).clamp(0, self.highest["output"])
        off_by = (y - expected).abs()
        distance_to_tie = (steps - steps.floor() - 0.5).abs()
        ties = distance_to_tie <= rounding / scale + NEAR_A_TIE
        wrong = off_by > ties  # more than one code off at a tie, or off at all elsewhere
        return {
            "codes": y.numel(),
            "different": int((off_by > 0).sum()),
            "ties": int(ties.sum()),
            "wrong": int(wrong.sum()),
        }

    def clip(self, y: Tensor) -> Tensor:
        """Clip codes at the end of a grid of fewer than 8 bits; the kernel saturates only at 255.

        With an output zero point of 0, the clip at code 0 is the ReLU.
        """
        highest = self.highest.get("output", 255)
        return y.clamp_(max=highest) if highest < 255 else y


class Int8Linear(IntegerLayer):
    """y = x W^T + b of integers, for x [..., in] in float32, or in codes if there is an input grid.

    Without an input grid the activations are quantized when they come (dynamic), on the grid of their least and largest
    value, by FBGEMM, or by oneDNN where `is_faster_by_qlinear` says so. Where FBGEMM is refused, oneDNN multiplies, or
    `int_mm` up to two rows, each row on the grid of its own largest magnitude.

    rows: number of rows for which the kernel of a dynamic layer is chosen. Calls with other numbers take the same
        kernel: a weight packed for both kernels would cost the memory that int8 saves.
    """

    def __init__(
        self,
        layer: nn.Linear,
        weight: Grid,
        input: Grid | None = None,
        output: Grid | None = None,
        *,
        rows: int = 1,
    ) -> None:
        super().__init__(layer, weight, input=input, output=output)
        self.rows = rows

    def prepare(self) -> ReadyProduct:
        source, target = self.numbers("input"), self.numbers("output")
        bits = 7 if self.codes.abs().max() < 64 else 8
        if source is None and not probe(KERNELS["fbgemm"], bits):
            if is_faster_by_qlinear(self.rows, bits):
                product = qlinear_of_floats(self.codes, self.scale, self.bias)
            else:
                product = fbgemm(self.codes, self.scale, self.bias)
            return ReadyProduct(product, source, target)
        product_of_few = int_mm(self.codes, self.scale)
        product = qlinear(self.codes, self.scale, self.bias)
        return ReadyProduct(product, source, target, product_of_few=product_of_few)

    def products(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.double())

    def forward(self, input: Tensor) -> Tensor:
        ready = self.ready()
        if not input.dim() or input.shape[-1] != self.codes.shape[1]:
            raise InputError(
                f"A Linear of integers takes [..., {self.codes.shape[1]}], not {list(input.shape)}: give it as many "
                "inputs as its weight has columns."
            )
        x = input.reshape(-1, input.shape[-1])
        if ready.input is None:
            y = self._dynamic(x, ready.product, ready.product_of_few)
        else:
            codes = self.input_codes(x)
            y = self.clip(ready.product(codes, *ready.input, ready.output))
        return y.view(*input.shape[:-1], len(self.codes))

    def _dynamic(self, x: Tensor, product: Run, product_of_few: Run | None) -> Tensor:
        """Multiply x [rows, in] in float32 on a grid of its own range."""
        if not len(x):  # no rows, no range
            return x.float() @ self.weight.t()
        if product_of_few is None:  # the product takes floats
            return product(x.float(), *_range(x))
        if len(x) > FEW:
            scale, zero = _range(x)
            return product(_codes(x, scale, zero), scale, zero)
        step = x.float().abs().amax(1, keepdim=True).div_(127)
        _check_finite(bool(step.isfinite().all()))
        step.masked_fill_(step == 0, 1)
        codes = (x / step).round_().to(torch.int8)
        y = product_of_few(codes).mul_(step)
        return y if self.bias is None else y.add_(self.bias)


class Int8Conv2d(IntegerLayer):
    """A convolution of integers, for x [N, C, H, W] in float32 or in codes of the input grid.

    output: the grid of the codes that are handed on.
    term: the grid of `other`, codes that are added to the result before it is rounded, and that the kernel may
        overwrite.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        weight: Grid,
        input: Grid,
        output: Grid | None = None,
        term: Grid | None = None,
    ) -> None:
        super().__init__(layer, weight, input=input, output=output, term=term)
        columns, _, rows, _ = layer._reversed_padding_repeated_twice  # numbers where padding is "same"
        self.options = (list(layer.stride), [rows, columns], list(layer.dilation), layer.groups)
        self.same = pads_same(layer)

    def prepare(self) -> ReadyProduct:
        stride, padding, dilation, groups = self.options
        product = qconv(self.codes, self.scale, self.bias, stride, padding, dilation, groups)
        source, target, term = self.numbers("input"), self.numbers("output"), self.numbers("term")
        return ReadyProduct(product, source, target, term)

    def padded(self, x: Tensor, value: int) -> Tensor:
        """Put `value` around x if the layer pads by the size of its input (`subclasses.pads_same`)."""
        if not self.same:
            return x
        stride, _, dilation, _ = self.options
        kernel = self.codes.shape[2:]
        pad = same_pads(x.shape[2:], kernel, stride, dilation)
        return F.pad(x, pad, value=value)

    def products(self, x: Tensor) -> Tensor:
        padded = self.padded(x, 0)
        return F.conv2d(padded, self.codes.double(), None, *self.options)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        ready = self.ready()
        *_, groups = self.options
        channels = self.codes.shape[1] * groups
        if input.dim() != 4 or input.shape[1] != channels:  # the kernel would read other shapes wrongly
            raise InputError(
                f"A convolution of integers takes [N, C, H, W] with {channels} channels C, not {list(input.shape)}: "
                "give it such a batch."
            )
        scale, zero = ready.input
        codes = self.padded(self.input_codes(input), zero)
        y = ready.product(codes, scale, zero, ready.output, other, ready.term)
        return self.clip(y)


# --- layers of packed weights -----------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., in], with W read in 4 or 8 bits by a kernel made for one row or a few.

    layer: the weight as `weight_only` stores it; the kernel's own layout is made at the first call.

    x, scales, the part of a zero point and x W^T are rounded to bfloat16, and products are added up in float32. From
    some dozens of rows on a product in float32 is faster.
    """

    def __init__(self, layer: WeightOnlyLinear) -> None:
        super().__init__()
        self.layer = layer
        self._run: Run | None = None

    @property
    def weight(self) -> Tensor:
        """The weight in float32, for forward passes that look at the dtype of a weight."""
        return self.layer.weight

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes int8 [out, in], from -8 or -128 up, scale and shift [out, groups]: W = codes * scale + shift."""
        weight = self.layer.quantized()
        is_unsigned = weight.grid.lo == 0
        middle = 2 ** (weight.bits - 1) if is_unsigned else 0
        scale = weight.scale.squeeze(-1).float()
        shift = (middle - weight.zero.squeeze(-1)) * scale
        codes = (weight.codes.short() - middle).to(torch.int8)
        return codes, scale, shift

    def compare(self, y: Tensor, x: Tensor) -> dict[str, int]:
        """Count, for `integer.prove`, how many entries of a result y differ from float64 by more than roundings.

        y: the layer's result for x. Float64 takes the operands as the kernel rounds them. Beyond that rounding, the
        products of n terms add up with less than (n + 2) 2^-24 of the magnitudes of the terms, and two roundings
        follow, to bfloat16 and, after the bias, to y's dtype.
        """
        codes, scale, shift = self.operands()
        x = x.bfloat16().double()
        scale = scale.bfloat16().double()[..., None]
        shift = shift.bfloat16().double()[..., None]
        codes = codes.double().unflatten(1, (scale.shape[1], -1))
        weight = (codes * scale + shift).flatten(1)
        weight_magnitude = codes.abs() * scale.abs() + shift.abs()
        value = F.linear(x, weight)
        magnitude = F.linear(x.abs(), weight_magnitude.flatten(1))
        terms = x.shape[-1]
        adding_up = (terms + 3) * 2**-24 * magnitude
        limit = 2**-8 * value.abs() + adding_up
        if self.layer.bias is not None:
            value = value + self.layer.bias.double()
            limit = limit + torch.finfo(y.dtype).eps * value.abs()
        off = int(((y - value).abs() > limit).sum())
        return {"codes": 0, "different": off, "ties": 0, "wrong": off}

    def forward(self, input: Tensor) -> Tensor:
        if self._run is None:
            self._run = self._prepare()
        x = input.reshape(-1, input.shape[-1])
        x = x.clone() if x.data_ptr() % ALIGNMENT else x
        y = self._run(x).to(input.dtype)
        y = y if self.layer.bias is None else y + self.layer.bias
        return y.view(*input.shape[:-1], -1)

    def _prepare(self) -> Run:
        kernel, _ = packing(self.layer)
        codes, scale, shift = self.operands()
        if kernel == "int4pack":
            return int4pack(codes, scale, shift)
        return KERNELS[kernel].prepare(codes, scale)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_run": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._run = None
        super()._load_from_state_dict(*args, **kwargs)


def packing(layer: WeightOnlyLinear) -> tuple[str, str]:
    """Return (the kernel of `KERNELS` that multiplies by a layer's weight, ""), or ("", the reason why none does)."""
    weight = layer.quantized()
    rows, columns = layer.out_features, layer.in_features
    if isinstance(weight, Encoded):
        return "", f"{weight.format} is a table of points, and the kernels multiply codes by a scale"
    group = columns // weight.scale.shape[1]
    if weight.bits <= 4 and rows % 16 == 0 and group % 32 == 0:
        return "int4pack", ""
    if group == columns and weight.grid.lo < 0 and columns % 16 == 0:
        return "int8pack", ""
    return "", (
        f"its {weight.bits} bits, [{rows}, {columns}] and groups of {group} fit neither int4pack (up to 4 bits, "
        "outputs in multiples of 16, groups in multiples of 32) nor int8pack (symmetric, a row is a group, inputs in "
        "multiples of 16)"
    )
