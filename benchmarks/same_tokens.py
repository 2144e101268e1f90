"""SmolLM2 writes the same tokens faster: many requests in one step, and guesses looked up in the text.

    python benchmarks/same_tokens.py --folder DIR               20 minutes on an idle core, and writes the record
    python benchmarks/same_tokens.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/same_tokens.py --quick                    two small runs, and writes nothing

serving: a load of 24 requests that are all there at the start, with short prompts and answers of about 60 tokens, is
    served three times: one request at a time, in static batches of eight, and by continuous batching with eight places.
    Each run draws other lengths; the ways take turns in going first.
copying, story: a prompt is continued by 128 tokens, greedily, with and without guesses by prompt lookup. In copying the
    model is asked to repeat a paragraph, whose first words stand there already. For stories it is also counted how
    often the first half of the blocks, used as a draft, guesses the next token that the whole model writes.

Seconds are CPU time of one thread, the prompts included. All ways compute in float32, and their texts are compared
token by token. A record can be written of the runs that are there: `--minutes 0`. Lesson 11 shows the record:
`lab.recorded("same_tokens")`.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resumable
import torch
from torch import Tensor

from labkit import datasets, models, stats
from labkit.attention import speculative
from labkit.attention.decoder import Decoder
from labkit.deploy import serving
from labkit.lesson import experiments
from labkit.records import cost, result

QUESTION = "how much faster does SmolLM2 write the same tokens, in batches and by guesses?"
LOADS, REQUESTS, PLACES = 10, 24, 8
MEAN, LEAST, MOST = 60, 4, 240  # tokens of an answer
PROMPT = (12, 40)  # tokens of a prompt
PROMPTS, NEW, GUESSES = 12, 128, 8
COPY = "Repeat the following text word for word.\n\n"
LETTERS = (700, 1000)  # of a paragraph to copy: it has about NEW tokens or more
BEGUN = 6  # words of the copy that stand there already
WHO = (
    "a lighthouse keeper who finds a map", "two sisters who open a bakery", "a robot that learns to paint",
    "a girl who talks to birds", "a train that never arrives", "an old clockmaker and his cat",
    "a village without shadows", "a boy who collects storms", "the last librarian on the moon",
    "a fox that wants to read", "a bridge between two islands", "a baker who lost her sense of taste",
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_batch": 1},
    "static": {"max_batch": PLACES, "batching": "static"},
    "continuous": {"max_batch": PLACES},
}


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A load of requests, or a prompt of a task."""

    part: str
    number: int


def all_runs() -> Iterator[Run]:
    """List the runs, so that an interruption leaves some of each part."""
    for number in range(max(LOADS, PROMPTS)):
        if number < PROMPTS:
            yield Run("copying", number)
            yield Run("story", number)
        if number < LOADS:
            yield Run("serving", number)


@dataclass(frozen=True)
class Setting:
    """The model, its tokenizer, and the text that prompts are cut from."""

    net: Decoder
    tokenizer: Any
    text: Tensor  # [tokens]
    paragraphs: Sequence[str]


def setting() -> Setting:
    tokenizer = models.tokenizer("smollm2")
    handbook = datasets.handbook()
    text = torch.tensor(tokenizer(handbook[:100_000])["input_ids"])
    paragraphs = [part for part in handbook.split("\n\n") if LETTERS[0] < len(part) < LETTERS[1]]
    return Setting(Decoder(models.smollm2()), tokenizer, text, paragraphs)


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the value of a call, and the CPU seconds of this thread."""
    start = time.thread_time()
    value = call()
    return value, time.thread_time() - start


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Rotate the names, so that each goes first in some runs."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


# --- serving ----------------------------------------------------------------------------------------------------------


def load_of(number: int, text: Tensor, quick: bool = False) -> tuple[list[Tensor], list[int]]:
    """Draw the prompts [T] of a load, and the numbers of tokens of the answers."""
    draw = np.random.default_rng(number)
    requests, most = (4, 6) if quick else (REQUESTS, MOST)
    sizes = draw.integers(*PROMPT, requests)
    places = draw.integers(0, len(text) - PROMPT[1], requests)
    prompts = [text[place : place + size] for place, size in zip(places, sizes, strict=True)]
    answers = np.clip(draw.exponential(MEAN, requests), LEAST, most).astype(int)
    return prompts, answers.tolist()


def steps_of(service: serving.Service) -> list[list[int]]:
    """Return the number of the step, from 1 on, in which each token of each request was written.

    All tokens of a step have the same time, and every step writes a token.
    """
    ends = np.unique(np.concatenate(service.token_s))
    return [(np.searchsorted(ends, times) + 1).tolist() for times in service.token_s]


def serve(number: int, of: Setting, quick: bool) -> dict[str, Any]:
    """Serve a load in each way: seconds, steps, the steps of each token, and how many texts are as one at a time."""
    prompts, answers = load_of(number, of.text, quick)
    services, seconds = {}, {}
    for name in in_turn(list(WAYS), number):
        services[name], seconds[name] = clocked(
            lambda way=WAYS[name]: serving.serve(of.net, prompts, max_new_tokens=answers, **way)
        )
    alone = services["one at a time"].ids
    outcome: dict[str, Any] = {"answers": answers, "prompts": [len(prompt) for prompt in prompts]}
    for name, service in services.items():
        outcome[name] = {
            "cpu": seconds[name],
            "tokens": sum(answers),
            "calls": service.steps,
            "computed": service.computed,
            "same": sum(map(torch.equal, service.ids, alone)),
            "texts": len(alone),
            "written at": steps_of(service),
        }
    return outcome


# --- guesses ----------------------------------------------------------------------------------------------------------


def prompt_of(run: Run, of: Setting) -> Tensor:
    """Return the prompt [1, T] of a task, as SmolLM2 is asked."""
    words, beginning = f"Write a short story about {WHO[run.number]}.", ""
    if run.part == "copying":
        paragraph = of.paragraphs[run.number]
        words, beginning = COPY + paragraph, " ".join(paragraph.split()[:BEGUN])
    talk = [{"role": "user", "content": words}]
    asked = of.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    return of.tokenizer(asked + beginning, return_tensors="pt")["input_ids"]


def write(run: Run, of: Setting, quick: bool) -> dict[str, Any]:
    """Continue a prompt with and without guesses: seconds, calls, and whether the texts are the same."""
    prompt = prompt_of(run, of)
    new = 4 if quick else NEW
    ways = {"plain": 0, "lookup": GUESSES}
    texts, seconds = {}, {}
    for name in in_turn(list(ways), run.number):
        texts[name], seconds[name] = clocked(
            lambda k=ways[name]: speculative.generate(of.net, prompt, k=k, max_new_tokens=new)
        )
    outcome: dict[str, Any] = {}
    for name, written in texts.items():
        outcome[name] = {
            "cpu": seconds[name],
            "tokens": new,
            "calls": written.calls,
            "guesses": written.proposed,
            "right": written.accepted,
            "same": int(torch.equal(written.ids, texts["plain"].ids)),
            "texts": 1,
        }
    if run.part == "story":
        outcome["half"] = guessed_by_half(of.net, texts["plain"].ids, new)
    return outcome


def guessed_by_half(net: Decoder, ids: Tensor, new: int) -> dict[str, int]:
    """Count how many of the last `new` tokens of a text [1, T] the first half of the blocks takes for most likely."""
    half = copy.copy(net)
    half.blocks = net.blocks[: len(net.blocks) // 2]
    half.layout = net.layout._replace(layers=len(half.blocks))
    states = half.hidden(ids[:, :-1], half.cache(ids.shape[1]))
    likely = half.logits(states[:, -new:]).argmax(-1)
    return {"guesses": new, "right": int((likely == ids[:, -new:]).sum())}


# --- the record -------------------------------------------------------------------------------------------------------


def do(run: Run, of: Setting, quick: bool) -> dict[str, Any]:
    return serve(run.number, of, quick) if run.part == "serving" else write(run, of, quick)


def rows_of(runs: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each way of each run."""
    names = ("cpu", "tokens", "calls", "same", "texts", "computed", "guesses", "right")
    rows = []
    for run, outcome in runs.items():
        for way in WAYS if run.part == "serving" else ("plain", "lookup"):
            of_way = outcome[way]
            rows.append({"part": run.part, "number": run.number, "way": way} | {n: of_way.get(n, 0) for n in names})
    return rows


def ratios(runs: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare the seconds and the calls of every two ways of a part, paired by run: median ratios over the runs."""
    pairs = [("serving", a, b) for a, b in (("one at a time", "continuous"), ("static", "continuous"),
                                            ("one at a time", "static"))]  # fmt: skip
    rows = []
    for part, before, after in [*pairs, ("copying", "plain", "lookup"), ("story", "plain", "lookup")]:
        outcomes = [outcome for run, outcome in runs.items() if run.part == part]
        row: dict[str, Any] = {"part": part, "before": before, "after": after, "runs": len(outcomes)}
        for name in ("cpu", "calls"):
            sides = ([outcome[way][name] for outcome in outcomes] for way in (before, after))
            ratio, low, high = stats.paired_ratio(*sides)
            row[name] = {"ratio": ratio, "low": low, "high": high}
        rows.append(row)
    return rows


def save(runs: Mapping[Run, Mapping[str, Any]]) -> Path:
    loads = {run.number: outcome for run, outcome in runs.items() if run.part == "serving"}
    first = loads[min(loads)]
    halves = [outcome["half"] for run, outcome in runs.items() if run.part == "story"]
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows_of(runs),
        by=("part", "number", "way"),
        columns={
            "cpu": cost("s", clock=True),
            "tokens": result("tokens"),
            "calls": cost("calls"),
            "same": result("texts"),
            "texts": result("texts"),
            "computed": result("tokens"),
            "guesses": result("tokens"),
            "right": result("tokens"),
        },
        settings={
            "requests": REQUESTS,
            "places": PLACES,
            "guesses": GUESSES,
            "new tokens": NEW,
            "answers": {number: outcome["answers"] for number, outcome in loads.items()},
            "prompts": first["prompts"],
            "written at": {way: first[way]["written at"] for way in WAYS},  # of the first load
            "half": {name: sum(half[name] for half in halves) for name in ("guesses", "right")},
            "ratios": ratios(runs),
        },
        seconds=sum(outcome["seconds"] for outcome in runs.values()),
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    of = setting()
    runs = list(all_runs())
    if options.quick:
        runs = [Run("story", 0), Run("serving", 0)]
    finished = resumable.finished(runs, options, lambda run: do(run, of, options.quick))
    parts = [run.part for run in finished]
    enough = all(parts.count(part) >= 6 for part in ("serving", "copying", "story"))
    if not options.quick and enough and (len(finished) == len(runs) or options.minutes == 0):
        print(save(finished))


if __name__ == "__main__":
    main()
