"""Perplexity of the whole SmolLM2 at 2:4 without training, beside fewer bits at equal bytes.

    python benchmarks/llm_two_of_four.py --folder DIR               40 minutes on an idle core, and writes the record
    python benchmarks/llm_two_of_four.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/llm_two_of_four.py --quick                    a few blocks, short texts; writes nothing

All Linears of all blocks are pruned or quantized; the embedding, which is the head too, and the norms stay. Weights and
arithmetic are bfloat16. The checkpoint is dequantised Q4_1: its weights had four bits before.

Three ways to choose 2:4 are compared at 16 bits: magnitude, Wanda (Sun et al. 2024, arXiv:2306.11695) and SparseGPT
(Frantar & Alistarh 2023, arXiv:2301.00774). Half of the weights by a free choice show what the pattern costs. At equal
bytes stand 2:4 of 4-bit values and 3 bits without a pattern, both rounded by GPTQ (Frantar et al. 2022,
arXiv:2210.17323), the first after SparseGPT. Eight bits, rounded to nearest, need fewer bytes than 2:4 at 16 bits.

A draw is a calibration text: segments at random places of the calibration chapters, the same for every way that reads
text. All models read the same windows of the test chapters, and the ratio of two perplexities has an interval over
windows and draws. Lesson 05 shows the record: `lab.recorded("llm_two_of_four")`.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from torch import Tensor, nn

from labkit import datasets, models, stats, training
from labkit.batches import segments
from labkit.lesson import experiments
from labkit.pruning import blockwise, unstructured
from labkit.quantization import weight_only
from labkit.records import cost

QUESTION = "what does a whole language model lose at 2:4 without training, and what at equal bytes with fewer bits?"
DRAWS = 3
GROUP = 64  # inputs that share a scale and a zero point
SCALE_BITS = 16
Pattern = float | tuple[int, int]


@dataclass(frozen=True)
class Way:
    """A way to make the weights smaller.

    pattern: (n, m), a fraction to remove, or None for all weights.
    method: method of `blockwise.prune`; "" without a pattern.
    bits: bits of a value; 16 is bfloat16.
    rounding: method of `weight_only.quantize`; "" for bfloat16.
    """

    pattern: Pattern | None = None
    method: str = ""
    bits: int = 16
    rounding: str = ""

    @property
    def reads_text(self) -> bool:
        return self.method in ("wanda", "sparsegpt") or self.rounding == "gptq"

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the dense matrix: values, positions, scales and zero points.

        2:4 stores two bits for the position of a value, a free choice one bit for every weight.
        """
        values = self.bits
        if isinstance(self.pattern, tuple):
            n, m = self.pattern
            values = n * (self.bits + math.ceil(math.log2(m))) / m
        elif self.pattern is not None:
            values = (1 - self.pattern) * self.bits + 1
        grid = (SCALE_BITS + self.bits) / GROUP if self.rounding else 0
        return values + grid


DENSE = "dense"
WAYS = {
    DENSE: Way(),
    "2:4, magnitude": Way((2, 4), "magnitude"),
    "2:4, Wanda": Way((2, 4), "wanda"),
    "2:4, SparseGPT": Way((2, 4), "sparsegpt"),
    "half, SparseGPT": Way(0.5, "sparsegpt"),
    "2:4 of 4 bits": Way((2, 4), "sparsegpt", 4, "gptq"),
    "3 bits": Way(None, "", 3, "gptq"),
    "8 bits": Way(None, "", 8, "rtn"),
}


@dataclass(frozen=True)
class Sizes:
    """Blocks of the model, calibration segments of a draw, test windows, and the tokens of a segment or a window."""

    blocks: int = 30
    segments: int = 24
    windows: int = 32
    length: int = 512
    draws: int = DRAWS


@dataclass(frozen=True)
class Run:
    """A way, by the name in WAYS, with the calibration text of a draw; draw 0 for a way that reads none."""

    way: str
    draw: int

    @property
    def file(self) -> str:
        return f"{self.way.replace(':', '-')}, {self.draw}.pt"


def all_runs(draws: int) -> list[Run]:
    """List the runs, all of a draw before those of the next."""
    runs = []
    for draw in range(draws):
        runs += [Run(name, draw) for name, way in WAYS.items() if draw == 0 or way.reads_text]
    return runs


class Setting:
    """The dense model and the texts.

    model: SmolLM2 in bfloat16.
    windows: tokens of the test chapters [windows, length], evenly spread over the text.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.model = models.smollm2(torch.bfloat16)
        self.model.model.layers = self.model.model.layers[: sizes.blocks]
        self._calibration = tokens_of("calibration")
        pieces = training.windows(tokens_of("test"), sizes.length)
        self.windows = pieces[:: len(pieces) // sizes.windows][: sizes.windows]

    def text(self, draw: int) -> list[Tensor]:
        """Draw a calibration text: segments [1, length]."""
        return segments(self._calibration, self.sizes.segments, self.sizes.length, seed=draw)


def losses_of(model: nn.Module, windows: Tensor) -> list[float]:
    """Return the mean loss of a token in each of the windows [windows, length], in nats."""
    return [math.log(training.perplexity(model, window, window=len(window))) for window in windows]


def tokens_of(part: str) -> Tensor:
    """Return the tokens [N] of some chapters of the handbook."""
    words = datasets.handbook(part)
    return torch.tensor(models.tokenizer("smollm2")(words, verbose=False)["input_ids"])


# --- the models -------------------------------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the blocks' Linears by name, without gradients."""
    weights = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and isinstance(module, nn.Linear):
            weights[f"{name}.weight"] = module.weight.detach()
    return weights


def pruned(setting: Setting, way: Way, draw: int, folder: Path) -> nn.Module:
    """Return the model pruned as the way says, with its masks; the pruned weights are kept in the folder."""
    if way.pattern is None:
        return setting.model

    def compute() -> dict[str, Tensor]:
        batches = setting.text(draw) if way.reads_text else None
        masked = blockwise.prune(setting.model, way.pattern, method=way.method, batches=batches)
        return unstructured.make_permanent(masked).state_dict()

    weights = resumable.once(folder / f"weights, {way.method}, {way.pattern}, {draw}.pt", compute)
    model = copy.deepcopy(setting.model)
    model.load_state_dict(weights)
    return unstructured.with_masks(model, {name: weight != 0 for name, weight in weights_of(model).items()})


def rounded(setting: Setting, way: Way, draw: int, model: nn.Module) -> nn.Module:
    """Return the model with the points of a grid as weights, in bfloat16: SIMULATED. Masked weights stay 0."""
    new = unstructured.make_permanent(model)
    if not way.rounding:
        return new
    batches = setting.text(draw) if way.reads_text else None
    codes = weight_only.quantize(model, way.bits, group_size=GROUP, method=way.rounding, batches=batches)
    for name, weight in weights_of(new).items():
        weight.copy_(codes.get_submodule(name.removesuffix(".weight")).weight)
    return new


def do(setting: Setting, run: Run, folder: Path) -> dict[str, Any]:
    """Do a run; return the losses of the windows in nats, and the share of zeros in the blocks' weights."""
    way = WAYS[run.way]
    model = rounded(setting, way, run.draw, pruned(setting, way, run.draw, folder))
    weights = weights_of(model).values()
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return {"losses": losses_of(model, setting.windows), "zeros": zeros}


# --- judging ----------------------------------------------------------------------------------------------------------


def ratio(after: list[list[float]], before: list[list[float]], tokens: int) -> dict[str, float]:
    """Return the perplexity over another model's, and its interval, as in `stats.perplexity_ratio`."""
    value, low, high = stats.perplexity_ratio(after, before, tokens)
    return {"ratio": value, "low": low, "high": high}


def compared(losses: Mapping[str, list[list[float]]], tokens: int) -> list[dict[str, Any]]:
    """Compare every two ways, the later one of WAYS over the earlier; losses: {way: [draws, windows]}."""
    rows = []
    names = list(losses)
    for i, before in enumerate(names):
        for after in names[i + 1 :]:
            draws = max(len(losses[before]), len(losses[after]))
            found = ratio(losses[after], losses[before], tokens)
            rows.append({"after": after, "before": before, "draws": draws, **found})
    return rows


def summary(done: Mapping[Run, Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return a row for each run but the dense: bits per weight, zeros, and perplexity over dense, over windows."""
    dense = [done[Run(DENSE, 0)]["losses"]]
    rows = []
    for run, outcome in done.items():
        if run.way == DENSE:
            continue
        rows.append({
            "weights": run.way,
            "draw": run.draw,
            "bits per weight": WAYS[run.way].bits_per_weight,
            "zeros": outcome["zeros"],
            **ratio([outcome["losses"]], dense, tokens),
        })  # fmt: skip
    return rows


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    sizes = Sizes(blocks=2, segments=2, windows=6, length=64, draws=2) if options.quick else Sizes()
    setting = Setting(sizes)
    runs = all_runs(sizes.draws)
    done = resumable.finished(runs, options, lambda run: do(setting, run, options.folder))
    if len(done) < len(runs):
        return
    losses: dict[str, list[list[float]]] = {}
    for run, outcome in done.items():
        losses.setdefault(run.way, []).append(outcome["losses"])
    tokens = sizes.length - 1
    comparisons = compared(losses, tokens)
    if options.quick:
        return
    path = experiments.save(
        Path(__file__).stem,
        QUESTION,
        summary(done, tokens),
        by=("weights", "draw"),
        columns={
            "bits per weight": cost("bits"),
            "zeros": cost("fraction"),
            "ratio": cost("ratio", low="low", high="high"),
        },
        settings={
            "dense": math.exp(sum(losses[DENSE][0]) / sizes.windows),
            "blocks": sizes.blocks,
            "windows": sizes.windows,
            "tokens of a window": sizes.length,
            "calibration tokens": sizes.segments * sizes.length,
            "draws": sizes.draws,
            "group": GROUP,
            "bits per weight": {name: way.bits_per_weight for name, way in WAYS.items()},
            "comparisons": comparisons,
        },
        seconds=sum(outcome["seconds"] for outcome in done.values()),
    )
    print(path)


if __name__ == "__main__":
    main()
