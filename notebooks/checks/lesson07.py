"""Checks of lesson 07: folding a norm, a scale by least squares, soft rounding.

Each tests what has to hold (the same outputs, the least error, the same gradients) on awkward settings.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labkit.lesson.failures import Failures, has_parts

# how the convolution is built, the norm's settings
FOLDS = (
    ({}, {}),
    ({"bias": False, "stride": 2}, {"eps": 0.3}),
    ({"groups": 2, "padding": 1, "padding_mode": "reflect"}, {"affine": False}),
    ({"bias": False, "groups": 4, "dilation": 2}, {"eps": 1e-3}),
    ({"kernel_size": (1, 3), "stride": (2, 1)}, {}),
)
SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "in_channels", "out_channels")


def folding(fn: Callable, failures: Failures) -> None:
    """fold_bn(conv, norm) -> one convolution that computes both."""
    for first, second in FOLDS:
        conv, norm = _conv_and_norm(first, second)
        with failures.given(conv=first, norm=second):
            changed = "the modules that were given have changed; copy the convolution before you fold"
            new = failures.call(fn, conv, norm, changed=changed)
            failures.need(isinstance(new, nn.Conv2d), "return a Conv2d")
            failures.need(isinstance(new.bias, nn.Parameter), "the new convolution has no bias as a parameter")
            types = new.weight.dtype, new.bias.dtype
            failures.need(types == (torch.float64,) * 2, "the new weight or bias has another dtype")
            same = all(getattr(new, name) == getattr(conv, name) for name in SETTINGS)
            failures.expect(same, "a setting of the convolution (stride, padding, groups, ...) has not been kept")
            x = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                reference = [norm(conv(image)) for image in (x, 0 * x)]
                at_zero, slope = new(0 * x), new(x) - new(0 * x)
            failures.close(
                at_zero,
                reference[1],
                "the bias is off, as the result for an image of zeros shows: the convolution's own bias minus the "
                "mean, times the factor, plus the norm's bias",
                atol=1e-9,
            )
            failures.close(
                slope,
                reference[0] - reference[1],
                "the weight is off: row i times gamma over the root of variance plus eps, of this norm",
                atol=1e-9,
            )


def _conv_and_norm(first: dict, second: dict) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """float64 modules in eval mode; some variances are as small as eps."""
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    conv, norm = nn.Conv2d(4, 8, **{"kernel_size": 3, **first}), nn.BatchNorm2d(8, **second)
    norm.running_mean.uniform_(-2, 2)
    norm.running_var.uniform_(0.01, 3)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    torch.random.set_rng_state(state)
    return conv.double().eval(), norm.double().eval()


# ------------------------------------------------------------------------------------------- a scale by least squares

FINE = 1000  # candidates of the check
SLACK = 1.02  # of the least error that they find


def least_squares(fn: Callable, failures: Failures) -> None:
    """best_scale(weight, bits) -> for each output channel the scale with the least squared error."""
    for name, weight in _weights().items():
        for bits in (2, 3, 4):
            with failures.given(weight=name, bits=bits):
                changed = "the weight that was given has changed; compute new tensors"
                scale = failures.call(fn, weight, bits, changed=changed)
                with suppress(TypeError, ValueError, RuntimeError):
                    scale = torch.as_tensor(scale)  # an array or a list is as good
                failures.need(isinstance(scale, Tensor), "return a tensor, a scale for each output channel")
                shape = list(scale.shape)
                failures.need(
                    shape == [len(weight)], "return [out], a scale for each output channel", detail=f"{shape}"
                )
                scale = scale.detach().double()
                failures.need(bool(scale.isfinite().all()), "a scale is NaN or infinite; a channel of zeros gets 1")
                failures.need(bool((scale > 0).all()), "a scale is 0 or negative; a channel of zeros gets 1")
                _is_the_best(scale, weight, bits, failures)


def _weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    convolution = torch.randn(6, 4, 3, 3, generator=draw) * torch.tensor([1.0, 0.01, 30, 1, 5, 0.2]).view(-1, 1, 1, 1)
    outlier = torch.randn(5, 200, generator=draw)
    outlier[:, 0] = torch.tensor([12.0, -9, 6, -20, 4])
    depthwise = torch.randn(8, 1, 3, 3, generator=draw)
    empty = torch.randn(4, 50, generator=draw)
    empty[2] = 0
    return {
        "a convolution with channels of very different sizes": convolution,
        "a Linear with one large weight in each row": outlier,
        "a depthwise convolution": depthwise,
        "a Linear with a row of zeros": empty,
    }


def _is_the_best(scale: Tensor, weight: Tensor, bits: int, failures: Failures) -> None:
    rows = weight.detach().double().flatten(1)
    is_empty = rows.abs().amax(1) == 0
    failures.expect(bool((scale[is_empty] == 1).all()), "a channel of zeros has a scale other than 1")
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1) / top
    found = [_error(rows, largest * part / FINE, top) for part in range(FINE, 0, -1)]
    least = torch.stack(found).amin(0)
    error = _error(rows, scale, top)
    is_worse = ~is_empty & (error > SLACK * least)
    if not is_worse.any():
        failures.expect(True, "")
        return
    channel = int(is_worse.nonzero()[0])
    nothing_clipped = _error(rows, largest, top)
    is_largest = torch.allclose(scale[~is_empty], largest[~is_empty], rtol=1e-3)
    message = "a channel's squared error is more than 2 % over the least: try scales that clip its largest weights"
    if not is_largest:
        message = (
            "a channel's squared error, of weights rounded and clipped to the codes, is more than 2 % over the least"
        )
    detail = (
        f"channel {channel}: scale {scale[channel]:.4g} leaves {error[channel]:.4g}, the best {least[channel]:.4g}; "
        f"the scale that clips nothing, {largest[channel]:.4g}, leaves {nothing_clipped[channel]:.4g}"
    )
    failures.expect(False, message, detail=detail)


def _error(rows: Tensor, scale: Tensor, top: int) -> Tensor:
    """The squared error of each row on its grid, [out]."""
    column = scale[:, None].clamp(min=1e-30)
    return ((rows / column).round().clamp(-top, top) * column - rows).square().sum(1)


# --------------------------------------------------------------------------------------------------- soft rounding


class Soft(NamedTuple):
    """A case of soft rounding."""

    weight: Tensor
    scale: Tensor
    v: Tensor
    bits: int
    beta: float


def soft_rounding(fn: Callable, failures: Failures) -> None:
    """soft_rounding(weight, scale, v, bits, beta) -> the softly rounded weight and the penalty."""
    for name, case in _soft_cases().items():
        tensors = [case.weight.clone(), case.scale.clone(), case.v.clone()]
        v = tensors[2].requires_grad_()
        with failures.given(case=name, bits=case.bits, beta=case.beta):
            pair = fn(*tensors, case.bits, case.beta)
            is_unchanged = all(map(torch.equal, tensors, case[:3]))
            failures.expect(is_unchanged, "an argument that was given has changed; compute new tensors")
            failures.need(has_parts(pair, 2), "return two things: the weight and the penalty")
            weight, penalty = pair
            are_tensors = isinstance(weight, Tensor) and isinstance(penalty, Tensor)
            failures.need(are_tensors, "return two tensors: the weight and the penalty")
            failures.need(weight.shape == case.weight.shape, "the new weight has another shape than the old")
            failures.need(penalty.numel() == 1, "the penalty is one number, the sum over all weights")
            expected = _softly(case, v)
            for message, wrong in _wrong_soft(case).items():
                same = torch.allclose(weight.detach(), wrong, rtol=1e-6, atol=1e-9)
                differs = not torch.allclose(wrong, expected[0].detach(), rtol=1e-6, atol=1e-9)
                failures.need(not (same and differs), message)
            failures.close(
                weight.detach(),
                expected[0].detach(),
                "the weight is off: round down in steps of the scale, add h, clip to the codes, times the scale",
                atol=1e-9,
            )
            failures.close(
                penalty.detach().reshape(()),
                expected[1].detach(),
                "the penalty is off: the sum of 1 - |2 h - 1| ** beta",
                rtol=1e-6,
                atol=1e-9,
            )
            for what, mine, theirs in (("weight", weight, expected[0]), ("penalty", penalty, expected[1])):
                failures.need(mine.requires_grad, f"no gradient reaches v from the {what}")
                slopes = [torch.autograd.grad(y.sum(), v, retain_graph=True)[0] for y in (mine, theirs)]
                failures.close(*slopes, f"the gradient of the {what} with respect to v is off", rtol=1e-6, atol=1e-9)


def _soft_cases() -> dict[str, Soft]:
    draw = torch.Generator().manual_seed(8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    row_scales = torch.tensor([0.5, 0.2, 1.5], dtype=torch.float64).view(-1, 1, 1, 1)
    return {
        "a convolution, a scale for each channel": Soft(normal(3, 2, 3, 3), row_scales, normal(3, 2, 3, 3), 3, 4.0),
        "a Linear, one scale": Soft(normal(4, 10), torch.tensor(0.3, dtype=torch.float64), normal(4, 10), 4, 2.0),
        "v far from 0, so that h is 0 or 1": Soft(normal(4, 10), row_scales[:1, :, 0, 0], 6 * normal(4, 10), 4, 20.0),
        "weights beyond the largest code": Soft(4 * normal(4, 10), row_scales[1:2, :, 0, 0], normal(4, 10), 2, 3.0),
    }


def _softly(case: Soft, v: Tensor) -> tuple[Tensor, Tensor]:
    top = 2 ** (case.bits - 1) - 1
    h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
    codes = (torch.floor(case.weight / case.scale) + h).clamp(-top, top)
    return codes * case.scale, (1 - (2 * h - 1).abs() ** case.beta).sum()


def _wrong_soft(case: Soft) -> dict[str, Tensor]:
    """The weights that usual slips give, by what to say."""
    top, steps = 2 ** (case.bits - 1) - 1, case.weight / case.scale
    sigmoid = torch.sigmoid(case.v)
    h = (1.2 * sigmoid - 0.1).clamp(0, 1)
    return {
        "h is the plain sigmoid, which reaches neither 0 nor 1: stretch it first": (steps.floor() + sigmoid).clamp(
            -top, top
        )
        * case.scale,
        "h is stretched and not cut off, so that a weight can leave its two neighbours": (
            steps.floor() + 1.2 * sigmoid - 0.1
        ).clamp(-top, top)
        * case.scale,
        "the weight is rounded to the nearest before h is added; round down": (steps.round() + h).clamp(-top, top)
        * case.scale,
        "the codes are not clipped": (steps.floor() + h) * case.scale,
        "the codes go one too far down; the lowest is -(2 ** (bits - 1) - 1)": (steps.floor() + h).clamp(-top - 1, top)
        * case.scale,
        "the codes are clipped before h is added; clip the sum": (steps.floor().clamp(-top, top) + h) * case.scale,
        "these are codes; the scale has to multiply them": (steps.floor() + h).clamp(-top, top),
    }


CHECKS = {
    "07.1": folding,
    "07.2": least_squares,
    "07.3": soft_rounding,
}

TRIES = {
    "07.1": f"{len(FOLDS)} pairs of a convolution and a norm, with other kernels, groups, strides and norms",
    "07.2": f"{len(_weights())} weights in 2, 3 and 4 bits, among them outliers and a row of zeros",
    "07.3": f"{len(_soft_cases())} weights, among them weights beyond the codes and decided h, with gradients",
}
