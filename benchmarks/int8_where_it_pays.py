"""Integers where they pay, beside float32 and bfloat16 in eager torch: 23 networks of timm and transformers.

    python benchmarks/int8_where_it_pays.py                                     all, one thread
    python benchmarks/int8_where_it_pays.py --networks timm/mobilenetv3_small_100
    python benchmarks/int8_where_it_pays.py --results pays.jsonl                keeps the rows, goes on where it stopped

The first five have depthwise or narrow layers, at which integers lose most; the rest are drawn from zoo.toml, a
package after another. Weights are random. A network of timm gets an image of its own size, a network of transformers is
wider than in zoo.py, with the input of zoo.py. `ptq.quantize` calibrates on the timed input, `integer.convert` makes
integers everywhere and where they pay. All four models take and give float32 (`labkit.deploy.engines`), and are timed
anew after the conversion, in interleaved pairs (`labkit.bench.compare`): the ratio is the time of the faster of float32
and bfloat16 over the time of integers where they pay, with its 95 % interval over six builds of both. The last line
names the networks below 0.98.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import strangers
import torch
import zoo
from torch import Tensor, nn

from labkit import bench, machine
from labkit.deploy import engines
from labkit.errors import LabError
from labkit.quantization import integer, ptq

FIRST = ("mobilenetv3_small_100", "mobilenetv2_100", "mixer_s32_224", "convnext_atto", "ghostnet_100")  # of timm
NETWORKS = 23
WIDTHS = (
    *("head_dim", "d_kv", "moe_intermediate_size", "intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner"),
    *("hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "hidden_size", "d_model", "n_embd"),
    *("dim", "embed_dim", "embedding_size", "word_embed_proj_dim"),
)
WIDER = 8  # hidden states of 384 numbers, in heads of 64
LEAST = 0.98  # ratio that no network should stay below

BUILDS = 6  # of each side of a comparison

Row = dict[str, Any]


class Side(NamedTuple):
    engine: str
    model: nn.Module


def names() -> list[str]:
    first = [f"timm/{name}" for name in FIRST]
    candidates = [name for name in zoo.names() if name not in first]
    return first + strangers.draw(candidates, seed=1, number=NETWORKS - len(first))


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """(model in eval mode with random weights, its arguments by name)."""
    library, _, network = name.partition("/")
    if library == "timm":
        import timm

        model = timm.create_model(network, **zoo.ZOO["timm"]["arguments"].get(network, {}))
        return zoo.spread(model), {"x": torch.randn(1, *model.default_cfg["input_size"])}
    sizes = zoo.ZOO["transformers"]["sizes"]
    for width in WIDTHS:
        sizes[width] *= WIDER
    try:
        model, _, named = zoo.transformers_network(network)
    finally:
        for width in WIDTHS:
            sizes[width] //= WIDER
    return zoo.spread(model), named


def compared(
    sides: Mapping[str, Side], baseline: str, name: str, named: Mapping[str, Tensor], budget_s: float
) -> bench.Comparison:
    """Compare two sides, each built anew several times: where its weights lie in memory is part of a timing."""

    def built(side: Side) -> Callable[[], Any]:
        engine = engines.prepare(side.engine, copy.deepcopy(side.model), named)
        return partial(engine, **named)

    builders = [partial(built, sides[each]) for each in (baseline, name)]
    return bench.compare(*builders, names=(baseline, name), budget_s=budget_s, builds=BUILDS)


def measured(name: str, budget_s: float) -> Row:
    """The row of a network: seconds of the four models, ratios with intervals, and the choice."""
    torch.manual_seed(0)
    model, named = build(name)
    simulated = ptq.quantize(model, [named]).model
    start = time.perf_counter()
    pays = integer.convert(simulated, where="pays", example=named)
    convert_s = time.perf_counter() - start
    everywhere = integer.convert(simulated)
    sides = {
        "float32": Side("torch", model),
        "bfloat16": Side("torch-bf16", model),
        "everywhere": Side("torch", everywhere),
        "pays": Side("torch", pays),
    }
    faster = compared(sides, "float32", "bfloat16", named, budget_s)
    base = "bfloat16" if faster.speedup > 1 else "float32"
    ratios = {side: compared(sides, base, side, named, budget_s) for side in ("everywhere", "pays")}
    seconds = {"float32": faster.baseline.median_s, "bfloat16": faster.candidate.median_s}
    seconds |= {side: comparison.candidate.median_s for side, comparison in ratios.items()}
    whole, *layers = pays.integer_report
    return {
        "network": name,
        "base": base,
        "seconds": seconds,
        **{side: [comparison.speedup, *comparison.ci95] for side, comparison in ratios.items()},
        "choice": whole["choice"],
        "layers": dict(Counter(row["choice"] for row in layers)),
        "convert_s": convert_s,
        "report": pays.integer_report,
    }


def resumed(networks: Sequence[str], results: Path | None, measure: Callable[[str], Row]) -> Iterator[Row]:
    """Give the row of each network: from the file `results` if that holds the row, else measured and kept there."""
    rows: dict[str, Row] = {}
    if results and results.exists():
        stored = map(json.loads, results.read_text(encoding="utf-8").splitlines())
        rows = {row["network"]: row for row in stored}
    for name in networks:
        if name not in rows:
            try:
                rows[name] = measure(name)
            except LabError as error:
                rows[name] = {"network": name, "error": str(error)}
            if results:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        yield rows[name]


def line(row: Row) -> str:
    if "error" in row:
        return f"{row['network']:34} {row['error']}"
    milliseconds = " ".join(f"{1e3 * seconds:8.2f}" for seconds in row["seconds"].values())
    ratios = " ".join("{:6.2f} [{:5.2f}, {:5.2f}]".format(*row[side]) for side in ("everywhere", "pays"))
    layers = ", ".join(f"{count} {choice}" for choice, count in row["layers"].items())
    return f"{row['network']:34} {milliseconds}  {ratios}  {row['choice']}: {layers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="instead of the 23")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a comparison, of three for each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a file that keeps the rows: those in it are not run again")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(machine.fingerprint("cpu"))
    print(f"{'ms of':34}  float32     bf16     int8     pays  int8 over the faster  pays over the faster", flush=True)
    rows: dict[str, Row] = {}
    for row in resumed(options.networks or names(), options.results, partial(measured, budget_s=options.budget)):
        rows[row["network"]] = row
        print(line(row), flush=True)
    ratios = {name: row["pays"] for name, row in rows.items() if "pays" in row}
    below = [name for name, (ratio, _, _) in ratios.items() if ratio < LEAST]
    if not ratios:
        return
    middle = statistics.geometric_mean(ratio for ratio, _, _ in ratios.values())
    print(f"{len(ratios)} networks, geometric mean {middle:.2f}; below {LEAST}: {', '.join(below) or 'none'}")


if __name__ == "__main__":
    main()
