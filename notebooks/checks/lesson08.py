"""Checks of lesson 08: a clipped straight-through quantizer, the gradient of a learned step, a diagnosis.

Values are held against a staircase in Python's own numbers, gradients against finite differences of what the estimators
pretend to be, a diagnosis against quantizers whose faults are known.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from labkit.lesson.failures import Failures

# step, zero point, least and largest code
GRIDS = (
    (0.5, 0, -7, 7),
    (0.25, 0, -1, 1),
    (0.3, 5, 0, 15),
    (1.0, 0, 0, 3),
    (0.1, 128, 0, 255),
)


def straight_through(fn: Callable, failures: Failures) -> None:
    """fake(x, scale, zero, lo, hi) -> the staircase, with slope 1 up to the last points and 0 beyond."""
    draw = torch.Generator().manual_seed(0)
    for scale, zero, lo, hi in GRIDS:
        width = (hi - lo) * scale
        share = torch.rand(4, 25, dtype=torch.float64, generator=draw) * 1.6 - 0.3
        x = share * width + (lo - zero) * scale
        upstream = torch.randn(4, 25, dtype=torch.float64, generator=draw)
        for step in (scale, torch.tensor(scale, dtype=torch.float64)):
            with failures.given(scale=scale, zero=zero, lo=lo, hi=hi, step={} if step is scale else "a tensor"):
                leaf = x.clone().requires_grad_()
                y = fn(leaf, step, zero, lo, hi)
                failures.need(isinstance(y, Tensor) and y.shape == x.shape, "return a tensor in the shape of x")
                failures.expect(torch.equal(leaf, x), "x has changed; compute a new tensor")
                failures.expect(step == scale, "the step has changed; compute a new tensor")
                points = [_stair(value, scale, zero, lo, hi) for value in x.flatten().tolist()]
                failures.close(
                    y.flatten(),
                    points,
                    "the value is not the grid's: round x / scale to a whole number, add the zero point, clip to lo "
                    "and hi, and go back",
                    atol=1e-9,
                )
                failures.need(y.requires_grad, "no gradient can get from the result to x; was all of it detached?")
                (gradient,) = torch.autograd.grad(y, leaf, upstream, allow_unused=True)
                failures.need(gradient is not None, "the result does not depend on x for autograd")
                _passes_inside(gradient, upstream, x / scale + zero, lo, hi, failures)
    for dtype in (torch.float32, torch.float64):
        with failures.given(x=f"{str(dtype).removeprefix('torch.')} numbers"):
            y = fn(torch.linspace(-2, 2, 9, dtype=dtype), 0.5, 0, -3, 3)
            failures.expect(y.dtype == dtype, "the result has another dtype than x", detail=f"{y.dtype}")


def _stair(x: float, scale: float, zero: int, lo: int, hi: int) -> float:
    return (min(max(round(x / scale) + zero, lo), hi) - zero) * scale


def _passes_inside(gradient: Tensor, upstream: Tensor, steps: Tensor, lo: int, hi: int, failures: Failures) -> None:
    inside = (steps > lo + 0.01) & (steps < hi - 0.01)
    failures.close(
        gradient[inside],
        upstream[inside],
        "where x / s + z lies between lo and hi the gradient that arrives is not the one that came from above: the "
        "slope is 1 there",
        atol=1e-9,
    )
    clipped = (steps < lo - 0.01) | (steps > hi + 0.01)
    failures.close(
        gradient[clipped],
        torch.zeros_like(gradient[clipped]),
        "a gradient arrives where x / s + z lies beyond lo or hi, where x is clipped to the last point; the slope is 0 "
        "there",
        atol=1e-9,
    )


# -------------------------------------------------------------------------------------------------- the step's gradient


def learned_step(fn: Callable, failures: Failures) -> None:
    """step_gradient(x, scale, lo, hi, upstream) -> LSQ's gradient in the step, in its shape."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    single = torch.tensor(0.4, dtype=torch.float64)
    rows = torch.tensor([[0.1], [0.5], [2.0]], dtype=torch.float64)
    kernels = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1, 1)
    cases = {
        "one step, signed codes": (normal(6, 20), single, -7, 7),
        "one step, two bits": (normal(50), single, -2, 1),
        "one step, codes from 0, after a ReLU": (2 * normal(5, 4, 3, 3).relu(), single, 0, 15),
        "all inside": (normal(30).clamp(-1, 1), torch.tensor(0.5, dtype=torch.float64), -7, 7),
        "all clipped": (normal(30).sign() * 9, single, -3, 3),
        "a step for each row": (normal(3, 40), rows, -7, 7),
        "a step for each output channel": (normal(2, 3, 3, 3), kernels, -1, 1),
    }
    for name, (x, scale, lo, hi) in cases.items():
        upstream = normal(*x.shape)
        with failures.given(x=name, lo=lo, hi=hi):
            changed = "an argument has changed; compute new tensors"
            gradient = failures.call(fn, x, scale, lo, hi, upstream, changed=changed)
            failures.need(isinstance(gradient, Tensor), "return a tensor")
            failures.need(gradient.shape == scale.shape, "the gradient does not have the shape of the step")
            expected = _by_differences(x, scale, lo, hi, upstream)
            plain = expected * math.sqrt(x.numel() // scale.numel() * hi)
            if not torch.allclose(plain, gradient, rtol=1e-4, atol=1e-6):  # else the sentence below says it all
                failures.close(
                    gradient,
                    expected,
                    "this is not LSQ's gradient in the step: inside round(x / s) - x / s, where clipped the code at "
                    "that end, times what comes from above, summed over all that share the step, over sqrt(N hi)",
                    rtol=1e-4,
                    atol=1e-6,
                )
            failures.expect(
                not torch.allclose(plain, gradient, rtol=1e-4, atol=1e-6),
                "the gradient scale 1 / sqrt(N hi) is missing; N counts the values that share a step",
            )


def _by_differences(x: Tensor, scale: Tensor, lo: int, hi: int, upstream: Tensor) -> Tensor:
    """Central differences of sum(upstream * x_hat) in the step, with the rounding errors held where they are.

    That is what the estimator pretends: code = clip(x / s) + c, with c a constant.
    """
    steps = x / scale
    rest = steps.round() - steps
    rest = torch.where((steps > lo) & (steps < hi), rest, torch.zeros_like(rest))

    def pretended(s: Tensor) -> Tensor:
        return ((x / s).clamp(lo, hi) + rest) * s

    h = 1e-7 * scale
    slopes = (pretended(scale + h) - pretended(scale - h)) / (2 * h) * upstream
    count = x.numel() // scale.numel()
    total = slopes.sum()
    if scale.dim():
        is_broadcast = scale.dim() < x.dim()
        shared = [d for d in range(x.dim()) if is_broadcast or scale.shape[d] == 1]
        total = slopes.sum(shared, keepdim=True)
    return total / math.sqrt(count * hi)


# ---------------------------------------------------------------------------------------------------------- a diagnosis

FAULTS = ("value", "blocked", "leak", "fixed", "inside", "unscaled")


class _Faulty(torch.autograd.Function):
    """LSQ with the faults that are named; "leak above" and "value below" are leaks and wrong values at one end."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, lo: int, hi: int, faults: frozenset[str]) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.ends, ctx.faults = (lo, hi), faults
        steps = x / step
        if "value, rounds down" in faults:
            return steps.floor().clamp(lo, hi) * step
        if "value, not rounded" in faults:
            return steps.clamp(lo, hi) * step
        if "value, no clip below" in faults:
            return steps.round().clamp(max=hi) * step
        if "value, no clip above" in faults:
            return steps.round().clamp(min=lo) * step
        return steps.round().clamp(lo, hi) * step

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, step), (lo, hi), faults = ctx.saved_tensors, ctx.ends, ctx.faults
        steps = x / step
        inside = (steps > lo) & (steps < hi)
        passes = inside.clone()
        if "leak" in faults or "leak, above only" in faults:
            passes |= steps >= hi
        if "leak" in faults or "leak, below only" in faults:
            passes |= steps <= lo
        if "blocked" in faults:
            passes &= ~inside
        to_x = gradient * passes
        if "leak, a tenth" in faults:
            to_x = torch.where(inside, to_x, gradient / 10)
        within = steps.round() - steps
        if "inside" in faults:
            within = torch.zeros_like(x)
        elif "inside, codes alone" in faults:
            within = steps.round()
        elif "inside, the other sign" in faults:
            within = steps - steps.round()
        slopes = torch.where(inside, within, steps.clamp(lo, hi))
        to_step = (gradient * slopes).sum()
        if "unscaled" not in faults:
            to_step = to_step / math.sqrt(x.numel() * hi)
        if "fixed, a gradient of 0" in faults:
            to_step = torch.zeros_like(to_step)
        return to_x, None if "fixed" in faults else to_step, None, None, None


CUT_OFF = ("blocked", "fixed")  # from the graph: the result requires no gradient
SUSPECTS = (
    (),
    ("value, rounds down",),
    ("value, not rounded",),
    ("value, no clip below",),
    ("value, no clip above",),
    ("blocked",),
    ("leak",),
    ("leak, above only",),
    ("leak, below only",),
    ("leak, a tenth",),
    ("blocked", "leak"),
    ("fixed",),
    ("fixed, a gradient of 0",),
    ("inside",),
    ("inside, codes alone",),
    ("inside, the other sign",),
    ("unscaled",),
    ("leak", "fixed"),
    ("inside", "unscaled"),
    ("blocked", "inside, codes alone", "unscaled"),
    ("leak, below only", "unscaled"),
    ("value, rounds down", "blocked", "fixed"),
    CUT_OFF,
)


def diagnosis(fn: Callable, failures: Failures) -> None:
    """faults(quantizer) -> the names of its faults, of FAULTS."""
    for some in SUSPECTS:
        with failures.given(quantizer=f"one with {' and '.join(some)}" if some else "LSQ as it should be"):
            names = fn(_quantizer(frozenset(some), detached=some is CUT_OFF))
            failures.need(isinstance(names, set | frozenset), "return a set of names")
            failures.need(names <= {*FAULTS}, f"a name is none of {', '.join(FAULTS)}")
            truth = {name.partition(",")[0] for name in some}
            detail = f"expected {_listed(truth)}, got {_listed(names)}"
            failures.expect(names >= truth, "a fault has not been found", detail=detail)
            failures.expect(names <= truth, "a fault is named that it does not have", detail=detail)


def _quantizer(faults: frozenset[str], detached: bool) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    def quantizer(x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
        y = _Faulty.apply(x, step, lo, hi, faults)
        return y.detach() if detached else y

    return quantizer


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


CHECKS = {"08.1": straight_through, "08.2": learned_step, "08.3": diagnosis}

TRIES = {
    "08.1": f"{len(GRIDS)} grids with values inside and beyond, and with the step as a number and as a tensor",
    "08.2": "7 tensors with one step for all, for each row and for each channel",
    "08.3": f"{len(SUSPECTS)} quantizers with no fault, with one and with several",
}
