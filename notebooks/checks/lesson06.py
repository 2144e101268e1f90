"""Checks of lesson 06: a quantizer, true bits, an integer layer, a quantized convolution.

Each holds the answer against what has to be true of it, or against an independent computation: a loop over numbers in
Python's own arithmetic, bits that are written out, sums of integers without an end, windows that are cut one by one.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from labkit.lesson.failures import Failures, has_parts

TIES_AT = {  # bits at which halves are ties, on one of the two grids or on both
    "ties": (3,),
    "ties, positive": (2,),
    "ties beside an odd zero point": (3,),
    "a tie of the zero point at 0.5": (2,),
    "a tie of the zero point at 2.5": (2,),
}


def quantize(fn: Callable, failures: Failures) -> None:
    """quantize(x, bits, symmetric) -> (int32 codes, scale, zero)."""
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    for case, x in {
        "both signs": noise,
        "a matrix": noise.view(5, 8),
        "a positive extreme": torch.cat([noise, torch.tensor([6.0])]),
        "all positive": noise.abs() + 1,
        "all negative": -noise.abs() - 1,
        "all zero": torch.zeros(6),
        "ties": torch.tensor([-3.0, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.0]),
        "ties, positive": torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0]),
        "ties beside an odd zero point": torch.tensor([-1.0, -0.5, 0.5, 1.5, 2.5, 6.0]),
        "a tie of the zero point at 0.5": torch.tensor([-0.5, 2.5]),
        "a tie of the zero point at 2.5": torch.tensor([-2.5, 0.5]),
        "tiny": 1e-7 * noise,
        "one value": torch.full((4,), 3.0),
    }.items():
        for bits in TIES_AT.get(case, (8, 4, 2)):
            for symmetric in (True, False):
                with failures.given(x=case, bits=bits, symmetric=symmetric):
                    _quantize(fn, failures, x, bits, symmetric)


def _quantize(fn: Callable, failures: Failures, x: Tensor, bits: int, symmetric: bool) -> None:
    answer = failures.call(fn, x, bits, symmetric, changed="your function changed x")
    failures.need(has_parts(answer, 3), "return three things: the codes, the scale and the zero point")
    codes, scale, zero = answer
    usable = isinstance(codes, Tensor) and codes.dtype == torch.int32 and codes.shape == x.shape
    failures.need(usable, "the codes have to be an int32 tensor in the shape of x")
    scale, zero = float(scale), float(zero)
    failures.need(scale > 0 and scale < float("inf"), "the scale has to be a positive number, 1 if all values are 0")
    least, most = 0, 2**bits - 1
    if symmetric:
        most = 2 ** (bits - 1) - 1
        least = -most
    failures.expect(
        least <= int(codes.min()) and int(codes.max()) <= most,
        "a code lies outside the range of the card: restricted if symmetric, else 0 to 2^bits - 1",
    )
    failures.need(
        zero == 0 if symmetric else zero.is_integer() and 0 <= zero <= most,
        "the zero point has to be 0 if symmetric, else a code, so that 0 can be stored exactly",
    )
    values = x.flatten().double().tolist()
    low, high = min(0.0, *values), max(0.0, *values)
    reach = max(-low, high) if symmetric else high - low
    failures.close(
        scale,
        reach / (most if symmetric else most - least) if reach else 1.0,
        "the scale is not the range over its number of steps; the range of an asymmetric grid contains 0",
        rtol=1e-5,
    )
    exact_zero = 0.0 if symmetric else -low / scale
    failures.expect(
        zero == round(exact_zero) if (2 * exact_zero).is_integer() else abs(zero - exact_zero) < 0.5001,
        "the zero point is not round(-min / s), in a tie the even whole number",
    )
    points = [(code - zero) * scale for code in codes.flatten().tolist()]
    failures.expect(
        all(abs(point - value) <= scale * 0.5001 for point, value in zip(points, values, strict=True)),
        "a value is farther than half a step from its point, although nothing has to be clipped",
    )
    even = True
    for code, value in zip(codes.flatten().tolist(), values, strict=True):
        if least < code < most:
            half_steps = value / scale * 2
            is_tie_or_point = abs(half_steps - round(half_steps)) < 1e-6
            even &= not is_tie_or_point or round(value / scale) == code - zero
    failures.expect(even, "a tie has to go to the even whole number, before the zero point is added")


# columns, group size
GROUPED_ROWS = (
    (576, 64),
    (576, 576),
    (576, 128),
    (64, 32),
    (10, 4),
    (1536, 16),
    (5, 8),
)
# bits of a code, of a scale, of a zero point
STORED_BITS = (
    (4, 16, 0),
    (4, 16, 4),
    (8, 32, 8),
    (2, 8, 0),
    (4, 16, 16),
)


def stored_bits(fn: Callable, failures: Failures) -> None:
    """stored_bits(columns, bits, group_size, scale_bits, zero_bits) -> bits stored for each weight of a row."""
    for columns, group_size in GROUPED_ROWS:
        for bits, scale_bits, zero_bits in STORED_BITS:
            arguments = {"columns": columns, "bits": bits, "group_size": group_size, "scale_bits": scale_bits}
            with failures.given(**arguments, zero_bits=zero_bits):
                row = ""
                for _ in range(0, columns, group_size):
                    row += "c" * bits * group_size + "s" * scale_bits + "z" * zero_bits
                failures.close(
                    fn(columns, bits, group_size, scale_bits, zero_bits),
                    len(row) / columns,
                    "your bits differ from those of a row that was written out: whole groups, each with its scale and "
                    "zero point, shared by the weights that there are",
                )


# rows, inputs, outputs
PRODUCTS = (
    (3, 7, 5),
    (1, 40, 2),
    (6, 4, 4),
    (5, 5, 5),
    (2, 1200, 3),
)
ZERO_POINTS = (
    (0, 0),
    (128, 0),
    (0, 3),
    (117, -5),
    (255, 127),
)


def int_linear(fn: Callable, failures: Failures) -> None:
    """int_linear(q, z_x, p, z_w) -> int32 [rows, out], the sums of (q - z_x)(p - z_w)."""
    generator = torch.Generator().manual_seed(1)
    for rows, inner, outputs in PRODUCTS:
        q = torch.randint(0, 256, (rows, inner), generator=generator).to(torch.uint8)
        p = torch.randint(-128, 128, (outputs, inner), generator=generator).to(torch.int8)
        q[0], p[0] = 255, -128
        p[0, 0] = -127  # odd, so that no float32 holds the sum of a long row
        for z_x, z_w in ZERO_POINTS:
            with failures.given(rows=rows, inputs=inner, outputs=outputs, z_x=z_x, z_w=z_w):
                sums = failures.call(fn, q, z_x, p, z_w, changed="your function changed the codes")
                shape = isinstance(sums, Tensor) and sums.shape == (rows, outputs)
                failures.need(shape, "return a tensor [rows, out]")
                failures.expect(sums.dtype == torch.int32, "the sums have to be int32, as a kernel's are")
                exact = [
                    [
                        sum((a - z_x) * (b - z_w) for a, b in zip(x, w, strict=True))
                        for w in p.tolist()
                    ]
                    for x in q.tolist()
                ]  # fmt: skip
                failures.close(
                    sums,
                    exact,
                    "the sums are not those of (q - z_x)(p - z_w): look at the sign of each term, at what a zero point "
                    "is multiplied by, along which dimension a sum runs, and at the type that holds it",
                    rtol=0.0,
                )


def quantized_conv(fn: Callable, failures: Failures) -> None:
    """quantized_conv(x, weight) -> floats [N, out, H, W], of u8 and s8 codes, padding 1."""
    generator = torch.Generator().manual_seed(2)
    for channels, outputs, height, width in ((3, 4, 6, 6), (1, 2, 4, 7), (5, 1, 5, 3)):
        x = torch.randn(2, channels, height, width, generator=generator)
        weight = torch.randn(outputs, channels, 3, 3, generator=generator)
        weight[0, 0, 0, 0] = 5.0  # the extreme is positive, and channels differ
        silent = weight.clone()
        silent[-1] = 0
        for case, image, kernel in (
            ("both signs", x, weight),
            ("all positive", x.abs() + 1, weight),
            ("all negative", -x.abs() - 1, weight),
            ("after ReLU", x.relu(), weight),
            ("a channel of zeros", x, silent),
        ):
            with failures.given(x=case, channels=channels, outputs=outputs, height=height, width=width):
                _quantized_conv(fn, failures, image, kernel)


def _quantized_conv(fn: Callable, failures: Failures, x: Tensor, weight: Tensor) -> None:
    y = failures.call(fn, x, weight, changed="your function changed x or the weight")
    shape = (len(x), len(weight), *x.shape[2:])
    usable = isinstance(y, Tensor) and y.is_floating_point() and y.shape == shape
    failures.need(usable, "return floats [N, out, H, W]: padding 1 keeps height and width")
    failures.need(bool(y.isfinite().all()), "the result holds NaN or infinity")
    exact = _by_windows(_points(x, False), torch.stack([_points(channel, True) for channel in weight]))
    close = (y.double() - exact).abs() <= 1e-4 * exact.abs().max()
    failures.expect(
        bool(close[..., 1:-1, 1:-1].all()),
        "the inside of the image differs from the sums of the dequantized numbers: look at ranges, scales and codes",
    )
    failures.expect(
        bool(close.all()),
        "the output is not that of the dequantized numbers everywhere: what does the code stand for that you pad with?",
    )


def _points(x: Tensor, symmetric: bool) -> Tensor:
    """The points of 8 bits nearest to x, in float64, with the scale in float32."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    reach = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    scale = reach if reach else torch.ones(())
    return (x / scale).round().double() * scale.double()


def _by_windows(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 convolution with a border of zeros, one place of the window at a time."""
    height, width = x.shape[2:]
    padded = torch.zeros(*x.shape[:2], height + 2, width + 2, dtype=torch.float64)
    padded[..., 1:-1, 1:-1] = x
    total = 0
    for i, j in itertools.product(range(3), range(3)):
        window = padded[..., i : i + height, j : j + width]
        total = total + torch.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
    return total


CHECKS = {"06.1": quantize, "06.2": stored_bits, "06.3": int_linear, "06.4": quantized_conv}

TRIES = {
    "06.1": "13 tensors, among them one-sided ones, zeros, tiny numbers and ties, at up to 3 widths, symmetric and not",
    "06.2": f"{len(GROUPED_ROWS)} rows, some with a last group that is not full, in {len(STORED_BITS)} formats",
    "06.3": f"{len(PRODUCTS)} products with {len(ZERO_POINTS)} pairs of zero points, with extreme codes and long rows",
    "06.4": "5 kinds of images at 3 sizes, not all square, among them images of one sign and a channel of zeros",
}
