"""Which architectures are pruned, and proved to compute what they should: labkit beside Torch-Pruning.

    python benchmarks/channels.py --zoo                                  all of zoo.toml, or this file by itself
    python benchmarks/zoo.py --models timm/dla34 transformers/bert       some
    python benchmarks/zoo.py --held-out                                  others, which labkit was not mended with
    python benchmarks/zoo.py --results zoo.jsonl                         keeps the rows, and goes on where it stopped

Every architecture and tool has a fresh process with a time limit, one thread, random weights. timm: a small model of
each module, on the smallest image that it takes. transformers: a small model by config with a head that its type has.
Half of the channels of every group go, and half of the heads, by their L2 norm. Torch-Pruning is called as its README
and its examples for transformers do: the classifier ignored, the heads of every attention module told, whole heads
removed, and the numbers that attention modules have written down put right afterwards.

An outcome is one of:
    equal      fewer parameters, and the pruned model is equal to the dense one as the check below has it
    refused    one sentence instead of a model, or a model from which nothing was removed
    failed     another error, a pruned model that does not run, or the time limit
    DIFFERENT  a pruned model that runs and is not equal, or labkit changed the model that it was given
    unjudged   what the check below cannot see

The check is the same for both tools and knows nothing of how they work. Which entries of each parameter stayed is read
off their values, which are all different. In the dense model all other entries are set to zero, and both models run in
float64 on another input and batch size. Scales, biases and statistics are random, so that no branch is scaled to
nothing. Where a normalisation or a standardised convolution lost channels, zeros cannot express that, so the dense
model takes the pruned module there, between a gather and a scatter. What the check cannot see: a statistic over
channels that is no module of its own. There "equal" rests on labkit's own proof, as the row says, and Torch-Pruning,
which has none, is not judged.

With transformers "heads" and "neurons" say whether `prune_heads` and `prune_ffn` remove half of them all.
"""

import argparse
import copy
import json
import multiprocessing
import re
import tempfile
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from labkit import machine
from labkit.errors import LabError

ZOO = tomllib.loads(Path(__file__).with_name("zoo.toml").read_text(encoding="utf-8"))
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")  # what attention modules call their number
PROJECTIONS = (
    *("qkv", "q", "k", "v", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "wq", "wk", "wv", "qkv_proj", "query_key_value", "in_proj", "Wqkv"),
)
LIBRARIES = ("timm", "torch_pruning", "transformers", "labkit.pruning.transformers")
TASKS = ("Seq2SeqLM", "SpeechSeq2Seq", "ImageClassification", "MaskedLM", "CausalLM", "AudioClassification")
STATISTICS = re.compile("StdConv|(?<!Batch)Norm|LN$")  # modules that have statistics over channels
DIRECTIONS = {"weight_v": "weight_g", "weight.original1": "weight.original0"}  # of a weight norm, and their lengths
OWN = "by its own proof"

Row = dict[str, Any]
Build = Callable[[str], tuple[nn.Module, tuple, dict[str, Any]]]  # random weights, no two entries of a parameter equal


# --- the architectures ------------------------------------------------------------------------------------------------


def names(held_out: bool = False) -> list[str]:
    """timm/<model> and transformers/<type>, of what is installed: the list, or the held-out sample."""
    listed = [f"{library}/{name}" for library in ("timm", "transformers") for name in ZOO[library]["names"]]
    return [name for name in (ZOO["held_out"]["names"] if held_out else listed) if find_spec(name.partition("/")[0])]


def build(name: str) -> tuple[nn.Module, tuple, dict[str, Tensor]]:
    """(model, args, kwargs): random weights, no two entries of a parameter equal, in eval mode."""
    library, _, name = name.partition("/")
    model, args, kwargs = timm_network(name) if library == "timm" else transformers_network(name)
    return spread(model), args, kwargs


def spread(model: nn.Module) -> nn.Module:
    """`model` itself in eval mode, with other weights: no two entries of a parameter are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for label, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point() and x.numel() and (isinstance(x, nn.Parameter) or "running" in label):
                spread_(x, label, generator)
    return model.eval()


def timm_network(name: str) -> tuple[nn.Module, tuple, dict]:
    import timm

    model = timm.create_model(name, **ZOO["timm"]["arguments"].get(name, {}))
    config = model.default_cfg
    channels, _, side = config["input_size"]
    if not config.get("fixed_input_size"):
        side = max(96, (config.get("min_input_size") or (0, 0, 0))[-1])
    return model, (torch.randn(1, channels, side, side),), {}


def transformers_network(name: str) -> tuple[nn.Module, tuple, dict]:
    import transformers

    from labkit.graph import anatomy

    kind = transformers.CONFIG_MAPPING[name]
    usual, sizes = kind(), ZOO["transformers"]["sizes"]
    small = {key: size for key, size in sizes.items() if type(vars(usual).get(key)) is int}
    config = kind(**small | ZOO["transformers"]["arguments"].get(name, {}))
    automatic = [getattr(transformers, f"AutoModelFor{task}") for task in TASKS]
    able = next((auto for auto in automatic if kind in auto._model_mapping), transformers.AutoModel)
    made = able._model_mapping[kind]
    model = (made[0] if isinstance(made, tuple) else made)(config).eval()
    return model, (), anatomy.example(model)


def spread_(x: Tensor, label: str, generator: torch.Generator) -> None:
    """Uniform numbers of the spread that x has, no two equal; vectors around 1 where they scale, else around 0."""
    steps = (torch.randperm(x.numel(), generator=generator).double() + 0.5) / x.numel() - 0.5
    spread, middle = 1.0, 0.0
    if x.dim() > 1:
        spread = 12**0.5 * float(x.std()) if float(x.std()) > 1e-3 else max(x[0].numel(), 1) ** -0.5
    elif label.endswith(("var", "weight")):
        middle = 1.0
    x.copy_((middle + spread * steps).view(x.shape))


def other(args: tuple, kwargs: Mapping[str, Tensor]) -> tuple[tuple, dict[str, Tensor]]:
    """Another input of the same kind: two images, or tokens in another order."""
    generator = torch.Generator().manual_seed(1)

    def new(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.dim():
            return torch.randn(max(2, len(x)), *x.shape[1:], generator=generator)
        return x.roll(1, 0).flip(-1) if x.unique().numel() > 2 else x  # a mask stays

    return tree_map_only(Tensor, new, (args, dict(kwargs)))


# --- the tools --------------------------------------------------------------------------------------------------------


def labkit(model: nn.Module, args: tuple, kwargs: dict) -> tuple[nn.Module, Row]:
    from labkit.pruning import channels

    start = time.perf_counter()
    pruned = channels.prune(model, args, kwargs, ratio=0.5, criterion="l2", scope="layer")
    facts = {"seconds": time.perf_counter() - start, "statistics": list(pruned.report.restricted)}
    return pruned.model, facts | {"loaded": _loads(model, pruned, args, kwargs)}


def _loads(model: nn.Module, pruned: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the pruned model comes back from the disk as it was."""
    from labkit.pruning import surgery

    with tempfile.TemporaryDirectory() as folder:
        surgery.save(pruned.model, [pruned.plan], Path(folder) / "model")
        again = surgery.load(model, Path(folder) / "model")
    return all(map(torch.equal, run(pruned.model, args, kwargs), run(again, args, kwargs)))


def torch_pruning(model: nn.Module, args: tuple, kwargs: dict) -> tuple[nn.Module, Row]:
    import torch_pruning as tp

    if hasattr(model, "set_attn_implementation"):  # its trace does not end, or not well, with a fused one and a cache
        model.set_attn_implementation("eager")
        model.config.use_cache = False
    start = time.perf_counter()
    projections = {m: list(_projections(m)) for m in model.modules()}
    heads = {linear: n for pairs in projections.values() for linear, n in pairs}
    widths = {linear: linear.out_features for linear in heads}
    heads |= {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    pruner = tp.pruner.BasePruner(
        model,
        kwargs or args,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=_classifiers(model),
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        output_transform=lambda out: getattr(out, "logits", out),
    )
    pruner.step()
    for module, pairs in projections.items():
        if pairs:
            first = pairs[0][0]
            share = first.out_features / widths[first]
            for name, value in list(vars(module).items()):  # numbers of heads, and widths of all of them
                if name in HEADS or (type(value) is int and value in (widths[first], widths[first] // 3)):
                    setattr(module, name, round(value * share))
            if groups := vars(module).get("num_key_value_groups"):
                module.num_key_value_groups = round(groups * share)
    return model, {"seconds": time.perf_counter() - start}


def _projections(module: nn.Module) -> Iterator[tuple[nn.Linear, int]]:
    """The linear modules that make the queries, keys and values of an attention module, and the heads of each."""
    n = next((n for name in HEADS if type(n := vars(module).get(name)) is int), None)
    config = getattr(module, "config", None)
    if n is None and "Attention" in type(module).__name__:
        n = getattr(config, "num_attention_heads", None)
    for name, child in module.named_children() if n else ():
        if name in PROJECTIONS and isinstance(child, nn.Linear):
            grouped = getattr(config, "num_key_value_heads", None) if name in ("k_proj", "v_proj") else None
            yield child, grouped or n


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """What gives the model's output."""
    if hasattr(model, "get_classifier"):
        heads = model.get_classifier()
        return list(heads) if isinstance(heads, (tuple, list)) else [heads]
    named = [getattr(model, name, None) for name in ("classifier", "lm_head", "cls", "generator", "head")]
    if hasattr(model, "get_output_embeddings"):
        named.append(model.get_output_embeddings())
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return [m for m in named if isinstance(m, nn.Module)] or layers[-1:]


TOOLS: dict[str, Callable[[nn.Module, tuple, dict], tuple[nn.Module, Row]]] = {
    "labkit": labkit,
    "torch_pruning": torch_pruning,
}


def units(model: nn.Module, kwargs: dict) -> Row:
    """Whether half of the heads, and half of the neurons of a transformer can be removed, or the reason why not."""
    from labkit.graph import anatomy
    from labkit.pruning import transformers

    def heads() -> None:
        parts = anatomy.attentions(model)
        transformers.prune_heads(model, {i: range(part.heads // 2) for i, part in enumerate(parts)}, kwargs=kwargs)

    row: Row = {}
    for what, call in {"heads": heads, "neurons": lambda: transformers.prune_ffn(model, 0.5, kwargs=kwargs)}.items():
        try:
            call()
            row[what] = ""
        except Exception as error:
            row[what] = ("" if isinstance(error, LabError) else f"{type(error).__name__}: ") + str(error)
    return row


# --- the check --------------------------------------------------------------------------------------------------------


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Of a tensor that has a graph, such as the weight of an old weight norm, it copies the values."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    derived = [x for x in attributes if isinstance(x, Tensor) and not x.is_leaf]
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in derived})


@torch.no_grad()
def run(model: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> list[Tensor]:
    """The logits, or else all tensors that the model gives, whatever holds them, as real numbers."""
    torch.manual_seed(0)  # a pass may draw numbers
    seen = set()

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        elif isinstance(value, (str, bytes, nn.Module, type)) or "Cache" in type(value).__name__ or id(value) in seen:
            return  # what a decoder keeps for its next call is state, not output
        elif isinstance(value, Mapping):
            yield from tensors(list(value.values()))
        elif isinstance(value, Iterable):
            for item in value:
                yield from tensors(item)
        elif hasattr(value, "__dict__"):
            seen.add(id(value))
            yield from tensors(vars(value))

    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))  # some write into their input
    out = model(*args, **kwargs)
    return list(tensors(getattr(out, "logits", out)))


def difference(dense: nn.Module, small: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> float:
    """The largest difference from `masked`, over the largest output; over what is allowed, so that 1 is the most."""
    reference, (args, kwargs) = masked(dense, small), other(args, kwargs)
    for dtype, allowed in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        models = [copied(model)._apply(partial(cast, dtype=dtype)) for model in (reference, small)]
        inputs = tree_map_only(Tensor, partial(cast, dtype=dtype), (args, kwargs))
        try:
            means = Means()
            with means:
                results = run(models[1], *inputs)
            with means.of_fewer():
                pairs = list(zip(run(models[0], *inputs), results, strict=True))
        except RuntimeError:
            if dtype is torch.float64:  # some forward passes name a dtype
                continue
            raise
        if any(a.shape != b.shape for a, b in pairs):
            return torch.inf
        pairs = [(a.double(), b.double()) for a, b in pairs if a.numel()]
        largest = max((float(a[a.isfinite()].abs().max()) for a, _ in pairs if a.isfinite().any()), default=0.0)
        if not largest or any(a.isnan().any() for a, _ in pairs):
            raise ValueError("the dense model gives no numbers, nothing but zeros, or what is not a number")
        apart = [torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf) for a, b in pairs]
        return max(float(x.max()) for x in apart) / (allowed * largest)
    raise AssertionError


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype.to_complex() if x.is_complex() else dtype) if x.is_floating_point() or x.is_complex() else x


def masked(dense: nn.Module, small: nn.Module) -> nn.Module:
    """`dense` with zeros where `small` has no entry."""
    masked = copied(dense)
    left = _tensors(small)
    stays: dict[str, list[Tensor]] = {}
    whole = _tensors(masked)
    for name, x in whole.items():
        if x.shape != left[name].shape and (entries := kept(x, left[name])):
            stays[name] = entries
            zeros = torch.zeros_like(x, requires_grad=False)
            path, _, attribute = name.rpartition(".")  # one place after another: a tool may have untied them
            owner = masked.get_submodule(path)
            if (
                lengths := _lengths(name, whole)
            ) is not None:  # each is divided by its own, and what has gone is multiplied by zero
                entries = [torch.arange(n) if lengths.shape[d] > 1 else entries[d] for d, n in enumerate(x.shape)]
                new = zeros.index_put(grid(entries), x.detach()[grid(entries)])
            else:
                new = zeros.index_put(grid(entries), left[name].detach())
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(new, requires_grad=False)
            else:
                owner._buffers[attribute] = new
    for name, module in list(masked.named_modules())[1:]:
        shapes = {label: x.shape for label, x in module._parameters.items() if x is not None}
        changed = [label for label, shape in shapes.items() if left[f"{name}.{label}"].shape != shape]
        told = changed and all(f"{name}.{label}" in stays for label in changed)
        if told and STATISTICS.search(type(module).__name__):
            pruned, entries = copied(small.get_submodule(name)), stays[f"{name}.{changed[0]}"]
            masked.set_submodule(name, Between(module, pruned, shapes[changed[0]], entries))
    return masked


def _lengths(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What the directions `name` of a weight norm are multiplied by, of the same number of dimensions."""
    pairs = [name.removesuffix(end) + lengths for end, lengths in DIRECTIONS.items() if name.endswith(end)]
    return tensors[pairs[0]] if pairs else None


def grid(entries: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.meshgrid(*entries, indexing="ij")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def kept(dense: Tensor, small: Tensor) -> list[Tensor] | None:
    """The indices of each dimension of `dense` whose entries `small` holds; None where its values do not tell."""

    def line(x: Tensor, place: list[int], dim: int) -> Tensor:
        return x[(*place[:dim], slice(None), *place[dim + 1 :])].detach()

    if dense.dim() != small.dim() or not small.numel():
        return None
    if dense.is_complex():
        dense, small = dense.real, small.real
    for place in (dense == small.flatten()[-1]).nonzero().tolist():
        lines = [(line(small, [-1] * small.dim(), d), *line(dense, place, d).sort()) for d in range(dense.dim())]
        entries = [
            order[torch.searchsorted(values, x.contiguous()).clamp(max=len(order) - 1)] for x, values, order in lines
        ]
        distinct = all(len(x.unique()) == len(x) for x in entries)
        if distinct and torch.equal(dense[grid(entries)], small):
            return entries
    return None


class Means(TorchFunctionMode):
    """Notes of how many numbers each mean is, in the pruned model; then in the dense one takes it of as many."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []
        self.left: Iterator[int] | None = None

    def of_fewer(self) -> "Means":
        self.left = iter(self.counts)
        return self

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (torch.mean, Tensor.mean) or not out.numel():
            return out
        count = args[0].numel() // out.numel()
        if self.left is None:
            self.counts.append(count)
            return out
        return out * (count / next(self.left))  # the others are zeros


class Between(nn.Module):
    """A pruned module in the dense model: it gets the channels that stay, and the others are zero after it."""

    def __init__(self, dense: nn.Module, pruned: nn.Module, shape: torch.Size, stays: list[Tensor]) -> None:
        super().__init__()
        convolution = isinstance(dense, nn.modules.conv._ConvNd)
        place = 0 if convolution else max(range(len(shape)), key=shape.__getitem__)  # of the channels in the parameter
        self.pruned, self.outputs, self.inputs, self.width = pruned, stays[place], stays[place], shape[place]
        self.weight = getattr(pruned, "weight", None)  # some look at its dtype
        first = convolution or isinstance(dense, nn.GroupNorm) or "2d" in type(dense).__name__.lower()
        first |= getattr(dense, "data_format", "") == "channels_first"
        self.dim = getattr(dense, "channel_dim", 1 if first else place - len(shape))
        if convolution:
            groups = (self.outputs // (self.width // dense.groups)).unique()
            self.inputs = (groups[:, None] * (dense.in_channels // dense.groups) + stays[1]).flatten()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = self.dim if x.shape[self.dim] == self.width else 1  # a norm that turns its input itself
        out = self.pruned(x.index_select(dim, self.inputs), *args, **kwargs)
        shape = list(out.shape)
        shape[dim] = self.width
        return out.new_zeros(shape).index_copy(dim, self.outputs, out)


# --- a row ------------------------------------------------------------------------------------------------------------


def row(tool: str, name: str, make: Build = build) -> Row:
    """What becomes of one architecture: outcome, reason, seconds, share of the parameters that is left."""
    model, args, kwargs = make(name)
    dense = copied(model)
    with_units = make is build and tool == "labkit" and name.startswith("transformers")
    extra = units(model, kwargs) if with_units else {}
    start = time.perf_counter()
    try:
        small, facts = TOOLS[tool](model, args, kwargs)
    except LabError as error:
        return {"outcome": "refused", "reason": str(error), "seconds": time.perf_counter() - start, **extra}
    except Exception as error:
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}", **extra}
    facts |= {"left": size(small) / size(dense), **extra}
    if facts["left"] == 1:
        return {"outcome": "refused", "reason": "nothing was removed", **facts}
    try:
        run(small, *other(args, kwargs))
    except Exception as error:
        reason = f"the pruned model does not run: {type(error).__name__}: {error}"
        return {"outcome": "failed", "reason": reason, **facts}
    try:
        off, reason = difference(dense, small, args, kwargs), ""
    except Exception as error:
        return {"outcome": "unjudged", "reason": f"the check does not run: {type(error).__name__}: {error}", **facts}
    if tool == "labkit" and not same(model, dense):
        reason = "the model that was given is changed"
    elif not facts.pop("loaded", True):
        reason = "the saved model is not loaded as it was"
    elif off > 1:
        places = [(place, dense.get_submodule(place.partition(" in ")[2])) for place in facts.get("statistics", ())]
        if own := [place for place, module in places if not _restricted(module)]:
            return {"outcome": "equal", "reason": f"{OWN}: {own[0]}", **facts}
        reason = f"{off:.2g} times the tolerance"
    return {"outcome": "DIFFERENT" if reason else "equal", "reason": reason, **facts}


def _restricted(module: nn.Module) -> bool:
    """Whether `masked` can take a module's statistics over the channels that stay: a weight tells it which stay."""
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def same(model: nn.Module, before: nn.Module) -> bool:
    """Whether the parameters and buffers are what they were."""
    after, before = _tensors(model), _tensors(before)
    return after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def process(tool: str, name: str, limit: float, make: Build = build) -> Row:
    """`row` in a process of its own, forked from one that has imported the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(filter(find_spec, LIBRARIES)))
    result, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, tool, name, make))
    worker.start()
    sender.close()
    try:
        if result.poll(limit):
            return result.recv()
        return {"outcome": "failed", "reason": f"no end in {limit:.0f} s"}
    except EOFError:
        return {"outcome": "failed", "reason": "the process ended without a word"}
    finally:
        worker.kill()
        worker.join()


def _work(sender: Connection, tool: str, name: str, make: Build) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = row(tool, name, make)
    except Exception as error:  # of the benchmark itself
        result = {"outcome": "failed", "reason": f"not judged: {type(error).__name__}: {error}"}
    sender.send(result)


# --- the table --------------------------------------------------------------------------------------------------------


def cell(row: Row) -> str:
    share = f"{row['left']:7.1%}" if row["outcome"] == "equal" else ""
    seconds = f"{row['seconds']:6.1f} s" if "seconds" in row else ""
    return f"{row['outcome']:9} {share:7} {seconds:8}"


def lines(name: str, rows: Mapping[str, Row]) -> Iterator[str]:
    ours = rows.get("labkit", {})
    cells = "  ".join(map(cell, rows.values()))
    parts = " ".join(what for what in ("heads", "neurons") if ours.get(what) == "")
    yield f"{name:42} {cells}  {parts}".rstrip()
    for tool, result in rows.items():
        if result["reason"]:
            yield f"    {tool}: {' '.join(result['reason'].split())[:300]}"
    for what in ("heads", "neurons"):
        if ours.get(what):
            yield f"    no {what}: {' '.join(ours[what].split())[:300]}"


def summary(table: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    outcomes = ("equal", "refused", "failed", "DIFFERENT", "unjudged")
    yield f"\n{'':14} {'':14} {'networks':>9}" + "".join(f"{outcome:>11}" for outcome in outcomes)
    libraries = list(dict.fromkeys(name.partition("/")[0] for name in table))
    for library in [*libraries, "all"] if len(libraries) > 1 else libraries:
        members = [rows for name, rows in table.items() if library in ("all", name.partition("/")[0])]
        for tool in TOOLS:
            counts = Counter(rows[tool]["outcome"] for rows in members if tool in rows)
            if counts:
                numbers = "".join(f"{counts[outcome]:11}" for outcome in outcomes)
                yield f"{library:14} {tool:14} {counts.total():9}{numbers}"
    ours = {name: rows["labkit"] for name, rows in table.items() if "labkit" in rows}
    families = [row for row in ours.values() if "heads" in row]
    for what in (("heads",), ("neurons",), ("heads", "neurons")) if families else ():
        n = sum(all(row.get(part) == "" for part in what) for row in families)
        yield f"{' and '.join(what)} are units in {n} of {len(families)} families of transformers"
    slow = sorted((row.get("seconds", 0), name) for name, row in ours.items())[:-6:-1]
    yield "slowest of labkit, proof included: " + ", ".join(f"{name} {seconds:.1f} s" for seconds, name in slow)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=names(), metavar="MODEL")
    parser.add_argument("--held-out", action="store_true", help="the sample that labkit was not mended with instead")
    parser.add_argument("--tools", nargs="+", default=[t for t in TOOLS if find_spec(t)], choices=TOOLS, metavar="TOOL")
    parser.add_argument("--limit", type=float, default=90, help="seconds for a process")
    parser.add_argument("--results", type=Path, help="a file that keeps the rows: those in it are not run again")
    options = parser.parse_args(arguments)
    models = names(held_out=True) if options.held_out else options.models
    survey(models, options.tools, options.limit, options.results)


def judged(rows: dict[str, Row]) -> dict[str, Row]:
    """Where labkit is equal by its own proof, what the check says of another tool counts for nothing."""
    other = rows.get("torch_pruning", {})
    if OWN in rows.get("labkit", {}).get("reason", "") and other.get("outcome") == "DIFFERENT":
        return rows | {"torch_pruning": other | {"outcome": "unjudged"}}
    return rows


def survey(
    models: list[str],
    tools: list[str],
    limit: float,
    results: Path | None = None,
    make: Build = build,
    judged: Callable[[dict[str, Row]], dict[str, Row]] = judged,
) -> None:
    """Prints a row for each model, and the summary. Rows in the file `results` are taken from there."""
    table: dict[str, dict[str, Row]] = {name: {} for name in models}
    for line in results.read_text().splitlines() if results and results.exists() else ():
        entry = json.loads(line)
        table.setdefault(entry["name"], {})[entry["tool"]] = entry["row"]
    packages = filter(find_spec, ("torch", "timm", "transformers", "torch_pruning"))
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"{machine.fingerprint('cpu').label}, 1 thread; {versions}")
    print(f"{'':42} " + "  ".join(f"{tool:26}" for tool in tools))
    for name in tqdm(models, unit="network", disable=None):
        for tool in tools:
            if tool not in table[name]:
                table[name][tool] = process(tool, name, limit, make)
                if results:
                    with results.open("a") as file:
                        print(json.dumps({"name": name, "tool": tool, "row": table[name][tool]}), file=file)
        table[name] = judged({tool: table[name][tool] for tool in tools})
        tqdm.write("\n".join(lines(name, table[name])))
    print("\n".join(summary({name: table[name] for name in models})))


if __name__ == "__main__":
    main()
