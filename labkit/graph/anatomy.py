"""Where the heads, the neurons and the layers of a transformer are, as a traced call shows them, whatever their names.

An attention is where a softmax over scores [B, heads, queries, keys] or [B * heads, queries, keys] is taken; the next
linear module reads what its heads give. A feed-forward network is a group of coupled channels in a layer that one
linear module or parameter reads. Nothing is scored or removed here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import check_mapping, check_module
from labkit.errors import InputError
from labkit.graph import tracing
from labkit.graph.groups import Coupling
from labkit.graph.record import Record
from labkit.graph.spans import span_at
from labkit.modules.stacks import is_linear, out_dim, stacks

SOFTMAX = ("_softmax", "_safe_softmax")


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention.

    name: the module that takes the softmax. output: the linear module that reads the heads' results, side by side.
    heads: of queries. size: columns of `output` that read one head. labels: [heads], of the trace; None where it has
    no labels for heads, so that none can go.
    """

    name: str
    output: str
    heads: int
    size: int
    labels: np.ndarray | None


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network, or several experts of one width.

    group: its number in the coupling, whose units are the neurons, of experts those at one place of each. down: the
    linear module that reads them, or the parameter [experts, out, in].
    """

    group: int
    down: str


def attentions(model: nn.Module, record: Record | None = None) -> tuple[Attention, ...]:
    """The attentions of `model` in the order of a forward pass; one that runs several times is there once.

    record: of a traced call; None traces one on `example`. InputError if there are none.
    """
    record = tracing.record(model, (), example(model)) if record is None else record
    modules = dict(model.named_modules())
    classes, _ = record.labels.resolve()
    rows = {(axis.name, axis.dim): np.arange(axis.base, axis.base + axis.size) for axis in record.axes}
    attentions: dict[str, Attention] = {}
    softmax = None
    for operation in record.operations:
        dim = len(operation.shape) - 3  # of the heads
        if operation.name in SOFTMAX and dim in (0, 1):
            span = span_at(operation.spans, dim)
            labels = span.labels if span is not None and span.dims == (dim,) else None
            if dim == 0 and labels is not None:
                labels = np.unique(labels)  # the same for each example
            heads = operation.shape[1] if dim else 0 if labels is None else len(labels)
            softmax = operation if heads else None
        elif softmax is None:
            continue
        elif is_linear(module := modules[operation.module]):
            columns = rows.get((f"{operation.module}.weight", 1 - out_dim(module)), np.arange(0))
            if len(columns) and (labels is None or np.isin(classes[labels], classes[columns]).all()):
                attention = Attention(softmax.module, operation.module, heads, len(columns) // heads, labels)
                attentions.setdefault(softmax.module, attention)
                softmax = None
        elif operation.name in ("addmm", "mm", "convolution"):  # a product with weights that no linear module has
            softmax = None
    if not attentions:
        raise InputError(
            f"{type(model).__name__} has no attention heads that labkit can read: it looks for a softmax over scores "
            "[batch, heads, queries, keys], and for the linear layer that reads what the heads give."
        )
    return tuple(attentions.values())


def feed_forwards(model: nn.Module, coupling: Coupling) -> tuple[FeedForward, ...]:
    """The feed-forward networks of `model` in the order of a forward pass; InputError if there are none."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    inside = tuple(f"{name}." for name in stacks(model))
    softmaxes = {operation.module for operation in coupling.record.operations if operation.name in SOFTMAX}
    networks = []
    for i, group in enumerate(coupling.groups):
        readers = {m.name.removesuffix(".weight"): m for m in group.members if m.role == "reads"}
        if len(readers) != 1:
            continue
        ((name, member),) = readers.items()
        attends = any(name.startswith(f"{module}.") for module in softmaxes)
        neurons = len(member.indices(0)) == 1  # and not heads
        reads = is_linear(modules.get(name)) or (name in parameters and parameters[name].dim() == 3)
        if name.startswith(inside) and not attends and neurons and reads:
            networks.append(FeedForward(i, name))
    if not networks:
        raise InputError(
            f"{type(model).__name__} has no feed-forward network that labkit can prune: it looks for neurons in a list "
            "of layers that one linear layer, or one parameter of experts, reads."
        )
    return tuple(networks)


def check_index(index: object, n: int, what: str) -> None:
    """InputError unless `index` is a whole number from 0 to n - 1."""
    if isinstance(index, bool) or not isinstance(index, Integral) or not 0 <= index < n:
        raise InputError(f"There is no {what} {index!r}: they are counted from 0 to {n - 1}.")


def configs(model: nn.Module) -> Iterator[Any]:
    """Every config object in the model, once: an encoder-decoder's two halves have copies of their own."""
    held = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    yield from {id(config): config for config in held}.values()


def called_with(model: nn.Module, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """`kwargs`, or an `example` where they are None; InputError where they are no {name: value}."""
    check_module(model)
    if kwargs is None:
        return example(model)
    check_mapping(kwargs, "kwargs", "name: value")
    return dict(kwargs)


def example(model: nn.Module) -> dict[str, Tensor]:
    """A small input for `model`, made from its config: three sequences of 7 tokens, an image, or sound.

    Sizes that no head or width has, so that a trace does not take one for the other. InputError where the config does
    not say what the model is called with.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "")
    like, generator = next(model.parameters()), torch.Generator().manual_seed(0)
    shapes: Mapping[str, Callable[[], tuple[int, ...]]] = {
        "pixel_values": lambda: (1, config.num_channels, *_sides(config)),
        "input_values": lambda: (1, 2000),  # samples: half a dozen frames
        "input_features": lambda: (1, config.num_mel_bins, 2 * config.max_source_positions),
    }
    try:
        if main in shapes:
            inputs = {main: torch.randn(shapes[main](), generator=generator).to(like)}
            ids = torch.randint(getattr(config, "vocab_size", 1), (1, 7), generator=generator)
        else:
            ids = torch.randint(config.vocab_size, (3, 7), generator=generator)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs["attention_mask"][-1, 5:] = 0  # without padding some models leave the mask out
    except AttributeError as error:  # a config without these sizes, or none
        raise InputError(
            f"labkit can make no input for {type(model).__name__} from its config: give kwargs, what it is called with."
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": torch.ones_like(ids)}
    device = "cpu" if like.device.type == "meta" else like.device  # a trace looks at integers
    return {name: x if x.is_floating_point() else x.to(device) for name, x in inputs.items()}


def _sides(config: Any) -> tuple[int, int]:
    side = getattr(config, "image_size", None) or 64
    return tuple(side) if isinstance(side, (tuple, list)) else (side, side)
