"""Answers to the exercises of lesson 08: right ones, written differently, and plausible wrong ones."""

import math
from itertools import pairwise

import torch


def _by_detach(x, scale, zero, lo, hi):
    steps = (x / scale + zero).clamp(lo - 0.5, hi + 0.5)
    codes = steps + ((x / scale).round().add(zero).clamp(lo, hi) - steps).detach()
    return (codes - zero) * scale


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero, lo, hi):
        codes = (x / scale).round() + zero
        ctx.save_for_backward((codes >= lo) & (codes <= hi))
        return (codes.clamp(lo, hi) - zero) * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None, None, None


def _staircase(x, scale, zero, lo, hi):
    return (((x / scale).round() + zero).clamp(lo, hi) - zero) * scale


def _everywhere(x, scale, zero, lo, hi):
    return x + (_staircase(x, scale, zero, lo, hi) - x).detach()


def _of_the_line(x, scale, zero, lo, hi):
    return ((x / scale + zero).clamp(lo, hi) - zero) * scale


def _in_codes(x, scale, zero, lo, hi):
    """The chain rule's factors 1 / scale and scale: one is lost."""
    line = (x / scale + zero).clamp(lo - 0.5, hi + 0.5)
    return line + (_staircase(x, scale, zero, lo, hi) - line).detach()


def _zero_forgotten(x, scale, zero, lo, hi):
    return _by_detach(x, scale, 0, lo, hi)


def _one_side(x, scale, zero, lo, hi):
    line = ((x / scale + zero).clamp(max=hi + 0.5) - zero) * scale
    return line + (_staircase(x, scale, zero, lo, hi) - line).detach()


def _clipped_first(x, scale, zero, lo, hi):
    """Clipped before the zero point is added."""
    steps = (x / scale).clamp(lo, hi)
    return (steps + (steps.round() - steps).detach()) * scale


def _half_a_step_short(x, scale, zero, lo, hi):
    line = ((x / scale + zero).clamp(lo, hi) - zero) * scale
    return line + (_staircase(x, scale, zero, lo, hi) - line).detach()


# -------------------------------------------------------------------------------------------------- the step's gradient


def _step(x, scale, lo, hi, upstream, *, inside=True, factor=True, clip=True, sign=1, count=None, upstream_used=True):
    """Right, unless an option takes a part of the answer away."""
    steps = x / scale
    within = (steps > lo) & (steps < hi)
    slopes = torch.zeros_like(steps)
    if inside:
        slopes = torch.where(within, sign * (steps.round() - steps), slopes)
    if clip:
        slopes = torch.where(within, slopes, steps.clamp(lo, hi))
    product = slopes * upstream if upstream_used else slopes
    total = product.sum_to_size(scale.shape)
    n = x.numel() // scale.numel() if count is None else count(x, scale)
    return total / math.sqrt(n * hi) if factor else total


def _step_by_autograd(x, scale, lo, hi, upstream):
    s = scale.detach().clone().requires_grad_()
    steps = (x / s).clamp(lo, hi)
    y = (steps + (steps.round() - steps).detach()) * s
    (gradient,) = torch.autograd.grad(y, s, upstream)
    return gradient / (x.numel() / s.numel() * hi) ** 0.5


def _step_in_place(x, scale, lo, hi, upstream):
    upstream.mul_(torch.where((x / scale > lo) & (x / scale < hi), (x / scale).round() - x / scale, x.sign()))
    return _step_by_autograd(x, scale, lo, hi, torch.ones_like(x))


# ---------------------------------------------------------------------------------------------------------- a diagnosis


def _faults(quantizer, *, below=True, above=True, value="all", steps=True, factor=True, single=False):
    """Right, unless an option leaves a test out."""
    names = set()
    step = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)

    def run(*values):
        x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        y = quantizer(x, step, -4, 3)
        pair = torch.autograd.grad(y.sum(), (x, step), allow_unused=True) if y.requires_grad else (None, None)
        zeros = torch.zeros_like(x), torch.zeros(())
        return y.detach(), *(z if g is None else g for g, z in zip(pair, zeros, strict=True))

    y, to_x, within = run(0.2, -0.3, 0.55, -0.57)
    points = torch.tensor([0.25, -0.25, 0.5, -0.5], dtype=torch.float64)
    if not torch.allclose(y, points):
        names.add("value")
    if not bool(to_x.all()):
        names.add("blocked")
    high, x_high, s_high = run(3.0, 4.0)
    low, x_low, s_low = run(-3.0, -4.0)
    if value == "all" and not (torch.allclose(high, 0.75 + 0 * high) and torch.allclose(low, 0 * low - 1)):
        names.add("value")
    if (above and bool(x_high.any())) or (below and bool(x_low.any())):
        names.add("leak")
    right = float((points - torch.tensor([0.2, -0.3, 0.55, -0.57])).sum()) / 0.25
    if steps and not (within or s_high or s_low):
        names.add("fixed")
    elif steps and not any(math.isclose(float(within), right / g, rel_tol=1e-5) for g in (1, math.sqrt(4 * 3))):
        names.add("inside")
    if factor and s_high and math.isclose(float(s_high), 6.0):
        names.add("unscaled")
    return set(sorted(names)[:1]) if single else names


def _faults_by_reference(quantizer):
    """Beside the straight rewrite, value by value, at random."""
    draw, names = torch.Generator().manual_seed(5), set()
    x = 2 * torch.randn(60, dtype=torch.float64, generator=draw)
    sides = []
    for fn in (quantizer, _reference):
        leaf, step = x.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        y = fn(leaf, step, -3, 3)
        grads = torch.autograd.grad(y.sum(), (leaf, step), allow_unused=True) if y.requires_grad else (None, None)
        sides.append((y.detach(), *grads))
    (y, to_x, to_step), (y_right, x_right, step_right) = sides
    to_x = torch.zeros_like(x) if to_x is None else to_x
    inside = x_right > 0
    names |= {"value"} if not torch.allclose(y, y_right) else set()
    names |= {"blocked"} if not to_x[inside].all() else set()
    names |= {"leak"} if to_x[~inside].any() else set()
    if to_step is None or not to_step:
        return names | {"fixed"}
    clipped, codes = (x[~inside].sign() * 3).sum(), (x / 0.7).round().clamp(-3, 3).sum()
    factor = math.sqrt(60 * 3)
    if any(torch.isclose(to_step, target) for target in (step_right * factor, clipped, codes)):
        names.add("unscaled")
    if not any(torch.isclose(to_step, step_right * g) for g in (1.0, factor)):
        names.add("inside")
    return names


def _reference(x, step, lo, hi):
    g = 1 / math.sqrt(x.numel() * hi)
    s = step * g + (step - step * g).detach()
    steps = (x / s).clamp(lo, hi)
    return (steps + (steps.round() - steps).detach()) * s


# ------------------------------------------------------------------------------------------------------------ reversals


def _reversals(history):
    moves = history.long().diff(dim=0).sign()  # [T - 1, N]
    last, count = torch.zeros_like(moves[0]), torch.zeros(history.shape[1])
    for move in moves:
        count += move * last < 0
        last = torch.where(move == 0, last, move)
    return count / len(moves)


def _reversals_by_columns(history):
    shares = []
    for codes in history.T.tolist():
        moves = [b - a for a, b in pairwise(codes) if b != a]
        turns = sum((a > 0) != (b > 0) for a, b in pairwise(moves))
        shares.append(turns / (len(codes) - 1))
    return torch.tensor(shares, dtype=torch.float64)


def _neighbours_only(history):
    moves = history.long().diff(dim=0).sign()
    return (moves[1:] * moves[:-1] < 0).double().sum(0) / len(moves)


def _all_changes(history):
    return (history.long().diff(dim=0) != 0).double().mean(0)


def _in_their_type(history):
    """int8 differences wrap around."""
    moves = history.diff(dim=0).sign()
    last, count = torch.zeros_like(moves[0]), torch.zeros(history.shape[1])
    for move in moves:
        count += move * last < 0
        last = torch.where(move == 0, last, move)
    return count / len(moves)


def _last_is_forgotten(history):
    moves = history.long().diff(dim=0).sign()
    count, last = torch.zeros(history.shape[1]), moves[0]
    for move in moves[1:]:
        count += move * last < 0
        last = move
    return count / len(moves)


RIGHT = {
    "08.1": (_by_detach, _Straight.apply),
    "08.2": (_step, _step_by_autograd),
    "08.3": (_faults, _faults_by_reference),
    "08.4": (_reversals, _reversals_by_columns),
}

WRONG = {
    "08.1": {
        "the staircase alone": _staircase,
        "the gradient passes where clipped": _everywhere,
        "clipped and not rounded": _of_the_line,
        "gradient of the codes": _in_codes,
        "the zero point forgotten": _zero_forgotten,
        "clipped at one end for the gradient": _one_side,
        "clipped before the zero point": _clipped_first,
        "clipped half a step early": _half_a_step_short,
    },
    "08.2": {
        "no gradient scale": lambda *arguments: _step(*arguments, factor=False),
        "nothing where clipped": lambda *arguments: _step(*arguments, clip=False),
        "nothing inside": lambda *arguments: _step(*arguments, inside=False),
        "the wrong sign inside": lambda *arguments: _step(*arguments, sign=-1),
        "N counts all values": lambda *arguments: _step(*arguments, count=lambda x, s: x.numel()),
        "N counts the steps": lambda *arguments: _step(*arguments, count=lambda x, s: s.numel()),
        "nothing from above": lambda *arguments: _step(*arguments, upstream_used=False),
        "an argument is changed": _step_in_place,
    },
    "08.3": {
        "looks below only for leaks": lambda q: _faults(q, above=False),
        "looks above only for leaks": lambda q: _faults(q, below=False),
        "values inside only": lambda q: _faults(q, value="inside"),
        "never looks at the step": lambda q: _faults(q, steps=False),
        "never looks at the factor": lambda q: _faults(q, factor=False),
        "one fault at most": lambda q: _faults(q, single=True),
        "no faults anywhere": lambda q: set(),
        "a list": lambda q: [*_faults(q)],
    },
    "08.4": {
        "neighbouring steps only": _neighbours_only,
        "all changes": _all_changes,
        "a rest ends the memory": _last_is_forgotten,
        "differences in int8": _in_their_type,
        "a count, no share": lambda history: _reversals(history) * (len(history) - 1),
        "over all steps and one more": lambda history: _reversals(history) * (len(history) - 1) / len(history),
    },
}
