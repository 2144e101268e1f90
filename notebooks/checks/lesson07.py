"""Checks of lesson 07: folding a norm, a percentile's range, equalised pairs, corrected biases, bits within a budget.

Each tests what has to hold (the same outputs, the same means, counts beyond a range) on awkward settings; the last one
follows the card's rule step by step.
"""

import math
from collections.abc import Callable
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


# ------------------------------------------------------------------------------------------------- a range from values


def percentile(fn: Callable, failures: Failures) -> None:
    """percentile_range(seen, share) -> (lo, hi): so many of all values within, and 0."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    batches = {
        "three batches of different sizes and spreads": [normal(4, 50), 5 * normal(3, 10, 20), normal(100) + 2],
        "all values above 1": [normal(500).abs() + 1, 3 * normal(2, 250).abs() + 1],
        "all values below -1": [-normal(400).abs() - 1],
        "outputs of a ReLU": [normal(8, 100).relu(), 4 * normal(8, 25).relu()],
        "a long tail on one side": [normal(1000).abs().pow(3), -normal(1000).abs()],
    }
    for name, seen in batches.items():
        for share in (1.0, 0.99, 0.9):
            with failures.given(seen=name, share=share):
                changed = "the tensors that were given have changed; compute new ones"
                ends = failures.call(fn, seen, share, changed=changed)
                failures.need(has_parts(ends, 2), "return two numbers: lo, hi")
                lo, hi = (float(end) for end in ends)
                failures.need(math.isfinite(lo) and math.isfinite(hi), "an end of the range is NaN or infinite")
                _has_the_share(torch.cat([x.flatten() for x in seen]), lo, hi, share, failures)


def _has_the_share(values: Tensor, lo: float, hi: float, share: float, failures: Failures) -> None:
    failures.expect(lo <= 0 <= hi, "0 is outside the range; pull the end up or down to it")
    cut = round((1 - share) / 2 * len(values), 6)  # 1 - 0.9 is not exactly 0.1
    for side, end, outside in (("below lo", lo, values < lo), ("above hi", hi, values > hi)):
        count = int(outside.sum())
        detail = f"{count} of {len(values)}"
        failures.expect(count <= cut + 1, f"too many of all values lie {side}", detail=detail)
        pulled = abs(end) < 1e-12  # to 0: fewer may be outside
        failures.expect(
            pulled or count >= cut - 1,
            f"too few of all values lie {side}: half of the rest belongs beyond each end",
            detail=detail,
        )


# ------------------------------------------------------------------------------------------------------- equalisation


def equalisation(fn: Callable, failures: Failures) -> None:
    """equalise(w1, b1, w2) -> the same function with equal ranges of rows and columns."""
    draw = torch.Generator().manual_seed(4)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    uneven = torch.tensor([2000.0, 0.1, 1.0, 5.0, 0.0002, 1.0], dtype=torch.float64)
    linear = (
        weights(6, 5) * uneven[:, None],
        weights(6),
        weights(6, 6),
    )
    kernels = (
        weights(6, 2, 3, 3) * uneven[:, None, None, None],
        weights(6),
        weights(4, 6, 1, 1),
    )
    mixed = (
        weights(6, 4, 1, 1),
        weights(6) * 3,
        weights(2, 6, 3, 3) * uneven[:, None, None],
    )
    no_row, no_column = [x.clone() for x in linear], [x.clone() for x in linear]
    no_row[0][2], no_column[2][:, 4] = 0, 0
    cases = {
        "two Linears": linear,
        "two convolutions, 3x3 and 1x1": kernels,
        "two convolutions, 1x1 and 3x3": mixed,
        "a channel whose row is all zero": tuple(no_row),
        "a channel whose column is all zero": tuple(no_column),
    }
    for name, (w1, b1, w2) in cases.items():
        with failures.given(layers=name):
            changed = "the tensors that were given have changed; return new ones"
            new = failures.call(fn, w1, b1, w2, changed=changed)
            failures.need(has_parts(new, 3), "return three tensors: w1, b1, w2")
            shapes = [x.shape if isinstance(x, Tensor) else None for x in new]
            failures.need(shapes == [w1.shape, b1.shape, w2.shape], "the new tensors have other shapes than the old")
            finite = all(bool(x.isfinite().all()) for x in new)
            failures.need(finite, "the new tensors hold NaN or infinities; a channel of zeros has no factor")
            _is_the_same_function(new, (w1, b1, w2), failures)
            _is_even(new, (w1, b1, w2), failures)


def _is_the_same_function(new: tuple, old: tuple, failures: Failures) -> None:
    width, conv = old[0].shape[1], old[0].dim() == 4
    shape = (5, width, 9, 9) if conv else (50, width)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    apply = F.conv2d if conv else F.linear
    outputs = []
    for w1, b1, w2 in (new, old):
        hidden = F.relu(apply(x, w1, b1))
        outputs.append(apply(hidden, w2))
    failures.close(
        *outputs,
        "the two layers compute something else than before; what is divided where a channel is made, bias included, is "
        "multiplied where it is read",
        atol=1e-9 * float(outputs[1].abs().max()),
    )


def _is_even(new: tuple, old: tuple, failures: Failures) -> None:
    (rows, columns), (before_rows, before_columns) = _ranges(*new), _ranges(*old)
    live = (before_rows > 0) & (before_columns > 0)
    failures.close(
        torch.stack([rows, columns])[:, live],
        torch.sqrt(before_rows * before_columns)[live].expand(2, -1),
        "row i of w1 and column i of w2 do not have the range that was asked for, the root of the product of the two",
        rtol=1e-6,
    )
    pairs = (rows, before_rows), (columns, before_columns)
    stays = all(torch.equal(now[~live], before[~live]) for now, before in pairs)
    failures.expect(stays, "a channel whose row in w1 or column in w2 is all zero has changed")


def _ranges(w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    rows = w1.flatten(1)
    columns = w2.transpose(0, 1).flatten(1)
    return rows.abs().amax(1), columns.abs().amax(1)


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
    "07.2": percentile,
    "07.3": equalisation,
    "07.4": bias_correction,
    "07.5": bits_in_budget,
}

TRIES = {
    "07.1": f"{len(FOLDS)} pairs of a convolution and a norm, with other kernels, groups, strides and norms",
    "07.2": "5 lists of batches, among them batches of one sign and of other sizes, with 3 shares",
    "07.3": "5 pairs of layers, among them convolutions and channels of zeros",
    "07.4": f"{len(CONVOLUTIONS)} convolutions, two of them with groups",
    "07.5": f"{len(_scans())} scans with a budget for each step of the rule, among them narrower rows with less noise",
}
