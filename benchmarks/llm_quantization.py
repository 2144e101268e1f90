"""Perplexity of the whole SmolLM2 with weights, activations or the cache in few bits, on and off its Q4_1 grid.

    python benchmarks/llm_quantization.py --folder DIR               40 minutes on an idle core, and writes the record
    python benchmarks/llm_quantization.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/llm_quantization.py --quick                    a few blocks, short texts; writes nothing

SIMULATED: floats are multiplied that the codes stand for, in float32. All Linears of all blocks are rounded; embedding,
head and norms stay, but for the row that says so.

The checkpoint was stored in Q4_1 before: 32 neighbours of a row on 16 points. "as is" takes these points as weights.
"dithered" moves each weight off its point by uniform noise of up to half a step, so that no grid is found again. The
dithered model is a model of its own, worse than the checkpoint, and its ratios are over itself. Blocks of 32 that are
the checkpoint's own still find part of the grid through the noise: "shifted" ways count blocks from the 16th input on.
A draw is the noise and the calibration text. The checkpoint as it is, there for the diagnosis, and ways that are not
IN_EVERY_DRAW have a single draw: their intervals are over windows alone.

Folded: the gains of the norms are multiplied into the Linears behind the norms, and nothing else. Rotated: the same,
and then the rotation (`quantization.rotation`). So the folded row stands between the model as it is and the rotated.

The cache is judged on the last tokens of long texts. A float pass reads the prompt, the cache is rounded, and the last
tokens read it as a decoder would. The same tokens are judged after a short and after a long prompt.

All models read the same windows of the test chapters, and the ratio of two perplexities has an interval over windows
and draws. Lesson 09 shows the record: `lab.recorded("llm_quantization")`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llm_two_of_four
import resumable
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labkit import batches, models, stats
from labkit.lesson import experiments
from labkit.modules.kv_cache import filled_cache
from labkit.quantization import affine, formats, k_quants, kv, rotation, weight_only
from labkit.quantization.kv import KVFormat
from labkit.records import cost

QUESTION = "what do four bits cost a whole language model, in its weights and its cache?"
GROUP = 64  # inputs that share a scale, but where a format says otherwise
SUPER_BLOCK = 6  # blocks of 32 in a K-quant's super-block: 8 do not fill SmolLM2's rows
AS_IS, DITHERED = "as is", "dithered"
FLOAT = "float"
Round = Callable[[Tensor], Tensor]


# --- the ways to round weights ----------------------------------------------------------------------------------------


def rtn(weight: Tensor, bits: int = 4, group: int | None = GROUP, symmetric: bool | str = False) -> Tensor:
    """Round to nearest, in groups along the inputs."""
    return weight_only.dequantize(weight_only.rtn(weight, bits, group_size=group, symmetric=symmetric))


def better_mxfp4(weight: Tensor) -> Tensor:
    return formats.with_better_exponent(weight).dequantize()


def q4_1(weight: Tensor) -> Tensor:
    """Round 32 neighbours to 16 points from the least to the largest of them, both ends in float16."""
    groups = weight.unflatten(1, (-1, 32))
    least = groups.amin(-1, True).half().float()
    step = ((groups.amax(-1, True) - least) / 15).half().float()
    codes = ((groups - least) / step.clamp(min=1e-8)).round().clamp(0, 15)
    return (codes * step + least).flatten(1)


def k_quant(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    return k_quants.fake(weight, importance, blocks=SUPER_BLOCK)


@dataclass(frozen=True)
class Way:
    """A way to store the weights of the blocks.

    bits: stored bits of a weight, scales and zero points included.
    round: the rule of a single weight; None for a method of `weight_only.quantize`, or for no rounding.
    method: that method, which reads text.
    importance: True for a rule that takes the mean square of each input as well.
    shifted: True to count blocks from the 16th input on, so that no block is one of the checkpoint's.
    change: what is done to the float model before rounding: "", "folded" or "rotated".
    head: True to round the head too, to 8 bits.
    """

    bits: float
    round: Round | None = None
    method: str = ""
    importance: bool = False
    shifted: bool = False
    change: str = ""
    head: bool = False


PER_ROW = 16 / 738  # of a scale a row: the blocks' rows have 738 inputs on average
ASYMMETRIC, SYMMETRIC = 4 + (16 + 4) / GROUP, 4 + 16 / GROUP
K_BITS = k_quants.bits_per_weight(SUPER_BLOCK)
WAYS = {
    FLOAT: Way(32),
    "RTN": Way(ASYMMETRIC, rtn),
    "GPTQ": Way(ASYMMETRIC, method="gptq"),
    "AWQ": Way(ASYMMETRIC, method="awq"),
    "K-quant": Way(K_BITS, k_quant),
    "K-quant, importance": Way(K_BITS, k_quant, importance=True),
    "signed": Way(SYMMETRIC, partial(rtn, symmetric="signed")),
    "restricted": Way(SYMMETRIC, partial(rtn, symmetric="restricted")),
    "NF4": Way(SYMMETRIC, partial(formats.fake, format="nf4")),
    "MXFP4": Way(4 + 8 / 32, partial(formats.fake, format="mxfp4")),
    "MXFP4, better exponent": Way(4 + 8 / 32, better_mxfp4),
    "Q4_1": Way(5, q4_1),
    "Q4_1, shifted": Way(5, q4_1, shifted=True),
    "K-quant, shifted": Way(K_BITS, k_quant, shifted=True),
    "K-quant, importance, shifted": Way(K_BITS, k_quant, importance=True, shifted=True),
    "RTN, folded": Way(ASYMMETRIC, rtn, change="folded"),
    "RTN, rotated": Way(ASYMMETRIC, rtn, change="rotated"),
    "RTN, groups of 192": Way(4 + (16 + 4) / 192, partial(rtn, group=192)),
    "RTN, 3 bits": Way(3 + (16 + 3) / GROUP, partial(rtn, bits=3)),
    "8 bits": Way(8 + PER_ROW, partial(rtn, bits=8, group=None, symmetric=True)),
    "RTN, head in 8 bits": Way(ASYMMETRIC, rtn, head=True),
}
ONLY_AS_IS = ("RTN, groups of 192", "RTN, 3 bits", "8 bits", "RTN, head in 8 bits")
ONLY_DITHERED = ("K-quant, shifted", "K-quant, importance, shifted")
IN_EVERY_DRAW = (FLOAT, "RTN", "GPTQ")

# --- the ways to round activations, with weights in 8 bits ------------------------------------------------------------


def per_tensor(x: Tensor) -> Tensor:
    return affine.fake_quantize(x, 8)


def per_token(x: Tensor) -> Tensor:
    """Round x [batch, tokens, in] with a scale for each token."""
    return affine.fake_quantize(x, 8, group_size=x.shape[-1])


ACTIVATIONS: dict[str, tuple[Round, str]] = {}
for _scales, _rule in (("a scale per tensor", per_tensor), ("a scale per token", per_token)):
    for _change in ("", "folded", "rotated"):
        ACTIVATIONS[f"{_scales}, {_change or AS_IS}"] = _rule, _change

# --- the caches -------------------------------------------------------------------------------------------------------

KIVI, PER_TOKEN, PER_CHANNEL = ("channel", "token"), ("token", "token"), ("channel", "channel")
CACHES: dict[str, KVFormat | None] = {
    FLOAT: None,
    "4 bits, K token, V token, no window": KVFormat(4, 4, *PER_TOKEN, window=0),
    "4 bits, K channel, V token": KVFormat(4, 4, *KIVI),
    "2 bits, K channel, V token": KVFormat(2, 2, *KIVI),
    "2 bits, K token, V token": KVFormat(2, 2, *PER_TOKEN),
    "2 bits, K channel, V channel": KVFormat(2, 2, *PER_CHANNEL),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    blocks: of the model.
    segments, segment: number and tokens of the calibration texts of a draw.
    windows, length: number and tokens of the test windows.
    texts: number of long texts, whose last `judged` tokens are predicted after `contexts` tokens, those included.
    draws: of noise and calibration text.
    """

    blocks: int = 30
    segments: int = 16
    segment: int = 512
    windows: int = 16
    length: int = 384
    texts: int = 16
    judged: int = 128
    contexts: tuple[int, int] = (512, 4096)
    draws: int = 3


QUICK = Sizes(blocks=2, segments=2, segment=96, windows=6, length=64, texts=6, judged=32, contexts=(64, 128), draws=2)


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A run.

    part: "weights", "activations" or "cache".
    way: a name in WAYS or ACTIVATIONS; "" for the cache, where a run does all forms on one text.
    checkpoint: AS_IS or DITHERED.
    draw: of noise and calibration text; the number of the text for the cache.
    """

    part: str
    way: str
    checkpoint: str
    draw: int


def all_runs(sizes: Sizes) -> list[Run]:
    """List the runs: draw after draw, then activations, and the cache on text after text."""
    return [
        *itertools.chain.from_iterable(runs_of(draw) for draw in range(sizes.draws)),
        *(Run("activations", way, AS_IS, 0) for way in ACTIVATIONS),
        *(Run("cache", "", AS_IS, text) for text in range(sizes.texts)),
    ]


def runs_of(draw: int) -> Iterator[Run]:
    """List the runs of a draw with weights rounded; the checkpoint as it is only in the first."""
    if draw == 0:
        for name in WAYS:
            if name not in ONLY_DITHERED:
                yield Run("weights", name, AS_IS, draw)
    for name in WAYS:
        if name in IN_EVERY_DRAW or (draw == 0 and name not in ONLY_AS_IS):
            yield Run("weights", name, DITHERED, draw)


# --- models and texts -------------------------------------------------------------------------------------------------


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears of the blocks by name."""
    parts = model.model.layers.named_modules(prefix="model.layers")
    return {name: part for name, part in parts if isinstance(part, nn.Linear)}


def dithered(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose weights lie off their Q4_1 points by uniform noise of up to half a step."""
    new = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    for layer in linears(new).values():
        groups = layer.weight.data.unflatten(1, (-1, 32))
        step = (groups.amax(-1, True) - groups.amin(-1, True)) / 15
        noise = torch.rand(groups.shape, generator=draw) - 0.5
        layer.weight.data = (groups + step * noise).flatten(1)
    return new


@torch.no_grad()
def folded(model: nn.Module) -> nn.Module:
    """Return a copy of the same function: the gains of the norms multiplied into the Linears behind them."""
    new = copy.deepcopy(model)
    for block in new.model.layers:
        for norm, readers in rotation.READERS.items():
            gain = block.get_submodule(norm).weight
            for reader in readers:
                block.get_submodule(reader).weight *= gain
            gain.fill_(1)
    return new


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": copy.deepcopy,
    "folded": folded,
    "rotated": rotation.rotate,
}


def dense(model: nn.Module) -> nn.Module:
    """Replace each `WeightOnlyLinear` by a Linear of the same weight, which is faster to judge."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, weight_only.WeightOnlyLinear):
            new = nn.Linear(layer.in_features, layer.out_features, bias=False)
            new.weight.data = layer.weight
            model.set_submodule(name, new)
    return model


@torch.no_grad()
def mean_squares(model: nn.Module, text: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean square of each input of each Linear of the blocks."""
    sums: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, y: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.flatten(0, -2).square().sum(0)

    with batches.watching(model, list(linears(model)), look):
        for piece in text:
            model.model(piece, use_cache=False)
    tokens = sum(piece.numel() for piece in text)
    return {name: total / tokens for name, total in sums.items()}


class Setting:
    """The checkpoint and the texts.

    model: SmolLM2 in float32.
    windows: tokens of the test chapters [windows, length], evenly spread.
    long_texts: [texts, the longest context], evenly spread over the same chapters; they may overlap.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.model = models.smollm2()
        self.model.model.layers = self.model.model.layers[: sizes.blocks]
        self.model.config.num_hidden_layers = sizes.blocks
        self._calibration, test = (llm_two_of_four.tokens_of(part) for part in ("calibration", "test"))
        self.windows = spread(test, sizes.windows, sizes.length)
        self.long_texts = spread(test, sizes.texts, sizes.contexts[-1])
        self._dithered: dict[int, nn.Module] = {}

    def text(self, draw: int) -> list[Tensor]:
        """Draw a calibration text: segments [1, segment]."""
        return batches.segments(self._calibration, self.sizes.segments, self.sizes.segment, seed=draw)

    def checkpoint(self, run: Run) -> nn.Module:
        """Return the float model of a run; the last dithered one is kept."""
        if run.checkpoint == AS_IS:
            return self.model
        if run.draw not in self._dithered:
            self._dithered = {run.draw: dithered(self.model, run.draw)}
        return self._dithered[run.draw]


def spread(tokens: Tensor, number: int, length: int) -> Tensor:
    """Cut pieces [number, length] out of a text, evenly spread from its begin to its end."""
    last = len(tokens) - length
    starts = [round(i * last / (number - 1)) for i in range(number)]
    return torch.stack([tokens[start : start + length] for start in starts])


# --- weights and activations ------------------------------------------------------------------------------------------


def rounded(setting: Setting, run: Run) -> nn.Module:
    """Return the model of a run with the points of its format as weights. SIMULATED."""
    way = WAYS[run.way]
    model = CHANGES[way.change](setting.checkpoint(run))
    if way.method:
        options = {"group_size": GROUP, "method": way.method, "batches": setting.text(run.draw)}
        return dense(weight_only.quantize(model, 4, **options))
    importance = mean_squares(model, setting.text(run.draw)) if way.importance else {}
    shift = 16 if way.shifted else 0
    for name, layer in linears(model).items():
        extra = (importance[name].roll(-shift),) if way.importance else ()
        if way.round:
            layer.weight.data = way.round(layer.weight.data.roll(-shift, 1), *extra).roll(shift, 1)
    if way.head:
        model.lm_head = copy.deepcopy(model.lm_head)  # the embedding stays
        model.lm_head.weight = nn.Parameter(rtn(model.lm_head.weight.detach(), 8, None, True))
    return model


def in_8_bits(setting: Setting, run: Run) -> nn.Module:
    """Return the model with weights in 8 bits, a scale per row, and all inputs of the blocks' Linears rounded."""
    rule, change = ACTIVATIONS[run.way]
    rotate = partial(rotation.rotate, online=True)  # the input of down_proj too
    model = rotate(setting.model) if change == "rotated" else CHANGES[change](setting.model)
    for layer in linears(model).values():
        layer.weight.data = rtn(layer.weight.data, 8, None, True)
        layer.register_forward_pre_hook(lambda layer, args, rule=rule: (rule(args[0]),))
    return model


# --- the cache --------------------------------------------------------------------------------------------------------


class Attentions(TorchFunctionMode):
    """Keep queries, keys and values of all causal attentions that are computed inside `with`: list of (q, k, v)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.calls.append(args[:3])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def cached(setting: Setting, text: int) -> dict[str, Any]:
    """Judge all forms of the cache on a text; return the mean loss of the last tokens, and decibels in the blocks."""
    sizes, model = setting.sizes, setting.model
    tokens = setting.long_texts[5 * text % sizes.texts]  # some of the texts lie all over the chapters, too
    losses: dict[str, float] = {}
    for context in sizes.contexts:
        ids = tokens[None, -context:]
        prompt, last = ids[:, : -sizes.judged - 1], ids[:, -sizes.judged - 1 : -1]
        argument, filled = filled_cache(model.model, prompt)
        for name, form in CACHES.items():
            with kv.quantized(form) if form else nullcontext():
                logits = model(last, **{argument: copy.deepcopy(filled)}).logits[0]
            losses[f"{name}, {context}"] = F.cross_entropy(logits, ids[0, -sizes.judged :]).item()
    return {"losses": losses, "dB": decibels(setting, tokens[None, -sizes.contexts[0] :])}


def decibels(setting: Setting, ids: Tensor) -> dict[str, list[float]]:
    """Return decibels of keys, of values, and of attention's output if one of both is rounded: a value a block.

    Four bits, no window: every token of the text is rounded, and the queries of its second half are looked at.
    """
    with Attentions() as seen:
        setting.model.model(ids, use_cache=False)
    of_blocks: dict[str, list[float]] = {}
    for q, k, v in seen.calls:
        exact = attended(q, k, v)
        for per in kv.PER:
            new_k, new_v = (kv.fake_quantize(x, 4, per) for x in (k, v))
            ratios = {
                "keys": affine.sqnr(k, new_k),
                "values": affine.sqnr(v, new_v),
                "output, keys rounded": affine.sqnr(exact, attended(q, new_k, v)),
                "output, values rounded": affine.sqnr(exact, attended(q, k, new_v)),
            }
            for of, db in ratios.items():
                of_blocks.setdefault(f"{of}, per {per}", []).append(db)
    return of_blocks


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the output of causal attention for the second half of the queries."""
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return output[:, :, q.shape[2] // 2 :]


def cache_bits(form: KVFormat | None, context: int, judged: int) -> float:
    """Return the bits of a cached number on average, over the tokens that the judged tokens read.

    Floats take 16 bits: the window, and tokens per channel that fill no group yet. A group has a scale of 16 bits, and
    a zero point of the bits of a code.
    """
    if form is None:
        return 16.0
    sides = ((form.key_bits, form.keys_per), (form.value_bits, form.values_per))
    total, read = 0.0, 0
    for tokens, (bits, per) in itertools.product(range(context - judged + 1, context + 1), sides):
        old = max(tokens - form.window, 0)
        if per == "channel":
            old = old // form.group_size * form.group_size
        in_codes = bits + (16 + bits) / form.group_size
        total += old * in_codes + (tokens - old) * 16
        read += tokens
    return total / read


# --- judging ----------------------------------------------------------------------------------------------------------


def do(setting: Setting, run: Run) -> dict[str, Any]:
    """Do a run."""
    if run.part == "cache":
        return cached(setting, run.draw)
    model = rounded(setting, run) if run.part == "weights" else in_8_bits(setting, run)
    return {"losses": llm_two_of_four.losses_of(model, setting.windows)}


Losses = dict[str, list[list[float]]]  # {way: [draws, windows]}


def losses_of(done: Mapping[Run, Mapping[str, Any]], part: str, checkpoint: str, draws: int) -> Losses:
    """Return the losses of the ways of a part by draw."""
    losses: Losses = {}
    for run, outcome in done.items():
        if (run.part, run.checkpoint) == (part, checkpoint) and run.draw < draws:
            losses.setdefault(run.way, []).append(outcome["losses"])
    return losses


def losses_of_caches(done: Mapping[Run, Mapping[str, Any]], context: int) -> Losses:
    """Return the losses of the forms of the cache at a context, the texts as windows of one draw."""
    of_texts = [outcome["losses"] for run, outcome in done.items() if run.part == "cache"]
    return {name: [[losses[f"{name}, {context}"] for losses in of_texts]] for name in CACHES}


def compared(losses: Losses, tokens: int) -> list[dict[str, Any]]:
    """Compare every two ways, the later one over the earlier, on the draws that both have."""
    rows = []
    for before, after in itertools.combinations(losses, 2):
        draws = min(len(losses[before]), len(losses[after]))
        value, low, high = stats.perplexity_ratio(losses[after][:draws], losses[before][:draws], tokens)
        rows.append({"after": after, "before": before, "draws": draws, "ratio": value, "low": low, "high": high})
    return rows


def mean_decibels(done: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return decibels, mean over blocks, with the interval over texts; and per token less per channel, with blocks."""
    of_texts = [outcome["dB"] for run, outcome in done.items() if run.part == "cache"]
    rows = []
    for name in of_texts[0]:
        value, low, high = stats.mean_ci([sum(db[name]) / len(db[name]) for db in of_texts])
        rows.append({"of": name, "dB": value, "low": low, "high": high})
    for of in dict.fromkeys(name.rpartition(", per ")[0] for name in of_texts[0]):
        differences = torch.tensor([db[f"{of}, per token"] for db in of_texts])
        differences -= torch.tensor([db[f"{of}, per channel"] for db in of_texts])  # [texts, blocks]
        value, low, high = stats.mean_ci(differences.mean(1).tolist())
        blocks = int((differences.mean(0) > 0).sum())
        rows.append({"of": f"{of}, token less channel", "dB": value, "low": low, "high": high, "blocks": blocks})
    return rows


def summary(done: Mapping[Run, Mapping[str, Any]], sizes: Sizes, draws: int) -> list[dict[str, Any]]:
    """Return a row for each way, checkpoint and draw: stored bits and perplexity over float, over windows."""
    rows = []
    for part, checkpoint in (("weights", AS_IS), ("weights", DITHERED), ("activations", AS_IS)):
        base = losses_of(done, "weights", checkpoint, draws)[FLOAT]
        for way, of_draws in losses_of(done, part, checkpoint, draws).items():
            if way == FLOAT:
                continue
            for draw, losses in enumerate(of_draws):
                before = base[draw] if len(base) > 1 else base[0]
                bits = WAYS[way].bits if part == "weights" else 8.0
                rows.append(row_of(part, way, checkpoint, draw, bits, [losses], [before], sizes.length - 1))
    for context in sizes.contexts:
        losses_at = losses_of_caches(done, context)
        before = losses_at.pop(FLOAT)
        for name, losses in losses_at.items():
            bits = cache_bits(CACHES[name], context, sizes.judged)
            rows.append(row_of("cache", f"{name}, {context}", AS_IS, 0, bits, losses, before, sizes.judged))
    return rows


def row_of(
    part: str,
    way: str,
    checkpoint: str,
    draw: int,
    bits: float,
    after: list[list[float]],
    before: list[list[float]],
    tokens: int,
) -> dict[str, Any]:
    """Return a row of the record."""
    value, low, high = stats.perplexity_ratio(after, before, tokens)
    names = {"part": part, "way": way, "checkpoint": checkpoint, "draw": draw, "bits": bits}
    return names | {"ratio": value, "low": low, "high": high}


def complete_draws(runs: Sequence[Run], done: Mapping[Run, Any], draws: int) -> int:
    """Return how many draws, from the first, have all their runs; other parts have none."""
    missing = [run.draw for run in runs if run not in done and run.part == "weights"]
    return min(missing, default=draws)


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes()
    setting = Setting(sizes)
    runs = all_runs(sizes)
    done = resumable.finished(runs, options, partial(do, setting))
    draws = complete_draws(runs, done, sizes.draws)
    texts = sum(run.part == "cache" for run in done)
    print(f"complete draws: {draws} of {sizes.draws}, texts of the cache: {texts} of {sizes.texts}")
    if not draws or texts < stats.LEAST:
        return
    tokens = sizes.length - 1
    of_checkpoint = {name: losses_of(done, "weights", name, draws) for name in (AS_IS, DITHERED)}
    activations = {FLOAT: of_checkpoint[AS_IS][FLOAT]} | losses_of(done, "activations", AS_IS, 1)
    comparisons = {f"weights, {name}": compared(losses, tokens) for name, losses in of_checkpoint.items()}
    comparisons["activations"] = compared(activations, tokens)
    for context in sizes.contexts:
        comparisons[f"cache, {context}"] = compared(losses_of_caches(done, context), sizes.judged)
    dithering = stats.perplexity_ratio(of_checkpoint[DITHERED][FLOAT], of_checkpoint[AS_IS][FLOAT], tokens)
    settings = {
        **asdict(sizes),
        "draws": draws,
        "texts": texts,
        "perplexity": math.exp(sum(of_checkpoint[AS_IS][FLOAT][0]) / sizes.windows),
        "bits": {name: way.bits for name, way in WAYS.items()},
        "dithered over as is": dict(zip(("ratio", "low", "high"), dithering, strict=True)),
        "comparisons": comparisons,
        "decibels": mean_decibels(done),
    }
    rows = summary(done, sizes, draws)
    if options.quick:
        return
    path = experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("part", "way", "checkpoint", "draw"),
        columns={"bits": cost("bits"), "ratio": cost("ratio", low="low", high="high")},
        settings=settings,
        seconds=sum(outcome["seconds"] for outcome in done.values()),
    )
    print(path)


if __name__ == "__main__":
    main()
