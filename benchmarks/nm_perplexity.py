"""Perplexity of SmolLM2 pruned to n:m and to 50 % by magnitude, Wanda and SparseGPT, by the amount of calibration text.

    python benchmarks/nm_perplexity.py --json rows.json                 the whole table; hours on two cores
    python benchmarks/nm_perplexity.py --methods sparsegpt --patterns 2:4 --calibration 16 --windows 8

Weights are dequantised Q4_1. Calibration and test text are different chapters of the Debian Administrator's Handbook.
Seconds and peak memory are those of this machine and of one run; the rows of a table share the process. Rows that the
file of --json holds already are not computed again. At the end come means over the seeds with 95 % intervals.
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from labkit import datasets, models, stats, training
from labkit.batches import segments
from labkit.files import replacing
from labkit.lesson.memory import peak_memory
from labkit.pruning import blockwise


def pattern(text: str) -> float | tuple[int, int]:
    """ "2:4" is (2, 4), "0.5" a fraction."""
    kept, _, of = text.partition(":")
    return (int(kept), int(of)) if of else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=blockwise.METHODS, default=blockwise.METHODS)
    parser.add_argument("--patterns", nargs="+", type=pattern, default=[0.5, (4, 8), (2, 4)])
    parser.add_argument("--calibration", nargs="+", type=int, default=[8, 32, 128], help="numbers of segments")
    parser.add_argument("--length", type=int, default=512, help="tokens of a segment and of a test window")
    parser.add_argument("--windows", type=int, help="test windows; all without it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="which calibration segments are drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()

    tokenizer = models.tokenizer("smollm2")
    calibration, test = (
        torch.tensor(tokenizer(datasets.handbook(part), verbose=False)["input_ids"], device=options.device)
        for part in ("calibration", "test")
    )
    if options.windows:
        test = test[: options.windows * options.length]
    model = models.smollm2().to(options.device)
    dense = training.perplexity(model, test, window=options.length)
    print(f"SmolLM2-135M-Instruct, dequantised Q4_1; {len(test) // options.length} windows of {options.length} tokens")
    print(f"{'method':10} {'pattern':8} {'segments':>8} {'seed':>4} {'perplexity':>10} {'seconds':>8} {'peak GB':>8}")
    print(f"{'dense':10} {'':8} {'':8} {'':4} {dense:10.2f}", flush=True)
    settings = {"length": options.length, "windows": len(test) // options.length}
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    rows = [row for row in rows if settings.items() <= row.items()]
    done = {(row["method"], row["pattern"], row["segments"], row["seed"]) for row in rows}
    for wanted, method, n, seed in draws(options):
        name = f"{wanted[0]}:{wanted[1]}" if isinstance(wanted, tuple) else f"{wanted:.0%}"
        key = {"method": method, "pattern": name, "segments": n, "seed": seed}
        if tuple(key.values()) in done:
            continue
        batches = segments(calibration, n, options.length, seed=seed) if n else None
        start = time.perf_counter()
        pruned = blockwise.prune(model, wanted, method=method, batches=batches, progress=f"{method} {name}")
        seconds, peak = time.perf_counter() - start, peak_memory() / 1e9
        found = training.perplexity(pruned, test, window=options.length)
        del pruned
        gc.collect()  # its masks hold it in a cycle, and the next row brings a copy of its own
        print(f"{method:10} {name:8} {n:8} {seed:4} {found:10.2f} {seconds:8.1f} {peak:8.2f}", flush=True)
        quality = {"perplexity": found, "over_dense": found / dense}
        rows.append({**key, **settings, **quality, "seconds": seconds, "peak_gb": peak})
        if options.json:
            with replacing(options.json) as partial:
                partial.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{'method':10} {'pattern':8} {'segments':>8} {'perplexity over dense, mean over seeds':>40}")
    for row in stats.over_seeds(rows, "over_dense", by=("method", "pattern", "segments")):
        spread = f"[{row['low']:.3f}, {row['high']:.3f}]" if row["segments"] else "(no seeds)"
        print(f"{row['method']:10} {row['pattern']:8} {row['segments']:8} {row['over_dense']:12.3f} {spread:>27}")


def draws(options: argparse.Namespace) -> Iterator[tuple[float | tuple[int, int], str, int, int]]:
    """(pattern, method, segments, seed) of every row; magnitude has no calibration."""
    for wanted, method in itertools.product(options.patterns, options.methods):
        drawn = itertools.product(options.calibration, options.seeds) if method != "magnitude" else [(0, 0)]
        yield from ((wanted, method, n, seed) for n, seed in drawn)


if __name__ == "__main__":
    main()
