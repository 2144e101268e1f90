"""Perplexity of SmolLM2 pruned to n:m and to 50 % by magnitude, Wanda and SparseGPT, by the amount of calibration text.

    python benchmarks/nm_perplexity.py                                  the whole table; hours on two cores
    python benchmarks/nm_perplexity.py --methods sparsegpt --patterns 2:4 --calibration 16 --windows 8

Weights are dequantised Q4_1. Calibration and test text are different chapters of the Debian Administrator's Handbook.
Seconds and peak memory are those of this machine and of one run; the rows of a table share the process.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from labkit import datasets, models, process, training
from labkit.pruning import layerwise
from labkit.pruning.calibration import segments


def pattern(text: str) -> float | tuple[int, int]:
    """ "2:4" is (2, 4), "0.5" a fraction."""
    kept, _, of = text.partition(":")
    return (int(kept), int(of)) if of else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=layerwise.METHODS, default=layerwise.METHODS)
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
    print(
        f"SmolLM2-135M-Instruct, {models.DEQUANTISED}; {len(test) // options.length} windows of {options.length} tokens"
    )
    print(f"{'method':10} {'pattern':8} {'segments':>8} {'seed':>4} {'perplexity':>10} {'seconds':>8} {'peak GB':>8}")
    print(f"{'dense':10} {'':8} {'':8} {'':4} {dense:10.2f}", flush=True)
    rows = [{"method": "dense", "perplexity": dense}]
    for wanted in options.patterns:
        for method in options.methods:
            draws = [(n, seed) for n in options.calibration for seed in options.seeds]
            for n, seed in [(0, 0)] if method == "magnitude" else draws:
                batches = segments(calibration, n, options.length, seed=seed) if n else None
                start = time.perf_counter()
                pruned = layerwise.prune(model, wanted, method=method, batches=batches, progress=f"{method} {wanted}")
                seconds, peak = time.perf_counter() - start, process.peak_memory() / 1e9
                found = training.perplexity(pruned, test, window=options.length)
                del pruned
                name = f"{wanted[0]}:{wanted[1]}" if isinstance(wanted, tuple) else f"{wanted:.0%}"
                print(f"{method:10} {name:8} {n:8} {seed:4} {found:10.2f} {seconds:8.1f} {peak:8.2f}", flush=True)
                rows.append(
                    {
                        "method": method,
                        "pattern": name,
                        "segments": n,
                        "seed": seed,
                        "perplexity": found,
                        "seconds": seconds,
                        "peak_gb": peak,
                    }
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
