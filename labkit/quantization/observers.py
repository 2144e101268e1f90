"""Observers: the range of values that an activation's codes have to span, from values observed batch by batch.

Five criteria in one table, `RANGES`. Min-max and the moving average need the extremes of each batch; the other three
need a histogram. Its bins are a power of two wide and only ever merge in pairs, so that counts are exact for any number
of batches in any order. The caller chooses the values to observe and the use of the range.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from labkit.errors import InputError, check_choice, check_whole
from labkit.quantization import affine

BINS = 4096  # of the histogram, half of them below 0: 16 for each of 256 codes
MOMENTUM = 0.9  # of the moving average: the share that stays at each batch
PERCENTILE = 99.99  # of the values, that many are in the range, as many outside at either end
CANDIDATES = 100  # ends that the squared error is compared at, each way
SMALLEST = -100  # exponent of the least histogram's range, that of zeros


class Observer:
    """Observes tensors of any shapes; `range` then gives the range that a criterion takes from them.

    name: the criterion, a row of `RANGES`.
    bits: width of the codes; "mse" and "histogram" use the width to weigh clipping against rounding.
    where: the observed value in words, for error messages.
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
        """The width of a bin."""
        return 2.0 ** (self.exponent + 1) / BINS

    @property
    def edges(self) -> np.ndarray:
        """The edges of the bins [BINS + 1]: bin i counts values from edges[i] on and below edges[i + 1].

        edges[BINS / 2] is 0.
        """
        half = BINS // 2
        return np.arange(-half, half + 1) * self.width

    def observe(self, x: Tensor) -> None:
        """Count in all values of x.

        Raises InputError if x has no values, NaN or infinity, and if x is no dense tensor of real numbers.
        """
        self._check_tensor(x)
        x = x.detach()
        if not x.numel():
            raise InputError(f"There are no values in {self.where}, of shape {list(x.shape)}: calibrate on others.")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        least, largest = torch.aminmax(x)
        lo, hi = float(least), float(largest)
        if not math.isfinite(lo) or not math.isfinite(hi):
            raise InputError(f"There is NaN or infinity in {self.where}: look for the batch that it comes from.")
        self.extremes.append((lo, hi))
        if self.name not in ("minmax", "moving"):
            self._count(x, max(hi, -lo))

    def _check_tensor(self, x: object) -> None:
        if isinstance(x, Tensor):
            if x.layout is torch.strided and not x.is_complex() and not x.is_meta:
                return
            kind = f"{x.layout}, {x.dtype}, on {x.device}"
        else:
            kind = type(x).__name__
        raise InputError(f"What {self.where} gets is no dense tensor of real numbers ({kind}): give it such.")

    def _count(self, x: Tensor, largest: float) -> None:
        """Count the values of x in the histogram, made wider if need be.

        largest: the largest |x|.
        """
        exponent = SMALLEST
        if largest:
            _, exponent_of_largest = math.frexp(largest)  # largest < 2^exponent
            exponent = max(exponent_of_largest, SMALLEST)
        if not self.counts.any():
            self.exponent = exponent
        while self.exponent < exponent:  # bins twice as wide: pairs merge, and lie in the middle
            pairs = self.counts.reshape(-1, 2)
            self.counts = np.pad(pairs.sum(1), BINS // 4)
            self.exponent += 1
        bins_from_zero = (x.flatten() / self.width).floor().long()
        bins = bins_from_zero + BINS // 2
        self.counts += torch.bincount(bins, minlength=BINS).cpu().numpy()

    def range(self) -> tuple[Tensor, Tensor]:
        """Return (lo, hi), float32 without dimensions, as `affine.choose` takes them; within the observed extremes.

        Raises InputError if nothing was observed, or the same number everywhere: codes could span no range then.
        """
        if not self.extremes:
            raise InputError(f"Nothing was observed of {self.where}: calibrate on at least one batch that reaches it.")
        lo, hi = _minmax(self)
        if lo == hi:
            number = lo + 0.0  # no -0
            raise InputError(
                f"All values of {self.where} are {number:g}, which is no range: calibrate on other data or ignore it."
            )
        low, high = RANGES[self.name](self)
        low = float(max(low, lo))
        high = float(min(high, hi))
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


def _minmax(seen: Observer) -> tuple[float, float]:
    """Return the range of all values. Jacob et al. 2018 (arXiv:1712.05877), section 3, for weights."""
    lowest = [lo for lo, _ in seen.extremes]
    highest = [hi for _, hi in seen.extremes]
    return min(lowest), max(highest)


def _moving(seen: Observer) -> tuple[float, float]:
    """Return exponential moving averages of the batches' extremes. Jacob et al. 2018, section 3.1, for activations."""
    lo, hi = seen.extremes[0]
    for low, high in seen.extremes[1:]:
        lo = MOMENTUM * lo + (1 - MOMENTUM) * low
        hi = MOMENTUM * hi + (1 - MOMENTUM) * high
    return lo, hi


def _percentile(seen: Observer) -> tuple[float, float]:
    """Cut off (100 - PERCENTILE) / 2 % of the values at each end, to the next edge of a bin."""
    cut = (1 - PERCENTILE / 100) / 2
    counted = np.cumsum(seen.counts)  # up to the end of each bin
    total = counted[-1]
    first = int(np.searchsorted(counted, cut * total, side="right"))  # earlier bins hold cut * total values at most
    last = int(np.searchsorted(counted, (1 - cut) * total, side="left"))
    return seen.edges[first], seen.edges[last + 1]


def _mse(seen: Observer) -> tuple[float, float]:
    """Search the ends between which rounding and clipping cost the least squared error: the upper, then the lower.

    Choukroun et al. 2019 (arXiv:1902.06822), on an asymmetric grid, every value in the middle of its bin.
    """
    (full_bins,) = seen.counts.nonzero()
    counts = torch.from_numpy(seen.counts[full_bins]).double()
    values = torch.from_numpy(seen.edges[full_bins] + seen.width / 2)
    x = values.expand(CANDIDATES, -1)  # [CANDIDATES, bins]
    hundredths = torch.arange(CANDIDATES, 0, -1, dtype=torch.float64)
    shares = hundredths[:, None] / CANDIDATES  # of the range, from all down to a hundredth

    def best(lo: Tensor, hi: Tensor) -> int:
        """Return the place of the range [lo, hi], each [CANDIDATES, 1], with the least squared error."""
        grid = affine.choose(lo, hi, seen.bits, symmetric=False)
        errors = (grid.fake(x) - x).square() @ counts
        return int(errors.argmin())

    lo, hi = (torch.full_like(shares, end) for end in _minmax(seen))
    upper = shares * hi
    hi = torch.full_like(shares, float(upper[best(lo, upper)]))
    lower = shares * lo
    lo = torch.full_like(shares, float(lower[best(lower, hi)]))
    return float(lo[0]), float(hi[0])


def _histogram(seen: Observer) -> tuple[float, float]:
    """Choose the threshold on |x| with which codes lose the least information of the clipped histogram.

    Migacz 2017, 8-bit Inference with TensorRT, pages 38-39. P: the first i bins, with the clipped values put into the
    last bin that is not empty. Q: the same bins told in codes, the count of a code spread evenly over its bins that are
    not empty. The i with the least sum P log(P / Q) is taken. As in NVIDIA's toolkit the first bin counts like the
    second: half of a ReLU's output is 0, which is a code anyway, and would drown all other values.
    """
    negative, positive = np.split(seen.counts, 2)
    counts = positive + negative[::-1]  # of |x|
    counts[0] = counts[1]
    lo, _ = _minmax(seen)
    has_sign = lo < 0
    codes = 2 ** (seen.bits - has_sign)
    (full_bins,) = counts.nonzero()
    bins = int(full_bins.max(initial=0)) + 1
    losses = {i: _divergence(counts, i, codes) for i in range(codes, bins + 1)}
    best = min(losses, key=losses.get, default=BINS)
    threshold = seen.width * best
    return -threshold, threshold


def _divergence(counts: np.ndarray, i: int, codes: int) -> float:
    """Return sum P log(P / Q) of the first i bins told in a number of codes, see `_histogram`."""
    p = counts[:i].astype(np.float64)
    is_full = p > 0
    if not is_full.any():
        return math.inf
    code = np.arange(i) * codes // i  # of each bin
    count_of_code = np.bincount(code, p, codes)
    full_bins_of_code = np.bincount(code, is_full, codes)
    spread = count_of_code / np.maximum(full_bins_of_code, 1)
    q = spread[code][is_full]
    p = p[is_full]
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
