"""Importance of attention heads by four methods, gates on heads, and attention maps.

Michel et al. 2019 (Are Sixteen Heads Really Better than One?, Taylor), Voita et al. 2019 (Analyzing Multi-Head
Self-Attention, confidence). `transformers.prune_heads` removes heads; this file removes none.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_module, check_real
from labkit.errors import InputError, check_choice, is_whole
from labkit.graph import anatomy, tracing
from labkit.graph.anatomy import Attention
from labkit.modules.batches import check_batches, evaluating, inputs, not_empty, split, valid_tokens
from labkit.modules.blocks import loss_increases
from labkit.modules.hooks import forward_hooks, reading
from labkit.modules.stacks import layers_of, stacks
from labkit.pruning.scores import LossFn, input_taylor

METHODS = ("taylor", "entropy", "confidence", "ablation")


@torch.inference_mode(False)
def head_importance(
    model: nn.Module,
    batches: Iterable,
    method: str = "taylor",
    *,
    loss_fn: LossFn | None = None,
) -> Tensor:
    """Score every query head; higher is more important: [layers, heads], float64 on the CPU.

    Rows are the attentions in the order of a forward pass (of T5: the encoder's, then of every decoder layer self- and
    cross-attention). A layer with fewer heads than another layer has NaN in the rest of the row.

    batches: input of `model`, read once, not stored. Padding (attention_mask 0) does not count.
    method:
        "taylor": first-order change of the loss on removing the head, (1/N) sum over examples x of |dl_x/dz_h|, z_h = 1
            a gate on the head's context vector: the absolute value of the sum over the valid tokens of x of context
            times gradient (Michel et al. 2019, equation 2, without the normalisation by layer: divide by
            `norm(dim=1, keepdim=True)` for that). l_x is the loss summed over x's terms, N counts the terms.
        "entropy": 1 - H / log n, averaged over the valid queries with n > 1 keys to attend to, H = -sum a log a over
            the n keys: 1 attends to a single token, 0 to all tokens alike. A head can attend to a single token and
            still contribute nothing to the loss.
        "confidence": mean over the same queries of the largest attention probability (Voita et al. 2019, section 4).
        "ablation": the exact increase of the mean loss per term when the head alone is silent; negative if the model is
            better without the head. Runs a forward pass from the head's layer on for each head and batch.
    loss_fn: loss_fn(output, target), a mean over the examples; None takes the labels in the batches, or a decoder's own
        tokens if they have none.

    `model` is not changed. Raises InputError for an unknown method, no batches, or a model without heads.
    """
    check_module(model)
    check_choice(method, METHODS, "method")
    attentions, batches = _attentions(model, check_batches(batches, method))
    if method == "entropy":
        return _mean_over_queries(model, attentions, batches, _concentration)
    if method == "confidence":
        return _mean_over_queries(model, attentions, batches, _largest_probability)
    if method == "taylor":
        heads_of_module = {attention.output: attention.heads for attention in attentions}
        return stack_with_nan(input_taylor(model, heads_of_module, batches, loss_fn))
    return stack_with_nan(_ablation(model, attentions, batches, loss_fn))


def _concentration(a: Tensor, n_keys: Tensor) -> Tensor:
    """1 - H / log n of attention probabilities a [.., keys], n_keys [..] the number of keys to attend to."""
    entropy = torch.special.entr(a).sum(-1)
    return 1 - entropy / n_keys.log()


def _largest_probability(a: Tensor, n_keys: Tensor) -> Tensor:
    return a.amax(-1)


def _attentions(model: nn.Module, batches: Iterable) -> tuple[tuple[Attention, ...], Iterable]:
    """Return the attentions that the first batch goes through, and all batches, the first included."""
    with evaluating(model):
        first = next(not_empty(batches))
        args, kwargs, _ = split(model, first)  # labels too: a decoder may be called with nothing else
        record = tracing.record(model, args, kwargs)
    is_iterator = iter(batches) is batches
    all_batches = itertools.chain([first], batches) if is_iterator else batches
    return anatomy.attentions_in(model, record), all_batches


def stack_with_nan(values: Sequence[Tensor]) -> Tensor:
    """Stack a vector [heads] for each attention to [layers, most heads], float64 on the CPU, padded with NaN."""
    most_heads = max(len(value) for value in values)
    table = torch.full((len(values), most_heads), torch.nan, dtype=torch.float64)
    for row, value in zip(table, values, strict=True):
        row[: len(value)] = value.detach().double().cpu()
    return table


def _ablation(
    model: nn.Module,
    attentions: Sequence[Attention],
    batches: Iterable,
    loss_fn: LossFn | None,
) -> Sequence[Tensor]:
    """Return the increase of the mean loss when each head alone is silent: [heads] for each attention."""
    layers = layers_of(model) if len(stacks(model)) == 1 else []
    silences = []
    for attention in attentions:
        first_layer = _layer_of(attention, [name for name, _ in layers])
        for gates in 1 - torch.eye(attention.heads):  # a single head is 0 in each row
            silences.append((first_layer, partial(scaling, model, [attention], [gates])))
    increases = loss_increases(model, [layer for _, layer in layers], silences, batches, loss_fn)
    return increases.split([attention.heads for attention in attentions])


def _layer_of(attention: Attention, layer_names: Sequence[str]) -> int:
    """Return the number of the layer that holds an attention, 0 if no layer in `layer_names` does."""
    for number, name in enumerate(layer_names):
        if attention.name.startswith(f"{name}."):
            return number
    return 0


def lowest_heads(importance: Tensor, n: int) -> dict[int, list[int]]:
    """Choose exactly the `n` least important heads: {layer: heads}, the argument of `prune_heads`.

    importance: [layers, heads], NaN for a head that does not exist. Of equal scores the first goes first. A layer keeps
        at least a single head; the next lowest head of another layer goes instead.
    Raises InputError if `n` heads cannot go.
    """
    check_real(importance, "importance")
    if importance.dim() != 2 or not len(importance):
        raise InputError(f"importance has the shape {list(importance.shape)}, but it must be [layers, heads].")
    remaining = (~importance.isnan()).sum(1)  # heads of each layer
    most = int((remaining - 1).clamp_min(0).sum())
    if not is_whole(n) or not 1 <= n <= most:
        raise InputError(
            f"n is {n!r}, but from 1 to {most} heads can go: one stays in each of {len(importance)} layers."
        )
    remaining = remaining.tolist()
    lowest: dict[int, list[int]] = {}
    for index in importance.flatten().argsort(stable=True).tolist():  # NaN comes last
        layer, head = divmod(index, importance.shape[1])
        if n and remaining[layer] > 1:
            lowest.setdefault(layer, []).append(head)
            remaining[layer] -= 1
            n -= 1
    return {layer: sorted(heads) for layer, heads in sorted(lowest.items())}


# --- gates ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gated(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """Multiply the context vector of head h in layer l by gates[l, h] while the context manager is open.

    gates: [layers, heads]. A gate of 0 removes the head exactly.
    """
    attentions = anatomy.attentions(model)
    shape = [len(attentions), max(attention.heads for attention in attentions)]
    check_real(gates, "gates")
    if list(gates.shape) != shape:
        raise InputError(f"gates has the shape {list(gates.shape)}, but it must be [layers, heads], {shape} here.")
    with scaling(model, attentions, gates):
        yield


@contextlib.contextmanager
def scaling(model: nn.Module, attentions: Sequence[Attention], gates: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the context vector of head h in attentions[i] by gates[i][h] while the context manager is open."""

    def scaled(i: int, x: Tensor) -> Tensor:  # x [.., heads * size]
        attention = attentions[i]
        heads = x.unflatten(-1, (attention.heads, attention.size))
        gate = gates[i][: attention.heads, None].to(x)
        return (heads * gate).flatten(-2)

    with reading(model, [attention.output for attention in attentions], scaled):
        yield


# --- attention maps ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _observing(
    model: nn.Module,
    attentions: Sequence[Attention],
    see: Callable[[int, Tensor], None],
) -> Iterator[None]:
    """Call see(number, probabilities) at every forward pass of each attention, as long as the `with` block runs.

    attentions: the attentions of `model`.
    see: gets the attention's place in `attentions` and its probabilities, [B, heads, queries, keys].

    The model computes its attentions eagerly inside, since fused kernels (sdpa, flash) return no probabilities, not
    even with `output_attentions=True`. Raises InputError for an attention that gives none eagerly.
    """

    def after(
        number: int,
        args: tuple,
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        maps = [x for x in output[1:] if isinstance(x, Tensor) and x.dim() == 4]
        if not maps or not _are_probabilities(maps[-1]):
            raise InputError(
                f"{attentions[number].name} gives no attention probabilities, not even computed eagerly; "
                "methods that need none: taylor, gate, ablation."
            )
        see(number, maps[-1])  # the last: T5's position biases come before the probabilities

    modules = [model.get_submodule(attention.name) for attention in attentions]
    implementations = [(config, config._attn_implementation) for config in anatomy.configs(model)]
    with forward_hooks(modules, after):
        try:
            for config, _ in implementations:
                config._attn_implementation = "eager"
            yield
        finally:
            for config, implementation in implementations:
                config._attn_implementation = implementation


def _are_probabilities(x: Tensor) -> bool:
    """Return True if no entry is negative and no row sums to more than 1, up to bfloat16; sinks make the sum less."""
    return not (x < 0).any() and not (x.float().sum(-1) > 1.02).any()


@torch.no_grad()
def _mean_over_queries(
    model: nn.Module,
    attentions: Sequence[Attention],
    batches: Iterable,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Average measure(a [.., keys], n_keys [..]) of attention probabilities a over queries: [layers, heads].

    Counted are queries that are no padding and have n_keys > 1 keys to attend to; with a single key there is no choice.
    """
    sums = [torch.zeros(attention.heads, dtype=torch.float64) for attention in attentions]
    counts = [torch.zeros(attention.heads, dtype=torch.float64) for attention in attentions]
    named: dict[str, Any] = {}  # arguments of the batch that runs

    def add(i: int, a: Tensor) -> None:
        a = a.double()  # [B, heads, queries, keys]
        n_keys = (a > 0).sum(-1).double()  # masked keys have a probability of exactly 0
        valid = valid_tokens(model, named, attentions[i].name, a[:, 0, :, :1])  # [B, queries]
        counted = valid[:, None] & (n_keys > 1)  # [B, heads, queries]
        values = torch.where(counted, measure(a, n_keys), 0.0)
        sums[i] += values.sum((0, 2)).cpu()
        counts[i] += counted.sum((0, 2)).cpu()

    with evaluating(model, seed=0), _observing(model, attentions, add):
        for batch in not_empty(batches):
            named.clear()
            named.update(inputs(model, batch))
            model(**named)
    return stack_with_nan([total / count for total, count in zip(sums, counts, strict=True)])
