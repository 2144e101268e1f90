"""The product of four-bit weights and a few rows of activations, in one kernel: weights stay packed until multiplied.

Frantar et al. 2024 (Marlin, arXiv:2408.11743) and torchao's tinygemm are the fast kernels of this kind. They reorder
the bytes for the tensor cores; here the bytes lie as `labkit.quantization.packing` stores them.
"""

from torch import Tensor

from labkit.errors import InputError
from labkit.quantization.weight_only import SCALE, WeightOnlyLinear
from labkit.triton_kernels import MISSING, operand

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError(MISSING) from error

FEWEST = 16  # rows, outputs and inputs that a tensor core multiplies at once
WIDEST_BLOCK = 128  # inputs in a step of the loop


@triton.jit
def int4_product(
    x, codes, scales, zeros, y,  # addresses of the tensors
    rows, inputs, outputs,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,  # inputs that share a scale, inputs of a step; BLOCK divides GROUP
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr,  # of a program, powers of two
    OPERAND: tl.constexpr,  # type of the factors of a product
):  # fmt: skip
    # A program computes y for all rows and for OUTPUTS of the outputs.
    row = tl.arange(0, ROWS)[:, None]
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = row < rows, output < outputs  # the last program may reach beyond the end
    byte = tl.arange(0, BLOCK // 2)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, BLOCK):
        # A byte holds the codes of two inputs, the earlier in its lower half.
        first_byte = output * (inputs // 2) + start // 2
        place = first_byte[None, :] + byte[:, None]  # [BLOCK / 2, OUTPUTS]
        packed = tl.load(codes + place, mask=is_output[None, :], other=0)
        # A block lies within one group, so each output has one scale and one zero point, a code as well.
        group = output * (inputs // GROUP) + start // GROUP
        scale = tl.load(scales + group, mask=is_output, other=0).to(tl.float32)
        pair_of_zeros = tl.load(zeros + group // 2, mask=is_output, other=0).to(tl.int32)
        zero = (pair_of_zeros >> 4 * (group % 2)) & 15
        even = (packed & 15).to(tl.int32) - zero[None, :]  # weights in steps of the scale, -15 to 15
        odd = (packed >> 4).to(tl.int32) - zero[None, :]
        # Even inputs meet the lower halves, odd inputs the upper halves: nothing is moved to unpack.
        place = row * inputs + start + 2 * byte[None, :]
        x_even = tl.load(x + place, mask=is_row, other=0)  # [ROWS, BLOCK / 2]
        x_odd = tl.load(x + place + 1, mask=is_row, other=0)
        part = tl.dot(x_even.to(OPERAND), even.to(OPERAND), input_precision="ieee")
        part = tl.dot(x_odd.to(OPERAND), odd.to(OPERAND), part, input_precision="ieee")
        total += part * scale[None, :]  # the scale is common to the block: once a sum, not once a weight
    place = row * outputs + output[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row & is_output[None, :])


def linear(x: Tensor, layer: WeightOnlyLinear) -> Tensor:
    """Multiply activations by a layer's packed weights: x weight^T, without the bias.

    x: float32, bfloat16 or float16 [rows, inputs] on the layer's device; few rows, all of which a program holds.
    layer: four bits with zero points (`weight_only.quantize` with its defaults), groups of a multiple of 32 inputs.
    Returns [rows, outputs] in the dtype of x. A weight is (code - zero) times its scale, not rounded to the dtype of x;
    products are added in float32. Raises InputError for another layer, and for an x that does not fit.
    """
    outputs, inputs = layer.out_features, layer.in_features
    group = inputs * outputs // layer.scale.view(SCALE).numel()
    if layer.bits != 4 or layer.format or layer.range[0] < 0 or group % (2 * FEWEST):
        raise InputError(
            f"The layer has {layer.extra_repr()} and groups of {group}: quantize it to 4 bits with symmetric=False "
            "and a group_size that is a multiple of 32."
        )
    if x.dim() != 2 or x.shape[1] != inputs or x.device != layer.codes.device:
        expected = f"[rows, {inputs}] on {layer.codes.device}"
        raise InputError(f"x is {list(x.shape)} on {x.device}, but it must be {expected}.")
    rows = len(x)
    y = x.new_empty(rows, outputs)
    programs = triton.cdiv(outputs, FEWEST)
    int4_product[(programs,)](
        x.contiguous(), layer.codes, layer.scale.view(SCALE), layer.zero, y, rows, inputs, outputs,
        GROUP=group, BLOCK=min(WIDEST_BLOCK, group & -group),  # the largest power of two in the group
        ROWS=max(FEWEST, triton.next_power_of_2(rows)), OUTPUTS=FEWEST, OPERAND=operand(x.dtype),
    )  # fmt: skip
    return y
