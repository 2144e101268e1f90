"""How much each group of channels matters to a metric: groups pruned one at a time, by really removing channels.

The scan of Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.2. Zeroing a convolution's weights is not
the same: biases and BatchNorm shifts would go on speaking. The baseline is the model as it is.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from labkit.arguments import check_function, check_several
from labkit.errors import InputError
from labkit.pruning import channels
from labkit.pruning.select import fraction


@dataclass(frozen=True)
class Trial:
    """One group without `ratio` of its units, all others whole, and what `evaluate` gave."""

    group: str
    ratio: float
    metric: float


@dataclass(frozen=True)
class Sensitivity:
    """baseline: the metric of the unpruned model. rows: by group, then by ratio."""

    baseline: float
    rows: tuple[Trial, ...]

    def allocation(self, tolerance: float) -> dict[str, float]:
        """{group: the largest scanned ratio up to which every drop is within `tolerance`}, to be `ratio` in prune."""
        result: dict[str, float] = {}
        stopped = set()
        for row in self.rows:
            result.setdefault(row.group, 0.0)
            if self.baseline - row.metric > tolerance:
                stopped.add(row.group)
            elif row.group not in stopped:
                result[row.group] = row.ratio
        return result


def scan(
    model: nn.Module,
    args: Any,
    evaluate: Callable[[nn.Module], float],
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Evaluates the model with each group of channels pruned by each of `ratios`, one at a time.

    evaluate(model) -> float: the metric, on the same data each time; it gets a pruned copy in the mode of `model`.
    Linked groups are pruned together. progress: show a bar. options: of `channels.Choice`.
    """
    check_function(evaluate, "evaluate")
    check_several(ratios, "ratios")
    ratios = sorted({fraction(ratio, "a ratio") for ratio in ratios})
    if not ratios:
        raise InputError("ratios is empty: give at least one fraction of channels to remove.")
    planner = channels.Planner(model, args, scope="layer", **options)

    def metric(ratio: float | Mapping[str, float]) -> float:
        return float(evaluate(channels.apply(model, planner.plan(ratio), args, check=False).model))

    baseline = metric(0.0)
    work = tqdm(list(itertools.product(planner.names(), ratios)), desc="sensitivity", disable=not progress)
    return Sensitivity(baseline, tuple(Trial(name, ratio, metric({name: ratio})) for name, ratio in work))
