"""A model through steps of compression, their order a parameter: after each, quality, bytes, latency and its price.

Whether gains multiply is a question for measurement: what one step has saved, such as overhead, the next cannot save
again. So each row is measured against the same two things: the model's own answers, and the model in eager torch.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True)
class Step:
    """apply(model) -> a new model; or the engine in which all that follows is run; or both.

    trains: the new model has the old one's shapes and other values, which took a while: they are kept in the folder.
    """

    name: str
    apply: Callable[[nn.Module], nn.Module] | None = None
    engine: str | None = None
    trains: bool = False


@dataclass(frozen=True)
class Stage:
    """The model after `steps`, in `engine`. speedups: over the first model in eager torch, by the label of the input,
    (ratio, low, high). seconds: what the last step took, once; in an engine with export and loading. error: why it went
    no further; the rest is then empty.
    """

    steps: tuple[str, ...]
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
    """By order, a row for the model as it is and one after each step; `model` stays as it was.

    What is not in the folder yet is timed in the end, all in the same rounds (labkit.bench.race): rows of one call can
    be compared although the machine's speed drifts.
    orders: by name, the steps in turn. examples: by label, inputs that latency is measured with. reference: of `model`,
    with batches of the size of the last example: what the rows' parity refers to. folder: rows and trained values, so
    that the same call goes on where it was interrupted; it belongs to one model and one meaning of the names. batches:
    to calibrate engines on. budget_s: of the timing, a row and an example. A step that raises a LabError ends the rows
    of its order, with its sentence.
    """
    for steps in orders.values():
        if twice := {step.name for step in steps if sum(step.name == other.name for other in steps) > 1}:
            raise InputError(
                f"Two steps are called {min(twice)}: give each its own name, which its results are kept by."
            )
    rows: dict[str, list[Stage]] = {order: [] for order in orders}
    stages: dict[tuple[str, ...], Stage] = {}
    untimed: dict[tuple[str, ...], dict[str, engines.Engine]] = {}
    for order, steps in orders.items():
        done, current, engine = (), model, "torch"
        for step in (Step("eager"), *steps):
            done, engine, start = (*done, step.name), step.engine or engine, time.perf_counter()
            try:
                current, seconds = _applied(current, step, _file(folder, done).with_suffix(".safetensors"))
                if done not in stages and _file(folder, done).exists():
                    stages[done] = _read(_file(folder, done))
                elif done not in stages:
                    seconds = time.perf_counter() - start if seconds is None else seconds
                    runs = {label: _prepared(engine, current, example, batches) for label, example in examples.items()}
                    *_, largest = runs.values()
                    seconds += 0 if engine == "torch" else largest.prepare_seconds + largest.load_seconds
                    stages[done] = Stage(done, engine, seconds, largest.bytes, reference.judge(largest))
                    untimed[done] = runs
            except LabError as error:
                rows[order].append(Stage(done, engine, time.perf_counter() - start, error=str(error)))
                break
            rows[order].append(stages[done])
    for label, example in examples.items():
        inputs = batching.inputs(model, example)
        calls = {done: partial(runs[label], **inputs) for done, runs in untimed.items() if len(done) > 1}
        if calls:
            eager = {(): partial(engines.prepare("torch", model, example), **inputs)}
            named = {">".join(done) or "eager": call for done, call in (eager | calls).items()}
            race = bench.race(named, budget_s=len(named) * budget_s)
            for done in calls:
                comparison = race.over("eager", ">".join(done))
                stages[done].speedups[label] = (comparison.speedup, *comparison.ci95)
    for done in untimed:
        with replacing(_file(folder, done)) as path:
            path.write_text(json.dumps(asdict(stages[done])), encoding="utf-8")
    return rows


def _file(folder: Path, done: tuple[str, ...]) -> Path:
    return folder / f"{hashlib.sha256('>'.join(done).encode()).hexdigest()[:16]}.json"


def _applied(model: nn.Module, step: Step, values: Path) -> tuple[nn.Module, float | None]:
    """The model after the step, and the seconds that training took, where it is from this run or another one."""
    if step.apply is None:
        return model, None
    if not step.trains:
        return step.apply(model), None
    if values.exists():
        model = copy.deepcopy(model)
        load_model(model, str(values))
        with safe_open(str(values), "pt") as file:
            return model, float(file.metadata()["seconds"])
    start = time.perf_counter()
    model = step.apply(model)
    seconds = time.perf_counter() - start
    with replacing(values) as path:
        save_model(model, str(path), metadata={"seconds": str(seconds)})
    return model, seconds


def _prepared(engine: str, model: nn.Module, example: Any, batches: Iterable | None) -> engines.Engine:
    if engine == "torch" and export.is_quantized(model):
        model = integer.convert(model)
    return engines.prepare(engine, model, example, batches=batches)


def _read(file: Path) -> Stage:
    row = json.loads(file.read_text(encoding="utf-8"))
    judged = {name: tuple(x) if isinstance(x, list) else x for name, x in row["parity"].items()}
    speedups = {label: tuple(x) for label, x in row["speedups"].items()}
    return Stage(**{**row, "steps": tuple(row["steps"]), "parity": Parity(**judged), "speedups": speedups})
