"""Perplexity of SmolLM2 with its weights in few bits, against the bits that are stored: a row a method.

    python benchmarks/llm_quantization.py --json rows.json                  the whole table; half an hour on one core
    python benchmarks/llm_quantization.py --methods rtn gptq --windows 2 --calibration 2

SIMULATED: floats are multiplied that the stored codes stand for. Weights are dequantised Q4_1, groups of 32 with zeros,
so 4 bits on that grid would lose nothing and are no row. Calibration and test text are different chapters of the Debian
Administrator's Handbook. The ratio is over the model in float32, paired by window, with the 95 % interval over windows
(bootstrap; none below six windows). Bits are those of a quantized layer's weight, scales and zeros included (of "2:4",
after SparseGPT, the zeros too: stored as codes); MB those of the file, with embedding and head, one tied weight, in
float16. Every row is a process: seconds are of its CPU time in `quantize`, the peak is that of the process with the
model loaded. Rows that the file of --json holds already are not computed again.
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from labkit import artifact, datasets, models, stats, training
from labkit.batches import segments
from labkit.files import replacing
from labkit.lesson.memory import peak_memory
from labkit.pruning import nm
from labkit.quantization import weight_only

GPTQ, AWQ = {"method": "gptq"}, {"method": "awq"}
ROWS: dict[str, dict[str, Any]] = {
    "float32": {},
    "rtn": {"method": "rtn"},
    **{f"rtn {kind}": {"symmetric": kind} for kind in ("restricted", "full", "signed")},
    "rtn channel": {"group_size": None},
    "rtn int3": {"bits": 3},
    "nf4": {"method": "nf4"},
    "mxfp4": {"method": "mxfp4"},
    "gptq in order": GPTQ | {"act_order": False},
    "gptq": GPTQ,
    "gptq signed": GPTQ | {"symmetric": "signed"},
    "gptq channel": GPTQ | {"group_size": None},
    "gptq int3 in order": GPTQ | {"bits": 3, "act_order": False},
    "gptq int3": GPTQ | {"bits": 3},
    "awq": AWQ,
    "awq signed": AWQ | {"symmetric": "signed"},
    "awq channel": AWQ | {"group_size": None},
    "awq int3": AWQ | {"bits": 3},
    "2:4 gptq": GPTQ,  # after SparseGPT
}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row, with the mean loss of each window."""
    torch.set_num_threads(options.threads)
    tokenizer = models.tokenizer("smollm2")
    calibration, test = (
        torch.tensor(tokenizer(datasets.handbook(part), verbose=False)["input_ids"]) for part in ("calibration", "test")
    )
    batches = segments(calibration, options.calibration, options.length, seed=options.seed)
    model = models.smollm2()
    if name.startswith("2:4"):
        model = nm.prune(model, method="sparsegpt", batches=batches)
    start = time.process_time()
    if ROWS[name]:
        model = weight_only.quantize(model, **ROWS[name], batches=batches)
    seconds, peak = time.process_time() - start, peak_memory() / 1e9
    layers = [layer for layer in model.modules() if isinstance(layer, weight_only.WeightOnlyLinear)]
    sizes = [layer.in_features * layer.out_features for layer in layers]
    windows = test[: options.windows * options.length].split(options.length)
    losses = [math.log(training.perplexity(model, window, window=options.length)) for window in windows]
    bits = [layer.bits_per_weight * n for layer, n in zip(layers, sizes, strict=True)]
    return {
        "row": name,
        "bits": sum(bits) / sum(sizes) if layers else 32.0,
        "mb": artifact.size(model.half() if layers else model) / 1e6,
        "seconds": seconds,
        "peak_gb": peak,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(ROWS)
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=names)
    parser.add_argument("--windows", type=int, default=8, help="test windows")
    parser.add_argument("--calibration", type=int, default=16, help="segments of the calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a segment and of a test window")
    parser.add_argument("--seed", type=int, default=0, help="which calibration segments are drawn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    settings = {key: getattr(options, key) for key in ("windows", "calibration", "length", "seed", "threads")}
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    rows = {row["row"]: row for row in rows if settings.items() <= row.items()}

    print("SmolLM2-135M-Instruct, dequantised Q4_1; SIMULATED")
    print(
        f"{options.windows} windows of {options.length} tokens, calibration {options.calibration} x {options.length}, "
        f"seed {options.seed}, {options.threads} threads"
    )
    print(f"{'':18} {'bits':>6} {'MB':>6} {'perplexity':>10} {'ratio':>6} {'95 %':>16} {'CPU s':>7} {'peak GB':>8}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for name in ["float32", *(name for name in options.methods if name != "float32")]:
            if name not in rows:
                rows[name] = pool.submit(measure, name, options).result() | settings
            row, base = rows[name], rows["float32"]
            row["perplexity"] = math.exp(sum(row["losses"]) / options.windows)
            tokens = [options.length - 1] * options.windows
            row["ratio"], low, high = stats.perplexity_ci(row["losses"], tokens, base["losses"])
            between = f"[{low:.3f}, {high:.3f}]"
            print(
                f"{name:18} {row['bits']:6.2f} {row['mb']:6.1f} {row['perplexity']:10.2f} {row['ratio']:6.3f} "
                f"{between:>16} {row['seconds']:7.1f} {row['peak_gb']:8.2f}",
                flush=True,
            )
            if options.json:
                with replacing(options.json) as partial:
                    partial.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
