"""Find the heads, neurons and layers of a transformer in a traced call, without relying on names.

An attention is a softmax over scores [B, heads, queries, keys] or [B * heads, queries, keys], together with the next
linear module, the reader of the heads' results. A feed-forward network is a group of coupled channels in a layer, read
by a single linear module or parameter. Heads are scored in `pruning.heads` and removed in `pruning.transformers`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import check_mapping, check_module
from labkit.errors import InputError
from labkit.graph import tracing
from labkit.graph.groups import Coupling, Group
from labkit.graph.record import Operation, Record
from labkit.graph.spans import span_at
from labkit.modules.batches import is_encoder_decoder, placed
from labkit.modules.stacks import is_linear, out_dim, stacks

SOFTMAX = ("_softmax", "_safe_softmax")
PRODUCTS = ("addmm", "mm", "convolution")  # with weights, in modules that are not linear ones
TOKENS = (3, 7)  # sequences and tokens of an example: sizes that no head or width has
PADDED = 5  # the first padded token of the last sequence
SAMPLES = 2000  # of sound in an example: half a dozen frames


@dataclass(frozen=True, eq=False)
class Attention:
    """The place of an attention in a model.

    name: the module taking the softmax.
    output: the linear module reading the results of the heads, side by side.
    heads: number of query heads.
    size: columns of `output` for each head.
    labels: [heads] labels of the heads in the trace; None without labels: then no head can be removed.
    """

    name: str
    output: str
    heads: int
    size: int
    labels: np.ndarray | None


@dataclass(frozen=True)
class FeedForward:
    """The place of a feed-forward network in a model, or of several experts of the same width.

    group: number of the neurons' group in the coupling; a unit of experts has a neuron of every expert.
    down: the linear module reading the neurons, or the parameter [experts, out, in].
    """

    group: int
    down: str


class _Scores(NamedTuple):
    """A softmax over attention scores: the module, the number of heads, and the heads' labels in the trace."""

    module: str
    heads: int
    labels: np.ndarray | None


def attentions(model: nn.Module) -> tuple[Attention, ...]:
    """Trace a call of `model` on `example`, and return the attentions as `attentions_in` does."""
    return attentions_in(model, tracing.record(model, (), example(model)))


def attentions_in(model: nn.Module, record: Record) -> tuple[Attention, ...]:
    """Return the attentions of `model` in the order of a forward pass; an attention running twice is listed once.

    record: record of a traced call.

    Raises InputError for a model without attentions.
    """
    listed = _attentions_in(model, record)
    if not listed:
        raise InputError(
            f"{type(model).__name__} has no attention heads that labkit can read: it looks for a softmax over scores "
            "[batch, heads, queries, keys], and for the linear layer that reads what the heads give."
        )
    return listed


def _attentions_in(model: nn.Module, record: Record) -> tuple[Attention, ...]:
    modules = dict(model.named_modules())
    classes, _ = record.labels.resolve()
    attentions: dict[str, Attention] = {}
    scores: _Scores | None = None  # of the last softmax, until the module comes that reads its heads
    for operation in record.operations:
        if _is_softmax_of_scores(operation):
            scores = _scores_of(operation)
        elif scores is not None and is_linear(modules[operation.module]):
            columns = _input_columns(record, operation.module, modules[operation.module])
            if len(columns) and _carries_heads(scores, columns, classes):
                size = len(columns) // scores.heads
                attention = Attention(scores.module, operation.module, scores.heads, size, scores.labels)
                attentions.setdefault(scores.module, attention)
                scores = None
        elif operation.name in PRODUCTS:
            scores = None
    return tuple(attentions.values())


def _heads_dim(operation: Operation) -> int:
    """Return the dimension of the heads in scores [B, heads, queries, keys] or [B * heads, queries, keys]."""
    return len(operation.shape) - 3


def _is_softmax_of_scores(operation: Operation) -> bool:
    return operation.name in SOFTMAX and _heads_dim(operation) in (0, 1)


def _scores_of(softmax: Operation) -> _Scores | None:
    """Read heads and labels from a softmax of scores; None if the number of heads cannot be told."""
    dim = _heads_dim(softmax)
    span = span_at(softmax.spans, dim)
    has_labels = span is not None and span.dims == (dim,)
    labels = span.labels if has_labels else None
    if dim == 1:
        heads = softmax.shape[1]
    elif labels is not None:
        labels = np.unique(labels)  # of [B * heads], the same for each example
        heads = len(labels)
    else:
        heads = 0
    return _Scores(softmax.module, heads, labels) if heads else None


def _input_columns(record: Record, name: str, module: nn.Module) -> np.ndarray:
    """Return the labels of the input columns of a linear module's weight, [in]; empty for unlabelled columns."""
    in_dim = 1 - out_dim(module)
    columns = np.arange(0)
    for axis in record.axes:
        if (axis.name, axis.dim) == (f"{name}.weight", in_dim):
            columns = np.arange(axis.base, axis.base + axis.size)
    return columns


def _carries_heads(scores: _Scores, columns: np.ndarray, classes: np.ndarray) -> bool:
    """Return True if columns are tied to every head, or the heads have no labels.

    columns: labels of input columns, [in].
    classes: [labels], equal for tied labels.
    """
    if scores.labels is None:
        return True
    return bool(np.isin(classes[scores.labels], classes[columns]).all())


def feed_forwards(model: nn.Module, coupling: Coupling) -> tuple[FeedForward, ...]:
    """Return the feed-forward networks of `model` in the order of a forward pass.

    coupling: coupling of the model (`groups.Coupling.of`).

    Raises InputError for a model without feed-forward networks.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    lists_of_layers = tuple(f"{name}." for name in stacks(model))
    operations = coupling.record.operations
    softmaxes = {operation.module for operation in operations if operation.name in SOFTMAX}
    readers_of_heads = {attention.output for attention in _attentions_in(model, coupling.record)}
    networks = []
    for number, group in enumerate(coupling.groups):
        name = _reader_of_neurons(group)
        if name is None or not name.startswith(lists_of_layers):
            continue
        is_in_attention = name in readers_of_heads or any(name.startswith(f"{module}.") for module in softmaxes)
        is_linear_module = is_linear(modules.get(name))
        is_stack_of_experts = name in parameters and parameters[name].dim() == 3
        if not is_in_attention and (is_linear_module or is_stack_of_experts):
            networks.append(FeedForward(number, name))
    if not networks:
        raise InputError(
            f"{type(model).__name__} has no feed-forward network that labkit can prune: it looks for neurons in a list "
            "of layers that one linear layer, or one parameter of experts, reads."
        )
    return tuple(networks)


def _reader_of_neurons(group: Group) -> str | None:
    """Return the only reader, a module or parameter, of a group of neurons; None for other groups.

    A unit of neurons is a single column of the reader.
    """
    readers = {}
    for member in group.members:
        if member.role == "reads":
            name = member.name.removesuffix(".weight")
            readers[name] = member
    if len(readers) != 1:
        return None
    ((name, member),) = readers.items()
    is_neuron = len(member.indices(0)) == 1  # a head has several columns
    return name if is_neuron else None


def configs(model: nn.Module) -> Iterator[Any]:
    """Yield every config object in the model once; the two halves of an encoder-decoder have separate configs."""
    by_id = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            by_id[id(config)] = config
    yield from by_id.values()


def called_with(model: nn.Module, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `kwargs`, on the model's device, or an `example` if None; InputError if `kwargs` is no {name: value}."""
    check_module(model)
    if kwargs is not None:
        check_mapping(kwargs, "kwargs", "name: value")
        return placed(model, dict(kwargs))
    return example(model)


def example(model: nn.Module) -> dict[str, Tensor]:
    """Make a small random input for a transformers model from its config: {argument: tensor}.

    The input is three sequences of 7 tokens (the last sequence padded), an image, or a sound. No model has heads or
    widths of these sizes, so a trace cannot confuse the dimensions. Raises InputError if the config does not tell the
    sizes of an input.
    """
    like = next(model.parameters())
    try:
        inputs = _inputs_from_config(model, like)
    except AttributeError as error:  # a config without these sizes, or none
        raise InputError(
            f"labkit can make no input for {type(model).__name__} from its config: give kwargs, what it is called with."
        ) from error
    device = "cpu" if like.device.type == "meta" else like.device  # a trace looks at integers
    placed = {}
    for name, x in inputs.items():
        placed[name] = x if x.is_floating_point() else x.to(device)
    return placed


def _inputs_from_config(model: nn.Module, like: Tensor) -> dict[str, Tensor]:
    """Make the input of `example`, floating-point tensors with the dtype and device of `like`."""
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    main_name = getattr(model, "main_input_name", "")
    shape = _shape_of_signal(main_name, config)
    if shape is not None:
        signal = torch.randn(shape, generator=generator)
        inputs = {main_name: signal.to(like)}
        vocabulary = getattr(config, "vocab_size", 1)
        ids = torch.randint(vocabulary, (1, TOKENS[1]), generator=generator)
    else:
        ids = torch.randint(config.vocab_size, TOKENS, generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, PADDED:] = 0  # without padding some models leave the mask out
        inputs = {"input_ids": ids, "attention_mask": mask}
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = ids.flip(0)
        inputs["decoder_attention_mask"] = torch.ones_like(ids)
    return inputs


def _shape_of_signal(main_name: str, config: Any) -> tuple[int, ...] | None:
    """Return the shape of an image or sound, by the name of a model's main argument; None for models of tokens."""
    if main_name == "pixel_values":
        return (1, config.num_channels, *_sides(config))
    if main_name == "input_values":
        return (1, SAMPLES)
    if main_name == "input_features":
        return (1, config.num_mel_bins, 2 * config.max_source_positions)
    return None


def _sides(config: Any) -> tuple[int, int]:
    """Return the height and width of an image according to a config, or 64 pixels by default."""
    side = getattr(config, "image_size", None) or 64
    return tuple(side) if isinstance(side, (tuple, list)) else (side, side)
