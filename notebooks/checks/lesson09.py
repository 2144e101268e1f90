"""Checks of lesson 09: the bound of a decode step, weights that lie on a grid already, GPTQ, a KV cache.

Each holds the answer against an independent computation: counts of distinct values, updates from a system of equations
solved anew for every column, grids that are laid value by value.
"""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from labkit.lesson.failures import Failures, has_parts
from labkit.quantization import affine


def decode_bound(fn: Callable, failures: Failures) -> None:
    """most_tokens(weights, bits, kv_numbers, kv_bits, context, batch, bandwidth) -> tokens per second."""
    small = {"layers": 8_000, "head": 1_000}
    settings = (
        ("one part, no context", {"all": 1_000_000}, {"all": 16.0}, 500, 16, 0, 1),
        ("two parts of different bits", small, {"layers": 4.25, "head": 16.0}, 64, 16, 0, 1),
        ("a long context", small, {"layers": 4.25, "head": 8.5}, 64, 16, 1_000, 1),
        ("a batch without context", small, {"layers": 4.0, "head": 8.0}, 64, 16, 0, 32),
        ("a batch with contexts", small, {"head": 16.0, "layers": 4.5}, 128, 4.5, 300, 8),
    )
    for case, weights, bits, kv_numbers, kv_bits, context, batch in settings:
        with failures.given(case=case, bits=bits, context=context, batch=batch):
            answer = fn(dict(weights), dict(bits), kv_numbers, kv_bits, context, batch, 2e9)
            read_bits = batch * context * kv_numbers * kv_bits
            for part, count in weights.items():
                read_bits += count * bits[part]
            failures.close(
                answer,
                batch * 2e9 / (read_bits / 8),
                "that is not the bound: a step reads every weight once, whatever the batch, and each sequence's cache, "
                "and writes one token for each sequence",
            )


# ----------------------------------------------------------------------------------------- a grid that is there already


def grid_share(fn: Callable, failures: Failures) -> None:
    """grid_share(weight, group_size, levels) -> share of the groups of at most so many different values."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (6, 192), generator=draw).float()
    steps = torch.rand(6, 6, 1, generator=draw) + 0.5
    rounded = (codes.view(6, 6, 32) * steps).view(6, 192)  # groups of 32 on grids of 16 points
    is_rounded = (torch.arange(6)[:, None] < 4) & (torch.arange(192) >= 128)
    mixed = torch.where(is_rounded, rounded, torch.randn(6, 192, generator=draw))
    alternating = torch.tensor([1.0, 2.0]).repeat(4, 96)
    exact = (torch.arange(32.0).remainder(16) - 8).repeat(3, 6)  # each of 16 values in every group
    for case, weight, group, levels in (
        ("rounded in groups of 32", rounded, 32, 16),
        ("the same, with steps below a thousandth", rounded / 4096, 32, 16),
        ("random, all below a thousandth", torch.randn(5, 128, generator=draw) / 4096, 64, 16),
        ("the same, looked at in groups of 96", rounded, 96, 16),
        ("the last two groups of four rows rounded", mixed, 32, 16),
        ("random", torch.randn(5, 128, generator=draw), 64, 16),
        ("random, all near 1", 1 + torch.randn(5, 128, generator=draw) / 4096, 64, 16),
        ("random, all below a billionth", torch.randn(5, 128, generator=draw) / 2**44, 64, 16),
        ("groups of one number more than levels", torch.randn(4, 68, generator=draw), 17, 16),
        ("two values in turns", alternating, 64, 2),
        ("exactly as many values as levels", exact, 32, 16),
        ("exactly one value too many", exact, 32, 15),
        ("groups as small as the number of levels", torch.randn(4, 64, generator=draw), 16, 16),
        ("groups smaller than the number of levels", rounded, 8, 16),
    ):
        with failures.given(weight=case, group_size=group, levels=levels):
            share = failures.call(fn, weight, group, levels, changed="your function changed the weight")
            if group <= levels:
                nothing = isinstance(share, Real | Tensor) and math.isnan(float(share))
                failures.expect(nothing, "a group of no more values than levels proves nothing: return NaN")
                continue
            few = []
            for row in weight.tolist():
                for start in range(0, len(row), group):
                    values = set(row[start : start + group])
                    few.append(len(values) <= levels)
            failures.close(
                share,
                sum(few) / len(few),
                "that is not the share of the groups, of neighbours in a row, that have at most `levels` different "
                "values",
            )


# ----------------------------------------------------------------------------------------------------------------- GPTQ


def _grid(values: Tensor, bits: int) -> affine.Grid:
    """The asymmetric grid of each row, with scales as they are stored: in 16 bits."""
    return affine.choose(values.amin(1, True), values.amax(1, True), bits, symmetric=False, dtype=torch.float16)


def gptq(fn: Callable, failures: Failures) -> None:
    """gptq(weight, u, bits, group_size) -> the rounded weight; H^-1 = U^T U."""
    draw = torch.Generator().manual_seed(2)
    for case, rows, columns, group, bits in (
        ("one group", 5, 8, 8, 4),
        ("groups of 4", 7, 16, 4, 3),
        ("groups of 16", 4, 48, 16, 4),
    ):
        x = torch.randn(200, columns, dtype=torch.float64, generator=draw)
        x = x @ torch.randn(columns, columns, dtype=torch.float64, generator=draw)  # inputs that go together
        weight = torch.randn(rows, columns, dtype=torch.float64, generator=draw)
        damping = 0.01 * x.square().sum() / columns
        hessian = x.t() @ x + damping * torch.eye(columns, dtype=torch.float64)
        for name, h in (
            ("of independent inputs", torch.eye(columns).double()),
            ("of inputs that go together", hessian),
        ):
            with failures.given(weight=f"{case}, {bits} bits", hessian=name):
                _gptq(fn, failures, weight, h, bits, group)


def _gptq(fn: Callable, failures: Failures, weight: Tensor, hessian: Tensor, bits: int, group: int) -> None:
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    new = failures.call(fn, weight, u, bits, group, changed="your function changed the weight or u; work on a copy")
    usable = isinstance(new, Tensor) and new.shape == weight.shape and new.is_floating_point()
    failures.need(usable, "return a tensor of the weight's shape, with the rounded weights")
    failures.need(bool(new.isfinite().all()), "the result holds NaN or infinity")
    values = new.reshape(-1, group).tolist()
    failures.expect(
        all(len({round(value, 9) for value in row}) <= 2**bits for row in values),
        "the result is not rounded: a group of a row holds more different values than there are codes",
    )
    plain = torch.cat([_grid(part, bits).fake(part) for part in weight.split(group, 1)], 1)
    if torch.equal(u, torch.eye(len(u), dtype=u.dtype)):
        failures.close(
            new, plain, "for independent inputs nothing is passed on: it has to be plain rounding", atol=1e-9
        )
        return
    failures.close(new[:, 0], plain[:, 0], "the first column is rounded as it stands", atol=1e-9)
    failures.close(
        new,
        _solved(weight, hessian, bits, group),
        "the result differs from the best update of all columns to the right, column by column, with the grid of a "
        "group chosen when its first column is reached, from what its weights are by then",
        atol=1e-7,
    )


def _solved(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """After each column the least-squares problem of those to the right, solved anew."""
    w = weight.clone()
    for j in range(w.shape[1]):
        if j % group == 0:
            grid = _grid(w[:, j : j + group], bits)
        column = w[:, j : j + 1]  # [out, 1]
        change = grid.fake(column) - column
        column += change
        right = slice(j + 1, None)
        if j + 1 < w.shape[1]:
            answer = torch.linalg.solve(hessian[right, right], hessian[right, j])  # [right]
            w[:, right] -= change * answer
    return w


# ------------------------------------------------------------------------------------------------------------- KV cache


def cache(fn: Callable, failures: Failures) -> None:
    """round_cache(k, v, bits, group) -> K rounded per channel, V per token."""
    draw = torch.Generator().manual_seed(3)
    for case, shape, group in (
        ("two whole groups", (16, 8), 8),
        ("a rest of three tokens", (2, 11, 8), 4),
        ("fewer tokens than a group", (1, 2, 5, 16), 8),
        ("heads and a rest of one", (1, 3, 9, 4), 4),
    ):
        k, v = (torch.randn(shape, generator=draw) + 0.3 for _ in range(2))
        k = k * torch.logspace(0, 1, shape[-1])  # channels of different sizes
        for bits in (8, 4, 2):
            with failures.given(shape=f"{case}, {list(shape)}", bits=bits, group=group):
                _cache(fn, failures, k, v, bits, group)


def _cache(fn: Callable, failures: Failures, k: Tensor, v: Tensor, bits: int, group: int) -> None:
    answer = failures.call(fn, k, v, bits, group, changed="your function changed k or v; return new ones")
    failures.need(has_parts(answer, 2), "return two tensors: the keys and the values")
    for new, old, name in zip(answer, (k, v), ("keys", "values"), strict=True):
        failures.need(isinstance(new, Tensor) and new.shape == old.shape, f"the {name} have to keep their shape")
    whole = k.shape[-2] // group * group
    failures.expect(
        torch.equal(answer[0][..., whole:, :], k[..., whole:, :]),
        "the keys of tokens that fill no group yet have to stay as they are",
    )
    keys, values = k.clone(), v.clone()
    for head in keys.view(-1, *k.shape[-2:]):
        for start in range(0, whole, group):
            for channel in range(head.shape[1]):
                tokens = slice(start, start + group)
                head[tokens, channel] = _laid(head[tokens, channel], bits)
    for head in values.view(-1, *v.shape[-2:]):
        for token in head:
            for start in range(0, len(token), group):
                token[start : start + group] = _laid(token[start : start + group], bits)
    failures.close(
        answer[0][..., :whole, :],
        keys[..., :whole, :],
        "the keys are off: a grid for each channel of each group of tokens, asymmetric, groups counted from the first "
        "token",
        rtol=1e-4,
        atol=1e-5,
    )
    failures.close(
        answer[1],
        values,
        "the values are off: a grid for each token of each group of channels, asymmetric",
        rtol=1e-4,
        atol=1e-5,
    )


def _laid(x: Tensor, bits: int) -> Tensor:
    """These numbers on one asymmetric grid that holds 0, one by one."""
    lo = min(0.0, float(x.min()))
    hi = max(0.0, float(x.max()))
    most = 2**bits - 1
    scale = float(torch.tensor(hi - lo) / most)
    zero = round(-lo / scale)
    unclipped = [round(value / scale) + zero for value in x.tolist()]
    codes = [min(max(code, 0), most) for code in unclipped]
    return torch.tensor([(code - zero) * scale for code in codes])


CHECKS = {"09.1": decode_bound, "09.2": grid_share, "09.3": gptq, "09.4": cache}

TRIES = {
    "09.1": "5 models, with parts of other bits, contexts and batches",
    "09.2": "14 weights, among them rounded ones, tiny ones and groups too small to prove anything",
    "09.3": "3 weights of 1 to 4 groups, with inputs that are independent and inputs that go together",
    "09.4": "4 caches at 8, 4 and 2 bits, among them tokens that fill no group",
}
