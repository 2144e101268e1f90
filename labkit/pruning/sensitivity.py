"""How much each group of channels matters to a metric: groups pruned one at a time, by really removing channels.

The scan of Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.2. Zeroing a convolution's weights is not
the same: biases and BatchNorm shifts would go on speaking. The baseline is the model as it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.errors import InputError
from labkit.files import replacing
from labkit.pruning import channels
from labkit.pruning.select import fraction


@dataclass(frozen=True)
class Row:
    """One group without `removed` of its units, all others whole, and what `evaluate` said."""

    group: str
    ratio: float
    removed: int
    units: int
    metric: float


@dataclass(frozen=True)
class Sensitivity:
    """baseline: the metric of the unpruned model. rows: by group, then by ratio."""

    baseline: float
    rows: tuple[Row, ...]

    def drop(self, group: str, ratio: float) -> float:
        """baseline - metric: what removing `ratio` of the group costs, for a metric of which more is better."""
        for row in self.rows:
            if (row.group, row.ratio) == (group, ratio):
                return self.baseline - row.metric
        raise InputError(f"The scan has no {group!r} at {ratio}: choose a group and a ratio of its rows.")

    def allocation(self, tolerance: float) -> dict[str, float]:
        """{group: the largest scanned ratio up to which every drop is within `tolerance`}, to be `ratio` in prune."""
        found: dict[str, float] = {}
        for group in dict.fromkeys(row.group for row in self.rows):
            found[group] = 0.0
            for row in sorted((row for row in self.rows if row.group == group), key=lambda row: row.ratio):
                if self.baseline - row.metric > tolerance:
                    break
                found[group] = row.ratio
        return found


def scan(
    model: nn.Module,
    args: Any,
    evaluate: Callable[[nn.Module], float],
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    kwargs: Mapping[str, Any] | None = None,
    groups: Iterable[str] | None = None,
    criterion: str = "l1",
    batches: Iterable | None = None,
    loss_fn: Callable | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Evaluates the model with each of `groups` (names; None: all) pruned by each of `ratios`, one at a time.

    evaluate(model) -> float: the metric, on the same data each time; it gets a pruned copy in the mode of `model`.
    Linked groups are pruned together. criterion, batches, loss_fn, seed: see `channels.plan`.
    folder: where each value is kept, so that the same call goes on after an interruption. progress: show a bar.
    """
    ratios = sorted({fraction(ratio, "a ratio") for ratio in ratios})
    if not ratios:
        raise InputError("ratios is empty: give at least one fraction of channels to remove.")
    planner = channels.Planner(
        model, args, kwargs, criterion=criterion, scope="layer", batches=batches, loss_fn=loss_fn, seed=seed
    )
    known = planner.names()
    wanted = known if groups is None else list(groups)
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"There is no prunable group {unknown[0]!r}: use names such as {', '.join(known[:3])}.")
    identity = {"model": _digest(model.state_dict()), "criterion": criterion, "seed": seed}
    path = None if folder is None else Path(folder) / "sensitivity.json"
    values = _resume(path, identity)
    work = [("", 0.0), *((name, ratio) for name in wanted for ratio in ratios)]
    rows = []
    for name, ratio in tqdm(work, desc="sensitivity", disable=not progress):
        plan = planner.plan({name: ratio} if name else 0.0)
        key = f"{name}@{ratio!r}"
        if key not in values:
            pruned = channels.apply(model, plan, args, kwargs, check=False)
            values[key] = float(evaluate(pruned.model))
            if path is not None:
                with replacing(path) as partial:
                    partial.write_text(json.dumps({"identity": identity, "values": values}), encoding="utf-8")
        if name:
            row = next(row for row in plan.units if row.name == name)
            rows.append(Row(name, ratio, row.removed, row.units, values[key]))
    return Sensitivity(values["@0.0"], tuple(rows))


def _resume(path: Path | None, identity: dict) -> dict[str, float]:
    if path is None or not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["identity"] != identity:
        raise InputError(f"{path} is of a scan of another model, criterion or seed: give another folder.")
    return dict(saved["values"])


def _digest(state: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values: equal for equal states."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
