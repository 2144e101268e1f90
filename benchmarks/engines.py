"""The same model in every engine of this CPU: parity first, then latency, first-load time and bytes.

    python benchmarks/engines.py                                  all three models, batch 1, 8 and 32, one thread
    python benchmarks/engines.py --models lite0 --batches 1 --engines onnxruntime openvino --budget 2

An engine whose answers are not the model's (see GATES) is named and not timed. Ratios are of time an image or a text,
with intervals of interleaved pairs (labkit.bench.compare): over eager at the same batch, and over the fastest eager
configuration of float32 at any batch, which is what somebody without the engine would use. n*: calls after which
preparing and loading have paid for themselves, against eager at the same batch. int8 is `benchmarks/int8_models.py`,
but for the rows "int8": weights and activations from `ptq.quantize` for ONNX Runtime and OpenVINO.
"""

import argparse
import json
import math
from collections.abc import Callable
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
    """inputs: those of the test, with `labels` [N] or None; calibration: a few others, as batches."""

    model: nn.Module
    inputs: Inputs
    labels: Tensor | None
    calibration: list[Inputs]


def resnet20() -> Case:
    test, train = datasets.fashion_mnist("test", 2000), datasets.fashion_mnist("train", 512)
    return Case(models.resnet20(), {"x": test.images}, test.labels, [{"x": x} for x in train.images.split(64)])


def minilm() -> Case:
    inputs, labels = tokens("test", 48, 800)
    calibration = cut(tokens("train", 48, 160)[0], 16)
    return Case(models.minilm_finetuned(), inputs, labels, calibration)


def lite0() -> Case:
    photos, others = (models.imagenet_input(datasets.photo_crops(n, seed=seed)) for n, seed in ((24, 2), (12, 1)))
    return Case(models.efficientnet_lite0(), {"x": photos}, None, [{"x": x} for x in others.split(8)])


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
    """Eager's answers to the test inputs in batches of this size."""
    tensors = case.inputs if case.labels is None else {**case.inputs, "labels": case.labels}
    batches: list[Any] = cut(tensors, batch)
    if case.labels is not None and "x" in case.inputs:
        batches = [(part["x"], part["labels"]) for part in batches]
    return parity.Reference(case.model, batches)


def ratio(baseline: Engine, engine: Engine, inputs: tuple[Inputs, Inputs], budget: float) -> bench.Comparison:
    calls = [partial(side, **x) for side, x in zip((baseline, engine), inputs, strict=True)]
    return bench.compare(*calls, names=("eager", "engine"), budget_s=budget)


def text(comparison: bench.Comparison, per_item: float = 1.0) -> str:
    low, high = comparison.ci95
    return f"{comparison.speedup * per_item:5.2f} [{low * per_item:5.2f}, {high * per_item:5.2f}]"


def break_even(engine: Engine, comparison: bench.Comparison) -> float:
    saved = comparison.baseline.median_s - comparison.candidate.median_s
    return (engine.prepare_seconds + engine.load_seconds) / saved if saved > 0 else math.inf


def described(good: parity.Parity) -> str:
    line = f"{good.sqnr_db:6.1f} dB, agree {good.agreement[0]:.4f} [{good.agreement[1]:.4f}]"
    if good.change is not None:
        return line + " {:+.2f} [{:+.2f}, {:+.2f}] points".format(*good.change)
    return line + (f", {good.sure_agreement[0]:.3f} of {good.sure} sure ones" if good.sure_agreement else "")


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
    states = engines.available()
    rows = [row for row in GATES if row in options.engines and row not in EAGER]
    records: list[dict[str, Any]] = []
    for name in options.models:
        case = MODELS[name]()
        quantized = simulated(case) if any(row in INT8 for row in rows) else None
        examples = {batch: {key: x[:batch] for key, x in case.inputs.items()} for batch in options.batches}
        eager = {(row, batch): prepared(case, None, row, examples[batch]) for row in EAGER for batch in options.batches}
        times = {
            (row, batch): bench.measure(partial(engine, **examples[batch]), budget_s=options.budget / 3).median_s
            / batch
            for (row, batch), engine in eager.items()
        }
        best = min(times, key=times.get)
        for stage, operators in engines.graphs(case.model, examples[options.batches[0]]).items():
            most = ", ".join(f"{count} {kind}" for kind, count in operators.most_common(6))
            print(f"{stage}: {operators.total()} operators, of them {most}")
        print(f"\n{name}: the fastest eager is {best[0]} at batch {best[1]}, {1e3 * times[best]:.2f} ms an example")
        for batch in options.batches:
            answers = reference(case, batch)
            print(
                f"batch {batch}: over eager at this batch | over the fastest eager | prepare, load | MB | n* | parity"
            )
            for row in rows:
                state = states[INT8.get(row, row)]
                if state != "ready":
                    print(f"  {row:23} {state}")
                    continue
                engine = prepared(case, quantized, row, examples[batch])
                try:
                    good = answers.judge(engine).require(db=GATES[row])
                except EqualityError as error:
                    print(f"  {row:23} not timed: {error}", flush=True)
                    continue
                same = ratio(eager["torch", batch], engine, (examples[batch],) * 2, options.budget)
                fair = ratio(eager[best], engine, (examples[best[1]], examples[batch]), options.budget)
                after = break_even(engine, same)
                print(
                    f"  {row:23} {text(same)} | {text(fair, batch / best[1])} | {engine.prepare_seconds:5.1f}, "
                    f"{engine.load_seconds:5.2f} s | {engine.bytes / 1e6:6.2f} | {after:8.0f} | {described(good)}",
                    flush=True,
                )
                records.append(
                    {"model": name, "batch": batch, "engine": row, "bytes": engine.bytes, "break_even_calls": after}
                    | {"prepare_s": engine.prepare_seconds, "load_s": engine.load_seconds, "parity": asdict(good)}
                    | {"over_eager": same.to_dict(), "over_best_eager": fair.to_dict(), "best_eager": best}
                )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
