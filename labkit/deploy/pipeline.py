"""A model through steps of compression in any order: after each step quality, bytes, latency and the step's cost.

Measurement decides if gains multiply: a step cannot save overhead that an earlier step has saved already. So every
row is measured against the same two references: the model's own answers, and the model in eager torch.
"""

import copy
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from labkit.deploy import engines, export
from labkit.deploy.parity import Parity, Reference
from labkit.errors import InputError, LabError
from labkit.files import replacing
from labkit.modules import batches as batching
from labkit.quantization import integer
from labkit.timing import bench, stats

Done = tuple[str, ...]  # names of the steps so far


@dataclass(frozen=True)
class Step:
    """A step of compression: a change of the model, or the engine in which all further rows are run, or both.

    apply: model -> a new model.
    engine: a name of `engines.available()`.
    trains: the new model has the old shapes and trained values; training takes a while, so the values are kept in the
        folder.
    """

    name: str
    apply: Callable[[nn.Module], nn.Module] | None = None
    engine: str | None = None
    trains: bool = False


@dataclass(frozen=True)
class Stage:
    """A row: the model after `steps`, in `engine`.

    seconds: time of the last step, once; in an engine with export and loading.
    bytes: size of the deployed file.
    parity: comparison of the answers with the first model's; the first row, that model itself, has a change of accuracy
        of exactly 0.
    speedups: (ratio, low, high) over the first model in eager torch, by the label of the input.
    error: reason why the order ends here; bytes, parity and speedups are then empty.
    """

    steps: Done
    engine: str
    seconds: float
    bytes: int = 0
    parity: Parity | None = None
    speedups: dict[str, stats.Estimate] = field(default_factory=dict)
    error: str = ""


def execute(
    model: nn.Module,
    orders: Mapping[str, Sequence[Step]],
    examples: Mapping[str, Any],
    reference: Reference,
    *,
    folder: Path,
    batches: Iterable | None = None,
    budget_s: float = 2.0,
) -> dict[str, list[Stage]]:
    """Run each order of steps: by order, a row for the model as it is and a row after each step.

    model: the float model, unchanged afterwards.
    orders: the steps in turn, by name of the order.
    examples: inputs for the measurement of latency, by label.
    reference: answers of `model` to batches of the size of the last example, which judge the rows' answers.
    folder: keeps rows and trained values, so the same call goes on after an interruption; a folder belongs to one model
        and one meaning of the steps' names.
    batches: calibration data for engines.
    budget_s: seconds of timing for a row and an example.
    Rows that are not in the folder yet are timed at the end, all in the same rounds (labkit.bench.race): rows of one
    call are comparable although the machine's speed drifts. A step that raises a LabError ends its order, with the
    error's sentence.
    """
    for steps in orders.values():
        _check_names(steps)
    pipelines = _Pipelines(model, examples, reference, batches, _Store(folder))
    rows = {order: pipelines.rows(steps) for order, steps in orders.items()}
    pipelines.time(budget_s)
    return rows


def _check_names(steps: Sequence[Step]) -> None:
    counts = Counter(step.name for step in steps)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise InputError(
            f"Two steps are called {min(repeated)}: give each its own name, which its results are kept by."
        )


class _Pipelines:
    """Several orders of steps on a model; orders with equal beginnings share stages.

    stages: all stages so far.
    untimed: the engines of each stage that the store lacks, by the label of the example.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Mapping[str, Any],
        reference: Reference,
        batches: Iterable | None,
        store: "_Store",
    ) -> None:
        self.model = model
        self.examples = examples
        self.reference = reference
        self.batches = batches
        self.store = store
        self.stages: dict[Done, Stage] = {}
        self.untimed: dict[Done, dict[str, engines.Engine]] = {}

    def rows(self, steps: Sequence[Step]) -> list[Stage]:
        """Apply the steps in turn, and return a stage for the model as it is and after each step."""
        rows = []
        done: Done = ()
        current, engine = self.model, "torch"
        for step in (Step("eager"), *steps):
            done = (*done, step.name)
            engine = step.engine or engine
            start = time.perf_counter()
            try:
                current, training_s = self._apply(current, step, done)
                seconds = time.perf_counter() - start if training_s is None else training_s
                rows.append(self._stage(done, engine, current, seconds))
            except LabError as error:
                rows.append(Stage(done, engine, time.perf_counter() - start, error=str(error)))
                break
        return rows

    def _apply(self, model: nn.Module, step: Step, done: Done) -> tuple[nn.Module, float | None]:
        """Return the model after the step, and the seconds of training, now or in an earlier call, if it trains."""
        if step.apply is None:
            return model, None
        if not step.trains:
            return step.apply(model), None
        trained = self.store.trained(done, model)
        if trained is not None:
            return trained
        start = time.perf_counter()
        model = step.apply(model)
        seconds = time.perf_counter() - start
        self.store.keep_trained(done, model, seconds)
        return model, seconds

    def _stage(self, done: Done, engine: str, model: nn.Module, seconds: float) -> Stage:
        """Return the stage after the steps `done`, from an earlier order, from the store, or prepared and judged."""
        if done in self.stages:
            return self.stages[done]
        stage = self.store.read(done)
        if stage is None:
            runs = {label: self._prepared(engine, model, example) for label, example in self.examples.items()}
            *_, largest = runs.values()
            if engine != "torch":
                seconds += largest.prepare_seconds + largest.load_seconds
            stage = Stage(done, engine, seconds, largest.bytes, self._judged(done, largest))
            self.untimed[done] = runs
        self.stages[done] = stage
        return stage

    def _judged(self, done: Done, engine: engines.Engine) -> Parity:
        parity = self.reference.judge(engine)
        is_model_itself = len(done) == 1 and not export.is_quantized(self.model)
        if is_model_itself and parity.change is not None:
            return replace(parity, change=(0.0, 0.0, 0.0))  # known, not estimated from examples
        return parity

    def _prepared(self, engine: str, model: nn.Module, example: Any) -> engines.Engine:
        if engine == "torch" and export.is_quantized(model):
            model = integer.convert(model)
        return engines.prepare(engine, model, example, batches=self.batches)

    def time(self, budget_s: float) -> None:
        """Time the untimed stages against eager torch, and store them.

        budget_s: seconds for a stage and an example.
        """
        for label, example in self.examples.items():
            self._time_example(label, example, budget_s)
        for done in self.untimed:
            self.store.keep(self.stages[done])

    def _time_example(self, label: str, example: Any, budget_s: float) -> None:
        inputs = batching.inputs(self.model, example)
        after_steps = {done: runs[label] for done, runs in self.untimed.items() if len(done) > 1}
        if not after_steps:
            return
        eager = engines.prepare("torch", self.model, example)
        calls = {"eager": partial(eager, **inputs)}
        for done, engine in after_steps.items():
            calls[_name(done)] = partial(engine, **inputs)
        race = bench.race(calls, budget_s=len(calls) * budget_s)
        for done in after_steps:
            comparison = race.over("eager", _name(done))
            self.stages[done].speedups[label] = (comparison.speedup, *comparison.ci95)


def _name(done: Done) -> str:
    return ">".join(done)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the lists of a JSON object into tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class _Store:
    """Folder that keeps a JSON file for each stage, and a safetensors file for the values of each trained model.

    A file is named by the steps' names. The results of lessons are kept by course/run, in folders with a notebook and a
    digest of the code; a stage has neither, so the two share `files.replacing` only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, done: Done) -> Stage | None:
        """Return the stage after the steps `done`, or None if it is not stored."""
        file = self._file(done, ".json")
        if not file.exists():
            return None
        row = json.loads(file.read_text(encoding="utf-8"))
        row["steps"] = tuple(row["steps"])
        row["parity"] = Parity(**_with_tuples(row["parity"]))
        row["speedups"] = _with_tuples(row["speedups"])
        return Stage(**row)

    def keep(self, stage: Stage) -> None:
        with replacing(self._file(stage.steps, ".json")) as path:
            path.write_text(json.dumps(asdict(stage)), encoding="utf-8")

    def trained(self, done: Done, model: nn.Module) -> tuple[nn.Module, float] | None:
        """Return a copy of `model` with the trained values, and the seconds of training; None if not stored."""
        file = self._file(done, ".safetensors")
        if not file.exists():
            return None
        model = copy.deepcopy(model)
        load_model(model, str(file))
        with safe_open(str(file), "pt") as opened:
            return model, float(opened.metadata()["seconds"])

    def keep_trained(self, done: Done, model: nn.Module, seconds: float) -> None:
        with replacing(self._file(done, ".safetensors")) as path:
            save_model(model, str(path), metadata={"seconds": str(seconds)})

    def _file(self, done: Done, suffix: str) -> Path:
        digest = hashlib.sha256(_name(done).encode()).hexdigest()
        return self.folder / f"{digest[:16]}{suffix}"
