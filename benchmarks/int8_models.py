"""Whole models in int8, in torch, ONNX Runtime and OpenVINO, each beside fp32 and bf16 in the same engine.

    python benchmarks/int8_models.py                              all three models, one thread
    python benchmarks/int8_models.py --models resnet20 --budget 1

What `ptq` simulated runs through `integer.convert` and through both engines; the engines' own quantization tools are
the peers. Times are interleaved pairs (labkit.bench.compare). Accuracy changes are paired with fp32 on the same test
examples; EfficientNet-lite0 has crops of four photos and no labels, so that its agreement speaks for these photos only.
Without OpenVINO and NNCF (./lab setup --with engines) their rows are left out.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labkit import bench, datasets, models
from labkit.deploy import engines, parity
from labkit.deploy.engines import Engine
from labkit.quantization import fold, integer, ptq

Inputs = dict[str, Tensor]
REST = 0.85  # alpha of what fold.smooth passes by: 28.3 dB on 800 validation snippets, 25.2 without


class Case(NamedTuple):
    """shapes: {label: (calibration batches of that shape, timed input)}, the last one also that of the test."""

    model: nn.Module
    simulated: nn.Module
    shapes: dict[str, tuple[list[Inputs], Inputs]]
    test: list[Inputs]
    labels: Tensor | None
    tools: dict[str, dict[str, Any]]  # by the start of the engine's name, options that its documents advise
    dynamic: bool = False  # whether int8 is also tried without calibration, in torch


def cut(tensors: Mapping[str, Tensor], size: int) -> list[Inputs]:
    """Full batches of `size`."""
    rows = zip(*(x.split(size) for x in tensors.values()), strict=True)
    return [dict(zip(tensors, row, strict=True)) for row in rows if len(row[0]) == size]


def shapes(sizes: Mapping[str, int], calibration: Mapping[str, Tensor]) -> dict[str, tuple[list[Inputs], Inputs]]:
    batches = {label: cut(calibration, size) for label, size in sizes.items()}
    return {label: (cuts, cuts[0]) for label, cuts in batches.items()}


def resnet20() -> Case:
    model, test = models.resnet20(), datasets.fashion_mnist("test")
    calibration = cut({"x": datasets.fashion_mnist("train", 512).images}, 64)
    simulated = ptq.quantize(model, calibration).model
    table = shapes({"batch 1": 1, "batch 64": 64}, {"x": datasets.fashion_mnist("train", 512).images})
    return Case(model, simulated, table, cut({"x": test.images}, 64), test.labels, {})


def smoothed(model: nn.Module, batches: list[Inputs]) -> nn.Module:
    """SmoothQuant for every Linear of the encoder: those fed by GELU or attention divide their input as well.

    Here maxima count padding, as the ranges of `ptq.quantize` do: over valid tokens alone, padding would set the ranges
    (20.1 dB).
    """
    model = fold.smooth(model, batches, alpha=0.5)
    layers = {name: x for name, x in model.named_modules() if name.endswith("output.dense")}
    largest = dict.fromkeys(layers, torch.zeros(()))
    for name, layer in layers.items():

        def hook(_, args, name=name) -> None:
            largest[name] = torch.maximum(largest[name], args[0].abs().amax((0, 1)))

        layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        for name, layer in layers.items():
            layer._forward_pre_hooks.clear()
            divisor = largest[name].clamp(min=1e-5) ** REST / layer.weight.abs().amax(0).clamp(min=1e-5) ** (1 - REST)
            layer.weight.mul_(divisor)
            model.set_submodule(name, fold.Smoothed(layer, divisor))
    return model


def tokens(split: str, length: int, n: int | None = None) -> tuple[Inputs, Tensor]:
    """MiniLM's inputs for n movie-review snippets (None: all), [n, length] each, and their labels [n]."""
    data, options = datasets.reviews(split, n), {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    encoded = models.tokenizer("minilm")(data.texts, max_length=length, **options)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}, data.labels


def minilm() -> Case:
    model = models.minilm_finetuned()
    calibration = cut(tokens("train", 48, 320)[0], 16)
    simulated = ptq.quantize(smoothed(model, calibration), calibration).model
    table = {"1 x 32": (cut(tokens("train", 32, 320)[0], 1), cut(tokens("train", 32, 320)[0], 1)[0])}
    table["16 x 48"] = (calibration, calibration[0])
    test, labels = tokens("test", 48)
    products = {"op_types_to_quantize": ["MatMul", "Gemm"]}  # with all operators 1 dB: the mask's -3e38 is in the range
    tools = {"nncf": {"model_type": "transformer"}, "onnxruntime-s": products}
    return Case(model, simulated, table, cut(test, 16), labels, tools, dynamic=True)


def efficientnet_lite0() -> Case:
    model = models.efficientnet_lite0()
    calibration = {"x": models.imagenet_input(datasets.photo_crops(16, seed=1))}
    test = {"x": models.imagenet_input(datasets.photo_crops(26, seed=2))}
    simulated = ptq.quantize(model, cut(calibration, 8)).model
    tools = {"nncf": {"preset": "mixed", "fast_bias_correction": False}}
    return Case(model, simulated, shapes({"batch 1": 1, "batch 8": 8}, calibration), cut(test, 8), None, tools)


MODELS: dict[str, Callable[[], Case]] = {"resnet20": resnet20, "minilm": minilm, "lite0": efficientnet_lite0}

# row: (engine, which model, fp32 in the same engine). Ours first, then the engine's own tools.
ROWS = {
    "torch fp32": ("torch", "model", None),
    "torch bf16": ("torch-bf16", "model", "torch fp32"),
    "torch int8, ours": ("torch", "integer", "torch fp32"),
    "torch int8 where it pays, ours": ("torch", "pays", "torch fp32"),
    "torch int8 dynamic, ours": ("torch", "dynamic", "torch fp32"),
    "ORT fp32": ("onnxruntime", "model", None),
    "ORT int8, ours": ("onnxruntime", "simulated", "ORT fp32"),
    "ORT int8 static": ("onnxruntime-static", "model", "ORT fp32"),
    "ORT int8 S8S8": ("onnxruntime-s8s8", "model", "ORT fp32"),
    "ORT int8 dynamic": ("onnxruntime-dynamic", "model", "ORT fp32"),
    "OpenVINO fp32": ("openvino", "model", None),
    "OpenVINO bf16": ("openvino-bf16", "model", "OpenVINO fp32"),
    "OpenVINO int8, ours": ("openvino", "simulated", "OpenVINO fp32"),
    "OpenVINO int8, NNCF": ("nncf", "model", "OpenVINO fp32"),
    "OpenVINO int8 + bf16, ours": ("openvino-bf16", "simulated", "OpenVINO fp32"),
    "OpenVINO int8 + bf16, NNCF": ("nncf-bf16", "model", "OpenVINO fp32"),
}

PAIRS = [  # ours, and a peer
    ("torch int8 where it pays, ours", "torch bf16"),
    ("torch int8 where it pays, ours", "torch int8, ours"),
    ("ORT int8, ours", "ORT int8 static"),
    ("ORT int8, ours", "ORT int8 dynamic"),
    ("OpenVINO int8, ours", "OpenVINO int8, NNCF"),
    ("OpenVINO int8 + bf16, ours", "OpenVINO int8 + bf16, NNCF"),
    ("OpenVINO int8 + bf16, ours", "ORT int8 dynamic"),
]


def prepared(case: Case, label: str) -> dict[str, Engine]:
    """The engines for one shape, by row."""
    batches, example = case.shapes[label]
    sources = {"model": case.model, "simulated": case.simulated, "integer": integer.convert(case.simulated)}
    sources["pays"] = integer.convert(case.simulated, where="pays", example=example)
    if case.dynamic:
        sources["dynamic"] = integer.convert_dynamic(case.model, rows=example["input_ids"].numel())
    state, rows = engines.available(), {}
    for row, (name, source, _) in ROWS.items():
        if state[name] == "ready" and source in sources:
            options = next((x for start, x in case.tools.items() if name.startswith(start)), {})
            rows[row] = engines.prepare(name, sources[source], example, batches=batches, **options)
    return rows


def quality(case: Case, rows: Mapping[str, Engine]) -> dict[str, parity.Parity]:
    """Of each row, beside fp32 in torch."""

    def scores(engine: Engine) -> Tensor:
        return torch.cat([engine(**batch) for batch in case.test])

    reference = scores(rows["torch fp32"])
    labels = None if case.labels is None else case.labels[: len(reference)]
    return {row: parity.compare_scores(reference, scores(engine), labels) for row, engine in rows.items()}


def race(rows: Mapping[str, Engine], baseline: str, row: str, example: Inputs, budget: float) -> bench.Comparison:
    calls = [partial(rows[name], **example) for name in (baseline, row)]
    return bench.compare(*calls, names=(baseline, row), budget_s=budget)


def ratio(comparison: bench.Comparison | None) -> str:
    if comparison is None:
        return f"{'':19}"
    return f"{comparison.speedup:5.2f} [{comparison.ci95[0]:5.2f}, {comparison.ci95[1]:5.2f}]"


def line(row: str, engine: Engine, speeds: list[bench.Comparison | None], good: parity.Parity | None) -> str:
    text = f"{row:30} {engine.bytes / 1e6:7.2f} MB {engine.load_seconds:5.2f} s  {'  '.join(map(ratio, speeds))}"
    if good is not None:
        text += f"  {good.sqnr_db:6.1f} dB  {good.agreement[0]:.4f} [{good.agreement[1]:.4f}]"
        if good.change is not None:
            text += "  {:+.2f} [{:+.2f}, {:+.2f}] pp".format(*good.change)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for name in options.models:
        case = MODELS[name]()
        for label, (_, example) in case.shapes.items():
            rows = prepared(case, label)
            good = quality(case, rows) if label == list(case.shapes)[-1] else {}
            print(
                f"\n{name}, {label}: MB, load, times over torch fp32, over fp32 in the same engine, quality", flush=True
            )
            for row, engine in rows.items():
                bases = dict.fromkeys(("torch fp32", ROWS[row][2] or row))
                speeds = [race(rows, base, row, example, options.budget) if base != row else None for base in bases]
                print(line(row, engine, speeds, good.get(row)), flush=True)
                records.append(
                    {"model": name, "shape": label, "row": row, "bytes": engine.bytes, "load_s": engine.load_seconds}
                    | {
                        "quality": asdict(good[row]) if row in good else None,
                        "speeds": [x.to_dict() for x in speeds if x is not None],
                    }
                )
            for ours, peer in PAIRS:
                if ours in rows and peer in rows:
                    comparison = race(rows, peer, ours, example, options.budget)
                    print(f"{ours} over {peer}: {ratio(comparison)} {comparison.verdict}", flush=True)
                    records.append({"model": name, "shape": label, "pair": [ours, peer], **comparison.to_dict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
