"""Where the heads, the neurons and the layers of a transformer are: one table of spellings, one row a way to write it.

A row is found by the names of the projections, not by the model's class, so that a model which spells its parts like
Llama is read like Llama. What is not spelled in the tables is not guessed: it is an error that says what there is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labkit.errors import InputError


class Spelling(NamedTuple):
    """Projections of an attention, by their names inside one module; one name thrice where they are one matrix."""

    query: str
    key: str
    value: str
    output: str


ATTENTIONS = (
    Spelling("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA
    Spelling("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT of earlier releases
    Spelling("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    Spelling("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2: query, key and value side by side
    Spelling("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, CLIP, Whisper
    Spelling("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen2, Qwen3, Mistral, Gemma, ViT
    Spelling("q", "k", "v", "o"),  # T5
)
FEED_FORWARDS = (  # (gate, up, down): down(act(up(x))), or down(act(gate(x)) * up(x))
    ("", "intermediate.dense", "output.dense"),  # BERT, RoBERTa
    ("", "lin1", "lin2"),  # DistilBERT
    ("", "c_fc", "c_proj"),  # GPT-2
    ("", "fc1", "fc2"),  # OPT, ViT, CLIP
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Qwen2, Qwen3, Mistral, Gemma
    ("", "wi", "wo"),  # T5
    ("wi_0", "wi_1", "wo"),  # T5 1.1
    ("", "0", "3"),  # torchvision's ViT
)
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")  # an attention's own name for it


@dataclass(frozen=True)
class Attention:
    """One attention: qualified names of its modules, and its sizes.

    name: the module that computes it, which has the attributes. heads: of queries. kv_heads: of keys and values; each
    serves `group` = heads / kv_heads query heads in a row. size: of a head. bias: a table of T5 with a column a head.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    size: int
    bias: str = ""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network: qualified names of its modules (gate is "" where it has none) and its neurons."""

    gate: str
    up: str
    down: str
    neurons: int


@dataclass(frozen=True)
class Anatomy:
    """A transformer's attentions, feed-forward networks and layers, in the order of the model's modules.

    stacks: qualified names of the lists of layers, one as a rule; an encoder-decoder has two.
    """

    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    stacks: tuple[str, ...]


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of `model`, from the spellings of its modules. A model that has none of them has empty tuples."""
    modules = dict(model.named_modules())
    attentions, feed_forwards = [], []
    for name, module in modules.items():
        if found := _attention(name, module):
            attentions.append(found)
        if found := _feed_forward(name, module):
            feed_forwards.append(found)
    inside = [part.output for part in attentions] + [part.down for part in feed_forwards]
    return Anatomy(tuple(attentions), tuple(feed_forwards), tuple(_stacks(modules, inside)))


def attentions(model: nn.Module) -> tuple[Attention, ...]:
    """The attentions of `model`; InputError if it has none that labkit can read."""
    if found := anatomy(model).attentions:
        return found
    spelled = "; ".join("/".join(dict.fromkeys(row)) for row in ATTENTIONS)
    raise InputError(
        f"{type(model).__name__} has no attention heads that labkit knows: it looks for projections spelled {spelled}."
    )


def feed_forwards(model: nn.Module) -> tuple[FeedForward, ...]:
    """The feed-forward networks of `model`; InputError if it has none that labkit can read."""
    if found := anatomy(model).feed_forwards:
        return found
    spelled = "; ".join("/".join(filter(None, row)) for row in FEED_FORWARDS)
    raise InputError(
        f"{type(model).__name__} has no feed-forward network that labkit knows: it looks for modules with projections "
        f"spelled {spelled}."
    )


def stack(model: nn.Module) -> str:
    """The name of the one list of layers of `model`; InputError if it has none, or two as an encoder-decoder."""
    found = anatomy(model).stacks
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} lists of layers ({', '.join(found)})" if found else "no list of transformer layers"
    raise InputError(f"{type(model).__name__} has {what}: layers can be removed from a model with exactly one.")


def check_index(index: object, n: int, what: str) -> None:
    """InputError unless `index` is a whole number from 0 to n - 1."""
    if isinstance(index, bool) or not isinstance(index, Integral) or not 0 <= index < n:
        raise InputError(f"There is no {what} {index!r}: they are counted from 0 to {n - 1}.")


def out_dim(module: nn.Module) -> int:
    """The dimension of `module.weight` that runs over its outputs: 0 in nn.Linear, 1 in transformers' Conv1D."""
    return 1 if {"nf", "nx"} <= vars(module).keys() else 0


def example(model: nn.Module) -> dict[str, Tensor]:
    """A small input for `model`, made from its config: three sequences of 7 tokens, or one image.

    Sizes that no head or width has, so that a trace does not take one for the other.
    """
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    if getattr(model, "main_input_name", "") == "pixel_values":
        side = config.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        image = torch.randn(1, config.num_channels, height, width, generator=generator)
        return {"pixel_values": image.to(device, next(model.parameters()).dtype)}
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise InputError(
            f"labkit can make no input for {type(model).__name__} from its config: give kwargs, what it is called with."
        )
    ids = torch.randint(vocabulary, (3, 7), generator=generator).to(device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids.flip(0)
    return found


def _attention(name: str, module: nn.Module) -> Attention | None:
    for row in ATTENTIONS:
        parts = [_part(module, path) for path in row]
        if any(part is None for part in parts):
            continue
        owner_path = row.query.rpartition(".")[0]
        owner = module.get_submodule(owner_path)
        size = next((getattr(owner, key) for key in HEAD_SIZES if hasattr(owner, key)), None)
        if size is None:
            return None
        fused = 3 if row.query == row.value else 1
        rows = [part.weight.shape[out_dim(part)] // fused for part in parts]
        table = _join(name, "relative_attention_bias") if hasattr(module, "relative_attention_bias") else ""
        names = [_join(name, path) for path in row]
        return Attention(_join(name, owner_path), *names, rows[0] // size, rows[1] // size, size, table)
    return None


def _feed_forward(name: str, module: nn.Module) -> FeedForward | None:
    for row in FEED_FORWARDS:
        gate, up, down = (_part(module, path) if path else None for path in row)
        if up is None or down is None or (row[0] and gate is None):
            continue
        neurons = up.weight.shape[out_dim(up)]
        if down.weight.shape[1 - out_dim(down)] == neurons:
            return FeedForward(*(_join(name, path) if path else "" for path in row), neurons)
    return None


def _part(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path` if it is there and has a matrix."""
    for step in path.split("."):
        module = module._modules.get(step)
        if module is None:
            return None
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _stacks(modules: Mapping[str, nn.Module], inside: list[str]) -> Iterator[str]:
    """Lists of modules of which every item holds an attention or a feed-forward network; only the outermost."""
    found: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(name.startswith(f"{n}.") for n in found):
            continue
        items = [_join(name, key) for key in module._modules]
        if items and all(any(part.startswith(f"{item}.") for part in inside) for item in items):
            found.append(name)
            yield name


def _join(*path: str) -> str:
    return ".".join(filter(None, path))
