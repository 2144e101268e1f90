"""Prune some channels, train, prune more: structured pruning that follows a schedule of `schedules`.

The schedule names the fraction of the dense model's channels that is gone after each round. What is left after the
last round is described by one plan, as if it had been cut from the dense model at once.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from labkit.errors import InputError
from labkit.files import replacing
from labkit.pruning import channels, checkpoints, surgery
from labkit.pruning.channels import Plan, Pruned
from labkit.pruning.schedules import Round, checked_schedule, digest, tuned_


@dataclass(frozen=True, eq=False)
class Iterated:
    """The model after the last round, and the rounds in order. pruned.report is the last round's check."""

    pruned: Pruned
    history: tuple[Round, ...]


def iterative(
    model: nn.Module,
    args: Any,
    schedule: Sequence[float],
    fine_tune: Callable[[nn.Module, int], float | None],
    *,
    kwargs: Mapping[str, Any] | None = None,
    criterion: str = "l1",
    scope: str = "global",
    min_channels: int = 1,
    round_to: int = 1,
    ignore: str | Iterable[str] = (),
    batches: Iterable | None = None,
    loss_fn: Callable | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Iterated:
    """Removes schedule[0] of the channels of `model` and trains what is left, then on to schedule[1], and so on.

    schedule: fractions of the dense model's prunable channels that do not fall, such as cubic(0.5, 4); every round
        scores the trained model anew. A round reaches its fraction as closely as units, round_to and min_channels let.
    fine_tune(model, round): trains the model in place and returns a number to keep, or None. It makes its own
        optimizer; torch's generators are seeded from (seed, round) for it and are as before afterwards.
    folder: where each round's end is kept, so that the same call goes on after an interruption.
    Other arguments are those of `channels.plan`. Every cut is checked as in `channels.prune`.
    """
    schedule = checked_schedule(schedule)
    options = dict(criterion=criterion, scope=scope, min_channels=min_channels, round_to=round_to, ignore=ignore)
    identity = {"schedule": list(schedule), "seed": seed, "model": digest(model.state_dict()), **_plain(options)}
    current, history, total = _resume(model, folder, identity)
    for number in range(len(history), len(schedule)):
        dense = model if current is None else current.model
        planner = channels.Planner(dense, args, kwargs, batches=batches, loss_fn=loss_fn, seed=seed, **options)
        total = total or planner.channels
        gone = history[-1].reached * total if history else 0.0
        ratio = min(max(schedule[number] * total - gone, 0.0) / planner.channels, 1.0)
        step = channels.apply(dense, planner.plan(ratio), args, kwargs)
        plan = step.plan if current is None else _after(model, current.plan, step.plan)
        metric = tuned_(step.model, fine_tune, number, seed)
        current = Pruned(step.model, plan, step.report)
        reached = sum(row.removed * row.width for row in plan.units) / total
        history = (*history, Round(schedule[number], reached, metric))
        if folder is not None:
            _save(current, history, total, Path(folder), identity)
    return Iterated(current, history)


def _after(model: nn.Module, first: Plan, second: Plan) -> Plan:
    """The plan that does at once what `first` and then `second` do."""
    kept = {name: dict(dims) for name, dims in first.kept.items()}
    for name, dims in second.kept.items():
        for dim, indices in dims.items():
            before = kept.setdefault(name, {})
            before[dim] = before[dim][indices] if dim in before else indices
    attributes = {name: dict(values) for name, values in first.attributes.items()}
    for name, values in second.attributes.items():
        attributes.setdefault(name, {}).update(values)
    names = {row.name: row for row in second.units}
    units = tuple(
        replace(row, removed=row.units - names[row.name].left) if row.name in names else row for row in first.units
    )
    return Plan(
        kept=kept,
        attributes=attributes,
        units=units,
        unprunable=first.unprunable,
        parameters=(first.parameters[0], second.parameters[1]),
        macs=(first.macs[0], second.macs[1]),
        bytes=(first.bytes[0], surgery.parameters(model, kept)[1]),
    )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    ignore = options["ignore"]
    return {**options, "ignore": [ignore] if isinstance(ignore, str) else list(ignore)}


def _save(current: Pruned, history: tuple[Round, ...], total: int, folder: Path, identity: dict) -> None:
    """The round's model in a folder of its own, then the list of rounds, which names the rounds that are whole."""
    checkpoints.save(current, folder / f"round{len(history)}")
    content = {"identity": identity, "total": total, "rounds": [asdict(entry) for entry in history]}
    with replacing(folder / "rounds.json") as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def _resume(
    model: nn.Module, folder: str | Path | None, identity: dict
) -> tuple[Pruned | None, tuple[Round, ...], int]:
    path = None if folder is None else Path(folder) / "rounds.json"
    if path is None or not path.exists():
        return None, (), 0
    saved = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name, value in identity.items() if saved["identity"].get(name) != value]:
        raise InputError(
            f"{path} is of a run with another {', '.join(other)}: give the same arguments to go on with it, or another "
            "folder."
        )
    history = tuple(Round(**entry) for entry in saved["rounds"])
    return checkpoints.load(model, path.parent / f"round{len(history)}"), history, saved["total"]
