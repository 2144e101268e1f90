"""Answers to the exercises of lesson 06: right ones, written differently, and plausible wrong ones."""

import math

import torch
import torch.nn.functional as F


def _quantize(x, bits, symmetric, *, zero_inside=True, steps=None, round=torch.round, guard=True, dtype=torch.int32):
    low, high = x.min(), x.max()
    if zero_inside:
        low, high = low.clamp(max=0), high.clamp(min=0)
    most = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    reach = torch.maximum(-low, high) if symmetric else high - low
    scale = reach / (steps(bits) if steps and symmetric else most)
    if guard and scale == 0:
        scale = torch.ones(())
    zero = torch.zeros(()) if symmetric else (-low / scale).round()
    codes = (round(x / scale) + zero).clamp(-most if symmetric else 0, most)
    return codes.to(dtype), scale, int(zero)


def _quantize_in_python(x, bits, symmetric):
    values = x.flatten().tolist()
    low, high = min(0.0, *values), max(0.0, *values)
    most = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    reach = max(-low, high) if symmetric else high - low
    scale = reach / most or 1.0
    zero = 0 if symmetric else round(-low / scale)
    codes = [min(max(round(v / scale) + zero, -most if symmetric else 0), most) for v in values]
    return torch.tensor(codes, dtype=torch.int32).view(x.shape), scale, zero


def _quantize_wraps(x, bits, symmetric):
    """Scaled to the full range, and cast before anything is clipped."""
    if not symmetric:
        return _quantize(x, bits, False)
    scale = x.abs().max() / 2 ** (bits - 1) if x.any() else torch.ones(())
    return (x / scale).round().int().to(torch.int8).int(), scale, 0


def _quantize_shifts_by_a_fraction(x, bits, symmetric):
    if symmetric:
        return _quantize(x, bits, True)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1) if high > low else torch.ones(())
    return ((x - low) / scale).round().int(), scale, -low / scale


def _sums(q, z_x, p, z_w, *, of_rows=1, of_outputs=1, corner=1, dtype=torch.int32):
    x, w = q.to(dtype), p.to(dtype)
    sums = x.long() @ w.long().T if dtype is torch.int16 else x @ w.T
    sums = sums.to(dtype) - of_rows * z_w * x.sum(1, keepdim=True) - of_outputs * z_x * w.sum(1)
    return (sums + corner * x.shape[1] * z_x * z_w).int()


def _sums_in_int16(q, z_x, p, z_w):
    exact = _sums(q, z_x, p, z_w)
    return exact.to(torch.int16).int()


def _sums_along_the_wrong_axis(q, z_x, p, z_w):
    x, w = q.int(), p.int()
    rows = x.sum(0).sum() / len(x)
    return (x @ w.T - z_w * rows - z_x * w.sum(1) + x.shape[1] * z_x * z_w).int()


def _conv(x, weight, *, zero_inside=True, half=127, padded_with_zero=True, scales="output", corrected=True, guard=True):
    low = x.min().clamp(max=0) if zero_inside else x.min()
    high = x.max().clamp(min=0) if zero_inside else x.max()
    step = (high - low) / 255
    zero = float((-low / step).round().clamp(0, 255))
    q = ((x / step).round() + zero).clamp(0, 255)
    magnitudes = weight.abs()
    scale = magnitudes.amax((1, 2, 3), keepdim=True) if scales == "output" else magnitudes.max().view(1, 1, 1, 1)
    scale = scale.expand(len(weight), 1, 1, 1) / half
    if guard:
        scale = scale.where(scale > 0, torch.ones_like(scale))
    p = (weight / scale).round().nan_to_num(0).int().to(torch.int8).double()
    sums = F.conv2d(F.pad(q.double(), (1, 1, 1, 1), value=zero if padded_with_zero else 0.0), p)
    if corrected:
        sums = sums - zero * p.sum((1, 2, 3)).view(-1, 1, 1)
    return (sums * step * scale.view(-1, 1, 1)).float()


def _conv_of_differences(x, weight):
    """q - zero is 0 where nothing is, so that plain padding is right."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    q = ((x / torch.tensor(step)).round() + zero).clamp(0, 255) - zero
    scale = weight.flatten(1).abs().amax(1).div(127).clamp(min=1e-30).view(-1, 1, 1, 1)
    p = (weight / scale).round()
    return F.conv2d(q.double(), p.double(), padding=1).float() * (step * scale.view(-1, 1, 1))


def _pack(codes, *, order=(0, 4), offset=0, mask=15):
    flat = (codes.flatten().int() + offset) & mask
    flat = F.pad(flat, (0, len(flat) % 2))
    return ((flat[::2] << order[0]) | (flat[1::2] << order[1])).to(torch.uint8)


def _pack_in_python(codes):
    numbers = [code % 16 for code in codes.flatten().tolist()]
    numbers += [0] * (len(numbers) % 2)
    return torch.tensor([a + 16 * b for a, b in zip(numbers[::2], numbers[1::2], strict=True)], dtype=torch.uint8)


RIGHT = {
    "06.1": (_quantize, _quantize_in_python),
    "06.2": (
        lambda columns, bits, group, scale, zero: math.ceil(columns / group) * (group * bits + scale + zero) / columns,
        lambda columns, bits, group, scale, zero: -(-columns // group) * (group * bits + (scale + zero)) / columns,
    ),
    "06.3": (_sums, lambda q, z_x, p, z_w: ((q.long() - z_x) @ (p.long() - z_w).T).int()),
    "06.4": (_conv, _conv_of_differences),
    "06.5": (_pack, _pack_in_python),
}

WRONG = {
    "06.1": {
        "no zero in the range": lambda *a: _quantize(*a, zero_inside=False),
        "the step of the clipped convention": lambda *a: _quantize(*a, steps=lambda bits: 2 ** (bits - 1)),
        "the step of the full convention": lambda *a: _quantize(*a, steps=lambda bits: 2 ** (bits - 1) - 0.5),
        "a half goes up": lambda *a: _quantize(*a, round=lambda t: (t + 0.5).floor()),
        "nothing divided by nothing": lambda *a: _quantize(*a, guard=False),
        "int8 wraps": _quantize_wraps,
        "truncated": lambda *a: _quantize(*a, round=torch.trunc),
        "a zero point between two codes": _quantize_shifts_by_a_fraction,
    },
    "06.2": {
        "scales forgotten": lambda columns, bits, group, scale, zero: bits,
        "zero points forgotten": lambda columns, bits, group, scale, zero: (
            math.ceil(columns / group) * (group * bits + scale) / columns
        ),
        "no padding": lambda columns, bits, group, scale, zero: bits + (scale + zero) / group,
        "padding of the codes forgotten": lambda columns, bits, group, scale, zero: (
            bits + math.ceil(columns / group) * (scale + zero) / columns
        ),
        "the last group dropped": lambda columns, bits, group, scale, zero: (
            columns // group * (group * bits + scale + zero) / columns
        ),
        "bytes": lambda columns, bits, group, scale, zero: (
            math.ceil(columns / group) * (group * bits + scale + zero) / columns / 8
        ),
        "a scale for each row": lambda columns, bits, group, scale, zero: bits + (scale + zero) / columns,
    },
    "06.3": {
        "the corner forgotten": lambda *a: _sums(*a, corner=0),
        "the corner with the wrong sign": lambda *a: _sums(*a, corner=-1),
        "the rows' term forgotten": lambda *a: _sums(*a, of_rows=0),
        "the outputs' term added": lambda *a: _sums(*a, of_outputs=-1),
        "summed along the wrong axis": _sums_along_the_wrong_axis,
        "an accumulator of 16 bits": _sums_in_int16,
        "subtracted in bytes": lambda q, z_x, p, z_w: (q - z_x).int() @ (p.int() - z_w).T,
        "floats": lambda *a: _sums(*a).float(),
    },
    "06.4": {
        "the draft of the lesson": lambda x, w: _conv(x, w, zero_inside=False, half=128, padded_with_zero=False),
        "padded with code 0": lambda x, w: _conv(x, w, padded_with_zero=False),
        "the largest weight wraps": lambda x, w: _conv(x, w, half=128),
        "a range without zero": lambda x, w: _conv(x, w, zero_inside=False),
        "a scale for the tensor": lambda x, w: _conv(x, w, scales="tensor"),
        "the zero point not corrected": lambda x, w: _conv(x, w, corrected=False),
        "a channel of zeros divided by zero": lambda x, w: (
            _conv(x, w, guard=False) / w.flatten(1).any(1).view(-1, 1, 1)
        ),
        "floats all the way": lambda x, w: F.conv2d(x, w, padding=1),
    },
    "06.5": {
        "the later code below": lambda codes: _pack(codes, order=(4, 0)),
        "sign lost": lambda codes: _pack(codes.abs()),
        "shifted by eight": lambda codes: _pack(codes, offset=8),
        "the sign runs into the neighbour": lambda codes: _pack(codes, mask=255),
        "an odd count loses its last": lambda codes: _pack(codes.flatten()[: codes.numel() // 2 * 2]),
        "a byte for each code": lambda codes: codes.flatten().to(torch.uint8),
        "signed bytes": lambda codes: _pack(codes).to(torch.int8),
    },
}
