"""torch's integer products for the CPU, a row each in `KERNELS`, and the probe that each must pass before use.

The kernels have private names in torch (inductor lowers to them). `probe` trusts a kernel only after it has multiplied
extreme codes as int64 does (see `extreme_codes`), and not much slower than float32.

The first function of a row prepares a weight once and returns a function of the activations, so that a layer and the
probe run the same code.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError, first_line
from labkit.quantization.extreme_codes import ROWS, TERMS, count_wrong, extreme_codes
from labkit.timing.fingerprint import fingerprint, on_threads

FEW = 2  # rows up to which a product with a vector is faster in int_mm than in oneDNN
MANY = 64  # rows from which oneDNN with AMX is faster than FBGEMM at all widths measured (benchmarks/int8_linear.py)
TOO_SLOW = 10  # times float32: a slower kernel is a reference loop, which takes 200 times and more
RUNS = 5  # of float32, the fastest of which is compared
PATIENCE = 20  # runs of a kernel that other programs may have slowed down, until the kernel is refused

Run = Callable[..., Tensor]
ScaleAndZero = tuple[float, int]

# --- kernels ----------------------------------------------------------------------------------------------------------


def qlinear(codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Run:
    """Prepare onednn::qlinear_pointwise: u8 [rows, in] x s8 [out, in].

    codes: int8 [out, in].
    scale: float32 [out].
    bias: float32 [out].
    Returns run(x, x_scale, x_zero, out) -> [rows, out]: float32, or uint8 codes on the grid out = (scale, zero).
    """
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(codes), dtype=torch.int64)

    def run(
        x: Tensor,
        x_scale: float = 1.0,
        x_zero: int = 0,
        out: ScaleAndZero | None = None,
    ) -> Tensor:
        step, zero, dtype = (*out, torch.uint8) if out else (1.0, 0, torch.float32)
        return torch.ops.onednn.qlinear_pointwise(
            x, x_scale, x_zero, packed, scale, zeros, bias, step, zero, dtype, "none", [], ""
        )

    return run


def qconv(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Run:
    """Prepare onednn::qconv_pointwise: u8 [N, C, H, W] x s8 [out, C / groups, kh, kw], padded with the zero point.

    codes, scale, bias: as for `qlinear`.
    stride, padding, dilation, groups: as for nn.Conv2d.
    Returns run(x, x_scale, x_zero, out, other, term) -> [N, out, H', W']: float32, or uint8 codes on the grid
    out = (scale, zero). `other` has codes on the grid term = (scale, zero), which are added before the result is
    rounded; the kernel may overwrite them.

    The weight is packed for the shape of x at the first call, with and without a zero point: oneDNN reorders a weight
    that was packed for another shape at each call, and some reorderings take fifty times as long as the product.
    """
    weights: dict[bool, Tensor] = {}  # packed, by having a zero point
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    shape = (bias, stride, padding, dilation, groups)

    def packed(x: Tensor, x_scale: float, x_zero: int) -> Tensor:
        has_zero = x_zero != 0
        if has_zero not in weights:
            sizes = (stride, padding, dilation, groups, list(x.shape))
            weights[has_zero] = torch.ops.onednn.qconv_prepack(codes, scale, x_scale, x_zero, *sizes)
        return weights[has_zero]

    def run(
        x: Tensor,
        x_scale: float = 1.0,
        x_zero: int = 0,
        out: ScaleAndZero | None = None,
        other: Tensor | None = None,
        term: ScaleAndZero | None = None,
    ) -> Tensor:
        source = (x, x_scale, x_zero, packed(x, x_scale, x_zero), scale, zeros)
        target = (*out, torch.uint8) if out else (1.0, 0, torch.float32)
        if other is None:
            return torch.ops.onednn.qconv_pointwise(*source, *shape, *target, "none", [], "")
        other = other.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *source, other, *shape, *target, *term, "sum", 1.0, "none", [], ""
        )

    return run


def fbgemm(codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Run:
    """Prepare FBGEMM's u8 x s8 product, torch's fastest for few rows, which rounds floats on a grid itself.

    FBGEMM computes x times 1 / scale, not x / scale: about one code in 10^5 falls on the other side of a tie. torch
    means to remove these operators, and warns of the quantized tensor that packing takes.

    codes, scale, bias: as for `qlinear`.
    Returns run(x, x_scale, x_zero) -> float32 [rows, out] for x in float32 [rows, in].
    """
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, bias)

    def run(x: Tensor, x_scale: float = 1.0, x_zero: int = 0) -> Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, x_scale, x_zero, packed)

    return run


def qlinear_of_floats(codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Run:
    """Prepare `qlinear` for floats, which are first rounded to FBGEMM's codes, those of x times 1 / scale.

    codes, scale, bias: as for `qlinear`.
    Returns run(x, x_scale, x_zero) -> float32 [rows, out] for x in float32 [rows, in].
    """
    multiply = qlinear(codes, scale, bias)
    with warnings.catch_warnings():  # torch warns of a process's first quantized tensor, and means to remove them
        warnings.simplefilter("ignore")
        _codes_in_a_pass(torch.zeros(1), 1.0, 0)

    def run(x: Tensor, x_scale: float = 1.0, x_zero: int = 0) -> Tensor:
        return multiply(_codes_in_a_pass(x, x_scale, x_zero), x_scale, x_zero)

    return run


def _codes_in_a_pass(x: Tensor, scale: float, zero: int) -> Tensor:
    """Round x in float32 to uint8 codes in a single pass, by a product with 1 / scale."""
    quantized = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    codes = torch.empty(0, dtype=torch.uint8)
    # The same bytes under another type: int_repr would copy them, which takes longer than the rounding.
    return codes.set_(quantized.untyped_storage(), 0, quantized.size(), quantized.stride())


def is_faster_by_qlinear(rows: int, bits: int = 8) -> bool:
    """Tell if `qlinear_of_floats` rounds and multiplies floats faster than `fbgemm`, and passes its probe.

    FBGEMM has no kernel for AMX, and oneDNN has; but a call of oneDNN begins with more overhead.

    rows: rows of the activations.
    bits: width of the weights' codes.
    """
    return rows >= MANY and _has_amx() and not probe(KERNELS["qlinear_of_floats"], bits)


@cache
def _has_amx() -> bool:
    return "amx" in fingerprint("cpu").features


def int_mm(codes: Tensor, scale: Tensor) -> Run:
    """Prepare torch._int_mm: s8 [rows, in] x s8 [out, in] in int32, multiplied by scale [out] afterwards."""
    columns = codes.t()

    def run(x: Tensor) -> Tensor:
        return torch._int_mm(x, columns) * scale

    return run


def int8pack(codes: Tensor, scale: Tensor) -> Run:
    """Prepare torch._weight_int8pack_mm: weights in 8 bits [out, in], scale [out], bfloat16 activations [rows, in]."""
    scale = scale.flatten().bfloat16()

    def run(x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.bfloat16(), codes, scale)

    return run


INT4PACK_GROUPS = (256, 128, 64, 32)  # the group sizes that the kernel knows


def int4pack(codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Run:
    """Prepare torch._weight_int4pack_mm_for_cpu: weights in 4 bits, bfloat16 activations [rows, in].

    codes: int8 [out, in], from -8 to 7.
    scale, shift: [out] or [out, groups]; weight = code * scale + shift.
    A group of a size that the kernel does not know is passed as several equal groups.
    """
    packed = torch._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    scale = scale.view(len(codes), -1)  # [out, groups]
    shift = torch.zeros_like(scale) if shift is None else shift
    width = codes.shape[1] // scale.shape[1]
    fitting = [size for size in INT4PACK_GROUPS if width % size == 0]
    group = fitting[0]
    table = torch.stack([scale, shift], -1).bfloat16()  # [out, groups, 2]
    table = table.repeat_interleave(width // group, 1).transpose(0, 1).contiguous()

    def run(x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, table)

    return run


class IntegerKernel(NamedTuple):
    """An integer product.

    prepare: takes codes [out, in, ...] int8 and scale [out]; returns run(activations).
    activations: "u8" or "s8" codes; "rounded": floats that the kernel rounds to u8; "float": bfloat16, not rounded.
    bits: largest width of a weight's codes.
    """

    prepare: Callable[..., Run]
    activations: str
    bits: int = 8


KERNELS = {
    "qlinear": IntegerKernel(qlinear, "u8"),
    "qconv": IntegerKernel(qconv, "u8"),
    "fbgemm": IntegerKernel(fbgemm, "rounded"),
    "qlinear_of_floats": IntegerKernel(qlinear_of_floats, "rounded"),
    "int_mm": IntegerKernel(int_mm, "s8"),
    "int8pack": IntegerKernel(int8pack, "float"),
    "int4pack": IntegerKernel(int4pack, "float", 4),
}


# --- the probe --------------------------------------------------------------------------------------------------------


def available() -> dict[str, str]:
    """Return "ready" or the reason for a refusal on this machine, for each name in `KERNELS`."""
    return {name: probe(kernel) or "ready" for name, kernel in KERNELS.items()}


@cache
def probe(kernel: IntegerKernel, bits: int = 8) -> str:
    """Run a kernel on extreme codes, and return the reason why the kernel is refused on this machine, or "".

    bits: width of the weights' codes.
    Reasons: the kernel does not run, a product differs from exact arithmetic, or the kernel takes
    more than `TOO_SLOW` times as long as float32.
    """
    name = kernel.prepare.__name__
    bits = min(bits, kernel.bits)
    trial = _trial(kernel, bits)
    try:
        prepared = kernel.prepare(trial.weight, torch.ones(ROWS), **trial.options)
        run = partial(prepared, trial.x, *trial.grid)
        results = run()
    except (RuntimeError, AttributeError) as error:
        return f"{name} does not run in torch {torch.__version__} on this machine ({first_line(error)[:80]})."
    exact = trial.product(trial.centred, trial.weight.double(), **trial.options)  # float64 holds these integers
    if wrong := count_wrong(results, exact):
        return (
            f"{name} gave {wrong} of {exact.numel()} products of extreme {bits}-bit codes wrong, as a CPU without VNNI "
            "does that adds pairs in int16: quantize the weights to 7 bits, whose pairs fit, or use an engine."
        )
    in_floats = partial(trial.product, trial.x.float(), trial.weight.float(), **trial.options)
    if _is_reference_loop(run, in_floats):
        advice = "multiply in float32" if kernel.activations == "float" else "give it unsigned activations"
        return f"{name} is a reference loop here, many times slower than float32: {advice}, or use an engine."
    return ""


@dataclass
class _Trial:
    """The operands of a probe.

    x: the kernel's activations, in the type that it takes.
    grid: (scale, zero point) of x, or () for a kernel that takes none.
    centred: float64, the codes of x minus the zero point.
    weight: int8 codes.
    product, options: torch's function for the same product in floating point, and its arguments.
    """

    x: Tensor
    grid: tuple[float, int] | tuple[()]
    centred: Tensor
    weight: Tensor
    product: Callable[..., Tensor] = F.linear
    options: dict[str, Any] = field(default_factory=dict)


def _trial(kernel: IntegerKernel, bits: int) -> _Trial:
    """Draw extreme codes of the kind that the kernel takes; a convolution pads, and zero points are not 0."""
    draw = torch.Generator().manual_seed(0)
    half = 2 ** (bits - 1)
    weight = extreme_codes(-half, half - 1, draw).to(torch.int8)
    if kernel.activations == "float":
        weight = F.pad(weight, (0, 8))  # 512 columns: whole groups
        columns = TERMS + 8
        # x W^T is some columns of the weight, so that bfloat16 holds the results exactly.
        x = torch.eye(columns)[torch.randperm(columns, generator=draw)[:ROWS]]
        return _Trial(x, (), x.double(), weight)
    if kernel.activations == "s8":
        x = extreme_codes(-128, 127, draw).to(torch.int8)
        return _Trial(x, (), x.double(), weight)
    x, zero = extreme_codes(0, 255, draw).to(torch.uint8), 128
    if kernel.prepare is qconv:
        x, weight = x.view(ROWS, 56, 3, 3), weight.view(ROWS, 56, 3, 3)
        return _Trial(x, (1.0, zero), x.double() - zero, weight, F.conv2d, {"padding": (1, 1)})
    centred = x.double() - zero
    if kernel.activations == "rounded":
        x = centred.float()
    return _Trial(x, (1.0, zero), centred, weight)


def _is_reference_loop(run: Callable[[], object], in_floats: Callable[[], object]) -> bool:
    """Return True if a kernel takes more than `TOO_SLOW` times as long as float32 in every one of many runs.

    Both compute on one thread, as two wait for each other when other programs run, up to a thousand times as long.
    """
    with on_threads(1):
        limit = TOO_SLOW * min(_time(in_floats) for _ in range(RUNS))
        return all(_time(run) > limit for _ in range(PATIENCE))


def _time(fn: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def check_kernel(name: str, bits: int, layer: nn.Module) -> None:
    """Raise InputError unless the kernel `name` can multiply by a layer's weight, in `bits` bits, on this machine."""
    weight = layer.weight
    if weight.device.type != "cpu":
        raise InputError(f"The model is on {weight.device}, but these kernels are the CPU's: move it there first.")
    if weight.dtype is not torch.float32:
        raise InputError(f"A layer's weight is {weight.dtype}, but these kernels give float32: call .float() first.")
    if reason := probe(KERNELS[name], bits):
        raise InputError(reason)
