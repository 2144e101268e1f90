"""SmolLM2 in OpenVINO GenAI: perplexity of the deployed files, then tokens a second, lookup, and several requests.

    python benchmarks/llm_engines.py                                     one thread, about five minutes
    python benchmarks/llm_engines.py --rows float16 "int8, bf16, A8" --requests 2 4 8 16 --budget 60

One process; ratios are of interleaved pairs (labkit.bench.compare) and of whole calls, prompt included. A row is shown
against eager float32, generate() of transformers with its cache. The row's perplexity is paired with the model's by
window, with the 95 % interval over windows (a bootstrap). A rise of 1 % is the limit: with the whole interval below the
limit a row passes the gate, with the whole interval above it fails and is not timed, being another model; else the gate
is open, and more windows decide. Printed too: the number of greedy texts equal to transformers' to the last token; with
rounded weights or activations, texts need not be equal.

Bound: the bytes of the file, all of which are read for a token, over the bandwidth that this machine reaches.
The fastest row that does not fail then serves. Lookup: prompt lookup over plain decoding in the same engine, tokens
compared. Requests: tokens a second of several at once over one request; every text has to be the text of the request
alone. A row "from GGUF" is the file as OpenVINO GenAI reads it.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attention import questions
from torch import Tensor, nn

from labkit import bench, datasets, fetch, machine, models, stats, training
from labkit.deploy import language
from labkit.deploy.language import LanguageEngine

GATE = 1.01  # perplexity over the model's
ENGINE = "openvino-genai"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS: dict[str, dict[str, str]] = {  # arguments of language.prepare; without weights the GGUF file is read
    "int8, A8": {"weights": "int8", "precision": "f32-a8"},
    "Q4_1 from GGUF, A8": {"precision": "f32-a8"},
    "float32": {"weights": "float32"},
    "float16": {"weights": "float16"},
    "int8": {"weights": "int8"},
    "int8, bf16, A8": {"weights": "int8", "precision": "bf16-a8"},
}
WINDOW = 512  # tokens, of perplexity
PROMPT, NEW = 16, 32  # tokens of a request
COPIED = 48  # new tokens, where guesses are looked up


class Fastest(NamedTuple):
    """The row with the largest speed-up over transformers so far."""

    speedup: float = 0.0
    name: str = ""
    engine: LanguageEngine | None = None


def eager(model: nn.Module, prompt: Tensor) -> Tensor:
    """Continue prompt [T] greedily by NEW tokens in transformers, past any end of text: [T + NEW]."""
    ids = prompt[None]
    texts = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return texts[0]


def together(engine: LanguageEngine, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Continue prompts by NEW tokens in the engine, all at once."""
    return engine.generate(prompts, max_new_tokens=NEW).ids


def ratio(comparison: bench.Comparison, factor: float = 1.0) -> str:
    value, low, high = (factor * x for x in (comparison.speedup, *comparison.ci95))
    return f"{value:5.2f}x [{low:.2f}, {high:.2f}]"


def agreeing(texts: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    return sum(map(torch.equal, texts, expected))


def quality(engine: LanguageEngine, windows: Sequence[Tensor], base: Sequence[float]) -> dict[str, Any]:
    """Measure the engine's perplexity, alone and over the model's with an interval. base: the model's loss per window.

    "gate": "passes", "fails" or "open".
    """
    losses = [math.log(engine.perplexity(window, window=len(window))) for window in windows]
    tokens = [len(window) - 1 for window in windows]
    value, low, high = stats.perplexity_ci(losses, tokens, base)
    gate = "passes" if high <= GATE else "open"
    if low > GATE:
        gate = "fails"
    perplexity = math.exp(sum(losses) / len(losses))
    return {"perplexity": perplexity, "ratio": value, "low": low, "high": high, "gate": gate}


def speed(
    engine: LanguageEngine, name: str, model: nn.Module, prompt: Tensor, bandwidth: float, budget_s: float
) -> bench.Comparison:
    """Compare a request in the engine with transformers, and print tokens a second. bandwidth: of memory, bytes/s."""
    calls = (partial(eager, model, prompt), partial(together, engine, [prompt]))
    comparison = bench.compare(*calls, names=("eager", name), budget_s=budget_s)
    rate = NEW / comparison.candidate.median_s
    share = rate * engine.bytes / bandwidth
    print(
        f"    {rate:.1f} tokens/s, {ratio(comparison)} eager; {share:.0%} of the bound by bytes",
        flush=True,
    )
    return comparison


def lookups(engine: LanguageEngine, guesses: int, budget_s: float) -> Iterator[dict[str, Any]]:
    """Compare prompt lookup with plain decoding: for free text, and for copies of two texts."""
    for name, prompt in list(questions().items())[:3]:
        generate = partial(engine.generate, [prompt], max_new_tokens=COPIED)
        calls = (partial(generate, lookup=0), partial(generate, lookup=guesses))
        plain, guessed = (call() for call in calls)
        is_same = (plain.ids[0] == guessed.ids[0]).long().cumprod(0)
        same = int(is_same.sum()) - prompt.numel()
        comparison = bench.compare(*calls, names=("plain", "lookup"), budget_s=budget_s)
        tokens = "all" if same == COPIED else f"the first {same} of {COPIED}"
        per_call = COPIED / guessed.calls
        print(
            f"    {name:16} {ratio(comparison)}, {per_call:.1f} tokens a call, {tokens} tokens as without",
            flush=True,
        )
        yield {"lookup": name, "calls": guessed.calls, "same": same, **comparison.to_dict()}


def requests(
    engine: LanguageEngine, prompts: Sequence[Tensor], counts: Sequence[int], budget_s: float
) -> Iterator[dict[str, Any]]:
    """Compare several requests at once with one request. counts: numbers of requests."""
    alone = [together(engine, [prompt])[0] for prompt in prompts]
    for count in counts:
        same = agreeing(together(engine, prompts[:count]), alone)
        calls = (partial(together, engine, prompts[:1]), partial(together, engine, prompts[:count]))
        comparison = bench.compare(*calls, names=("one", f"{count} at once"), budget_s=budget_s)
        rate = count * NEW / comparison.candidate.median_s
        rates = f"{rate:6.1f} tokens/s, {ratio(comparison, count)} those of one"
        print(f"    {count:2} requests: {rates}; {same} of {count} texts as alone", flush=True)
        yield {"requests": count, "as_alone": same, **comparison.to_dict()}


def print_quality(name: str, engine: LanguageEngine, judged: dict[str, Any]) -> None:
    megabytes = engine.bytes / 1e6
    print(
        f"{name}: {megabytes:.1f} MB, prepared in {engine.prepare_seconds:.1f} s, "
        f"loaded in {engine.load_seconds:.1f} s; "
        "perplexity {perplexity:.3f}, {ratio:.4f} [{low:.4f}, {high:.4f}] of the model's: "
        "gate: {gate}".format(**judged),
        flush=True,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:2], metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--windows", type=int, default=32, help=f"of {WINDOW} tokens, for perplexity")
    parser.add_argument("--texts", type=int, default=4, help="that are compared with transformers'")
    parser.add_argument("--requests", type=int, nargs="*", default=[16], help="at once")
    parser.add_argument("--guesses", type=int, default=5, help="a call, of prompt lookup")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a comparison; of lookup, half")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every sample")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    state = language.available()[ENGINE]
    if state != "ready":
        print(state)
        return
    torch.set_num_threads(options.threads)
    bandwidth = machine.ceilings().bandwidth
    computer = machine.fingerprint("cpu").label
    print(f"{computer}, {options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    model = models.smollm2()
    tokens = torch.tensor(models.tokenizer("smollm2")(datasets.handbook(), verbose=False)["input_ids"])
    windows = tokens[: WINDOW * options.windows].split(WINDOW)
    base = [math.log(training.perplexity(model, window)) for window in windows]
    count = max([options.texts, *options.requests])
    prompts = tokens[-PROMPT * count :].split(PROMPT)
    compared = prompts[: options.texts]
    exact = [eager(model, prompt) for prompt in compared]
    print(f"transformers, eager float32: perplexity {math.exp(sum(base) / len(base)):.3f}")
    records: dict[str, dict[str, Any]] = {}
    fastest = Fastest()
    for name in options.rows:
        settings = ROWS[name]
        source = model if "weights" in settings else fetch.path("smollm2") / GGUF
        engine = language.prepare(ENGINE, source, **settings)
        judged = quality(engine, windows, base)
        texts = [together(engine, [prompt])[0] for prompt in compared]
        equal = agreeing(texts, exact)
        print_quality(name, engine, judged)
        print(f"    {equal} of {len(exact)} texts are transformers'", flush=True)
        records[name] = {"bytes": engine.bytes, "quality": judged, "texts": len(exact), "equal": equal}
        if judged["gate"] == "fails":
            continue
        comparison = speed(engine, name, model, prompts[0], bandwidth, options.budget)
        records[name] |= comparison.to_dict()
        if comparison.speedup > fastest.speedup:
            fastest = Fastest(comparison.speedup, name, engine)
    if fastest.engine is not None:
        print(f"{fastest.name}, the fastest that does not fail, serves:")
        record = records[fastest.name]
        record["lookups"] = list(lookups(fastest.engine, options.guesses, options.budget / 2))
        record["served"] = list(requests(fastest.engine, prompts, options.requests, options.budget))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
