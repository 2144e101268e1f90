"""MiniLM behind HTTP: capacity, and p50 and p99 against the rate, with and without batching; LoadGen as the judge.

    python benchmarks/serving.py                                 eager and an int8 engine, batches of 1 and 16
    python benchmarks/serving.py --servers "engine, 16" --shares .5 .8 --requests 2000 --loadgen 100

Load is open (Poisson) on loopback, server and sender on the same cores, rates as shares of the capacity that each
server shows to 32 clients that wait. A percentile stands beside the number of answers behind it, and is left out where
these are too few. --loadgen RATE...: MLPerf's LoadGen, scenario Server, p99 within --bound ms, 60 s a rate at most.
"""

import argparse
import importlib.util
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from int8_models import tokens

from labkit import datasets, machine, models
from labkit.deploy import engines, parity, server
from labkit.errors import InputError

SERVERS: dict[str, tuple[bool, int]] = {  # whether in the engine, and the largest batch
    "eager, 1": (False, 1),
    "eager, 16": (False, 16),
    "engine, 1": (True, 1),
    "engine, 16": (True, 16),
}


def deployed(name: str, folder: Path) -> None:
    """The fine-tuned MiniLM for batches and texts of any length, and how its answers differ."""
    model = models.minilm_finetuned()
    sizes = {0: (1, 16), 1: (2, server.LONGEST)}
    inputs, _ = tokens("train", server.LONGEST, 128)
    options = {"model_type": "transformer", "batches": [inputs]} if name == "nncf" else {}
    example = {name: tensor[:8] for name, tensor in inputs.items()}
    engine = engines.prepare(name, model, example, dynamic=sizes, folder=folder, **options)
    judged = parity.Reference(model, models.review_batches("test", 400, batch_size=8)).judge(engine)
    change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*judged.change)
    print(f"{name}: {judged.sqnr_db:.1f} dB, {change} points, {engine.bytes / 1e6:.1f} MB")


def milliseconds(load: server.Load, q: float) -> str:
    with suppress(InputError):
        return f"p{q:g} {1e3 * load.percentile(q):7.1f} ms"
    return f"p{q:g} {'':7}   "


def line(load: server.Load, rate: float) -> str:
    lost = f"{load.count(429)} shed, {load.count(0)} lost"
    return f"  {rate:6.1f}/s  {milliseconds(load, 50)}  {milliseconds(load, 99)}  of {load.answered} answers, {lost}"


def judged(verdict: server.Verdict) -> str:
    reasons = (f"{verdict.refused} refused",) if verdict.refused else verdict.reasons[:2]
    word = "VALID" if verdict.valid else f"INVALID, {'; '.join(reasons)}"
    return f"  LoadGen {verdict.rate:g}/s: {word}; p99 {1e3 * verdict.p99_s:.1f} ms of {verdict.queries} queries"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--engine", default="nncf" if importlib.util.find_spec("nncf") else "onnxruntime-dynamic")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9, 1.2], help="of capacity")
    parser.add_argument("--requests", type=int, default=1100, help="a rate")
    parser.add_argument("--delay", type=int, default=1, help="ms that a batch waits for more")
    parser.add_argument("--loadgen", type=float, nargs="*", default=[], metavar="RATE")
    parser.add_argument("--bound", type=float, default=50.0, help="ms of p99 for LoadGen")
    parser.add_argument("--seconds", type=float, default=15.0, help="of LoadGen a rate, at the least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every latency")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine.fingerprint('cpu').label}, {options.threads} threads")
    bodies = [json.dumps({"text": text}).encode() for text in datasets.reviews("test", 200).texts]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if any(SERVERS[name][0] for name in options.servers):
            deployed(options.engine, Path(folder))
        for name in options.servers:
            in_engine, batch = SERVERS[name]
            with server.Server(folder if in_engine else None, max_batch=batch, delay_ms=options.delay) as running:
                server.closed_loop(running.url, bodies, clients=4, n=50)
                full = server.closed_loop(running.url, bodies, clients=32, n=500)
                alone = server.closed_loop(running.url, bodies, clients=1, n=100)
                capacity = full.answered / full.seconds
                print(f"{name}: capacity {capacity:.1f}/s; a lone client {milliseconds(alone, 50)}", flush=True)
                for seed, share in enumerate(options.shares):
                    rate = share * capacity
                    load = server.open_loop(running.url, bodies, rate=rate, n=options.requests, seed=seed)
                    print(line(load, rate), flush=True)
                    row = {"server": name, "capacity": capacity, "rate": rate, "status": list(load.status)}
                    records.append(row | {"latency_s": load.latency_s.tolist()})
                for rate in options.loadgen:
                    bounds = {"bound_s": options.bound / 1e3, "seconds": options.seconds}
                    print(judged(server.loadgen(running.url, bodies, rate=rate, **bounds)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
