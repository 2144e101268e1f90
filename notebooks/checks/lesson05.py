"""Checks of lesson 05: an exact N:M mask, the bytes of a pattern, a straight-through estimator, SparseGPT.

Each holds the answer against what has to be true of it, or against an independent computation: counts in every group,
positions that are really written out, gradients by their definition, updates with an inverse for every column.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from labkit.lesson.failures import Failures, is_mask


def nm_mask(fn: Callable, failures: Failures) -> None:
    """nm_mask(weight, n, m) -> bool tensor, True where kept; groups of m along dimension 1."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(12, 24, generator=generator)
    for case, weight in {
        "random": random,
        "many ties": (2 * random).round(),
        "all equal": torch.full((3, 24), -0.5),
        "a transposed view": torch.randn(24, 6, generator=generator).t(),
        "float16": random.half(),
        "int8": (40 * random).clamp(-127, 127).to(torch.int8),
        "tiny and nearly equal": 1e-30 * (1 + 1e-5 * random),
        "a convolution": torch.randn(4, 24, 3, 3, generator=generator),
        "one of its transposed views": torch.randn(3, 3, 24, 4, generator=generator).permute(3, 2, 0, 1),
    }.items():
        for n, m in ((2, 4), (1, 4), (4, 8), (3, 6), (4, 4)):
            with failures.given(weight=case, n=n, m=m):
                _nm_mask(fn, failures, weight, n, m)


def _nm_mask(fn: Callable, failures: Failures, weight: Tensor, n: int, m: int) -> None:
    changed = "your function changed the weight; it should only return a mask"
    mask = failures.call(fn, weight, n, m, changed=changed)
    if not failures.expect(is_mask(mask, weight), "return a bool tensor of the weight's shape"):
        return
    groups = weight.abs().float().movedim(1, -1).reshape(-1, m).tolist()  # each one m neighbours in dimension 1
    rows = mask.movedim(1, -1).reshape(-1, m).tolist()
    wrong = [sum(row) for row in rows if sum(row) != n]
    failures.expect(
        not wrong,
        "a group of m neighbours in dimension 1 does not keep exactly n: look at ties, the dimension, what n counts",
        detail=f"{len(wrong)} of {len(rows)} groups, the first keeps {wrong[0]}" if wrong else "",
    )
    pairs = [list(zip(group, row, strict=True)) for group, row in zip(groups, rows, strict=True)]
    failures.expect(
        all(least >= most for least, most in map(_edge, pairs)),
        "a removed weight is larger in magnitude than one of its group that is kept",
    )
    failures.expect(
        not any(_breaks_ties_late(group) for group in pairs),
        "of weights that are equal in magnitude the first ones of the group have to stay",
    )


def _edge(group: list[tuple[float, bool]]) -> tuple[float, float]:
    """The least that is kept and the most that is removed."""
    least = min((weight for weight, stays in group if stays), default=0.0)
    most = max((weight for weight, stays in group if not stays), default=0.0)
    return least, most


def _breaks_ties_late(group: list[tuple[float, bool]]) -> bool:
    """Tell whether of two equal weights of a group the first goes and the second stays."""
    for (first, first_stays), (second, second_stays) in itertools.combinations(group, 2):
        if first == second and second_stays and not first_stays:
            return True
    return False


PATTERNS = (
    (2, 4),
    (1, 4),
    (4, 8),
    (1, 2),
    (3, 6),
    (8, 16),
    (4, 4),
    (5, 12),
    (2, 5),
    (1, 1),
)  # n, m


def stored_share(fn: Callable, failures: Failures) -> None:
    """stored_share(n, m, bits) -> bytes of an N:M weight over those of the dense one, metadata included."""
    for n, m in PATTERNS:
        for bits in (32, 16, 8, 4):
            with failures.given(n=n, m=m, bits=bits):
                digits = len(f"{m - 1:b}") if m > 1 else 0  # of the highest place
                values = "v" * bits * n
                where = "p" * digits * n
                failures.close(
                    fn(n, m, bits),
                    len(values + where) / (bits * m),
                    "your share differs from that of a group that was written out bit by bit: n values, and for each "
                    "its position among m",
                )


def sparse_refined(fn: Callable, failures: Failures) -> None:
    """SparseRefined.apply(weight, keep, decay): an autograd.Function; see the exercise for both of its passes."""
    generator = torch.Generator().manual_seed(3)
    for case, shape in {"a matrix": (5, 8), "a convolution": (3, 4, 2, 2)}.items():
        weight = torch.randn(shape, generator=generator)
        scores = torch.rand(shape, generator=generator).movedim(1, -1)
        order = scores.unflatten(-1, (-1, 4)).argsort(-1)
        keep = (order < 2).flatten(-2).movedim(-1, 1)
        for decay in (0.0, 0.5, 2.0):
            with failures.given(weight=case, decay=decay):
                _sparse_refined(fn, failures, weight, keep, decay)
    _two_layers(fn, failures)


def _two_layers(fn: Callable, failures: Failures) -> None:
    """Two calls before the backward pass: each has a mask and a pull that the other must not touch."""
    apply = getattr(fn, "apply", fn)
    leaves = [torch.full((2, 4), size, requires_grad=True) for size in (1.0, 3.0)]
    masks = [torch.tensor([[True, True, False, False]] * 2), torch.tensor([[False, True, False, True]] * 2)]
    pulls = (0.5, 2.0)
    with failures.given(weight="two layers, backwards after both went forwards", decay=str(pulls)):
        used = [apply(leaf, mask, pull) for leaf, mask, pull in zip(leaves, masks, pulls, strict=True)]
        sum(part.sum() for part in used).backward()
        for leaf, mask, pull in zip(leaves, masks, pulls, strict=True):
            failures.close(
                leaf.grad,
                1 + pull * leaf * ~mask,
                "a layer gets the pull or the mask of another; keep on ctx what the backward pass needs",
            )


def _sparse_refined(fn: Callable, failures: Failures, weight: Tensor, keep: Tensor, decay: float) -> None:
    apply = getattr(fn, "apply", fn)
    leaf, mask = weight.clone().requires_grad_(), keep.clone()
    used = apply(leaf, mask, decay)
    is_result = isinstance(used, Tensor) and used.shape == weight.shape
    failures.need(is_result, "forward has to return a tensor of the weight's shape")
    failures.expect(
        torch.equal(used, torch.where(keep, weight, torch.zeros(()))),
        "forward has to return the weight where it is kept, and 0 elsewhere",
    )
    failures.need(used.requires_grad, "what apply returns is cut off from the weight: keep it in the graph")
    arriving = torch.linspace(-1.0, 2.0, weight.numel()).view(weight.shape)
    arriving[0] = 0  # to the weights of an output without a gradient; the pull stays
    used.backward(arriving)
    failures.need(leaf.grad is not None, "backward hands no gradient to the weight")
    passed = leaf.grad - arriving  # what was added on the way
    failures.expect(
        torch.equal(leaf.detach(), weight) and torch.equal(mask, keep), "your function changed the weight or the mask"
    )
    failures.close(
        passed[keep],
        torch.zeros(int(keep.sum())),
        "a kept weight has to get the gradient that arrives, unchanged: nothing pulls on what is used",
        atol=1e-6,
    )
    pull = "and decay times its own dense value more" if decay else "as if there were no mask, if decay is 0"
    failures.close(
        passed[~keep],
        decay * weight[~keep],
        f"a removed weight has to get the gradient that arrives, {pull}",
        rtol=1e-5,
        atol=1e-6,
    )


def sparsegpt_24(fn: Callable, failures: Failures) -> None:
    """sparsegpt_24(weight, u) -> the weight [out, in] at 2:4 by SparseGPT, where u^T u is the inverse Hessian."""
    generator = torch.Generator().manual_seed(4)
    for case, width, dtype in (
        ("inputs that do not correlate", 8, torch.float64),
        ("one group", 4, torch.float64),
        ("correlated inputs", 16, torch.float64),
        ("correlated inputs, some of them loud", 24, torch.float64),
        ("a weight with zeros", 12, torch.float64),
        ("equal weights", 8, torch.float64),
        ("float32", 16, torch.float32),
    ):
        x = torch.randn(200, width, generator=generator, dtype=torch.float64)
        if case not in ("inputs that do not correlate", "equal weights"):
            x = x @ (torch.eye(width) + 0.6 * torch.randn(width, width, generator=generator)).double()
        if "loud" in case:
            x = x * torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
        hessian = x.t() @ x / len(x)
        if case in ("inputs that do not correlate", "equal weights"):
            hessian = torch.eye(width, dtype=torch.float64)
        weight = torch.randn(6, width, generator=generator, dtype=torch.float64)
        if case == "a weight with zeros":
            weight[torch.rand(weight.shape, generator=generator) < 0.4] = 0.0
        if case == "equal weights":
            weight = weight.sign()
        with failures.given(weight=case, shape=(6, width), dtype=str(dtype)):
            _sparsegpt_24(fn, failures, weight, hessian, dtype)


def _sparsegpt_24(fn: Callable, failures: Failures, weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> None:
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).to(dtype)
    given = weight.to(dtype)
    answer = failures.call(fn, given, u, changed="your function changed the weight or u; work on a copy")
    is_result = isinstance(answer, Tensor) and answer.shape == weight.shape
    if not failures.expect(is_result, "return the pruned weight, a tensor of the weight's shape"):
        return
    answer = answer.detach().double()
    nonzeros = (answer != 0).unflatten(1, (-1, 4)).sum(-1)
    failures.expect(
        bool((nonzeros <= 2).all()),
        "a group of four holds more than two nonzeros: a removed weight has to end as exactly 0",
        detail=f"{int((nonzeros > 2).sum())} of {nonzeros.numel()} groups",
    )
    wanted = _by_inverses(weight, hessian)
    loose = 1e-3 if dtype is torch.float32 else 1e-7
    failures.close(
        answer,
        wanted,
        "the weight differs from that of the formulas, computed with an inverse for every column: look at what is "
        "ranked (the updated weights, each over its own u[k, k], once a group), and at what is subtracted from which "
        "columns",
        rtol=loose,
        atol=loose,
    )


def _by_inverses(weight: Tensor, hessian: Tensor) -> Tensor:
    """Prune by OBS with an inverse of the rest of the Hessian for each column, as the text derives it."""
    w = weight.clone()
    width = w.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    errors = torch.stack([inverse[0, 0] for inverse in inverses])  # U_jj squared
    for j in range(width):
        if j % 4 == 0:
            scores = w[:, j : j + 4].square() / errors[j : j + 4]
            order = scores.argsort(dim=1, descending=True, stable=True)
            removed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, 2:], True)
        step = w[:, j] / errors[j] * removed[:, j % 4]
        w[:, j:] -= step[:, None] * inverses[j][0]
        w[:, j].masked_fill_(removed[:, j % 4], 0.0)
    return w


CHECKS = {"05.1": nm_mask, "05.2": stored_share, "05.3": sparse_refined, "05.4": sparsegpt_24}

TRIES = {
    "05.1": "9 weights, among them ties, views, convolutions and int8, in 5 patterns N:M",
    "05.2": f"{len(PATTERNS)} patterns N:M at 4 widths of the values",
    "05.3": "a matrix and a convolution with 3 strengths of the pull, forwards and backwards, then two layers at once",
    "05.4": "7 weights of 1 to 6 groups a row, with inputs that correlate or not, zeros, ties and float32",
}
