"""Attention in blocks, a decoder's step, batches of requests and guesses: what each gains here, and where it loses.

    python benchmarks/attention.py             everything, a quarter of an hour on one thread
    python benchmarks/attention.py --quick     smaller sizes and budgets, some minutes

blocks: one causal head of 64, over attention with all scores in memory (naive), beside torch's fused kernel and naive
    attention whose large arrays are there already, which is the fairest opponent (its memory is not counted).
step: a token of SmolLM2 on a filled cache, over transformers' forward pass on its own cache, and a whole text over its
    `generate`, both with the time of the prompt. The roof is the least bytes over the measured bandwidth.
serving: requests of different lengths that come together; tokens a second of continuous over static batching, in pairs
    of runs. Gaps are those between a request's tokens, "first" is the time to its first.
guesses: prompt lookup over plain decoding, the texts being equal token by token.
caches: bytes and nats a token that smaller caches lose on the handbook, token by token after a prefix, beside a
    random choice that keeps sinks and recent tokens. Codes lie in a byte each in memory: their bytes are SIMULATED.
latent: FLOPs of absorbed over expanded latent attention, counted (DeepSeek-V2's sizes, 16 of its heads).
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import bench, datasets, machine, models, roofline, stats
from labkit.attention import blockwise, mla, speculative
from labkit.attention.cache import Cache, EvictingCache, QuantizedCache
from labkit.attention.decoder import Decoder
from labkit.deploy import serving
from labkit.quantization.kv import KVFormat

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler tells when it starts and stops
Row = dict[str, Any]
COPY = "Repeat the following text word for word.\n\n"
FREE = "Write a short story about a lighthouse keeper who finds a map."


def show(name: str, comparison: bench.Comparison, note: str = "") -> Row:
    low, high = comparison.ci95
    print(f"  {name:34} {comparison.speedup:5.2f}x [{low:.2f}, {high:.2f}]{note}", flush=True)
    return {"name": name, "note": note, **comparison.to_dict()}


def rounds(calls: dict[str, Callable[[], Any]], number: int) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds and results of calls that take seconds each, in random order within each round, after one of each."""
    seconds, results = ({name: [] for name in calls} for _ in "sr")
    for i in range(number + 1):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            result = calls[name]()
            if i:
                seconds[name].append(time.perf_counter() - start)
                results[name].append(result)
    return seconds, results


# --- blocks -----------------------------------------------------------------------------------------------------------


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As textbooks have it."""
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Naive with two large tensors fewer."""
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    return ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill_(later, -torch.inf).softmax(-1) @ v


def naive_reusing(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Naive with all large tensors there already: large memory that is asked for anew comes page by page."""
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    scores, weights = torch.empty(2, *q.shape[:3], k.shape[2])

    def call() -> Tensor:
        torch.matmul(q * q.shape[-1] ** -0.5, k.mT, out=scores).masked_fill_(later, -torch.inf)
        return torch.softmax(scores, -1, out=weights) @ v

    return call


def peak_bytes(call: Callable[[], Tensor]) -> int:
    """The most bytes that a call has from torch's allocator at a time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def blocks(options: argparse.Namespace) -> Iterator[Row]:
    for tokens in (1024, 8192) if options.quick else (256, 1024, 4096, 8192):
        q, k, v = (torch.randn(1, 1, tokens, 64) for _ in range(3))
        calls = {
            "naive": partial(naive, q, k, v),
            "naive, in place": partial(in_place, q, k, v),
            "naive, memory reused": naive_reusing(q, k, v),
            "blocks of 256": partial(blockwise.attention, q, k, v, causal=True),
            "blocks of 512": partial(blockwise.attention, q, k, v, causal=True, block=512),
            "fused": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        }
        print(f"{tokens} tokens, over naive, and the most memory beside the inputs:")
        for name, call in calls.items():
            size = peak_bytes(call)
            if name == "naive":
                print(f"  {name:61} {size / 1e6:7.1f} MB")
                continue
            budget = options.budget * (4 if tokens == 8192 else 1)  # a second a call
            close = partial(torch.allclose, atol=1e-5)
            comparison = bench.compare(calls["naive"], call, names=("naive", name), check=close, budget_s=budget)
            yield {"tokens": tokens, "peak": size, **show(name, comparison, f"  {size / 1e6:7.1f} MB")}
        sides = calls["naive, memory reused"], calls["blocks of 256"]
        comparison = bench.compare(*sides, names=("naive, memory reused", "blocks"), check=close, budget_s=budget)
        yield {"tokens": tokens, **show("blocks of 256 over memory reused", comparison)}


# --- a decoder's step -------------------------------------------------------------------------------------------------


def step(decoder: Decoder, prompt: Tensor) -> Callable[[], Tensor]:
    """As `roofline.decode_step`: a token on top of a cache with the prompt, which is then cut back."""
    cache, last = decoder.cache(prompt.shape[1] + 1), prompt[:, -1:]
    decoder.hidden(prompt, cache)

    def call() -> Tensor:
        logits = decoder.logits(decoder.hidden(last, cache))
        cache.crop(prompt.shape[1])
        return logits

    return call


def steps(options: argparse.Namespace, net: nn.Module) -> Iterator[Row]:
    bandwidth = machine.ceilings().bandwidth
    for dtype in (torch.float32, torch.bfloat16):
        model = net if dtype == torch.float32 else models.smollm2(dtype)
        decoder, name = Decoder(model), str(dtype).removeprefix("torch.")
        print(f"A step in {name}, over transformers' ({bandwidth / 1e9:.1f} GB/s):")
        for tokens in (256,) if options.quick else (32, 256, 2048):
            prompt = torch.randint(1000, 40000, (1, tokens))
            sides = roofline.decode_step(model, prompt), step(decoder, prompt)
            comparison = bench.compare(*sides, names=("transformers", "decoder"), budget_s=options.budget)
            size = roofline.count(sides[1]).bytes
            shares = [size / bandwidth / side.median_s for side in (comparison.baseline, comparison.candidate)]
            note = f"  {size / 1e6:.0f} MB: {shares[1]:.0%} of the roof, transformers {shares[0]:.0%}"
            yield {"bytes": size, "bandwidth": bandwidth, **show(f"{tokens} tokens in the cache", comparison, note)}
        new = 16 if options.quick else 64
        model.generation_config.eos_token_id = None  # a text ends by its length
        settings = {"max_new_tokens": new, "do_sample": False}
        seconds, texts = rounds(
            {
                "transformers": partial(model.generate, prompt[:, :32], **settings),
                "decoder": partial(written, decoder, prompt[:, :32], 0, new),
            },
            options.rounds,
        )
        if dtype == torch.float32:
            same_text(texts["transformers"], texts["decoder"])
        yield paired(f"{new} tokens after a prompt of 32", seconds["transformers"], seconds["decoder"])


def paired(name: str, baseline: list[float], candidate: list[float], note: str = "") -> Row:
    ratio, low, high = stats.paired_ratio(baseline, candidate)
    print(f"  {name:34} {ratio:5.2f}x [{low:.2f}, {high:.2f}]{note}", flush=True)
    return {"name": name, "note": note, "baseline_s": baseline, "candidate_s": candidate}


def written(decoder: Decoder, prompt: Tensor, k: int, new: int) -> Tensor:
    return speculative.generate(decoder, prompt, k=k, max_new_tokens=new).ids


def same_text(a: list[Tensor], b: list[Tensor]) -> None:
    if not all(map(torch.equal, a, b)):
        raise SystemExit("Two ways of decoding gave different texts.")


# --- serving ----------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, decoder: Decoder) -> Iterator[Row]:
    draw = np.random.default_rng(0)
    count, longest, batch = (10, 64, 4) if options.quick else (24, 192, 8)
    prompts = [torch.from_numpy(draw.integers(1000, 40000, n)) for n in draw.integers(16, 97, count)]
    new = np.clip(draw.exponential(longest / 4, count), 6, longest).astype(int).tolist()
    settings = {"max_new_tokens": new, "max_batch": batch}
    ways: dict[str, dict[str, Any]] = {
        "static": {"batching": "static"},
        "continuous": {"batching": "continuous"},
        "continuous, chunks of 32": {"batching": "continuous", "chunk": 32},
    }
    calls = {name: partial(serving.serve, decoder, prompts, **settings, **way) for name, way in ways.items()}
    seconds, served = rounds(calls, options.rounds)
    print(f"{count} requests, {sum(new)} new tokens, {batch} at a time, over static batching:")
    for name, runs in served.items():
        same_text(runs[0].ids, served["static"][0].ids)
        ratio, low, high = stats.paired_ratio(seconds["static"], seconds[name])
        gaps = np.concatenate([service.gaps_s for service in runs])
        first = np.concatenate([service.first_s for service in runs])
        times = {"gap": np.median(gaps), "gap_p99": np.percentile(gaps, 99), "first_p99": np.percentile(first, 99)}
        print(
            f"  {name:25} {sum(new) / np.median(seconds[name]):5.1f} tokens/s  {ratio:5.2f}x [{low:.2f}, {high:.2f}]  "
            f"{runs[0].steps} steps  gaps {1e3 * times['gap']:.0f} ms, p99 {1e3 * times['gap_p99']:.0f} ms, "
            f"first p99 {times['first_p99']:.2f} s",
            flush=True,
        )
        yield {"serving": name, "seconds": seconds[name], "steps": runs[0].steps, **times}
    beginning = torch.from_numpy(draw.integers(1000, 40000, 64))
    alike = [torch.cat([beginning, prompt[:16]]) for prompt in prompts[:batch]]
    print(f"{batch} requests that begin alike, 64 of 80 tokens:")
    pages = {"pages of its own": {"share_prefixes": False}, "shared pages": {}, "shared, few pages": {"pages": 8}}
    services = {
        name: serving.serve(decoder, alike, max_new_tokens=16, page_size=16, **how) for name, how in pages.items()
    }
    for name, service in services.items():
        same_text(service.ids, services["shared pages"].ids)
        print(f"  {name:25} {service.computed} tokens computed, {service.steps} steps, {service.preemptions} preempted")
        yield {"prefixes": name, "computed": service.computed, "steps": service.steps, "seconds": service.first_s.max()}


# --- guesses ----------------------------------------------------------------------------------------------------------


def questions() -> dict[str, Tensor]:
    """Prompts [1, T] as SmolLM2 is asked: for free text, and to copy three texts, their first words already there."""
    tokenizer = models.tokenizer("smollm2")
    paragraphs = [text for text in datasets.handbook().split("\n\n") if 300 < len(text) < 500]
    tasks = {"free text": (FREE, "")} | {
        f"copying, text {i}": (COPY + text, " ".join(text.split()[:6])) for i, text in enumerate(paragraphs[:3])
    }
    prompts = {}
    for name, (question, beginning) in tasks.items():
        talk = [{"role": "user", "content": question}]
        start = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) + beginning
        prompts[name] = tokenizer(start, return_tensors="pt").input_ids
    return prompts


def guesses(options: argparse.Namespace, decoder: Decoder) -> Iterator[Row]:
    new = 48 if options.quick else 80
    print(f"Prompt lookup over plain decoding, {new} tokens:")
    for name, prompt in list(questions().items())[: 2 if options.quick else None]:
        generate = partial(speculative.generate, decoder, prompt, max_new_tokens=new)
        calls = {"plain": partial(generate, k=0), "lookup": partial(generate, k=options.k)}
        seconds, results = rounds(calls, options.rounds)
        same_text(*([result.ids for result in results[side]] for side in calls))
        lookup = results["lookup"][0]
        note = f"  {lookup.accepted} of {lookup.proposed} guesses accepted, {lookup.calls} calls"
        yield paired(f"{name}, k = {options.k}", seconds["plain"], seconds["lookup"], note)


# --- smaller caches ---------------------------------------------------------------------------------------------------


def losses(decoder: Decoder, cache: Cache, text: Tensor, prefix: int) -> Tensor:
    """Nats of each token [T - prefix - 1] after a prefix that is given at once."""
    logits = [decoder.logits(decoder.hidden(text[None, :prefix], cache)[:, -1])]
    logits += [decoder.logits(decoder.hidden(token[None, None], cache)[0]) for token in text[prefix:-1]]
    return F.cross_entropy(torch.cat(logits), text[prefix:], reduction="none")


def caches(options: argparse.Namespace, decoder: Decoder) -> Iterator[Row]:
    prefix, after, windows = (256, 32, 1) if options.quick else (768, 192, 3)
    ids = torch.tensor(models.tokenizer("smollm2")(datasets.handbook()[: 8000 * windows]).input_ids)
    texts = ids.split(prefix + after)[:windows]
    budget = prefix // 6
    kinds: dict[str, Callable[[int], Cache]] = {
        "all": lambda i: decoder.cache(prefix + after),
        "4 bits": lambda i: QuantizedCache(decoder.layout, 1),
        "2 bits": lambda i: QuantizedCache(decoder.layout, 1, KVFormat(2, 2)),
        "recent": lambda i: EvictingCache(decoder.layout, 1, budget, sinks=0),
        "sinks and recent": lambda i: EvictingCache(decoder.layout, 1, budget),
        "sinks, recent and random": lambda i: EvictingCache(decoder.layout, 1, budget, policy="random", seed=i),
        "accumulated attention (H2O)": lambda i: EvictingCache(decoder.layout, 1, budget, policy="attention"),
        "votes (SnapKV)": lambda i: EvictingCache(decoder.layout, 1, budget, policy="votes"),
    }
    print(f"{windows} texts, {after} tokens after {prefix}; caches that forget have {budget} entries:")
    whole: list[Tensor] = []
    for name, kind in kinds.items():
        sides = [kind(i) for i in range(windows)]
        nats = [losses(decoder, cache, text, prefix) for cache, text in zip(sides, texts, strict=True)]
        whole = whole or nats
        lost = [float((x - y).mean()) for x, y in zip(nats, whole, strict=True)]
        row = " ".join(f"{x:+.3f}" for x in lost)
        print(f"  {name:30} {sides[0].bytes / 1e6:6.2f} MB  {row} nats a token", flush=True)
        yield {"cache": name, "bytes": sides[0].bytes, "lost": lost}


# --- latent attention -------------------------------------------------------------------------------------------------


def latent() -> Iterator[Row]:
    print("Absorbed over expanded latent attention, FLOPs:")
    for name, queries, tokens in (("a token", 1, 300), ("a prompt", 300, 300)):
        shapes = ((1, 16, queries, 128), (1, 16, queries, 64), (1, tokens, 512), (1, tokens, 64))
        parts = [torch.randn(shape) for shape in (*shapes, (16, 128, 512), (16, 128, 512))]
        expanded, absorbed = (roofline.count(form, *parts).flops for form in (mla.expanded, mla.absorbed))
        print(f"  {name:10} {absorbed / expanded:5.3f}, {tokens} in the cache")
        yield {"latent": name, "expanded": expanded, "absorbed": absorbed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", default=["blocks", "step", "serving", "guesses", "caches", "latent"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, help="seconds a comparison; 5, or 20 without --quick")
    parser.add_argument("--rounds", type=int, default=6, help="runs of each kind of batching")
    parser.add_argument("-k", type=int, default=8, help="guesses a call")
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    options.budget = options.budget or (5.0 if options.quick else 20.0)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    net = models.smollm2()
    decoder = Decoder(net)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "blocks": lambda: blocks(options),
        "step": lambda: steps(options, net),
        "serving": lambda: serve(options, decoder),
        "guesses": lambda: guesses(options, decoder),
        "caches": lambda: caches(options, decoder),
        "latent": latent,
    }
    print(machine.fingerprint().label, f"{options.threads} threads")
    with torch.inference_mode():
        records = [row for name in options.parts for row in parts[name]()]
    if options.json:
        options.json.write_text(json.dumps(records, indent=1, default=float))


if __name__ == "__main__":
    main()
