"""A lesson's session: start() settles seeds, threads, device, preset; the Lab collects what is predicted and measured.

Predict first, then measure, then compare both with what was claimed; finish() writes it all down as one record. It
measures nothing itself (labkit.bench does), grades no exercise (`check` does) and installs or downloads nothing.
"""

import gc
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from labkit import show
from labkit.errors import InputError
from labkit.lesson import challenge, claims, records, settings, worked
from labkit.lesson import check as checks
from labkit.lesson.parameters import PRESETS, SEEDS, ranges, require_allowed
from labkit.lesson.records import Column, RecordedTable, RecordedValue, Role, RunRecord
from labkit.timing import machine, roofline
from labkit.timing.bench import Comparison, Measurement, Race, compare, measure, race
from labkit.timing.work import Work

LESSONS = {
    "00": "Measuring honestly",
    "01": "The inference challenge",
    "02": "Unstructured pruning",
    "03": "Structured pruning of CNNs",
    "04": "Structured pruning of transformers",
    "05": "N:M sparsity",
    "06": "Quantization foundations",
    "07": "Post-training quantization",
    "08": "Quantization-aware training",
    "09": "LLM quantization",
    "10": "Knowledge distillation",
    "11": "Efficient attention and KV cache",
    "12": "Hardware-specific deployment",
    "13": "Case studies",
}
NOT_DONE = "not done yet"
YOURS = "your plan"


class Budget(NamedTuple):
    """What a lesson may take at a preset: seconds of running cells, bytes of memory (None: no limit)."""

    seconds: float
    memory: float | None


BUDGETS = {"smoke": Budget(90, 4e9), "class": Budget(600, None), "full": Budget(900, None)}


def start(
    lesson: str,
    *,
    preset: str = "class",
    device: str = "auto",
    seed: int = 0,
    results_dir: str | os.PathLike = "runs",
    parameters: Mapping[str, Any] | None = None,
) -> "Lab":
    """Begin a lesson: seed Python, numpy and torch, set the threads and the figures' style, show the machine's card.

    lesson      "00" to "13"
    preset      "smoke", "class" or "full"; LABKIT_PRESET, where set, wins
    device      "cpu", "cuda", "cuda:N", or "auto": LABKIT_DEVICE where set, else CUDA where torch has it
    results_dir the record goes to results_dir/<lesson>/record.json
    parameters  the lesson's own parameters, for the record, each within the range that the lesson states
    InputError for anything else, before anything is changed.
    """
    if lesson not in LESSONS:
        raise InputError(f'There is no lesson {lesson!r}; give one of "00" to "13", as text with two digits.')
    preset = _preset(preset)
    torch_device = machine.torch_device(device)
    require_allowed("SEED", seed, SEEDS)
    folder = _results_folder(results_dir)
    parameters = parameters or {}
    for name, allowed in ranges(lesson).items():
        if name in parameters:
            require_allowed(name, parameters[name], allowed)
    parameters = records.plain({"SEED": seed, **parameters})

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(machine.threads())
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device.index or 0)
        torch.cuda.reset_peak_memory_stats()
    show.style()
    gc.collect()
    gc.freeze()  # what the imports made stays anyway: to search it before each measurement takes a quarter of a second
    lab = Lab(lesson, preset, torch_device, seed, folder / lesson / "record.json", parameters)
    lab._show_card()
    return lab


class Lab:
    """One session of a lesson. What is measured under a name stands beside what was predicted under that name.

    Running a cell again replaces what it had recorded, and finish() may be called again: it writes the record anew.
    """

    def __init__(
        self, lesson: str, preset: str, device: torch.device, seed: int, path: Path, parameters: dict[str, Any]
    ) -> None:
        self.lesson, self.preset, self.device, self.seed = lesson, preset, device, seed
        self.title = LESSONS[lesson]
        self.budget = BUDGETS[preset]
        self.machine = machine.fingerprint(device)
        self._path, self._parameters = path, parameters
        self._stopwatch = records.Stopwatch()
        self._measurements: dict[str, RecordedValue | RecordedTable] = {}
        self._predictions: dict[str, records.Prediction] = {}
        self._claims: dict[str, records.SettledClaim] = {}
        self._checks: dict[str, records.CheckedExercise] = {}
        self._ceilings: dict[tuple[str, int], machine.Ceilings] = {}
        self._checked: dict[str, Callable] = {}  # exercise -> the function that its check last saw
        self._changed: dict[str, tuple[str, ...]] = {}  # exercise -> settings that this function changed
        self._worked: dict[str, Callable] = {}  # exercise -> the worked answer that the lesson goes on with
        self._sentences: dict[str, list[str]] = {}
        self._challenges: dict[str, records.Challenge] = {}
        self._folded: list[tuple[str, dict[str, Any]]] | None = None  # lines and rows, while a fold is open

    def by_preset(self, smoke: Any, class_: Any, full: Any) -> Any:
        """The value for this session's preset. A preset changes sizes, never what is done."""
        return {"smoke": smoke, "class": class_, "full": full}[self.preset]

    # before and after measuring ---------------------------------------------------------------------------------

    def predict(self, name: str, value: float | EllipsisType, unit: str = "", question: str = "") -> None:
        """Commit to a number before `name` is measured; afterwards the first prediction stands.

        value: a number in `unit`, or `...`, which only asks the question: no prediction is recorded, and none scored.
        """
        _check_name(name)
        number = None if value is ... else show.number(value)
        if value is not ... and (number is None or not math.isfinite(number)):
            raise InputError(f"The prediction {name!r} is {value!r}; give one number, your best guess will do.")
        if name in self._measurements and number is not None:
            first = self._predictions.get(name)
            stands = first and first.predicted is not None
            state = f"your prediction of {show.quantity(first.predicted, first.unit)} stands" if stands else "too late"
            show.emit(f"{name} has been measured already: {state}. Restart the kernel to predict afresh.")
            return
        if name not in self._measurements:
            self._predictions[name] = records.Prediction(
                name=name, question=question, unit=unit, predicted=number, measured=None
            )
        if number is not None:
            show.emit(f"predicted  {name}: {show.quantity(number, unit)}")
            return
        unit = "as a factor" if unit == "x" else unit
        asked = f"{question or name}{f' ({unit})' if unit not in {'', *show.BARE} else ''}"
        wanted_from_you = "no prediction yet: replace the ... by your number"
        show.emit(f"{asked}\n{wanted_from_you}", f"<p><b>{escape(asked)}</b><br><i>{escape(wanted_from_you)}</i></p>")

    def measure(self, name: str, fn: Callable[[], Any], **options: Any) -> Measurement:
        """Time `fn()` with labkit.bench.measure, on this session's device unless `device` says otherwise; record it."""
        _check_name(name)
        result = measure(fn, name=name, **{"device": self.device, **options})
        meaning = {"unit": "s", "role": "cost", "clock": True}
        outcome = {"value": result.median_s, "ci95": result.ci95_s, "detail": result.to_dict()}
        self._keep(kind="measurement", name=name, **meaning, **outcome)
        row = {"name": name, "time": show.quantity(result.median_s, "s"), "95 % interval": _between(result.ci95_s, "s")}
        self._show_timing(str(result), row, result, warnings=result.warnings)
        return result

    def compare(
        self,
        name: str,
        baseline: Callable[[], Any],
        candidate: Callable[[], Any],
        *,
        work: tuple[Work, Work] | None = None,
        dtype: str | tuple[str, str] = "fp32",
        **options: Any,
    ) -> Comparison:
        """Time both with labkit.bench.compare, on this session's device unless `device` says otherwise; record it.

        work    what a call of each side has to do (labkit.roofline.count): the share of the roof of both sides is
                shown and recorded, too. Where a side lies above a roof that its data cannot have left (compute, or the
                memory with cold caches), the roofs were measured in a bad moment: they are measured once more
        dtype   whose compute ceiling counts, one for both sides or one each
        """
        _check_name(name)
        types = (dtype, dtype) if isinstance(dtype, str) else tuple(dtype)
        for name_of, pair in (("work", work), ("dtype", types)):
            if pair is not None and (not isinstance(pair, tuple | list) or len(pair) != 2):
                raise InputError(f"{name_of} is {pair!r}; give two, that of the baseline and of the candidate.")
        result = compare(baseline, candidate, **{"device": self.device, **options})
        if work is not None:
            sides = (result.baseline, work[0], types[0]), (result.candidate, work[1], types[1])
            device = result.baseline.device
            placed = [roofline.placed(side, of, self.ceilings(device), dtype) for side, of, dtype in sides]
            if any(_above_a_low_roof(side) for side in placed):
                roofs = self.ceilings(device, again=True)
                placed = [roofline.placed(side, of, roofs, dtype) for side, of, dtype in sides]
            result = replace(result, baseline=placed[0], candidate=placed[1])
        self._keep_comparison(name, result)
        return result

    def race(
        self,
        name: str,
        calls: dict[str, Callable[[], Any]],
        *,
        also: dict[str, Callable[[], Any]] | None = None,
        **options: Any,
    ) -> Race:
        """Time all with labkit.bench.race, on this session's device unless `device` says otherwise.

        calls   the first is the baseline: each other one over it is shown and recorded as "<its name>, <name>"
        also    what takes its turns as well and is not recorded over the baseline, such as work of another size
        """
        for call in calls:
            _check_name(f"{call}, {name}")
        result = race(calls | (also or {}), **{"device": self.device, **options})
        baseline, *candidates = calls
        for candidate in candidates:
            self._keep_comparison(f"{candidate}, {name}", result.over(baseline, candidate))
        return result

    def _keep_comparison(self, name: str, result: Comparison) -> None:
        meaning = {"unit": "x", "role": "quality", "clock": True}
        outcome = {"value": result.speedup, "ci95": result.ci95, "verdict": result.verdict, "detail": result.to_dict()}
        self._keep(kind="comparison", name=name, **meaning, **outcome)
        sides = result.baseline, result.candidate
        row = {"name": name} | {
            side: f"{'' if timed.name == side else timed.name} {show.quantity(timed.median_s, 's')}".strip()
            for side, timed in zip(("baseline", "candidate"), sides, strict=True)
        }
        row |= {"ratio": show.quantity(result.speedup, "x"), "95 % interval": _between(result.ci95, "x")}
        row["verdict"] = result.verdict
        line = str(result) if self._folded is None else f"{name}: {result}"
        self._show_timing(line, row, *sides, warnings=result.all_warnings)

    def ceilings(self, device: str | torch.device | None = None, *, again: bool = False) -> machine.Ceilings:
        """The roofs of the session's device, or of another, measured when first asked for and then kept and recorded.

        They belong to the number of threads that torch has at the time.
        again   measure them once more, and keep the higher of each: a neighbour's load only lowers a roof
        """
        target = machine.torch_device(device or self.device)
        device = f"{target.type}:{target.index}" if target.index else target.type  # cuda is cuda:0
        key = device, torch.get_num_threads()
        if again or key not in self._ceilings:
            roofs = machine.ceilings(device, budget_s=self.by_preset(1.2, 6.0, 10.0))
            if key in self._ceilings:
                roofs = self._ceilings[key].raised(roofs)
            self._ceilings[key] = roofs
            rates = {name: ("FLOP/s", rate, roofs.flops_range.get(name)) for name, rate in roofs.flops.items()}
            rates["bandwidth"] = ("B/s", roofs.bandwidth, roofs.bandwidth_range)
            rows = [
                {"ceiling": ceiling, unit: rate, "low": ends and ends[0], "high": ends and ends[1]}
                for ceiling, (unit, rate, ends) in rates.items()
            ]
            columns = {unit: records.quality(unit, clock=True, low="low", high="high") for unit in ("FLOP/s", "B/s")}
            name = f"ceilings of {device}, {key[1]} thread{'s' * (key[1] > 1)}"
            self._measurements[name] = records.table(name, rows, ("ceiling",), columns)
        return self._ceilings[key]

    def record(
        self,
        name: str,
        value: Any,
        unit: str = "",
        *,
        ci95: Sequence[float] | None = None,
        role: Role = "result",
        clock: bool = False,
        by: Sequence[str] = (),
        columns: Mapping[str, Column] | None = None,
        simulated: bool = False,
    ) -> None:
        """Record a number or a text with its meaning, or rows (a list of dicts) with that of their columns; silently.

        unit, ci95 (low, high), role and clock belong to a single value and mean what they mean for a column
        (labkit.records.Column): "quality" if more is better, "cost" if less is.
        by          of rows: the columns that tell them apart; rows that differ only in "seed" are repetitions
        columns     of rows: what the others mean, as in {"accuracy": quality("%"), "ms": cost("ms", clock=True)}
        simulated   computed, not measured
        InputError for what is none of these, a column that is not there, and a `by` that does not tell rows apart.
        """
        _check_name(name)
        if isinstance(value, list | tuple):
            self._measurements[name] = records.table(name, value, by, columns, simulated=simulated)
            return
        number = value if isinstance(value, str | bool) else show.number(value)
        if number is None:
            kind = type(value).__name__
            raise InputError(f"{name!r} is a {kind}; record a number, a text or a list of dicts (one a row).")
        if by or columns:
            raise InputError(f"{name!r} is a single value, and by and columns are about rows; give role and clock.")
        meaning = {"unit": unit, "role": role, "clock": clock, "simulated": simulated}
        self._keep(kind="value", name=name, value=number, ci95=ci95, **meaning)

    @contextmanager
    def fold(self, title: str) -> Iterator[None]:
        """Collect what measure and compare would print inside, and show it at the end as one folded table.

        After an exception what there is by then is shown.
        """
        outer, self._folded = self._folded, []
        try:
            yield
        finally:
            collected, self._folded = self._folded, outer
            if collected:
                lines, rows = zip(*collected, strict=True)
                optional = [name for name in ("of the roof", "warnings") if any(row[name] for row in rows)]
                rows = [{name: row[name] for name in (*list(row)[:-2], *optional)} for row in rows]
                table = show.html_table(rows)
                show.emit("\n  ".join([title, *lines]), f"<details><summary>{escape(title)}</summary>{table}</details>")

    def say(self, name: str, *sentences: str | bool | None) -> None:
        """Show and record what a figure or a table says: one to three sentences, computed from the result.

        name        of the result; saying something about it again replaces what was recorded
        sentences   falsy ones are left out, so a branch is `ratio > 1.5 and f"..."`
        InputError where no sentence is left, or where one is no text.
        """
        _check_name(name)
        texts = [text for text in sentences if text]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"Nothing is said about {name!r} by {sentences!r}; give a sentence for each way it can come out."
            )
        self._sentences[name] = texts
        rule = "border-left:3px solid #8888;padding:2px 0 2px 12px;margin:6px 0"
        show.emit("\n".join(texts), f'<p style="{rule}">{escape(" ".join(texts))}</p>')

    def claim(
        self,
        id: str,
        value: float | None = None,
        ci95: Sequence[float] | None = None,
        *,
        trained: Mapping[str, float] | None = None,
    ) -> None:
        """Note what our value (None: not measurable here) says about a claim of claims.toml; `claims` shows it.

        ci95     (low, high) around the value
        trained  what it rests on, needed where the claim has a recipe: {"steps": 600, "seeds": 5}
        A claim about a GPU is not settled by a CPU's number, nor the other way round: such a value is not kept.
        InputError for an unknown id, a value that is no number, an interval that does not hold it, a missing `trained`.
        """
        claim, number = claims.entry(id), show.number(value)
        verdict = claims.verdict(claim, value if number is None else number, ci95, trained)
        kinds, _ = claims.SETTLED_BY.get(claim.needs, ({"cpu", "cuda"}, ""))
        if self.device.type not in kinds:
            verdict, number, ci95 = "not measurable here", None, None
        self._claims[id] = records.SettledClaim(
            id=id, value=number, ci95=ci95 and tuple(ci95), trained=trained and dict(trained), verdict=verdict
        )

    def claims(self, *ids: str) -> None:
        """Show up to five claims that were tested, in one folded box: verdict, why people say it, when they are right.

        Where ours settles nothing, the recorded run that does stands beside it. InputError for none or more than five,
        for one that `claim` has not had, and for one whose entry lacks why or right_when.
        """
        if not 1 <= len(ids) <= 5:
            raise InputError(f"lab.claims shows one to five claims, not {len(ids)}; choose those that teach most.")
        tested = []
        for id in ids:
            claim, ours = claims.entry(id), self._claims.get(id)
            if ours is None:
                raise InputError(f"Claim {id} has not been tested; call lab.claim({id!r}, value) in a cell above.")
            if not (claim.why and claim.right_when):
                raise InputError(f"Claim {id} has no why and right_when in claims.toml; add both, a sentence each.")
            elsewhere = self._settled_elsewhere(claim) if ours.verdict == "not settled here" else ""
            tested.append((claim, ours.verdict, claims.measured(claim, ours.value, ours.ci95), elsewhere))
        show.emit(*claims.folded(tested))

    def check(self, id: str, fn: Callable, **context: Any) -> None:
        """Check an exercise's answer and show all that is wrong with it. It is recorded and never raised.

        A stub, a wrong answer and an exception inside the learner's function are all failures; InputError is for an
        unknown id and for something that is no function.
        """
        if fn is self._worked.get(id):
            show.emit(f"exercise {id}: this is the worked answer; run the cell with yours, then this one.")
            return
        checked, requirements = self._examine(id, fn, **context)
        if checked.passed:
            put_back = f" It changed {', '.join(names)}: put back." if (names := self._changed[id]) else ""
            show.emit(f"exercise {id}: passed, {requirements} requirements met.{put_back}")
        elif checked.failures == [NOT_DONE]:
            show.emit(f"exercise {id}: {NOT_DONE}. Replace the `raise NotImplementedError` line with your answer.")
        else:
            count = f"{len(checked.failures)} thing{'s' * (len(checked.failures) > 1)} to look at"
            listed = "".join(f"<li>{escape(failure)}</li>" for failure in checked.failures)
            show.emit(
                "\n  - ".join([f"exercise {id}: {count}", *checked.failures]),
                f"<b>Exercise {escape(id)}: {count}</b><ul>{listed}</ul>",
            )

    def answer(self, id: str, fn: Callable) -> Callable:
        """The function that the lesson goes on with: the learner's `fn` if it passed its check, else the worked one.

        A function that no check has seen is checked first. Where there is no worked answer `fn` is used as it is. After
        each call of a function that changed settings of the process (`settings`) they are put back.
        """
        if fn is self._worked.get(id):
            return self._use(id, fn, "worked", "the worked answer is used from here on")
        if self._checked.get(id) is not fn:
            self._examine(id, fn)
        name = getattr(fn, "__name__", "answer")
        if self._checks[id].passed:
            guarded = settings.putting_back(fn) if self._changed[id] else fn
            return self._use(id, guarded, "learner", f"your {name} is used from here on")
        answer = worked.answer(id, fn)
        if answer is None:
            return self._use(id, fn, None, f"your {name} has not passed yet, and no worked answer is here to stand in")
        self._worked[id] = answer
        return self._use(
            id, answer, "worked", f"your {name} has not passed yet; the worked answer is used from here on"
        )

    def challenge(
        self,
        name: str,
        goal: str,
        point: Mapping[str, Any] | None,
        *,
        goals: challenge.Goals,
        references: show.Rows,
        label: str = "recipe",
    ) -> None:
        """Place the learner's plan on the plane of a goal, beside reference points; shown and recorded.

        goal        what is asked for, in a sentence
        point       what the plan reaches, {column: number}, or None while there is none
        goals       {column: (least, most, unit)}, None where a side is open; two columns, x then y of the plane
        references  dicts with both columns, and with `label`, their name. Under "<column> ci95" a point may have the
                    (low, high) of an interval.
        InputError for goals or points that are none of this.
        """
        import matplotlib.pyplot as plt

        _check_name(name)
        points = [
            {label: str(row.get(label)), **challenge.checked(goals, row)} for row in show.checked_rows(references)
        ]
        reached, state = None, "no plan yet"
        if point is not None:
            point = challenge.checked(goals, point)
            missed = challenge.missed(goals, point)
            reached, state = not missed, "; ".join(["not reached yet", *missed]) if missed else "reached"
            points.append({label: YOURS, **point})
        self._challenges[name] = records.Challenge(
            name=name, goal=goal, point=point, goals=dict(goals), reached=reached
        )
        fig, ax = plt.subplots()
        challenge.plane(ax, goals, points, label, YOURS)
        x, y = goals
        alt = (
            f"{y} against {x}, points: {len(points)}; shaded is the goal, {challenge.asked(goals)}. Your plan: {state}."
        )
        show.figure(fig, alt=alt, table=challenge.rows(goals, points, label), caption=goal)
        show.emit(f"challenge {name}: {state}.")

    # showing ----------------------------------------------------------------------------------------------------

    table = staticmethod(show.table)
    show = staticmethod(show.figure)

    def recorded(self, name: str) -> list[dict[str, Any]]:
        """What reference runs of this lesson hold under `name`: one dict a machine, with machine, device and preset.

        created and spread (labkit.records.Spread; None for what is no number) say when, and how processes differed.
        """
        return [
            {"machine": run.machine["label"], "device": run.device, "preset": run.preset, **entry.model_dump()}
            | {"created": run.created, "spread": run.spread(name)}
            for run in records.recorded(self.lesson)
            if (entry := run.named(name))
        ]

    def beside(self, name: str) -> None:
        """Show this run's number beside the recorded ones; device kinds without a record say "not recorded yet".

        An interval within a run says how well that run knew its number; only several processes say how runs differ.
        """
        value = self._measurements.get(name)
        if not isinstance(value, RecordedValue):
            names = [key for key, entry in self._measurements.items() if isinstance(entry, RecordedValue)]
            raise InputError(
                f"There is no number called {name!r} to show; measured so far: {', '.join(names) or 'nothing'}."
            )
        here = {"machine": self.machine.label, "device": self.device.type, "preset": self.preset}
        runs = [here | value.model_dump(), *self.recorded(name)]
        rows = []
        for run in runs:
            spread, number, ends, meaning = run.get("spread"), run["value"], run["ci95"], "95 % interval within the run"
            if spread is not None and spread.processes > 1:
                number, *ends = spread[:3]
                meaning = f"median, smallest to largest of {spread.processes} processes"
            elif spread is not None:
                meaning += ", 1 process"
            rows.append(
                {
                    "run": f"recorded {_date(run['created'])}" if "created" in run else "this run",
                    "machine": run["machine"],
                    "preset": run["preset"],
                    "value": show.quantity(number, run["unit"]),
                    "range": show.interval(ends, run["unit"]),
                    "kind of range": meaning if ends is not None else "1 process",
                }
            )
        for kind, words in (("cpu", "a CPU"), ("cuda", "a GPU")):
            if all(torch.device(run["device"]).type != kind for run in runs):
                rows.append(dict.fromkeys(rows[0], "") | {"machine": words, "value": "not recorded yet"})
        self.table(rows, caption=name, simulated=value.simulated)

    def finish(self) -> RunRecord:
        """Write the record to results_dir/<lesson>/record.json, embed it in the notebook, show what came of it all."""
        seconds, peak = self._stopwatch.seconds, records.peak_memory()
        on_gpu = self.device.type == "cuda"
        within = seconds <= self.budget.seconds and (self.budget.memory is None or peak <= self.budget.memory)
        record = RunRecord(
            version=records.VERSION,
            lesson=self.lesson,
            title=self.title,
            preset=self.preset,
            device=str(self.device),
            parameters=self._parameters,
            machine=records.plain(self.machine.to_dict()),
            measurements=list(self._measurements.values()),
            predictions=list(self._predictions.values()),
            claims=list(self._claims.values()),
            checks=list(self._checks.values()),
            sentences=self._sentences,
            challenges=list(self._challenges.values()),
            seconds=round(seconds, 3),
            peak_memory=peak,
            peak_device_memory=torch.cuda.max_memory_allocated() if on_gpu else None,
            budget={**self.budget._asdict(), "within": within},
            **records.origin(),
        )
        records.write(record, self._path)
        text, html = records.summary(record)
        show.emit(text, html, data={records.MIME: record.to_dict()})
        return record

    # inside -----------------------------------------------------------------------------------------------------

    def _examine(self, id: str, fn: Callable, **context: Any) -> tuple[records.CheckedExercise, int]:
        """Check `fn` and note the outcome; with the number of requirements that were looked at."""
        try:
            result = checks.check(id, fn, **context)
            passed, failures, tried, changed = result.passed, list(result.failures), result.tried, result.changed
        except NotImplementedError:
            passed, failures, tried, changed = False, [NOT_DONE], 0, ()
        before = self._checks.get(id)
        self._checks[id] = records.CheckedExercise(
            id=id, passed=passed, failures=failures, used=before.used if before else None
        )
        self._checked[id], self._changed[id] = fn, changed
        return self._checks[id], tried

    def _show_timing(self, line: str, row: dict[str, Any], *sides: Measurement, warnings: Sequence[str]) -> None:
        """Print a timing, or add it to the open fold: its line, and its row with the sides' shares of the roof."""
        if self._folded is None:
            show.emit(line)
            return
        shares = [f"{100 * side.roof_share:.3g} %" for side in sides if side.roof_share is not None]
        self._folded.append((line, row | {"of the roof": " and ".join(shares), "warnings": "; ".join(warnings)}))

    def _use(self, id: str, fn: Callable, used: Literal["learner", "worked"] | None, sentence: str) -> Callable:
        self._checks[id].used = used
        show.emit(f"{id}: {sentence}.")
        return fn

    def _keep(self, **entry: Any) -> None:
        """Note a value and set it beside its prediction, in the prediction's unit; if those differ, keep nothing."""
        name, unit, ci95, role = (entry[field] for field in ("name", "unit", "ci95", "role"))
        if ci95 is not None and len(ci95) != 2:
            raise InputError(f"The interval of {name!r} is {ci95!r}; give (low, high).")
        if role not in get_args(Role):
            raise InputError(f"The role of {name!r} is {role!r}; choose one of {', '.join(get_args(Role))}.")
        value = RecordedValue(**records.plain(entry))
        if (guess := self._predictions.get(name)) and show.number(value.value) is not None:
            factor = show.factor(unit, guess.unit)
            if factor is None:
                raise InputError(
                    f"{name!r} was predicted in {guess.unit} and measured in {unit}; use one unit for both."
                )
            guess.measured = value.value * factor
            guess.ci95 = value.ci95 and tuple(end * factor for end in value.ci95)
        self._measurements[name] = value

    def _settled_elsewhere(self, claim: "claims.Claim") -> str:
        """What the reference runs say that settled it, in words; "" where none did."""
        return "; ".join(
            f"{claims.measured(claim, theirs.value, theirs.ci95)}, {theirs.verdict}, at {run.preset} on "
            f"{run.machine['label']}, {run.created[:10]}"
            for run in records.recorded(self.lesson)
            for theirs in run.claims
            if theirs.id == claim.id and "here" not in theirs.verdict
            if claims.is_current(claim, run.created, theirs.trained)
        )

    def _show_card(self) -> None:
        here, memory = self.machine, self.budget.memory
        budget = f"{self.budget.seconds} s" + (f", {show.quantity(memory, 'B')}" if memory else "")
        runs = [
            f"{run.seconds:.0f} s at {run.preset} on {run.machine['label']}, {run.created[:10]}"
            for run in records.recorded(self.lesson)
        ]
        facts = {
            "device": f"{self.device}: {here.label}",
            "threads": f"{here.threads}, float32 products at precision '{here.float32_matmul_precision}'",
            "software": f"Python {here.python}, torch {here.torch}",
            "preset": f"{self.preset}, within {budget}; seed {self.seed}",
            "recorded": "; ".join(runs) or "no earlier run",
        }
        show.facts(f"Lesson {self.lesson}: {self.title}", facts)


def _above_a_low_roof(side: Measurement) -> bool:
    """Whether a side is above its roof for no reason of its own; above the memory's, hot data may sit in a cache."""
    return (side.roof_share or 0.0) > 1 and (side.limited_by == "compute" or side.cache == "cold")


def _between(ci95: tuple[float, float], unit: str) -> str:
    return show.interval(ci95, unit) if all(map(math.isfinite, ci95)) else "too few samples"


def _date(created: str) -> str:
    """24 Nov 2026."""
    return datetime.fromisoformat(created).strftime("%d %b %Y").lstrip("0")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"The name is {name!r}; give what is measured as a short text, like 'decode speed'.")


def _preset(asked: str) -> str:
    override = os.environ.get("LABKIT_PRESET")
    return require_allowed("LABKIT_PRESET" if override else "PRESET", override or asked, PRESETS)


def _results_folder(results_dir: str | os.PathLike) -> Path:
    if not isinstance(results_dir, str | os.PathLike):
        raise InputError(f"RESULTS_DIR cannot be {results_dir!r}; give the name of a folder, as text.")
    folder = Path(results_dir)
    nearest = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"Results cannot be written to {folder}; give a results_dir that is a folder you may write to."
        )
    return folder
