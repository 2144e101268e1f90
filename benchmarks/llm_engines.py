"""SmolLM2 in language engines: perplexity of the artefact first, then tokens a second, lookup, and requests at once.

    python benchmarks/llm_engines.py                                     one thread, about five minutes
    python benchmarks/llm_engines.py --rows float16 "int8, bf16, A8" --requests 2 4 8 16 --budget 60

One process; ratios are of interleaved pairs (labkit.bench.compare) and of whole calls, prompt included. A row is shown
against eager float32, generate() of transformers with its cache. Its perplexity is that of the artefact, beside the
model's, paired by window, with the 95 % interval of the mean logarithm. A rise of 1 % is the limit: with the whole
interval below it a row passes the gate, with all of it above it fails and is not timed, being another model; else the
gate is open, and more windows decide. Of the greedy texts it is told how many are transformers' to the last token;
with rounded weights or activations they need not be.

Bound: the bytes of the file, all of which are read for a token, over the bandwidth that this machine reaches.
The fastest row that does not fail then serves. Lookup: prompt lookup over plain decoding in the same engine, tokens
compared. Requests: tokens a second of several at once over those of one; every text has to be the one that it is
alone. A row "from GGUF" is the file as OpenVINO GenAI reads it. llama.cpp reads the same file, where it is installed;
it takes requests one after the other. That row is UNTESTED.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import questions
from torch import Tensor, nn

from labkit import bench, datasets, fetch, machine, models, stats, training
from labkit.deploy import language
from labkit.deploy.language import LanguageEngine

GATE = 1.01  # perplexity over the model's
GENAI, GGUF = "openvino-genai", "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "int8, A8": (GENAI, {"weights": "int8", "precision": "f32-a8"}),
    "Q4_1 from GGUF, A8": (GENAI, {"precision": "f32-a8"}),
    "Q4_1 in llama.cpp": ("llama.cpp", {}),
    "float32": (GENAI, {"weights": "float32"}),
    "float16": (GENAI, {"weights": "float16"}),
    "int8": (GENAI, {"weights": "int8"}),
    "int8, bf16, A8": (GENAI, {"weights": "int8", "precision": "bf16-a8"}),
}
PROMPT, NEW = 16, 32  # tokens of a request
COPIED = 48  # new tokens, where guesses are looked up


def eager(model: nn.Module, prompt: Tensor) -> Tensor:
    """NEW tokens, greedily, past any end of text; prompt and result [T]."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, everything = prompt[None], torch.ones_like(prompt[None])
    return model.generate(ids, attention_mask=everything, max_new_tokens=NEW, **settings)[0]


def together(engine: LanguageEngine, prompts: Sequence[Tensor]) -> list[Tensor]:
    return engine.generate(prompts, max_new_tokens=NEW).ids


def ratio(comparison: bench.Comparison, factor: float = 1.0) -> str:
    low, high = comparison.ci95
    return f"{comparison.speedup * factor:5.2f}x [{low * factor:.2f}, {high * factor:.2f}]"


def agreeing(texts: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    return sum(map(torch.equal, texts, others))


def quality(engine: LanguageEngine, windows: Sequence[Tensor], base: Sequence[float]) -> dict[str, float]:
    """Perplexity of the engine, and over the model's, value and interval; base: the model's losses, one a window."""
    losses = [math.log(engine.perplexity(window, window=len(window))) for window in windows]
    value, low, high = stats.mean_ci([a - b for a, b in zip(losses, base, strict=True)])
    perplexity = math.exp(sum(losses) / len(losses))
    return {"perplexity": perplexity, "ratio": math.exp(value), "low": math.exp(low), "high": math.exp(high)}


def lookups(engine: LanguageEngine, options: argparse.Namespace) -> Iterator[dict]:
    """Prompt lookup over plain decoding: for free text, and for copies of two texts."""
    for name, prompt in list(questions().items())[:3]:
        calls = [partial(engine.generate, [prompt], max_new_tokens=COPIED, lookup=k) for k in (0, options.guesses)]
        plain, guessed = (call() for call in calls)
        same = int((plain.ids[0] == guessed.ids[0]).long().cumprod(0).sum()) - prompt.numel()
        comparison = bench.compare(*calls, names=("plain", "lookup"), budget_s=options.budget / 2)
        print(
            f"    {name:16} {ratio(comparison)}, {COPIED / guessed.calls:.1f} tokens a call, "
            f"{'all' if same == COPIED else f'the first {same} of {COPIED}'} tokens as without",
            flush=True,
        )
        yield {"lookup": name, "calls": guessed.calls, "same": same, **comparison.to_dict()}


def requests(engine: LanguageEngine, prompts: Sequence[Tensor], options: argparse.Namespace) -> Iterator[dict]:
    """Several at once over one."""
    alone = [together(engine, [prompt])[0] for prompt in prompts]
    for count in options.requests:
        same = agreeing(together(engine, prompts[:count]), alone)
        calls = (partial(together, engine, prompts[:n]) for n in (1, count))
        comparison = bench.compare(*calls, names=("one", f"{count} at once"), budget_s=options.budget)
        rate = count * NEW / comparison.candidate.median_s
        print(
            f"    {count:2} requests: {rate:6.1f} tokens/s, {ratio(comparison, count)} those of one; "
            f"{same} of {count} texts as alone",
            flush=True,
        )
        yield {"requests": count, "as_alone": same, **comparison.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:3], metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, for perplexity")
    parser.add_argument("--texts", type=int, default=4, help="that are compared with transformers'")
    parser.add_argument("--requests", type=int, nargs="*", default=[16], help="at once")
    parser.add_argument("--guesses", type=int, default=5, help="a call, of prompt lookup")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a comparison; of lookup, half")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth = machine.ceilings().bandwidth
    print(f"{machine.fingerprint('cpu').label}, {options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    model, states = models.smollm2(), language.available()
    tokens = torch.tensor(models.tokenizer("smollm2")(datasets.handbook(), verbose=False)["input_ids"])
    windows = tokens[: 512 * options.windows].split(512)
    base = [math.log(training.perplexity(model, window)) for window in windows]
    count = max([options.texts, *options.requests])
    prompts = tokens[-PROMPT * count :].split(PROMPT)
    exact = [eager(model, prompt) for prompt in prompts[: options.texts]]
    print(f"transformers, eager float32: perplexity {math.exp(sum(base) / len(base)):.3f}")
    records: dict[str, dict[str, Any]] = {}
    fastest: tuple[float, str, LanguageEngine | None] = (0.0, "", None)
    for name in options.rows:
        engine_name, settings = ROWS[name]
        if states[engine_name] != "ready":
            print(f"{name}: {states[engine_name]}")
            continue
        source = model if "weights" in settings else fetch.path("smollm2") / GGUF
        engine = language.prepare(engine_name, source, **settings)
        judged = quality(engine, windows, base)
        equal = agreeing([together(engine, [prompt])[0] for prompt in prompts[: options.texts]], exact)
        verdict = "passes" if judged["high"] <= GATE else "fails" if judged["low"] > GATE else "open"
        print(
            f"{name}: {engine.bytes / 1e6:.1f} MB, prepared in {engine.prepare_seconds:.1f} s, loaded in "
            f"{engine.load_seconds:.1f} s; perplexity {judged['perplexity']:.3f}, {judged['ratio']:.4f} "
            f"[{judged['low']:.4f}, {judged['high']:.4f}] of the model's: "
            f"gate: {verdict}; {equal} of {len(exact)} texts are transformers'",
            flush=True,
        )
        records[name] = {"bytes": engine.bytes, "quality": judged, "texts": len(exact), "equal": equal}
        if verdict == "fails":
            continue
        calls = partial(eager, model, prompts[0]), partial(together, engine, prompts[:1])
        comparison = bench.compare(*calls, names=("eager", name), budget_s=options.budget)
        rate = NEW / comparison.candidate.median_s
        print(
            f"    {rate:.1f} tokens/s, {ratio(comparison)} eager; {rate * engine.bytes / bandwidth:.0%} of the bound "
            "by bytes",
            flush=True,
        )
        records[name] |= comparison.to_dict()
        if engine_name == GENAI:
            fastest = max(fastest, (comparison.speedup, name, engine))
    _, name, engine = fastest
    if engine is not None:
        print(f"{name}, the fastest that does not fail, serves:")
        records[name] |= {"lookups": [*lookups(engine, options)], "served": [*requests(engine, prompts, options)]}
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
