"""REAL int8: torch's integer kernels behind a probe, layers that store integers, and whole models that hand on codes.

The kernels have private names in torch (inductor lowers to them) and are trusted only after they have multiplied the
extreme codes once as int64 does: without VNNI some add pairs of products in int16, 2 x 255 x 127 > 32767, and are wrong
without a word. CPU only. What is rounded where is decided by `ptq`, and here it is the same, code by code.
"""

import contextlib
import copy
import itertools
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from labkit.errors import InputError
from labkit.graph.subclasses import pads_same, same_pads
from labkit.quantization import calls
from labkit.quantization.affine import Grid
from labkit.quantization.formats import Encoded
from labkit.quantization.ptq import FakeQuantized, QuantizationPoint, bypassed, called, is_sum, replaced, weight_grid
from labkit.quantization.weight_only import WeightOnlyLinear

FEW = 2  # rows up to which a product with a vector is faster in _int_mm than in oneDNN
TOO_SLOW = 10  # times float32: a kernel beyond it is a reference loop, which takes 200 times and more

# --- kernels ----------------------------------------------------------------------------------------------------------
# Each prepares codes once and returns a function of the activations, so that a layer and the probe run the same thing.

Run = Callable[..., Tensor]


def _qlinear(codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Run:
    """onednn::qlinear_pointwise, u8 [rows, in] x s8 [out, in]; float32, or codes on the grid `out` = (scale, zero)."""
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(codes), dtype=torch.int64)

    def run(x: Tensor, x_scale: float = 1.0, x_zero: int = 0, out: tuple[float, int] | None = None) -> Tensor:
        step, zero, dtype = (*out, torch.uint8) if out else (1.0, 0, torch.float32)
        return torch.ops.onednn.qlinear_pointwise(
            x, x_scale, x_zero, packed, scale, zeros, bias, step, zero, dtype, "none", [], ""
        )

    return run


def _qconv(
    codes: Tensor, scale: Tensor, bias: Tensor | None = None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
) -> Run:
    """onednn::qconv_pointwise, u8 [N, C, H, W] x s8 [out, C / groups, kh, kw]. What it pads with is the zero point.

    other: codes on the grid `term` = (scale, zero), added before the result is rounded; they may be overwritten.
    """
    packed = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, 0, stride, padding, dilation, groups, None)
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    shape = (bias, stride, padding, dilation, groups)

    def run(x, x_scale=1.0, x_zero=0, out=None, other=None, term=None) -> Tensor:
        step, zero, dtype = (*out, torch.uint8) if out else (1.0, 0, torch.float32)
        source, target = (x, x_scale, x_zero, packed, scale, zeros), (step, zero, dtype)
        if other is None:
            return torch.ops.onednn.qconv_pointwise(*source, *shape, *target, "none", [], "")
        other = other.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *source, other, *shape, *target, *term, "sum", 1.0, "none", [], ""
        )

    return run


def _fbgemm(codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Run:
    """FBGEMM's u8 x s8 product, torch's fastest for few rows; it takes floats and rounds them on a grid itself.

    As x times 1 / scale, not x / scale: about one code in 10^5 falls on the other side of a tie. torch means to remove
    these operators, and warns of the quantized tensor that its packing takes.
    """
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, bias)
    return lambda x, x_scale=1.0, x_zero=0: torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, x_scale, x_zero, packed
    )


def _int_mm(codes: Tensor, scale: Tensor) -> Run:
    """torch._int_mm, s8 [rows, in] x s8 [out, in] in int32, scaled after."""
    columns = codes.t()
    return lambda x: torch._int_mm(x, columns) * scale


def _int8pack(codes: Tensor, scale: Tensor) -> Run:
    """torch._weight_int8pack_mm: weights are stored in 8 bits and multiplied with bfloat16 activations."""
    scale = scale.flatten().bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), codes, scale)


def _int4pack(codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Run:
    """torch._weight_int4pack_mm_for_cpu: codes -8..7 in 4 bits, bfloat16 activations; weight = code scale + shift.

    scale, shift: [out] or [out, groups]. Groups that the kernel does not know are taken as several that are alike.
    """
    packed = torch._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    scale = scale.view(len(codes), -1)  # [out, groups]
    width = codes.shape[1] // scale.shape[1]
    group = next(size for size in (256, 128, 64, 32) if width % size == 0)
    table = torch.stack([scale, torch.zeros_like(scale) if shift is None else shift], -1).bfloat16()  # [out, groups, 2]
    table = table.repeat_interleave(width // group, 1).transpose(0, 1).contiguous()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, table)


class IntegerKernel(NamedTuple):
    """prepare(codes [out, in, ...] int8, scale [out]) -> run(activations).

    activations: "u8" or "s8" codes; "rounded": floats, which it makes u8 itself; "float": bfloat16, and not rounded.
    """

    prepare: Callable[..., Run]
    activations: str
    bits: int = 8  # of the weights, at most


KERNELS = {
    "qlinear": IntegerKernel(_qlinear, "u8"),
    "qconv": IntegerKernel(_qconv, "u8"),
    "fbgemm": IntegerKernel(_fbgemm, "rounded"),
    "int_mm": IntegerKernel(_int_mm, "s8"),
    "int8pack": IntegerKernel(_int8pack, "float"),
    "int4pack": IntegerKernel(_int4pack, "float", 4),
}


def available() -> dict[str, str]:
    """For each of `KERNELS` the word "ready", or the sentence with which it is refused on this machine."""
    return {name: probe(kernel) or "ready" for name, kernel in KERNELS.items()}


@cache
def probe(kernel: IntegerKernel, bits: int = 8) -> str:
    """Why the kernel is refused, or nothing: it multiplies codes of `bits` as int64 does, not far slower than float32.

    In some rows every weight and every activation is at an end of its range, where int16 sums overflow. 504 terms, so
    that float32 holds the results exactly. A convolution pads, and zero points are not 0.
    """
    name, bits = kernel.prepare.__name__.lstrip("_"), min(bits, kernel.bits)
    draw = torch.Generator().manual_seed(0)

    def extreme(low: int, high: int) -> Tensor:
        codes = torch.randint(low, high + 1, (64, 504), generator=draw)
        codes[0], codes[1], codes[2, ::2], codes[2, 1::2] = high, low, high, low
        return codes

    w, zero = extreme(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8), 0
    if kernel.activations in ("u8", "rounded"):
        x, zero = extreme(0, 255).to(torch.uint8), 128
    elif kernel.activations == "s8":
        x = extreme(-128, 127).to(torch.int8)
    else:
        w = F.pad(w, (0, 8))  # 512 columns: whole groups
        x = torch.eye(512)[torch.randperm(512, generator=draw)[:64]]  # some columns: bfloat16 holds the results exactly
    reference, options = F.linear, {}
    if kernel.prepare is _qconv:
        x, w, options = x.view(64, 56, 3, 3), w.view(64, 56, 3, 3), {"padding": (1, 1)}
        reference = F.conv2d
    centred = x.double() - zero
    x = centred.float() if kernel.activations == "rounded" else x
    try:
        run = partial(kernel.prepare(w, torch.ones(64), **options), x, *((1.0, zero) if zero else ()))
        results = run()
    except (RuntimeError, AttributeError) as error:
        return f"{name} does not run in torch {torch.__version__} on this machine ({str(error).splitlines()[0][:80]})."
    exact = reference(centred, w.double(), **options)  # float64 holds these integers
    if wrong := int((results.double() != exact).sum()):
        return (
            f"{name} gave {wrong} of {exact.numel()} products of extreme {bits}-bit codes wrong, as a CPU without VNNI "
            "does that adds pairs in int16: quantize the weights to 7 bits, whose pairs fit, or use an engine."
        )
    floats = x.float(), w.float()
    if _seconds(run) > TOO_SLOW * _seconds(lambda: reference(*floats, **options)):
        advice = "multiply in float32" if kernel.activations == "float" else "give it unsigned activations"
        return f"{name} is a reference loop here, many times slower than float32: {advice}, or use an engine."
    return ""


def _seconds(fn: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


def _check(kernel: str, bits: int, layer: nn.Module) -> None:
    if layer.weight.device.type != "cpu":
        raise InputError(
            f"The model is on {layer.weight.device}, but these kernels are the CPU's: move it there first."
        )
    if layer.weight.dtype is not torch.float32:
        raise InputError(
            f"A layer's weight is {layer.weight.dtype}, but these kernels give float32: call .float() first."
        )
    if reason := probe(KERNELS[kernel], bits):
        raise InputError(reason)


# --- layers that store integers ---------------------------------------------------------------------------------------


class _OnGrid(nn.Module):
    """Stores grids of activations: what a name in `grids` stands for is loaded and saved with the model."""

    def __init__(self, **grids: Grid | None) -> None:
        super().__init__()
        grids = {name: grid for name, grid in grids.items() if grid is not None}
        if any(grid.lo or grid.scale.numel() > 1 for grid in grids.values()):
            raise InputError("Activations need one unsigned grid for the tensor: choose it with symmetric=False.")
        self.highest = {name: grid.hi for name, grid in grids.items()}
        for name, grid in grids.items():
            self.register_buffer(f"{name}_scale", grid.scale.detach().float().reshape(()).clone())
            self.register_buffer(f"{name}_zero", grid.zero.detach().int().reshape(()).clone())
        self._ready: tuple | None = None

    def numbers(self, name: str) -> tuple[float, int] | None:
        """(scale, zero) as Python's numbers, or None without such a grid."""
        if name not in self.highest:
            return None
        return float(getattr(self, f"{name}_scale")), int(getattr(self, f"{name}_zero"))

    def prepare(self) -> tuple:
        raise NotImplementedError

    def ready(self) -> tuple:
        """What `prepare` makes of the stored integers, once; it has a layout of the CPU's and is stored nowhere."""
        if self._ready is None:
            self._ready = self.prepare()
        return self._ready

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_ready": None}

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._ready = None
        super()._load_from_state_dict(*args, **kwargs)


class Quantize(_OnGrid):
    """Floats to the codes of a grid, in uint8; `Grid.quantize` but for its look at NaN."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid=grid)

    def prepare(self) -> tuple:
        return *self.numbers("grid"), self.highest["grid"]

    def forward(self, x: Tensor) -> Tensor:
        return _codes(x, *self.ready())


class Dequantize(Quantize):
    """Codes to floats."""

    def forward(self, codes: Tensor) -> Tensor:
        scale, zero, _ = self.ready()
        return codes.float().sub_(zero).mul_(scale)


class PadCodes(Quantize):
    """Pads codes with the code of zero, which is the zero point and not the code 0."""

    def __init__(self, grid: Grid, pad: tuple[int, ...]) -> None:
        super().__init__(grid)
        self.pad = pad

    def forward(self, codes: Tensor) -> Tensor:
        return F.pad(codes, self.pad, value=self.ready()[1])


class _IntegerLayer(_OnGrid):
    """codes int8, scale float32 [out], bias float32 [out]: what is stored, and what `artifact.size` counts.

    input: the grid of the activations, asymmetric and for the whole tensor. output: the grid on which codes are handed
    on; without, float32. term: the grid of the codes that are added before that.
    """

    def __init__(self, layer: nn.Module, weight: Grid, **grids: Grid | None) -> None:
        super().__init__(**grids)
        if weight.lo >= 0 or weight.zero.any() or weight.scale.numel() not in (1, *weight.scale.shape[:1]):
            raise InputError(
                "A weight needs a symmetric grid, one for all or one for each output channel: see weight_grid."
            )
        with torch.no_grad():
            self.register_buffer("codes", weight.quantize(layer.weight).to(torch.int8))
            scale = weight.scale.float().flatten()
            self.register_buffer("scale", scale.expand(len(self.codes)).clone())
            self.register_buffer("bias", None if layer.bias is None else layer.bias.float().clone())
        if 255 * int(self.codes.int().abs().flatten(1).sum(1).max()) >= 2**31:
            raise InputError(
                f"A sum of {self.codes[0].numel()} products of these codes can leave int32: quantize the weights to "
                "fewer bits, or leave this layer out (ptq.quantize's ignore)."
            )

    @property
    def weight(self) -> Tensor:
        """The points of the codes, for forward passes that look at its type (ViT, T5)."""
        return self.codes * self.scale.view(-1, *[1] * (self.codes.dim() - 1))

    def arguments(self) -> tuple:
        return self.codes, self.scale, self.bias

    def exact(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the result for codes x before it is rounded, the sum of its terms' magnitudes), in float64.

        Which holds every sum of products of codes, an integer below 2^53, exactly.
        """
        scale, zero = self.numbers("input")
        shape = (-1, *[1] * (self.codes.dim() - 2))
        terms = [self.products(x.double() - zero) * (scale * self.scale.double().view(shape))]
        if self.bias is not None:
            terms.append(self.bias.double().view(shape))
        if other is not None:
            scale, zero = self.numbers("term")
            terms.append((other.double() - zero) * scale)
        return sum(terms), sum(term.abs() for term in terms)

    def products(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def compare(self, y: Tensor, x: Tensor, other: Tensor | None = None) -> dict[str, int]:
        """For `prove`: the result y of x against `exact`."""
        x = x if x.dtype is torch.uint8 else _codes(x, *self.numbers("input"), self.highest["input"])
        value, size = self.exact(x, other)
        target = self.numbers("output")
        if target is None:
            codes, near = 0, torch.zeros(())
            off = (y - value).abs() > ROUNDING * size
        else:
            steps, codes = value / target[0], y.numel()
            off = (y - (steps.round() + target[1]).clamp(0, self.highest["output"])).abs()
            near = (steps - steps.floor() - 0.5).abs() <= ROUNDING * size / target[0] + 2**-16
        counts = {"different": off > 0, "ties": near, "wrong": off > near}
        return {"codes": codes} | {key: int(x.sum()) for key, x in counts.items()}

    def clip(self, y: Tensor) -> Tensor:
        """The kernel saturates at 255, a grid of fewer bits earlier. ReLU is the clip at a zero point of 0."""
        highest = self.highest.get("output", 255)
        return y.clamp_(max=highest) if highest < 255 else y


class Int8Linear(_IntegerLayer):
    """y = x W^T + b of integers, for x [..., in] in float32, or in codes of the input grid where it has one.

    Without an input grid the activations are quantized as they come (dynamic), on the grid of their least and largest
    value, by FBGEMM; where it is refused by oneDNN, and up to two rows each by its own largest magnitude by `_int_mm`.
    """

    def __init__(self, layer: nn.Linear, weight: Grid, input: Grid | None = None, output: Grid | None = None) -> None:
        super().__init__(layer, weight, input=input, output=output)

    def prepare(self) -> tuple:
        source, few = self.numbers("input"), None
        bits = 7 if self.codes.abs().max() < 64 else 8
        if source is None and not probe(KERNELS["fbgemm"], bits):
            product = _fbgemm(*self.arguments())
        else:
            product, few = _qlinear(*self.arguments()), _int_mm(self.codes, self.scale)
        return product, few, source, self.numbers("output")

    def products(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.double())

    def forward(self, input: Tensor) -> Tensor:
        product, few, source, target = self.ready()
        if not input.dim() or input.shape[-1] != self.codes.shape[1]:
            raise InputError(
                f"A Linear of integers takes [..., {self.codes.shape[1]}], not {list(input.shape)}: give it as many "
                "inputs as its weight has columns."
            )
        x = input.reshape(-1, input.shape[-1])
        if source is None and not len(x):  # which have no range
            y = x.float() @ self.weight.t()
        elif source is None and few is None:
            y = product(x.float(), *_range(x))
        elif source is None and len(x) <= FEW:
            step = x.float().abs().amax(1, keepdim=True).div_(127)
            _check_finite(bool(step.isfinite().all()))
            step.masked_fill_(step == 0, 1)
            y = few((x / step).round_().to(torch.int8)).mul_(step)
            y = y if self.bias is None else y.add_(self.bias)
        elif source is None:
            scale, zero = _range(x)
            y = product(_codes(x, scale, zero), scale, zero)
        else:
            x = x if x.dtype is torch.uint8 else _codes(x, *source, self.highest["input"])
            y = self.clip(product(x, *source, target))
        return y.view(*input.shape[:-1], len(self.codes))


class Int8Conv2d(_IntegerLayer):
    """A convolution of integers, for x [N, C, H, W] in float32 or in codes of the input grid; `other`: see `_qconv`."""

    def __init__(
        self, layer: nn.Conv2d, weight: Grid, input: Grid, output: Grid | None = None, term: Grid | None = None
    ) -> None:
        super().__init__(layer, weight, input=input, output=output, term=term)
        pad = layer._reversed_padding_repeated_twice  # numbers where padding is "same"
        self.options = (list(layer.stride), [pad[2], pad[0]], list(layer.dilation), layer.groups)
        self.same = pads_same(layer)

    def prepare(self) -> tuple:
        return _qconv(*self.arguments(), *self.options), *map(self.numbers, ("input", "output", "term"))

    def padded(self, x: Tensor, value: int) -> Tensor:
        """x with `value` around it where the layer pads by the size of its input (`subclasses.pads_same`)."""
        if not self.same:
            return x
        stride, _, dilation, _ = self.options
        return F.pad(x, same_pads(x.shape[2:], self.codes.shape[2:], stride, dilation), value=value)

    def products(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padded(x, 0), self.codes.double(), None, *self.options)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        product, source, target, term = self.ready()
        channels = self.codes.shape[1] * self.options[-1]
        if input.dim() != 4 or input.shape[1] != channels:  # the kernel would take it for something else
            raise InputError(
                f"A convolution of integers takes [N, C, H, W] with {channels} channels C, not {list(input.shape)}: "
                "give it such a batch."
            )
        x = input if input.dtype is torch.uint8 else _codes(input, *source, self.highest["input"])
        return self.clip(product(self.padded(x, source[1]), *source, target, other, term))


ALIGNMENT = 64  # bytes; the kernels load vectors and the process ends where these lie across


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., in], W read in 4 or 8 bits by a kernel that is made for one row or a few.

    layer: what is stored, as `weight_only` packed it; the kernel's layout is made of it at the first call. x, scales,
    what a zero point adds, and x W^T are rounded to bfloat16, and products are added up in float32. From some dozens of
    rows on a product in float32 is faster.
    """

    def __init__(self, layer: WeightOnlyLinear) -> None:
        super().__init__()
        self.layer = layer
        self._run: Run | None = None

    @property
    def weight(self) -> Tensor:
        """For forward passes that look at its type."""
        return self.layer.weight

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """codes [out, in] from -8 or -128, scale and shift [out, groups]: W = codes scale + shift."""
        weight = self.layer.quantized()
        lowest = 2 ** (weight.bits - 1) if weight.grid.lo == 0 else 0  # of unsigned codes
        scale = weight.scale.squeeze(-1).float()
        shift = (lowest - weight.zero.squeeze(-1)) * scale
        return (weight.codes.short() - lowest).to(torch.int8), scale, shift

    def compare(self, y: Tensor, x: Tensor) -> dict[str, int]:
        """For `prove`: results y of x against float64 on the operands as the kernel rounds them.

        Beyond these, products of n terms add up with less than (n + 2) 2^-24 of their terms' magnitudes, and two
        roundings follow, to bfloat16 and to y's type after the bias.
        """
        codes, *table = self.operands()
        x, (scale, shift) = x.bfloat16().double(), (part.bfloat16().double()[..., None] for part in table)
        codes = codes.double().unflatten(1, (scale.shape[1], -1))
        value = F.linear(x, (codes * scale + shift).flatten(1))
        size = F.linear(x.abs(), (codes.abs() * scale.abs() + shift.abs()).flatten(1))
        result, limit = value, 2**-8 * value.abs() + (x.shape[-1] + 3) * 2**-24 * size
        if self.layer.bias is not None:
            result = value + self.layer.bias.double()
            limit = limit + torch.finfo(y.dtype).eps * result.abs()
        off = int(((y - result).abs() > limit).sum())
        return {"codes": 0, "different": off, "ties": 0, "wrong": off}

    def forward(self, input: Tensor) -> Tensor:
        if self._run is None:
            kernel, _ = packing(self.layer)
            self._run = KERNELS[kernel].prepare(*self.operands()[: 3 if kernel == "int4pack" else 2])
        x = input.reshape(-1, input.shape[-1])
        x = x.clone() if x.data_ptr() % ALIGNMENT else x
        y = self._run(x).to(input.dtype)
        y = y if self.layer.bias is None else y + self.layer.bias
        return y.view(*input.shape[:-1], -1)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_run": None}

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._run = None
        super()._load_from_state_dict(*args, **kwargs)


def packing(layer: WeightOnlyLinear) -> tuple[str, str]:
    """(which of KERNELS multiplies the layer, "") or ("", why none does)."""
    weight, (rows, columns) = layer.quantized(), (layer.out_features, layer.in_features)
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


def _codes(x: Tensor, scale: float, zero: int, highest: int = 255) -> Tensor:
    return x.float().div(scale).round_().add_(zero).clamp_(0, highest).to(torch.uint8)


def _range(x: Tensor) -> tuple[float, int]:
    """`affine.choose(min, max, 8, symmetric=False)` in Python's numbers, several times faster for one tensor."""
    lo, hi = (np.float32(float(end)) for end in x.aminmax())
    lo, hi = min(lo, np.float32(0)), max(hi, np.float32(0))
    with np.errstate(over="ignore"):
        scale = (hi - lo) / np.float32(255)
    _check_finite(math.isfinite(scale))
    scale = max(scale, np.float32(2.0**-126)) if scale else np.float32(1)  # 1 / scale is a number, too
    return float(scale), int(min(max(round(float(-lo / scale)), 0), 255))


def _check_finite(finite: bool) -> None:
    if not finite:
        raise InputError(
            "The input of an int8 layer has NaN or infinity, or a range beyond float32: look for the layer that it "
            "comes from."
        )


# --- whole models -----------------------------------------------------------------------------------------------------


def convert(model: nn.Module) -> nn.Module:
    """REAL: a model whose kernels read integers, made of a SIMULATED one from `ptq`, `qat` or `weight_only`.

    model: with `FakeQuantized` layers, and equal to it code by code; or with `WeightOnlyLinear`s, which become
        `PackedLinear`s and differ by roundings to bfloat16. It is left as it was. If it is a graph
        (`Calibrated.plan.traced`), codes are handed from layer to layer: where all readers of a value quantize it on
        the same grid, its layer gives codes of that grid, ReLU is the clip at their zero, and a sum is added up before
        the codes are rounded. Elsewhere, and in other models, every layer takes float32 and gives float32.

    Codes are those of exact arithmetic but next to a rounding tie, where the kernel's float32 may fall on the other
    side. InputError without quantized layers, for weights that no kernel takes, or if this machine's kernels do not
    pass `probe`.
    """
    calls.check_model(model)
    layers = {name: x for name, x in model.named_modules() if isinstance(x, FakeQuantized | WeightOnlyLinear)}
    if not layers:
        raise InputError("The model has no quantized layer: call ptq.quantize or weight_only.quantize first.")
    for name, layer in layers.items():
        if isinstance(layer, FakeQuantized):
            _check("qlinear" if isinstance(layer.layer, nn.Linear) else "qconv", layer.weight_grid.bits, layer.layer)
            continue
        kernel, reason = packing(layer)
        if reason:
            raise InputError(
                f"{name or 'The layer'} cannot be converted ({reason}): quantize it so, or name it in ignore."
            )
        _check(kernel, layer.bits, layer)
    model = copy.deepcopy(model)
    if isinstance(model, fx.GraphModule):
        return _Lowering(model).run()
    for name in layers:
        layer = model.get_submodule(name)
        model = replaced(model, name, _integer(layer) if isinstance(layer, FakeQuantized) else PackedLinear(layer))
    return model


def convert_dynamic(model: nn.Module, *, weights: int = 8) -> nn.Module:
    """REAL: a copy of `model` whose Linears are int8 and quantize what they get.

    weights: bits, 2 to 8, per output channel. Activations have 8, see `Int8Linear`, and need no calibration. InputError
    if this machine's kernels do not pass `probe`.
    """
    calls.check_model(model)
    read = bypassed(model)
    layers = {name: x for name, x in model.named_modules() if type(x) is nn.Linear and x not in read}
    if not layers:
        raise InputError("The model has no nn.Linear that is called: give another, or calibrate it with ptq.quantize.")
    grids = {name: weight_grid(layer, weights) for name, layer in layers.items()}
    kernels = ("qlinear", "int_mm") if probe(KERNELS["fbgemm"], weights) else ("fbgemm",)
    for layer, kernel in itertools.product(layers.values(), kernels):
        _check(kernel, weights, layer)
    model = copy.deepcopy(model)
    for name, grid in grids.items():
        model = replaced(model, name, Int8Linear(layers[name], grid))
    return model


ROUNDING = 2**-22  # of what a float32 kernel adds up: four roundings; 2^-16 is float32's at 256, where codes end


@torch.no_grad()
def prove(model: nn.Module, batch: Any) -> list[dict[str, Any]]:
    """Every integer layer of a converted model on this batch, laid beside exact arithmetic on the codes that it got.

    Rows: "layer"; "codes" that it hands on; "different" of them from one rounding in float64; "ties", values so near to
    the middle between two codes that the kernel's float32 may round them to either; "wrong" of the different ones, not
    at a tie or more than one code off. It is proved where wrong is 0; the others are reported, not tolerated. Of a
    layer that gives float32 "codes" is 0, and "wrong" and "different" count numbers that are further off than their
    roundings. Layers that quantize as they go (dynamic) are left out. InputError for a model without integer layers,
    and for a batch with NaN or infinity, or without a number that a layer could be compared on.
    """
    calls.check_model(model)
    named = calls.inputs(model, batch)
    rows, terms = [], {}

    def check(_: nn.Module, args: Sequence[Tensor]) -> None:
        if not args[0].isfinite().all():
            raise InputError("The batch makes NaN or infinity, for which there is no code: give other data.")

    def before(layer: _IntegerLayer | PackedLinear, args: tuple, kwargs: dict[str, Tensor]) -> None:
        terms[layer] = [arg.clone() for arg in (*args, *kwargs.values())]  # a sum overwrites its term
        check(layer, terms[layer])

    def after(name: str, layer: _IntegerLayer | PackedLinear, _: tuple, y: Tensor) -> None:
        rows.append({"layer": name} | layer.compare(y, *terms.pop(layer)))

    with contextlib.ExitStack() as hooks:
        for name, layer in model.named_modules():
            if type(layer) is Quantize:
                hooks.callback(layer.register_forward_pre_hook(check).remove)
            if isinstance(layer, PackedLinear) or (isinstance(layer, _IntegerLayer) and "input" in layer.highest):
                hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(partial(after, name)).remove)
        calls.run(model, **named)
    if not rows:
        raise InputError("The model has no integer layer but such as quantize as they go: convert one that has.")
    return rows


def _integer(layer: FakeQuantized, output: Grid | None = None, term: Grid | None = None) -> _IntegerLayer:
    if isinstance(layer.layer, nn.Linear):
        return Int8Linear(layer.layer, layer.weight_grid, layer.input_grid, output)
    return Int8Conv2d(layer.layer, layer.weight_grid, layer.input_grid, output, term)


class _Lowering:
    """Rewrites the graph of a simulated model. grids: on which each value is handed on in codes, where it is.

    summed: {a layer that gives its sum to an addition: that addition}, which the layer's kernel does.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        self.grids: dict[fx.Node, Grid] = {}
        self.summed: dict[fx.Node, fx.Node] = {}
        wants: dict[fx.Node, list[Grid | None]] = defaultdict(list)  # by reader; None: floats
        for node in reversed(model.graph.nodes):
            module, readers = self._module(node), wants[node]
            grid = readers[0] if readers and all(_same(readers[0], other) for other in readers) else None
            if isinstance(module, QuantizationPoint):
                grid = needs = module.grid
            elif isinstance(module, FakeQuantized):
                needs = module.input_grid
            elif grid is not None and self._keeps(node, grid) is not None:
                needs = grid
            elif grid is not None and (layer := self._fused(node)) is not None:
                self.summed[layer], needs = node, None
            else:
                grid = needs = None
            if grid is not None:
                self.grids[node] = grid
            for source in node.all_input_nodes:
                wants[source].append(needs)

    def run(self) -> fx.GraphModule:
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}  # by old one
        self.converted: dict[tuple[fx.Node, str], fx.Node] = {}
        self.sums: list[fx.Node] = []
        for node in self.model.graph.nodes:
            module, grid = self._module(node), self.grids.get(node)
            if node in self.summed:
                continue
            if node in self.summed.values():
                layer = next(layer for layer, addition in self.summed.items() if addition is node)
                (other,) = (source for source in node.all_input_nodes if source is not layer)
                term = self._module(other).grid
                self.new[node] = self._layer(layer, grid, term, self._codes(other, term))
                self.sums.append(self.new[node])
            elif isinstance(module, FakeQuantized):
                self.new[node] = self._layer(node, grid)
            elif grid is not None:
                codes = self._codes(node.all_input_nodes[0], grid)
                pad = None if isinstance(module, QuantizationPoint) else self._keeps(node, grid)
                self.new[node] = self._call(PadCodes(grid, pad), f"{node.name}_codes", codes) if pad else codes
            else:
                self.new[node] = self.graph.node_copy(node, self._floats)
        self._spare_terms()
        for name in [name for name, module in self.modules.items() if isinstance(module, FakeQuantized)]:
            if isinstance(self.model.get_submodule(name), FakeQuantized):
                self.model.delete_submodule(name)  # nobody calls it
        return fx.GraphModule(self.model, self.graph)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def _keeps(self, node: fx.Node, grid: Grid) -> tuple[int, ...] | None:
        """How this operation, done on codes of `grid`, pads (often ()); None if it is another operation.

        ReLU changes no code if that of 0 is the lowest, ReLU6 if that of 6 is beyond the highest, too.
        """
        module = self._module(node)
        operation = type(module) if module is not None else called(node)
        at_zero, at_six = int(grid.zero) == grid.lo, bool(grid.scale * (grid.hi - grid.zero - 0.5) < 6)
        if operation in RELU:
            return () if at_zero else None
        if operation in RELU6:
            return () if at_zero and at_six else None
        return tuple(module.padding) if operation is nn.ZeroPad2d else None

    def _fused(self, node: fx.Node) -> fx.Node | None:
        """The convolution that can do this sum of its result and a point, if nobody else reads the result."""
        if not is_sum(node):
            return None
        modules = {source: self._module(source) for source in node.args}
        layers = [
            source for source, module in modules.items()
            if isinstance(module, FakeQuantized) and isinstance(module.layer, nn.Conv2d) and len(source.users) == 1
        ]  # fmt: skip
        points = [source for source, module in modules.items() if isinstance(module, QuantizationPoint)]
        return layers[0] if layers and points else None

    def _layer(self, node: fx.Node, output: Grid | None, term: Grid | None = None, other: fx.Node | None = None):
        layer = self._module(node)
        name = node.target
        if not isinstance(self.model.get_submodule(name), FakeQuantized):  # called before, with other grids maybe
            name = f"{name}_{node.name}"
        codes = self._codes(node.all_input_nodes[0], layer.input_grid)
        return self._call(_integer(layer, output, term), name, codes, *([other] if other is not None else []))

    def _codes(self, node: fx.Node, grid: Grid) -> fx.Node:
        if _same(self.grids.get(node), grid):
            return self.new[node]
        key = (node, f"{float(grid.scale)} {int(grid.zero)} {grid.bits}")
        if key not in self.converted:
            name = f"{node.name}_quantize_{len(self.converted)}"
            self.converted[key] = self._call(Quantize(grid), name, self._floats(node))
        return self.converted[key]

    def _floats(self, node: fx.Node) -> fx.Node:
        if node not in self.grids:
            return self.new[node]
        if (node, "floats") not in self.converted:
            name = f"{node.name}_dequantize"
            self.converted[node, "floats"] = self._call(Dequantize(self.grids[node]), name, self.new[node])
        return self.converted[node, "floats"]

    def _call(self, module: nn.Module, name: str, *args: fx.Node) -> fx.Node:
        self.model.set_submodule(name, module)
        return self.graph.call_module(name, args)

    def _spare_terms(self) -> None:
        """A sum overwrites its term: a copy of it, where the layer reads the term as well, or somebody does later."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        for node in self.sums:
            source, term = node.args
            if source is term or any(order.get(user, 0) > order[node] for user in term.users):  # 0: a copy, made before
                with self.graph.inserting_before(node):
                    node.update_arg(1, self.graph.call_method("clone", (term,)))


def _same(a: Grid | None, b: Grid | None) -> bool:
    if a is None or b is None:
        return False
    return a.bits == b.bits and float(a.scale) == float(b.scale) and int(a.zero) == int(b.zero)


RELU = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
RELU6 = {nn.ReLU6, F.relu6}
