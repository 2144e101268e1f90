"""Sensitivity scan: the metric of a model with a single group of channels pruned, for each group and ratio.

The scan of Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.2. Channels are really removed; with
zeroed weights instead, biases and BatchNorm shifts would still act. The baseline is the unpruned model.
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
    """The metric of the model with the fraction `ratio` of the units of a single group removed."""

    group: str
    ratio: float
    metric: float


@dataclass(frozen=True)
class Sensitivity:
    """Result of a scan: the metric of the unpruned model, and rows ordered by group, then by ratio."""

    baseline: float
    rows: tuple[Trial, ...]

    def allocation(self, tolerance: float) -> dict[str, float]:
        """Return a ratio for each group, {group: ratio}, to pass as `ratio` to `channels.prune`.

        The ratio is the largest scanned ratio up to which every drop of the metric is at most `tolerance`.
        """
        ratios: dict[str, float] = {}
        exceeded = set()  # groups with a larger drop at a smaller ratio
        for row in self.rows:
            ratios.setdefault(row.group, 0.0)
            if self.baseline - row.metric > tolerance:
                exceeded.add(row.group)
            elif row.group not in exceeded:
                ratios[row.group] = row.ratio
        return ratios


def scan(
    model: nn.Module,
    args: Any,
    evaluate: Callable[[nn.Module], float],
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Evaluate the model with each group of channels pruned by each ratio, a single group at a time.

    args: the example input for tracing `model`.
    evaluate: evaluate(model) -> float, the metric; gets a pruned copy in the mode of `model`, the same data each time.
    ratios: fractions of a group's units to remove.
    progress: True shows a progress bar.
    options: fields of `channels.Choice`. Linked groups are pruned together.
    """
    check_function(evaluate, "evaluate")
    check_several(ratios, "ratios")
    ratios = sorted({fraction(ratio, "a ratio") for ratio in ratios})
    if not ratios:
        raise InputError("ratios is empty: give at least one fraction of channels to remove.")
    planner = channels.Planner(model, args, scope="layer", **options)

    def metric(ratio: float | Mapping[str, float]) -> float:
        pruned = channels.apply(model, planner.plan(ratio), args, check=False)
        return float(evaluate(pruned.model))

    baseline = metric(0.0)
    trials = []
    pairs = list(itertools.product(planner.names(), ratios))
    for name, ratio in tqdm(pairs, desc="sensitivity", disable=not progress):
        trials.append(Trial(name, ratio, metric({name: ratio})))
    return Sensitivity(baseline, tuple(trials))
