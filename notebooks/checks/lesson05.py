"""Checks of lesson 05: an exact N:M mask, values with two-bit positions, the bytes of a pattern, a straight-through
estimator, Wanda's choice in groups.

Each holds the answer against what has to be true of it, or against an independent computation: counts in every group,
a weight put together again bit by bit, positions that are really written out, gradients by their definition, outputs
that are computed without a weight.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from labkit.lesson.failures import Failures, has_parts, is_mask


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


def compress(fn: Callable, failures: Failures) -> None:
    """compress(weight) -> (values [out, in / 2], positions uint8 [out, in / 8]) of a 2:4 weight."""
    generator = torch.Generator().manual_seed(1)
    for case, rows, columns, dtype in (
        ("two kept in every group", 5, 16, torch.float32),
        ("two kept in every group", 3, 8, torch.float16),
        ("some groups with one or none", 6, 32, torch.float32),
        ("some groups with one or none", 4, 24, torch.int8),
        ("tiny values", 3, 16, torch.float32),
        ("all zero", 2, 8, torch.float32),
    ):
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        weight = torch.randn(rows, columns // 4, 4, generator=generator).masked_fill(order < 2, 0.0)
        fewer = {"some groups with one or none": 0.3, "all zero": 1.0}.get(case, 0.0)
        weight[torch.rand(weight.shape, generator=generator) < fewer] = 0.0
        weight *= {"tiny values": 1e-20}.get(case, 20.0)
        with failures.given(weight=case, shape=(rows, columns), dtype=str(dtype)):
            _compress(fn, failures, weight.flatten(1).to(dtype))


def _compress(fn: Callable, failures: Failures, weight: Tensor) -> None:
    rows, columns = weight.shape
    answer = failures.call(fn, weight, changed="your function changed the weight")
    if not failures.expect(has_parts(answer, 2), "return the values and the metadata"):
        return
    values, metadata = answer
    usable = all(isinstance(part, Tensor) for part in answer)
    usable = usable and values.shape == (rows, columns // 2) and values.dtype == weight.dtype
    if not failures.expect(usable, "values has to be a tensor [out, in / 2] of the weight's own type"):
        return
    usable = metadata.shape == (rows, columns // 8) and metadata.dtype == torch.uint8
    if not failures.expect(usable, "the metadata have to be a uint8 tensor [out, in / 8]: two groups share a byte"):
        return
    again, ascending = torch.zeros_like(weight), True
    for row in range(rows):
        for group in range(columns // 4):
            nibble = metadata[row, group // 2].item() >> 4 * (group % 2) & 15
            first, second = nibble & 3, nibble >> 2
            ascending &= first < second
            again[row, 4 * group + first] += values[row, 2 * group]
            again[row, 4 * group + second] += values[row, 2 * group + 1]
    failures.expect(
        ascending,
        "the two positions of a group have to differ and ascend, also where the group holds fewer than two values",
    )
    failures.expect(
        torch.equal(again, weight),
        "read back by the layout in the text (lowest bits first), your values and metadata give another weight",
    )


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


def wanda_mask(fn: Callable, failures: Failures) -> None:
    """wanda_mask(weight, inputs, n, m) -> bool tensor [out, in], True where kept."""
    generator = torch.Generator().manual_seed(2)
    for case, shape in {
        "[tokens, in]": (50, 24),
        "[batch, tokens, in]": (6, 9, 24),
        "one token": (1, 24),
        "half of them always 0": (20, 24),
    }.items():
        inputs = torch.randn(shape, generator=generator) ** 3  # long tails: mean and root mean square rank differently
        inputs = inputs * torch.logspace(-1, 1, 24)[torch.randperm(24, generator=generator)]  # some features are loud
        if case == "half of them always 0":
            inputs[:, 12:] = 0
        weight = torch.randn(8, 24, generator=generator)
        for n, m in ((2, 4), (1, 4), (4, 8), (2, 6)):
            with failures.given(inputs=case, n=n, m=m):
                _wanda_mask(fn, failures, weight, inputs, n, m)


def _wanda_mask(fn: Callable, failures: Failures, weight: Tensor, inputs: Tensor, n: int, m: int) -> None:
    changed = "your function changed the weight or the inputs; it should only return a mask"
    mask = failures.call(fn, weight, inputs, n, m, changed=changed)
    if not failures.expect(is_mask(mask, weight), "return a bool tensor [out, in], True where a weight is kept"):
        return
    groups = mask.view(len(weight), -1, m)
    if not failures.expect(bool((groups.sum(-1) == n).all()), "a group of m does not keep exactly n"):
        return
    columns = inputs.flatten(0, -2).t()  # [in, tokens]
    changes = []
    for row in weight:
        changes += [(w * x).norm() for w, x in zip(row, columns, strict=True)]
    change = torch.stack(changes).view(
        groups.shape
    )  # how far the outputs move when this weight alone goes, over all tokens
    least = change.masked_fill(~groups, torch.inf).amin(-1)
    most = change.masked_fill(groups, 0.0).amax(-1)
    failures.expect(
        bool((least >= most * (1 - 1e-5)).all()),
        "a weight was removed whose absence moves the output further than that of one that stayed in its group: the "
        "score is |w| times the root of the sum of the squares of its input, over all tokens",
    )


CHECKS = {"05.1": nm_mask, "05.2": compress, "05.3": stored_share, "05.4": sparse_refined, "05.5": wanda_mask}

TRIES = {
    "05.1": "9 weights, among them ties, views, convolutions and int8, in 5 patterns N:M",
    "05.2": "6 weights, among them groups with one nonzero or none, and int8",
    "05.3": f"{len(PATTERNS)} patterns N:M at 4 widths of the values",
    "05.4": "a matrix and a convolution with 3 strengths of the pull, forwards and backwards, then two layers at once",
    "05.5": "inputs with two and with three dimensions, some of them always 0, in 4 patterns N:M",
}
