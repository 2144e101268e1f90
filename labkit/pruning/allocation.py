"""Allocation: how many units each group of a model loses at a given pruning ratio.

The file works on scores and numbers of units, never on a model. Groups bound to keep the same fraction of units form a
`Cluster`. A cluster shrinks in steps; a step removes the same fraction of every group in the cluster. Most clusters
hold a single group and remove a single unit in a step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.graph.groups import Group
from labkit.pruning.select import count_to_prune, lowest_k


@dataclass(eq=False)
class Cluster:
    """Groups bound to keep the same fraction of units, and the equal steps in which they go."""

    groups: list[int]  # numbers of the groups
    steps: int  # into which the units of every group are divided
    scores: Tensor  # [steps], rising: mean score of the units of a step
    order: list[Tensor]  # for each group its unit numbers, least important first
    channels: int  # in a step, summed over the groups
    floor: int  # steps that remain at least
    grain: int  # the number of remaining steps has to be a multiple of the grain

    def removed_units(self, steps: int) -> dict[int, Tensor]:
        """Return {number of the group: bool [units], True where a unit goes} if `steps` steps are removed."""
        removed = {}
        for group, order in zip(self.groups, self.order, strict=True):
            n_units = len(order)
            least_important = order[: steps * n_units // self.steps]
            removed[group] = torch.zeros(n_units, dtype=torch.bool)
            removed[group][least_important] = True
        return removed

    def rounded(self, steps: int) -> int:
        """Return the number of steps to remove after `floor` and `grain` have corrected how many remain."""
        remaining = self.steps - steps
        if steps and self.grain > 1:
            multiples = math.floor(remaining / self.grain + 0.5)
            remaining = max(multiples, 1) * self.grain
        remaining = max(remaining, self.floor)
        return self.steps - min(remaining, self.steps)


def make_cluster(
    groups: Sequence[Group],
    members: list[int],
    scores: Mapping[int, Tensor],
    min_channels: int,
    round_to: int,
) -> Cluster:
    """Rank the units of linked groups and divide them into steps.

    groups: all groups of the model.
    members: numbers of the linked groups.
    scores: {number of the group: [units]}.
    min_channels: channels that remain in each group.
    round_to: each group's remaining channels are a multiple of it.
    """
    steps = math.gcd(*(groups[i].units for i in members))
    order, step_scores = [], []
    floor, grain, channels = 1, 1, 0
    for i in members:
        group_channels = groups[i].units * groups[i].width
        step_channels = group_channels // steps
        relative = _relative(scores[i])
        ranked = relative.argsort(stable=True)
        order.append(ranked)
        units_by_step = relative[ranked].view(steps, -1)
        step_scores.append(units_by_step.mean(1))
        floor = max(floor, math.ceil(min_channels / step_channels))
        grain = math.lcm(grain, round_to // math.gcd(round_to, step_channels))
        channels += group_channels
    mean_scores = torch.stack(step_scores).mean(0)
    return Cluster(members, steps, mean_scores, order, channels // steps, min(floor, steps), grain)


def _relative(scores: Tensor) -> Tensor:
    """Divide scores by their mean size, to rank layers of differently large weights together."""
    mean_size = scores.abs().mean()
    return scores / mean_size if mean_size > 0 else scores


def global_steps(clusters: Sequence[Cluster], ratio: float) -> list[int]:
    """Return the number of steps that go of each cluster if all steps are ranked together by score.

    Steps are removed from the lowest score upwards, up to the fraction `ratio` of all channels.
    """
    removable = [cluster.scores[: max(cluster.steps - cluster.floor, 0)] for cluster in clusters]
    lengths = [len(scores) for scores in removable]
    scores = torch.cat(removable)
    order = _spread_order(lengths)
    all_channels = sum(cluster.channels * cluster.steps for cluster in clusters)
    target = count_to_prune(all_channels, ratio)

    channels_of_cluster = torch.tensor([cluster.channels for cluster in clusters])
    channels = channels_of_cluster.repeat_interleave(torch.tensor(lengths))  # in each removable step
    by_score = scores[order].argsort(stable=True)
    removed_channels = channels[order][by_score].cumsum(0)
    n_steps = int((removed_channels <= target).sum())

    lowest = torch.zeros_like(scores, dtype=torch.bool)
    lowest[order] = lowest_k(scores[order], n_steps)
    return [int(part.sum()) for part in lowest.split(lengths)]


def _spread_order(lengths: Sequence[int]) -> Tensor:
    """Return an order of concatenated lists in which they are interleaved evenly.

    Of equal scores the first in the order goes first, to spread ties over the clusters.
    """
    positions = [(torch.arange(n) + 0.5) / max(n, 1) for n in lengths]
    return torch.cat(positions).argsort(stable=True)
