"""Attention in blocks, a decoder's step, batches of requests and guesses: what each gains here, and where it loses.

    python benchmarks/attention.py             everything, a quarter of an hour on one thread
    python benchmarks/attention.py --quick     smaller sizes and budgets, some minutes

blocks: one causal head of 64, over attention with all scores in memory (naive), beside torch's fused kernel.
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
import random
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

Row = dict[str, Any]
COPY = "Repeat the following text word for word.\n\n"
FREE = "Write a short story about a lighthouse keeper who finds a map."


def show(name: str, comparison: bench.Comparison, note: str = "") -> Row:
    low, high = comparison.ci95
    print(f"  {name:34} {comparison.speedup:5.2f}x [{low:.2f}, {high:.2f}]{note}", flush=True)
    return {"name": name, "note": note, **comparison.to_dict()}


# --- blocks -----------------------------------------------------------------------------------------------------------


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


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
            comparison = bench.compare(calls["naive"], call, names=("naive", name), budget_s=options.budget)
            yield {"tokens": tokens, "peak": size, **show(name, comparison, f"  {size / 1e6:7.1f} MB")}


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
        comparison = bench.compare(
            partial(model.generate, prompt[:, :32], **settings),
            partial(written, decoder, prompt[:, :32], k=0, new=new),
            names=("transformers", "decoder"),
            check=torch.equal if dtype == torch.float32 else None,
            budget_s=2 * options.budget,
        )
        yield show(f"{new} tokens after a prompt of 32", comparison)


def written(decoder: Decoder, prompt: Tensor, k: int, new: int) -> Tensor:
    return speculative.generate(decoder, prompt, k=k, max_new_tokens=new).ids


# --- serving ----------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace, decoder: Decoder) -> Iterator[Row]:
    draw = np.random.default_rng(0)
    count, longest, batch = (10, 64, 4) if options.quick else (24, 192, 8)
    prompts = [torch.from_numpy(draw.integers(1000, 40000, n)) for n in draw.integers(16, 97, count)]
    new = np.clip(draw.exponential(longest / 4, count), 6, longest).astype(int).tolist()
    run = partial(serving.serve, decoder, prompts, max_new_tokens=new, max_batch=batch)
    ways = {
        "static": partial(run, batching="static"),
        "continuous": partial(run, batching="continuous"),
        "continuous, chunks of 16": partial(run, chunk=16),
    }
    served: dict[str, list[serving.Service]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name in random.sample(list(ways), len(ways)):
            served[name].append(ways[name]())
    print(f"{count} requests, {sum(new)} new tokens, {batch} at a time, over static batching:")
    seconds = {name: [1 / service.tokens_per_s for service in runs] for name, runs in served.items()}
    for name, runs in served.items():
        same_text(runs[0].ids, served["static"][0].ids)
        ratio, low, high = stats.paired_ratio(seconds["static"], seconds[name])
        gaps, first = (np.concatenate([getattr(service, part) for service in runs]) for part in ("gaps_s", "first_s"))
        times = {"gap": np.median(gaps), "gap_p99": np.percentile(gaps, 99), "first_p99": np.percentile(first, 99)}
        print(
            f"  {name:25} {1 / np.median(seconds[name]):5.1f} tokens/s  {ratio:5.2f}x [{low:.2f}, {high:.2f}]  "
            f"{runs[0].steps} steps  gaps {1e3 * times['gap']:.0f} ms, p99 {1e3 * times['gap_p99']:.0f} ms, "
            f"first p99 {times['first_p99']:.2f} s",
            flush=True,
        )
        yield {"serving": name, "seconds_per_token": seconds[name], "steps": runs[0].steps, **times}
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


def same_text(a: list[Tensor], b: list[Tensor]) -> None:
    if not all(map(torch.equal, a, b)):
        raise SystemExit("Two ways of serving gave different texts.")


# --- guesses ----------------------------------------------------------------------------------------------------------


def guesses(options: argparse.Namespace, decoder: Decoder) -> Iterator[Row]:
    tokenizer = models.tokenizer("smollm2")
    paragraphs = [text for text in datasets.handbook().split("\n\n") if 300 < len(text) < 500]
    questions = {"copying": COPY + paragraphs[0], "copying another": COPY + paragraphs[1], "free text": FREE}
    if options.quick:
        del questions["copying another"]
    new = 48 if options.quick else 80
    print(f"Prompt lookup over plain decoding, {new} tokens:")
    for name, question in questions.items():
        talk = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = talk["input_ids"]
        comparison = bench.compare(
            *(partial(written, decoder, prompt, k=k, new=new) for k in (0, options.k)),
            names=("plain", "lookup"),
            check=torch.equal,
            budget_s=4 * options.budget,
        )
        result = speculative.generate(decoder, prompt, k=options.k, max_new_tokens=new)
        note = f"  {result.accepted} of {result.proposed} guesses accepted, {result.calls} calls"
        yield {"calls": result.calls, "accepted": result.accepted, **show(f"{name}, k = {options.k}", comparison, note)}


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
