"""A lesson's session: `start` settles the process, and the `Lab` lists all steps of a page.

A page predicts a number, measures, compares both with what people claim, and finishes with a record on the disk:

>>> import tempfile, labkit
>>> folder = tempfile.mkdtemp()
>>> lab = labkit.start("00", preset="class", device="cpu", results_dir=folder)  # doctest: +ELLIPSIS
Lesson 00: Measuring honestly
...
>>> lab.predict("step", 3, "ms", question="How long is a step?")
predicted  step: 3 ms
>>> lab.record("step", 0.0015, "s", ci95=(0.001, 0.002))
>>> lab.say("step", "A step takes half of the predicted time.")
A step takes half of the predicted time.
>>> record = lab.finish()  # doctest: +ELLIPSIS
Lesson 00 finished: ...
>>> record.named("step").value
0.0015

A session measures nothing itself (labkit.bench does), and installs or downloads nothing. At preset smoke, whose sizes
only try the code, nothing is said of results: sentences, captions and alt texts are left out, and no prediction, claim
or plan is judged. `Lab._judges` is the gate. A timing at smoke is short, and leaves the caches as they are.
"""

import gc
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from html import escape
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from labkit import show
from labkit.errors import InputError
from labkit.lesson import records, reference_runs
from labkit.lesson.exercises import Exercises
from labkit.lesson.parameters import PRESETS, SEEDS, SMOKE, ranges, require_allowed
from labkit.lesson.records import Column, RecordedValue, Role, RunRecord
from labkit.lesson.results import Results, check_name, single_value
from labkit.lesson.timings import Timings
from labkit.show import Rows
from labkit.timing import machine, thread_race
from labkit.timing.bench import Comparison, Measurement, compare, measure
from labkit.timing.clocks import check_budget
from labkit.timing.thread_race import ThreadRace

if TYPE_CHECKING:  # a session imports them when a page first needs them: lesson 00 counts no work
    from labkit.lesson import challenge
    from labkit.lesson.claim_tests import ClaimTests
    from labkit.lesson.experiments import Experiment
    from labkit.lesson.roofs import Roofs
    from labkit.timing.race import Race
    from labkit.timing.work import Work

_Timing = TypeVar("_Timing")  # a Measurement, a Comparison, a Race, or the fields of a recorded number

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


class Budget(NamedTuple):
    """The limits of a lesson at a preset: seconds of running cells, bytes of memory (None: no limit)."""

    seconds: float
    memory: float | None


SMOKE_S = 0.05  # of a timing at smoke, at most, with hot caches: to empty a server's caches takes as long
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

    torch computes on all cores, or on one thread if a race shows that other programs keep the cores busy.

    float32 is computed in full ("ieee"). By torch's default a GPU's convolutions would round to TF32, ten bits of
    mantissa, and no share of the float32 roof would mean anything.

    lesson: number of the lesson, "00" to "13".
    preset: "smoke", "class" or "full"; LABKIT_PRESET wins if set.
    device: "cpu", "cuda", "cuda:N" or "auto": LABKIT_DEVICE if set, else CUDA if torch has CUDA. A lesson that times
        the CPU alone states "cpu" for its DEVICE, takes no other, and means the CPU by "auto".
    results_dir: folder of the results; the record goes to results_dir/<lesson>/record.json.
    parameters: the lesson's own parameters for the record, each within the range that the lesson states.
    Raises InputError for any other argument, before a change.
    """
    if lesson not in LESSONS:
        raise InputError(f'There is no lesson {lesson!r}; give one of "00" to "13", as text with two digits.')
    preset = _checked_preset(preset)
    allowed_by_name = ranges(lesson)
    if "DEVICE" in allowed_by_name:
        require_allowed("DEVICE", device, allowed_by_name["DEVICE"])
        if device == "auto":
            device = allowed_by_name["DEVICE"][0]
    torch_device = machine.torch_device(device)
    require_allowed("SEED", seed, SEEDS)
    folder = _checked_folder(results_dir)
    parameters = parameters or {}
    for name, allowed in allowed_by_name.items():
        if name in parameters:
            require_allowed(name, parameters[name], allowed)
    parameters = records.plain({"SEED": seed, **parameters})

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    race = _race_of_threads()
    torch.set_num_threads(race.threads)
    _compute_fp32_in_full()
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device.index or 0)
        torch.cuda.reset_peak_memory_stats()
    show.style()
    gc.collect()
    gc.freeze()  # what the imports made stays anyway: to search it before each measurement takes a quarter of a second
    lab = Lab(lesson, preset, torch_device, seed, folder / lesson / "record.json", parameters)
    _show_card(lab, race)
    return lab


def _race_of_threads() -> ThreadRace:
    """Race one thread against all; a number that the user has set stays."""
    if os.environ.get("OMP_NUM_THREADS"):
        return ThreadRace(torch.get_num_threads(), 1.0)
    return thread_race.race(machine.threads())


class Lab:
    """A session of a lesson. Each method is a step of a page; a result stands beside the prediction of the same name.

    Running a cell again replaces the results of the cell, and finish() may be called again: the record is written anew.
    """

    def __init__(
        self, lesson: str, preset: str, device: torch.device, seed: int, path: Path, parameters: dict[str, Any]
    ) -> None:
        self.lesson = lesson
        self.title = LESSONS[lesson]
        self.preset = preset
        self.budget = BUDGETS[preset]
        self.device = device
        self.machine = machine.fingerprint(device)
        self.seed = seed
        self._path = path
        self._parameters = parameters
        self._stopwatch = records.Stopwatch()
        self._judges = preset != "smoke"  # the gate: False keeps all words about results away
        self._results = Results(self._judges)
        self._timings = Timings()
        self._exercises = Exercises()
        self._sentences: dict[str, list[str]] = {}
        self._challenges: dict[str, records.Challenge] = {}

    def by_preset(self, smoke: Any, class_: Any, full: Any) -> Any:
        """Return the argument of the session's preset. A preset changes sizes, never the steps."""
        return {"smoke": smoke, "class": class_, "full": full}[self.preset]

    # numbers ------------------------------------------------------------------------------------------------------

    def predict(self, name: str, value: float | EllipsisType, unit: str = "", question: str = "") -> None:
        """Commit to a number before `name` is measured; afterwards the first prediction stands.

        name: name of the quantity, as later in `record`, `measure` or `compare`.
        value: a number in `unit`, or `...`, which asks the question without a prediction to record and score.
        question: text shown with the request for a number; `name` if empty.
        """
        check_name(name)
        is_measured = name in self._results.by_name
        self._results.predictions.predict(name, value, unit, question, is_measured=is_measured)

    def measure(self, name: str, fn: Callable[[], Any], **options: Any) -> Measurement:
        """Time `fn()` with labkit.bench.measure, and record and show the median in seconds.

        options: arguments of labkit.bench.measure; `device` is the session's unless given.
        """
        check_name(name)
        timing = measure(fn, name=name, **self._timing_options(options))
        timing = self._over_processes(name, timing)
        self._results.add_measurement(name, timing)
        self._timings.show_measurement(name, timing)
        return timing

    def compare(
        self,
        name: str,
        baseline: Callable[[], Any] | str,
        candidate: Callable[[], Any] | str,
        *,
        processes: int | None = None,
        work: "tuple[Work, Work] | None" = None,
        dtype: str | tuple[str, str] = "fp32",
        **options: Any,
    ) -> Comparison:
        """Time two functions in pairs with labkit.bench.compare, and record and show the speed-up.

        processes: number of fresh processes, five or more, whose range is the interval. Both sides are then factories
            that can be imported (labkit.timing.processes). Without it the interval holds within this run.
        work: work of a call of the baseline and of the candidate (labkit.roofline.count): adds each
            side's share of the roof to all that is shown and recorded.
        dtype: the type whose compute ceiling counts, for both sides or for each.
        options: arguments of labkit.bench.compare; `device` is the session's unless given.
        """
        check_name(name)
        dtypes = (dtype, dtype) if isinstance(dtype, str) else tuple(dtype)
        if work is not None:
            _check_pair("work", work)
        _check_pair("dtype", dtypes)
        options = self._timing_options(options)
        if processes is None:
            comparison = self._over_processes(name, compare(baseline, candidate, **options))
        else:
            from labkit.timing.processes import compare_in_processes

            comparison = compare_in_processes(baseline, candidate, processes=processes, **options)
        if work is not None:
            comparison = self._roofs.place(comparison, work, dtypes)
        self._add_comparison(name, comparison)
        return comparison

    def race(
        self,
        name: str,
        calls: dict[str, Callable[[], Any]],
        **options: Any,
    ) -> "Race":
        """Time several functions in turns with labkit.bench.race, and record and show each speed-up over the first.

        calls: {name of the call: function}; each comparison is recorded as "<name of the call>, <name>".
        options: arguments of labkit.bench.race; `device` is the session's unless given.
        """
        from labkit.timing.race import race

        for call in calls:
            check_name(f"{call}, {name}")
        result = race(calls, **self._timing_options(options))
        result = self._over_processes(name, result)
        baseline, *candidates = calls
        for candidate in candidates:
            self._add_comparison(f"{candidate}, {name}", result.over(baseline, candidate))
        return result

    def ceilings(self, device: str | torch.device | None = None, *, again: bool = False) -> machine.Ceilings:
        """Return the roofs of a device at torch's number of threads, measured and recorded when first asked for.

        device: a torch device, by default the session's.
        again: True to measure once more, and keep the higher of each roof: a neighbour's load only lowers a roof.
        """
        return self._roofs.of(device or self.device, again=again)

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
        device: str | torch.device | None = None,
    ) -> None:
        """Record a number, a text, or rows (a list of dicts), with the meaning; silently.

        unit, ci95 (low, high), role and clock belong to a single value and mean the same as for a column
        (labkit.records.Column): "quality" if more is better, "cost" if less is.
        by: the columns that tell rows apart; rows that differ only in "seed" are repetitions.
        columns: the meaning of the rest, as in {"accuracy": quality("%"), "ms": cost("ms", clock=True)}.
        simulated: True for a computed value or table, False for a measured.
        device: device whose work was timed, such as "cpu"; None for the session's. The result is filed under the
            machine of this device.
        Raises InputError for a value of a wrong type, a missing column, a name that is no device's, and two rows alike
        in all columns of `by`.
        """
        check_name(name)
        device = _device_name(device)
        if isinstance(value, list | tuple):
            self._results.add_table(records.table(name, value, by, columns, simulated=simulated, device=device))
            return
        plain = single_value(name, value)
        if by or columns:
            raise InputError(f"{name!r} is a single value, and by and columns are about rows; give role and clock.")
        fields = dict(
            kind="value", name=name, value=plain, unit=unit, ci95=ci95, role=role, clock=clock, simulated=simulated,
            device=device,
        )  # fmt: skip
        self._results.add_value(**(self._over_processes(name, fields) if clock else fields))

    def result(self, name: str) -> RecordedValue:
        """Return a recorded number: `value` with interval `ci95`, and `covers`, a text on what the interval covers.

        In the last process of a recording a number made by a clock is the median over the processes, and `ci95` their
        range. So record what is derived from this process's times, such as a share of the roof, and show the result.
        Raises InputError, naming all numbers, for an unknown name and for a table.
        """
        return self._results.number(name)

    # words --------------------------------------------------------------------------------------------------------

    @contextmanager
    def fold(self, title: str) -> Iterator[None]:
        """Collect all timings of the block, and show a folded table at the end instead of a line each.

        After an exception the timings collected by then are shown.
        """
        with self._timings.fold(title):
            yield

    def say(self, name: str, *sentences: str | bool | None, any_preset: bool = False) -> None:
        """Show and record the message of a figure or a table: one to three sentences, computed from the result.

        name: name of the result; a second call for the same name replaces the recorded sentences.
        sentences: the sentences to show; falsy values are left out, so a branch is `ratio > 1.5 and f"..."`. A sentence
            with an undefined or infinite number is left out too.
        any_preset: True if the sentences are the same at every preset, and are said at smoke too.
        Raises InputError if no sentence is left, and for a sentence that is no text.
        """
        check_name(name)
        texts = [sentence for sentence in sentences if sentence]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"Nothing is said about {name!r} by {sentences!r}; give a sentence for each way it can come out."
            )
        if not (self._judges or any_preset):
            return
        self._sentences[name] = texts = show.defined(texts)
        rule = "border-left:3px solid #8888;padding:2px 0 2px 12px;margin:6px 0"
        paragraph = escape(" ".join(texts))
        show.emit("\n".join(texts), f'<p style="{rule}">{paragraph}</p>')

    # claims, exercises, challenges --------------------------------------------------------------------------------

    def claim(
        self,
        id: str,
        value: float | None = None,
        ci95: Sequence[float] | None = None,
        *,
        trained: Mapping[str, float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Put a claim of claims.toml to the test, silently; `claims` shows the verdict.

        value: our number in the claim's unit; None if the quantity is not measurable here.
        ci95: the value's 95 % interval, (low, high).
        trained: the training behind the value, needed if the claim has a recipe: {"steps": 600, "seeds": 5}.
        device: device whose work was timed (`Measurement.device`), such as "cpu"; None for the session's.
        A CPU's number settles no claim about a GPU, nor a GPU's number a claim about a CPU: the value is dropped.
        Raises InputError for an unknown id, a value that is no number, an interval that does not hold the value, and
        a missing `trained`.
        """
        self._claim_tests.test(id, value, ci95, trained, _device_name(device))

    def claims(self, *ids: str) -> None:
        """Show up to five tested claims in a folded box: the verdict, why people say so, when people are right.

        Raises InputError for zero or more than five ids, for an untested claim, and for an entry without `why` or
        `right_when`.
        """
        self._claim_tests.show_folded(ids)

    def check(self, id: str, fn: Callable, **context: Any) -> None:
        """Check an exercise's answer, show every failure, and record the outcome.

        id: number of the exercise: "01.2".
        fn: the learner's function; a stub and an exception inside are failures of the answer, never raised.
        context: further arguments of the exercise's check.
        Raises InputError for an unknown id and for an `fn` that cannot be called.
        """
        self._exercises.check(id, fn, **context)

    def answer(self, id: str, fn: Callable) -> Callable:
        """Return the function for the rest of the lesson: the learner's `fn` if passed, else the worked answer.

        An unchecked function is checked first. Without a worked answer `fn` itself is used. If `fn` changes settings of
        the process (`settings`), they are put back after each call.
        """
        return self._exercises.answer(id, fn)

    def judging(self, takes: str) -> AbstractContextManager[None]:
        """Return a context for the learner's plan: an exception is told in a line, with what a plan is (`takes`)."""
        from labkit.lesson import challenge

        return challenge.judging(takes)

    def challenge(
        self,
        name: str,
        goal: str,
        point: Mapping[str, Any] | None,
        *,
        goals: "challenge.Goals",
        references: Rows,
        label: str = "recipe",
    ) -> None:
        """Show and record the learner's plan on the plane of a goal, beside reference points.

        goal: the goal in a sentence.
        point: the numbers of the plan, {column: number}; None without a plan, and for a plan that failed (`judging`).
        goals: {column: (least, most, unit)} for two columns, x then y of the plane; a bound of None is open.
        references: dicts with the two columns, and with `label`, a point's name. "<column> ci95" may hold the (low,
            high) of an interval.
        Raises InputError for goals or points without numbers for two columns.
        """
        from labkit.lesson import challenge

        check_name(name)
        record, points, state = challenge.judge(name, goal, point, goals=goals, references=references, label=label)
        if not self._judges:
            record, state = record.model_copy(update={"point": None, "reached": None}), SMOKE
        self._challenges[name] = record  # before the figure, which may fail
        challenge.show_plane(record, goals, points, label, state)

    # figures, tables, other machines ------------------------------------------------------------------------------

    def show(self, fig: Any, *, alt: str, table: Rows, caption: str = "", simulated: bool = False) -> None:
        """Show a matplotlib figure as labkit.show.figure does, at smoke without a word about the results."""
        instead = "" if self._judges else SMOKE
        show.figure(fig, alt=alt, table=table, caption=caption, simulated=simulated, instead=instead)

    def table(self, rows: Rows, *, caption: str = "", simulated: bool = False, any_preset: bool = False) -> None:
        """Show rows as labkit.show.table does, at smoke without the caption.

        any_preset: True if the caption is the same at every preset, and is shown at smoke too.
        """
        show.table(rows, caption=caption if self._judges or any_preset else "", simulated=simulated)

    def recorded(self, name: str) -> "Experiment":
        """Show and return a long experiment (labkit.lesson.experiments); InputError for an unknown name."""
        from labkit.lesson import experiments

        return experiments.shown(name)

    def reference_runs(self, name: str) -> list[dict[str, Any]]:
        """Return the results called `name` of the lesson's reference runs: a dict for each machine.

        Keys: machine, device, preset, the fields of the result, created, and spread (labkit.records.Spread over
        processes; None for a text or a table).
        """
        return reference_runs.results(self.lesson, name)

    def beside(self, name: str) -> None:
        """Show the run's number beside the recorded numbers, at smoke the recorded alone.

        Each number stands with the machine that it was timed on; a device without any number is "not recorded yet".

        Raises InputError if the run has no number called `name`.
        """
        from labkit.lesson.by_device import timed_on

        value = self._results.number(name)
        kind = torch.device(timed_on(value) or self.device).type
        label = self.machine.to_dict()["devices"][kind]["label"]
        this_run = value.model_dump() | {"machine": label, "device": kind, "preset": self.preset}
        rows = reference_runs.beside(this_run, self.reference_runs(name))
        if not self._judges:
            del rows[0]  # of this run
        self.table(rows, caption=name, simulated=value.simulated, any_preset=True)

    # the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> RunRecord:
        """Write the record to results_dir/<lesson>/record.json, embed it in the notebook, and show a summary."""
        from labkit.lesson.summary import summary

        record = self._to_record()
        records.write(record, self._path)
        text, html = summary(record)
        show.emit(text, html, data={records.MIME: record.to_dict()})
        return record

    @cached_property
    def _claim_tests(self) -> "ClaimTests":
        from labkit.lesson.claim_tests import ClaimTests

        return ClaimTests(self.lesson, self.device.type, self._judges)

    @cached_property
    def _roofs(self) -> "Roofs":
        from labkit.lesson.roofs import Roofs

        return Roofs(self._results, budget_s=self.by_preset(0.1, 6.0, 10.0))

    def _timing_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a timing with the session's device; at smoke hot caches and SMOKE_S seconds at most."""
        options = {"device": self.device, **options}
        if self.preset == "smoke":
            budget_s = options.get("budget_s", SMOKE_S)
            check_budget(budget_s)
            options["budget_s"] = min(budget_s, SMOKE_S)
            if options.get("cache") == "cold":
                options["cache"] = "hot"
        return options

    def _over_processes(self, name: str, timing: _Timing) -> _Timing:
        """Return a timing with median and range over processes in a recording's last process; unchanged in others."""
        if records.OTHERS not in os.environ:
            return timing
        from labkit.lesson.other_processes import over_processes

        return over_processes(name, timing)

    def _add_comparison(self, name: str, comparison: Comparison) -> None:
        self._results.add_comparison(name, comparison)
        self._timings.show_comparison(name, comparison)

    def _to_record(self) -> RunRecord:
        from labkit.lesson.memory import peak_memory
        from labkit.lesson.origin import origin

        seconds, peak_bytes = self._stopwatch.seconds, peak_memory()
        peak_device_memory = None
        if self.device.type == "cuda":
            peak_device_memory = self._roofs.peak_device_memory()
        memory_is_within = self.budget.memory is None or peak_bytes <= self.budget.memory
        is_within = seconds <= self.budget.seconds and memory_is_within
        return RunRecord(
            version=records.VERSION,
            lesson=self.lesson,
            title=self.title,
            preset=self.preset,
            device=str(self.device),
            parameters=self._parameters,
            machine=records.plain(self.machine.to_dict()),
            measurements=list(self._results.by_name.values()),
            predictions=list(self._results.predictions),
            claims=self._claim_tests.settled,
            checks=self._exercises.outcomes,
            sentences=self._sentences,
            challenges=list(self._challenges.values()),
            seconds=round(seconds, 3),
            peak_memory=peak_bytes,
            peak_device_memory=peak_device_memory,
            budget={**self.budget._asdict(), "within": is_within},
            **origin(),
        )


def _device_name(device: str | torch.device | None) -> str | None:
    """Return the name of a device; InputError for a name that torch does not know."""
    try:
        return None if device is None else str(torch.device(device))
    except RuntimeError as error:
        raise InputError(f'device is {device!r}; give "cpu", "cuda:0" or the device of a measurement.') from error


def _compute_fp32_in_full() -> None:
    """Turn TF32 off, in products and in convolutions.

    By the older of torch's two settings: after the newer, `fp32_precision`, torch's own `cudnn.flags` raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 prefers the newer setting
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


def _show_card(lab: Lab, race: ThreadRace) -> None:
    """Show the session's machine, software, preset and budget, and how long the reference runs took."""
    here = lab.machine
    threads = f"{race.threads}"
    if race.threads < race.several:
        threads += f", because {race.several} take {race.multiple:.1f} times as long beside another program"
    budget = f"{lab.budget.seconds} s"
    if lab.budget.memory:
        budget += f", {show.quantity(lab.budget.memory, 'B')}"
    preset = lab.preset if lab.preset != "smoke" else f"smoke ({SMOKE})"
    facts = {
        "device": f"{lab.device}: {here.label}",
        "threads": f"{threads}; float32 products at precision '{here.float32_matmul_precision}'",
        "software": f"Python {here.python}, torch {here.torch}",
        "preset": f"{preset}, within {budget}; seed {lab.seed}",
        "an earlier run": reference_runs.duration(lab.lesson) or "none recorded",
    }
    show.facts(f"Lesson {lab.lesson}: {lab.title}", facts)


def _check_pair(argument: str, pair: Any) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{argument} is {pair!r}; give two, that of the baseline and of the candidate.")


def _checked_preset(preset: str) -> str:
    """Return LABKIT_PRESET if set, else `preset`; InputError for an unknown preset."""
    override = os.environ.get("LABKIT_PRESET")
    if override:
        return require_allowed("LABKIT_PRESET", override, PRESETS)
    return require_allowed("PRESET", preset, PRESETS)


def _checked_folder(results_dir: str | os.PathLike) -> Path:
    """Return `results_dir` as a path; InputError unless the path is or can become a folder that we may write to."""
    if not isinstance(results_dir, str | os.PathLike):
        raise InputError(f"RESULTS_DIR cannot be {results_dir!r}; give the name of a folder, as text.")
    folder = Path(results_dir)
    nearest = folder
    if not folder.exists():
        nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"Results cannot be written to {folder}; give a results_dir that is a folder you may write to."
        )
    return folder
