"""SmolLM2 in language engines, over transformers' generate with its cache: parity first, then tokens a second.

    python benchmarks/llm_engines.py                                         every row, one thread; about an hour
    python benchmarks/llm_engines.py --rows "int8, A8" q4_1 --budget 20 --windows 2

One process; ratios are of interleaved pairs (labkit.bench.compare) and of whole calls, prompt included: eager float32,
generate() of transformers with a cache, over the engine. Perplexity is that of the artefact, beside the model's, paired
by window, with the 95 % interval of the mean logarithm. A row whose perplexity is more than 1 % above the model's fails
the gate: it is timed, marked, and no speed-up of this model. Of the greedy texts it is told how many are transformers'
to the last token; in few bits and in bfloat16 they need not be.

Bound: the bytes of the file, all of which are read for a token, over the bandwidth that this machine reaches.
Requests: tokens a second of 1 to 16 at once over those of one; every text has to be the one that it is alone.
Lookup: prompt lookup over plain decoding in the same engine. A row "from GGUF" is the file as the engine reads it.
llama.cpp, where it is installed, is a row more: UNTESTED.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
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
    "float32": (GENAI, {"weights": "float32"}),
    "float16": (GENAI, {"weights": "float16"}),
    "float16, bf16": (GENAI, {"weights": "float16", "precision": "bf16"}),
    "int8": (GENAI, {"weights": "int8"}),
    "int8, A8": (GENAI, {"weights": "int8", "precision": "f32-a8"}),
    "int8, A8, bf16": (GENAI, {"weights": "int8", "precision": "bf16-a8"}),
    "q8_0, A8": (GENAI, {"weights": "q8_0", "precision": "f32-a8"}),
    "q8_0, A8, bf16": (GENAI, {"weights": "q8_0", "precision": "bf16-a8"}),
    "q4_1": (GENAI, {"weights": "q4_1"}),
    "q4_1, bf16": (GENAI, {"weights": "q4_1", "precision": "bf16"}),
    "int4, A8, bf16": (GENAI, {"weights": "int4", "precision": "bf16-a8"}),
    "Q4_1 from GGUF, A8, bf16": (GENAI, {"precision": "bf16-a8"}),
    "Q4_1 in llama.cpp": ("llama.cpp", {}),
}
PROMPT, NEW = 32, 64  # tokens of a request
FIRST = 256  # tokens of the prompt whose first answer is timed


def eager(model: nn.Module, prompt: Tensor, new: int) -> Tensor:
    """Greedily, past any end of text; prompt and result [T]."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, everything = prompt[None], torch.ones_like(prompt[None])
    return model.generate(ids, attention_mask=everything, max_new_tokens=new, **settings)[0]


def together(engine: LanguageEngine, prompts: Sequence[Tensor], new: int, **options: int) -> list[Tensor]:
    return engine.generate(prompts, max_new_tokens=new, **options).ids


def ratio(comparison: bench.Comparison, factor: float = 1.0) -> str:
    low, high = comparison.ci95
    return f"{comparison.speedup * factor:5.2f}x [{low * factor:.2f}, {high * factor:.2f}]"


def agreeing(texts: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    return sum(map(torch.equal, texts, others))


def perplexities(engine: LanguageEngine, windows: Sequence[Tensor], base: Sequence[float]) -> dict[str, float]:
    """Of the engine, and over the model's: value and interval; base: the model's losses, one a window."""
    losses = [math.log(engine.perplexity(window, window=len(window))) for window in windows]
    value, low, high = stats.mean_ci([a - b for a, b in zip(losses, base, strict=True)])
    perplexity = math.exp(sum(losses) / len(losses))
    return {"perplexity": perplexity, "ratio": math.exp(value), "low": math.exp(low), "high": math.exp(high)}


def requests(engine: LanguageEngine, prompts: Sequence[Tensor], alone: Sequence[Tensor], options) -> Iterator[dict]:
    """Several at once, over one."""
    for count in options.requests:
        texts = together(engine, prompts[:count], NEW)
        comparison = bench.compare(
            partial(together, engine, prompts[:1], NEW),
            partial(together, engine, prompts[:count], NEW),
            names=("one", f"{count} at once"),
            budget_s=options.budget,
        )
        rate = count * NEW / comparison.candidate.median_s
        print(
            f"    {count:2} requests: {rate:6.1f} tokens/s, {ratio(comparison, count)} those of one; "
            f"{agreeing(texts, alone)} of {count} texts as alone",
            flush=True,
        )
        yield {"requests": count, "as_alone": agreeing(texts, alone), **comparison.to_dict()}


def lookups(engine: LanguageEngine, prompts: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict]:
    """Prompt lookup over plain decoding."""
    for name, prompt in prompts.items():
        calls: list[Callable[[], Any]] = [
            partial(engine.generate, [prompt], max_new_tokens=NEW, lookup=guesses) for guesses in (0, options.guesses)
        ]
        plain, guessed = (call() for call in calls)
        same = int((plain.ids[0] == guessed.ids[0]).long().cumprod(0).sum()) - prompt.numel()
        comparison = bench.compare(*calls, names=("plain", "lookup"), budget_s=options.budget)
        print(
            f"    {name:16} {ratio(comparison)}, {NEW / guessed.steps:.1f} tokens a call, "
            f"{'all' if same == NEW else f'the first {same} of {NEW}'} tokens as without",
            flush=True,
        )
        yield {"lookup": name, "calls": guessed.steps, "same": same, **comparison.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, for perplexity")
    parser.add_argument("--texts", type=int, default=16, help="that are compared with transformers'")
    parser.add_argument("--requests", type=int, nargs="*", default=[2, 4, 8, 16], help="at once")
    parser.add_argument("--guesses", type=int, default=5, help="a call, of prompt lookup")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the files of the rows there")
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth = machine.ceilings().bandwidth
    print(f"{machine.fingerprint('cpu').label}, {options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    model, tokenizer, states = models.smollm2(), models.tokenizer("smollm2"), language.available()
    tokens = torch.tensor(tokenizer(datasets.handbook(), verbose=False)["input_ids"])
    windows = tokens[: 512 * options.windows].split(512)
    base = [math.log(training.perplexity(model, window)) for window in windows]
    starts = torch.linspace(512 * options.windows, len(tokens) - FIRST, max([options.texts, *options.requests]) + 1)
    prompts = [tokens[start : start + PROMPT] for start in starts[:-1].long().tolist()]
    long = tokens[-FIRST:]
    exact = [eager(model, prompt, NEW) for prompt in prompts[: options.texts]]
    print(f"transformers, eager float32: perplexity {math.exp(sum(base) / len(base)):.3f}")
    records: list[dict[str, Any]] = []
    for name in options.rows:
        engine_name, settings = ROWS[name]
        if states[engine_name] != "ready":
            print(f"{name}: {states[engine_name]}")
            continue
        source = model if "weights" in settings else fetch.path("smollm2") / GGUF
        folder = options.folder / name.replace(", ", "-") if options.folder and source is model else None
        engine = language.prepare(engine_name, source, folder=folder, **settings)
        quality = perplexities(engine, windows, base)
        verdict = "passes" if quality["ratio"] <= GATE else "FAILS"
        alone = [together(engine, [prompt], NEW)[0] for prompt in prompts]
        equal = agreeing(alone, exact)
        print(
            f"{name}: {engine.bytes / 1e6:.1f} MB, prepared in {engine.prepare_seconds:.1f} s, loaded in "
            f"{engine.load_seconds:.1f} s; perplexity {quality['perplexity']:.3f}, {quality['ratio']:.4f} "
            f"[{quality['low']:.4f}, {quality['high']:.4f}] of the model's: {verdict} the gate; {equal} of "
            f"{len(exact)} texts are transformers'",
            flush=True,
        )
        row = {"row": name, "bytes": engine.bytes, "load_s": engine.load_seconds, "prepare_s": engine.prepare_seconds}
        row |= {"quality": quality, "passes": verdict == "passes", "texts": len(exact), "equal": equal}
        for what, prompt, new in ((f"{PROMPT} + {NEW} tokens", prompts[0], NEW), (f"{FIRST} + 1 token", long, 1)):
            comparison = bench.compare(
                partial(eager, model, prompt, new),
                partial(together, engine, [prompt], new),
                names=("eager", name),
                budget_s=options.budget,
            )
            share = new * engine.bytes / bandwidth / comparison.candidate.median_s
            bound = f"; {share:.0%} of the bound by bytes" if new > 1 else ""
            print(
                f"    {what}: {new / comparison.candidate.median_s:.1f} tokens/s, {ratio(comparison)}{bound}",
                flush=True,
            )
            row[what] = {"share_of_bound": share, **comparison.to_dict()}
        row["lookups"] = list(lookups(engine, questions(), options))
        row["served"] = list(requests(engine, prompts, alone, options))
        records.append(row)
        if options.json:
            options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
