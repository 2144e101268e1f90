"""Observers: which range of values an activation's codes have to span, from what was seen of it, batch by batch.

Five criteria in one table. Min-max and the moving average need the extremes of each batch; the other three look at one
histogram, whose bins are a power of two wide and only ever merge in pairs, so that its counts are exact however many
batches there are and in whichever order. Which values are observed, and what becomes of the range, is the caller's.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from labkit.errors import InputError, check_choice, check_whole
from labkit.quantization import affine

BINS = 4096  # of the histogram, half of them below 0: 16 for each of 256 codes
MOMENTUM = 0.9  # of the moving average: what stays of it at each batch
PERCENTILE = 99.99  # of the values, that many are in the range, as many outside at either end
CANDIDATES = 100  # ends that the squared error is compared at, each way
SMALLEST = -100  # exponent of the least histogram's range, that of zeros


class Observer:
    """Looks at tensors of any shapes with `observe`; `range` is then what the criterion makes of them.

    name: a row of `RANGES`. bits: of the codes, which "mse" and "histogram" weigh clipping against rounding by.
    where: what is observed, for error messages.
    """

    def __init__(self, name: str, bits: int = 8, where: str = "the activation") -> None:
        check_choice(name, RANGES, "observer")
        check_whole(bits, "bits", 2, 8)
        self.name, self.bits, self.where = name, bits, where
        self.extremes: list[tuple[float, float]] = []  # of each tensor
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.exponent = SMALLEST  # the histogram goes from -2^exponent to 2^exponent

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0 ** (self.exponent + 1) / BINS

    @property
    def edges(self) -> np.ndarray:
        """[BINS + 1]: bin i counts the values from edges[i] on and below edges[i + 1]; edges[BINS / 2] is 0."""
        return np.arange(-BINS // 2, BINS // 2 + 1) * self.width

    def observe(self, x: Tensor) -> None:
        """Counts in all values of x.

        InputError where it has none, or NaN or infinity among them, and for what is no dense tensor of real numbers.
        """
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_complex() or x.is_meta:
            kind = f"{x.layout}, {x.dtype}, on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"What {self.where} gets is no dense tensor of real numbers ({kind}): give it such.")
        x = x.detach()
        if not x.numel():
            raise InputError(f"There are no values in {self.where}, of shape {list(x.shape)}: calibrate on others.")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        lo, hi = (float(end) for end in torch.aminmax(x))
        if not math.isfinite(lo) or not math.isfinite(hi):
            raise InputError(f"There is NaN or infinity in {self.where}: look for the batch that it comes from.")
        self.extremes.append((lo, hi))
        if self.name not in ("minmax", "moving"):
            self._count(x, max(hi, -lo))

    def _count(self, x: Tensor, largest: float) -> None:
        exponent = max(math.frexp(largest)[1], SMALLEST) if largest else SMALLEST  # largest < 2^exponent
        if not self.counts.any():
            self.exponent = exponent
        while self.exponent < exponent:  # bins twice as wide: pairs merge, and lie in the middle
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 4)
            self.exponent += 1
        bins = (x.flatten() / self.width).floor().long() + BINS // 2
        self.counts += torch.bincount(bins, minlength=BINS).cpu().numpy()

    def range(self) -> tuple[Tensor, Tensor]:
        """(lo, hi), float32 and without dimensions, as `affine.choose` takes them; within what was observed.

        InputError if nothing was observed, or the same number everywhere: it has no range that codes could span.
        """
        if not self.extremes:
            raise InputError(f"Nothing was observed of {self.where}: calibrate on at least one batch that reaches it.")
        lo, hi = _minmax(self)
        if lo == hi:
            raise InputError(
                f"All values of {self.where} are {lo:g}, which is no range: calibrate on other data or ignore it."
            )
        low, high = RANGES[self.name](self)
        return tuple(torch.tensor(float(end), dtype=torch.float32) for end in (max(low, lo), min(high, hi)))


def _minmax(seen: Observer) -> tuple[float, float]:
    """All values. Jacob et al. 2018 (arXiv:1712.05877), section 3, for weights."""
    return min(lo for lo, _ in seen.extremes), max(hi for _, hi in seen.extremes)


def _moving(seen: Observer) -> tuple[float, float]:
    """Exponential moving averages of the batches' extremes. Jacob et al. 2018, section 3.1, for activations."""
    lo, hi = seen.extremes[0]
    for low, high in seen.extremes[1:]:
        lo, hi = MOMENTUM * lo + (1 - MOMENTUM) * low, MOMENTUM * hi + (1 - MOMENTUM) * high
    return lo, hi


def _percentile(seen: Observer) -> tuple[float, float]:
    """What is left when (100 - PERCENTILE) / 2 % of the values are cut off at each end, to the next edge of a bin."""
    cut = (1 - PERCENTILE / 100) / 2
    below = np.cumsum(seen.counts)
    n = below[-1]
    first = int(np.searchsorted(below, cut * n, side="right"))  # the bins before it hold cut * n values at most
    last = int(np.searchsorted(below, (1 - cut) * n, side="left"))
    return seen.edges[first], seen.edges[last + 1]


def _mse(seen: Observer) -> tuple[float, float]:
    """The ends between which rounding and clipping cost the least squared error: first the upper one, then the lower.

    Choukroun et al. 2019 (arXiv:1902.06822), on an asymmetric grid, every value in the middle of its bin.
    """
    full, counts = seen.counts.nonzero()[0], torch.from_numpy(seen.counts[seen.counts > 0]).double()
    x = torch.from_numpy(seen.edges[full] + seen.width / 2).expand(CANDIDATES, -1)  # [CANDIDATES, bins]
    shares = torch.arange(CANDIDATES, 0, -1, dtype=torch.float64)[:, None] / CANDIDATES  # from all down to a hundredth
    ends = [torch.full_like(shares, end) for end in _minmax(seen)]
    for end in (1, 0):
        tried = [shares * x if i == end else x for i, x in enumerate(ends)]
        error = (affine.choose(*tried, seen.bits, symmetric=False).fake(x) - x).square() @ counts
        ends[end] = torch.full_like(shares, float(tried[end][error.argmin()]))
    return float(ends[0][0]), float(ends[1][0])


def _histogram(seen: Observer) -> tuple[float, float]:
    """The threshold on |x| whose clipped histogram loses least information when it is told in codes.

    Migacz 2017, 8-bit Inference with TensorRT, pages 38-39: for the first i bins with what is clipped put into the last
    that is not empty (P), and what the codes make of the bins (Q: each code's count spread evenly over its bins that
    are not empty), the i with the least sum P log(P / Q). As in NVIDIA's toolkit the first bin counts like the second:
    half of a ReLU's output is 0, which is a code anyway, and would drown all else.
    """
    counts = seen.counts[BINS // 2 :] + seen.counts[: BINS // 2][::-1]
    counts[0] = counts[1]
    codes = 2 ** (seen.bits - (_minmax(seen)[0] < 0))
    last = int(counts.nonzero()[0].max(initial=0)) + 1
    losses = {i: _divergence(counts, i, codes) for i in range(codes, last + 1)}
    threshold = seen.width * min(losses, key=losses.get, default=BINS)
    return -threshold, threshold


def _divergence(counts: np.ndarray, i: int, codes: int) -> float:
    """sum P log(P / Q) of the first i bins told in so many codes."""
    p, code = counts[:i].astype(np.float64), np.arange(i) * codes // i
    full = p > 0
    if not full.any():
        return math.inf
    q = (np.bincount(code, p, codes) / np.maximum(np.bincount(code, full, codes), 1))[code][full]
    p = p[full]
    p[-1] += counts[i:].sum()
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


RANGES: dict[str, Callable[[Observer], tuple[float, float]]] = {
    "minmax": _minmax,
    "moving": _moving,
    "percentile": _percentile,
    "mse": _mse,
    "histogram": _histogram,
}
