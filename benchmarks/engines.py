"""The same model in every engine of this CPU: parity first, then latency, first-load time and bytes.

    python benchmarks/engines.py                                  all three models, batch 1, 8 and 32, one thread
    python benchmarks/engines.py --models lite0 --batches 1 --engines onnxruntime openvino --budget 2

An engine whose answers are not the model's (see GATES) is named and not timed. Ratios are of time an image or a text,
with intervals of interleaved pairs (labkit.bench.compare): over eager at the same batch, and over the fastest eager
configuration of float32 at any batch, the choice of somebody without the engine. n*: calls after which preparing and
loading have paid for themselves, against eager at the same batch. int8 is `benchmarks/int8_models.py`, but for the rows
"int8": weights and activations from `ptq.quantize` for ONNX Runtime and OpenVINO.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from int8_models import Inputs, cut, tokens
from torch import Tensor, nn

from labkit import bench, datasets, machine, models
from labkit.deploy import engines, parity
from labkit.deploy.engines import Engine
from labkit.errors import EqualityError
from labkit.quantization import fold, ptq

EAGER = ("torch", "torch-channels-last")
FLOAT = (
    *EAGER, "torch-compile", "torch-compile-unfrozen", "aotinductor", "aotinductor-unfrozen", "executorch",
    "onnxruntime-unoptimized", "onnxruntime", "openvino",
)  # fmt: skip
BF16 = ("torch-bf16", "torch-compile-bf16", "openvino-bf16")
INT8 = {"onnxruntime int8": "onnxruntime", "openvino int8": "openvino", "openvino int8 + bf16": "openvino-bf16"}
# decibels that a correct engine reaches: float32 sums in another order; 8 bits of mantissa; 8 bits in all
GATES = {**dict.fromkeys(FLOAT, 80.0), **dict.fromkeys(BF16, 25.0), **dict.fromkeys(INT8, 15.0)}


class Case(NamedTuple):
    """A model with data. inputs: of the test, with `labels` [N] or None; calibration: other inputs, as batches."""

    model: nn.Module
    inputs: Inputs
    labels: Tensor | None
    calibration: list[Inputs]

    def example(self, batch: int) -> Inputs:
        """Return the first `batch` inputs of the test."""
        return {name: x[:batch] for name, x in self.inputs.items()}


def resnet20() -> Case:
    test = datasets.fashion_mnist("test", 2000)
    train = datasets.fashion_mnist("train", 512)
    calibration = [{"x": x} for x in train.images.split(64)]
    return Case(models.resnet20(), {"x": test.images}, test.labels, calibration)


def minilm() -> Case:
    inputs, labels = tokens("test", 48, 800)
    calibration = cut(tokens("train", 48, 160)[0], 16)
    return Case(models.minilm_finetuned(), inputs, labels, calibration)


def lite0() -> Case:
    photos = models.imagenet_input(datasets.photo_crops(24, seed=2))
    calibration = models.imagenet_input(datasets.photo_crops(12, seed=1))
    return Case(models.efficientnet_lite0(), {"x": photos}, None, [{"x": x} for x in calibration.split(8)])


MODELS: dict[str, Callable[[], Case]] = {"resnet20": resnet20, "minilm": minilm, "lite0": lite0}


def simulated(case: Case) -> nn.Module:
    model = case.model
    if "input_ids" in case.inputs:
        model = fold.smooth(model, case.calibration)
    return ptq.quantize(model, case.calibration).model


def prepared(case: Case, quantized: nn.Module | None, row: str, example: Inputs) -> Engine:
    if row not in INT8:
        return engines.prepare(row, case.model, example)
    return engines.prepare(INT8[row], quantized, example, batches=case.calibration)


def reference(case: Case, batch: int) -> parity.Reference:
    """Ask the eager model the test inputs in batches of this size."""
    tensors = case.inputs if case.labels is None else {**case.inputs, "labels": case.labels}
    batches: list[Any] = cut(tensors, batch)
    if case.labels is not None and "x" in case.inputs:
        batches = [(part["x"], part["labels"]) for part in batches]
    return parity.Reference(case.model, batches)


# --- eager ------------------------------------------------------------------------------------------------------------


class Eager(NamedTuple):
    """Eager engines by (row, batch), and the (row, batch) that is fastest for an example: `seconds` each."""

    engines: dict[tuple[str, int], Engine]
    best: tuple[str, int]
    seconds: float


def eager(case: Case, batches: Sequence[int], budget_s: float) -> Eager:
    """Prepare and time all eager configurations. budget_s: for a configuration."""
    runs = {}
    seconds = {}
    for row in EAGER:
        for batch in batches:
            example = case.example(batch)
            runs[row, batch] = prepared(case, None, row, example)
    for (row, batch), engine in runs.items():
        call = partial(engine, **case.example(batch))
        seconds[row, batch] = bench.measure(call, budget_s=budget_s).median_s / batch
    best = min(seconds, key=seconds.get)
    return Eager(runs, best, seconds[best])


# --- a row of the table -----------------------------------------------------------------------------------------------


def ratio(baseline: Engine, engine: Engine, inputs: tuple[Inputs, Inputs], budget: float) -> bench.Comparison:
    calls = [partial(side, **x) for side, x in zip((baseline, engine), inputs, strict=True)]
    return bench.compare(*calls, names=("eager", "engine"), budget_s=budget)


def text(comparison: bench.Comparison, per_item: float = 1.0) -> str:
    value, low, high = (per_item * x for x in (comparison.speedup, *comparison.ci95))
    return f"{value:5.2f} [{low:5.2f}, {high:5.2f}]"


def break_even(engine: Engine, comparison: bench.Comparison) -> float:
    """Return the number of calls after which preparing and loading have paid for themselves."""
    saved = comparison.baseline.median_s - comparison.candidate.median_s
    if saved <= 0:
        return math.inf
    return (engine.prepare_seconds + engine.load_seconds) / saved


def described(judged: parity.Parity) -> str:
    share, low, _ = judged.agreement
    line = f"{judged.sqnr_db:6.1f} dB, agree {share:.4f} [{low:.4f}]"
    if judged.change is not None:
        return line + " {:+.2f} [{:+.2f}, {:+.2f}] points".format(*judged.change)
    if judged.sure_agreement:
        line += f", {judged.sure_agreement[0]:.3f} of {judged.sure} sure ones"
    return line


def compared(
    case: Case, engine: Engine, row: str, batch: int, fastest: Eager, judged: parity.Parity, budget: float
) -> dict[str, Any]:
    """Time an engine against eager torch, print the row, and return its record."""
    example = case.example(batch)
    best_row, best_batch = fastest.best
    same = ratio(fastest.engines["torch", batch], engine, (example, example), budget)
    fair = ratio(fastest.engines[fastest.best], engine, (case.example(best_batch), example), budget)
    after = break_even(engine, same)
    cells = [
        text(same),
        text(fair, batch / best_batch),
        f"{engine.prepare_seconds:5.1f}, {engine.load_seconds:5.2f} s",
        f"{engine.bytes / 1e6:6.2f}",
        f"{after:8.0f}",
        described(judged),
    ]
    print(f"  {row:23} {' | '.join(cells)}", flush=True)
    return {
        "batch": batch,
        "engine": row,
        "bytes": engine.bytes,
        "break_even_calls": after,
        "prepare_s": engine.prepare_seconds,
        "load_s": engine.load_seconds,
        "parity": asdict(judged),
        "over_eager": same.to_dict(),
        "over_best_eager": fair.to_dict(),
        "best_eager": (best_row, best_batch),
    }


def table(case: Case, rows: Sequence[str], batches: Sequence[int], budget: float) -> list[dict[str, Any]]:
    """Print the rows of a model at each batch, and return their records."""
    states = engines.available()
    quantized = simulated(case) if any(row in INT8 for row in rows) else None
    fastest = eager(case, batches, budget / 3)
    for stage, operators in engines.graphs(case.model, case.example(batches[0])).items():
        most = ", ".join(f"{count} {kind}" for kind, count in operators.most_common(6))
        print(f"{stage}: {operators.total()} operators, of them {most}")
    best_row, best_batch = fastest.best
    milliseconds = 1e3 * fastest.seconds
    print(f"the fastest eager is {best_row} at batch {best_batch}, {milliseconds:.2f} ms an example")
    records = []
    for batch in batches:
        answers = reference(case, batch)
        print(f"batch {batch}: over eager at this batch | over the fastest eager | prepare, load | MB | n* | parity")
        for row in rows:
            state = states[INT8.get(row, row)]
            if state != "ready":
                print(f"  {row:23} {state}")
                continue
            engine = prepared(case, quantized, row, case.example(batch))
            try:
                judged = answers.judge(engine).require(db=GATES[row])
            except EqualityError as error:
                print(f"  {row:23} not timed: {error}", flush=True)
                continue
            records.append(compared(case, engine, row, batch, fastest, judged, budget))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine.fingerprint('cpu').label}, {options.threads} threads")
    rows = [row for row in GATES if row in options.engines and row not in EAGER]
    records: list[dict[str, Any]] = []
    for name in options.models:
        print(f"\n{name}:")
        for record in table(MODELS[name](), rows, options.batches, options.budget):
            records.append({"model": name, **record})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
