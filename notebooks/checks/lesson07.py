"""Checks of lesson 07: folding a norm, a scale by least squares, corrected biases, soft rounding, bits within a budget.

Each tests what has to hold (the same outputs, the least error, the same means, gradients) on awkward settings; the last
one follows the card's rule step by step.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


# --------------------------------------------------------------------------------------------------- corrected biases

CONVOLUTIONS = (
    {"kernel_size": 1},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": (3, 2), "groups": 2, "stride": 2},
    {"kernel_size": 3, "groups": 4, "dilation": 2},
)


def bias_correction(fn: Callable, failures: Failures) -> None:
    """correct_bias(conv, rounded, mean) -> the bias [out] that keeps the mean of each output."""
    for settings in CONVOLUTIONS:
        state = torch.random.get_rng_state()
        torch.manual_seed(6)
        conv = nn.Conv2d(4, 8, **settings).double()
        mean = torch.rand(4, dtype=torch.float64) * torch.tensor([1.0, -5.0, 0.1, 2.0])
        torch.random.set_rng_state(state)
        rough = (conv.weight.detach() * 4).round() / 4
        with failures.given(conv=settings):
            changed = "the arguments that were given have changed; return a new bias"
            bias = failures.call(fn, conv, rough, mean, changed=changed)
            failures.need(isinstance(bias, Tensor) and bias.shape == (8,), "return a tensor, a bias for each output")
            bias = bias.detach()
            for message, wrong in _wrong_biases(conv, rough, mean).items():
                failures.need(not torch.allclose(bias, wrong, rtol=1e-6), message)
            x = mean.view(1, 4, 1, 1).expand(1, 4, 7, 7)  # every pixel has the mean
            shape = (conv.stride, 0, conv.dilation, conv.groups)
            with torch.no_grad():
                before = F.conv2d(x, conv.weight, conv.bias, *shape).mean((0, 2, 3))
                after = F.conv2d(x, rough, bias, *shape).mean((0, 2, 3))
            failures.close(
                after,
                before,
                "the mean of an output is not what it was, for an input with this mean at every pixel",
                atol=1e-9,
            )


def _wrong_biases(conv: nn.Conv2d, rough: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """The biases that usual slips give, by what to say."""
    old = conv.bias.detach()
    error = rough - conv.weight.detach()  # [out, in / groups, height, width]
    inputs_of_group = mean.view(conv.groups, 1, -1).expand(-1, conv.out_channels // conv.groups, -1)
    inputs = inputs_of_group.reshape(len(error), -1)  # [out, in / groups]: the means that each output reads
    taps = error[0, 0].numel()
    shift = (error.sum((2, 3)) * inputs).sum(1)
    slips = {
        "the bias is the old one, though rounding has moved the mean of an output": old,
        "the shift is added; what the error of the weight adds to an output has to be taken off": old + shift,
        "the shift alone is returned; it has to be taken off the old bias": -shift,
        "the mean of the input is left out; a weight's error moves an output by the error times what it reads": old
        - error.sum((1, 2, 3)),
    }
    if taps > 1:
        slips["the error is averaged over the kernel; each of its places reads a pixel, so sum"] = old - shift / taps
    if conv.groups > 1:
        first_inputs = mean[: error.shape[1]]
        first = (error.sum((2, 3)) * first_inputs).sum(1)
        slips["each group is given the means of the first group's inputs; a group reads channels of its own"] = (
            old - first
        )
    return slips


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


# ------------------------------------------------------------------------------------------------ bits within a budget


Plan = dict[str, int]


def bits_in_budget(fn: Callable, failures: Failures) -> None:
    """choose_bits(rows, budget) -> {layer: bits} by the card's rule."""
    for name, rows in _scans().items():
        steps = _steps_of_the_rule(rows)
        with failures.given(rows=name):
            for number, step in enumerate(steps):
                not_met_before = steps[number - 1].bytes - 1 if number else step.bytes + 1
                for budget in (step.bytes, not_met_before):  # the budget is met by this step, and not before
                    changed = "the rows that were given have changed; build lists of your own"
                    plan = failures.call(fn, rows, budget, changed=changed)
                    _is_this_plan(plan, step, number, budget, rows, failures)
            too_little = steps[-1].bytes - 1
            plan = failures.call(fn, rows, too_little, changed=changed)
            failures.expect(
                plan == steps[-1].plan,
                "a budget below the narrowest widths of all layers gives every layer its narrowest width",
                detail=f"expected {steps[-1].plan}, got {plan}",
            )


def _scans() -> dict[str, list[dict]]:
    draw = torch.Generator().manual_seed(7)

    def scan(sizes: dict[str, int], widths: tuple[int, ...], least: float, most: float) -> list[dict]:
        """Rows in any order; each width costs between `least` and `most` dB against the next wider."""
        rows = []
        for layer, size in sizes.items():
            db = 30 + 20 * float(torch.rand(1, generator=draw))
            for bits in widths:
                rows.append({"layer": layer, "bits": bits, "bytes": size * bits // 8 + 64, "db": db})
                db -= least + (most - least) * float(torch.rand(1, generator=draw))
        order = torch.randperm(len(rows), generator=draw).tolist()
        return [rows[i] for i in order]

    sizes = {"small": 1152, "middle": 9216, "large": 36864, "last": 640}
    jump = [
        {"layer": "a", "bits": 8, "bytes": 8000, "db": 50.0},
        {"layer": "a", "bits": 4, "bytes": 4000, "db": 20.0},
        {"layer": "a", "bits": 2, "bytes": 2000, "db": 19.5},
        {"layer": "b", "bits": 8, "bytes": 8080, "db": 45.0},
        {"layer": "b", "bits": 4, "bytes": 4040, "db": 25.0},
        {"layer": "b", "bits": 2, "bytes": 2020, "db": 3.0},
    ]
    less_noise = [
        {"layer": "a", "bits": 8, "bytes": 4000, "db": 40.0},
        {"layer": "a", "bits": 4, "bytes": 2000, "db": 40.5},
        {"layer": "a", "bits": 2, "bytes": 1000, "db": 41.0},
        {"layer": "b", "bits": 8, "bytes": 4010, "db": 40.0},
        {"layer": "b", "bits": 4, "bytes": 2010, "db": 43.0},
        {"layer": "b", "bits": 2, "bytes": 1010, "db": 43.2},
    ]
    other_widths = scan({"small": 1152}, (6, 3), 8.0, 14.0) + scan({"large": 9216}, (8, 5, 4), 2.0, 6.0)
    return {
        "four layers, 8 to 2 bits": scan(sizes, (8, 6, 4, 3, 2), 4.0, 8.0),
        "four layers, 8, 4 and 2 bits": scan(sizes, (8, 4, 2), 8.0, 14.0),
        "steps of 0.2 to 12 dB": scan(sizes, (8, 6, 4, 3, 2), 0.2, 12.0),
        "some narrower rows with less noise": scan(sizes, (8, 6, 4, 3, 2), -4.0, 6.0),
        "one layer of 6 and 3 bits, one of 8, 5 and 4": other_widths,
        "two layers, one with a costly first step": jump,
        "two layers whose narrower rows have less noise": less_noise,
    }


class Step(NamedTuple):
    """A plan on the rule's way from the widest to the narrowest.

    taken: the layer that went down one width to come here, None at the beginning.
    prices: noise per byte of the steps that were possible, by layer.
    """

    plan: Plan
    bytes: int
    taken: str | None
    prices: dict[str, float]


def _steps_of_the_rule(rows: list[dict]) -> list[Step]:
    """All steps of all layers are priced at every turn."""
    at = {}
    for row in rows:
        noise = 10 ** (-row["db"] / 10)
        at[row["layer"], row["bits"]] = row["bytes"], noise
    widths = {layer: sorted((b for name, b in at if name == layer), reverse=True) for layer, _ in at}
    plan = {layer: bits[0] for layer, bits in widths.items()}
    steps = [Step(plan, sum(at[item][0] for item in plan.items()), None, {})]
    while True:
        narrower, prices = {}, {}
        for layer, bits in widths.items():
            for wide, narrow in pairwise(bits):
                if wide == plan[layer]:
                    (size, noise), (less, more) = at[layer, wide], at[layer, narrow]
                    narrower[layer] = narrow
                    prices[layer] = (more - noise) / (size - less)
        if not prices:
            return steps
        layer = min(prices, key=prices.get)
        plan = {**plan, layer: narrower[layer]}
        steps.append(Step(plan, sum(at[item][0] for item in plan.items()), layer, prices))


def _is_this_plan(plan: object, step: Step, number: int, budget: int, rows: list[dict], failures: Failures) -> None:
    at = {(row["layer"], row["bits"]): row for row in rows}
    failures.need(
        isinstance(plan, dict) and plan.keys() == step.plan.keys(), "return {layer: bits} with every layer of the rows"
    )
    failures.need(all(item in at for item in plan.items()), "a layer has bits that the scan did not try")
    size = sum(at[item]["bytes"] for item in plan.items())
    sizes = f"budget {budget}, expected {step.plan}, got {plan}"
    failures.need(size <= budget, "the plan is larger than the budget, though it could be smaller", detail=sizes)
    if plan == step.plan:
        failures.expect(True, "")
        return
    failures.need(number > 0, "the budget holds every layer at its widest, so no layer may go down", detail=sizes)
    prices = ", ".join(f"{layer} {price:.2e}" for layer, price in step.prices.items())
    failures.need(
        False,
        f"step {number} of the rule, the first that differs, takes {step.taken!r} down: of the noise added per byte "
        "saved, (noise after - noise before) / (bytes before - bytes after), its next step has the least",
        detail=f"{prices}; {sizes}",
    )


CHECKS = {
    "07.1": folding,
    "07.2": least_squares,
    "07.3": bias_correction,
    "07.4": soft_rounding,
    "07.5": bits_in_budget,
}

TRIES = {
    "07.1": f"{len(FOLDS)} pairs of a convolution and a norm, with other kernels, groups, strides and norms",
    "07.2": f"{len(_weights())} weights in 2, 3 and 4 bits, among them outliers and a row of zeros",
    "07.3": f"{len(CONVOLUTIONS)} convolutions, two of them with groups",
    "07.4": f"{len(_soft_cases())} weights, among them weights beyond the codes and decided h, with gradients",
    "07.5": f"{len(_scans())} scans with a budget for each step of the rule, among them narrower rows with less noise",
}
