"""How much an attention head matters, by five methods; gates that silence heads, and what heads attend to.

Michel et al. 2019 (Are Sixteen Heads Really Better than One?, Taylor), Voita et al. 2019 (Analyzing Multi-Head
Self-Attention, confidence and learned gates). Nothing is removed here; that is `transformers.prune_heads`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_module, check_real, seeded
from labkit.errors import InputError, check_choice, check_whole
from labkit.graph import anatomy, tracing
from labkit.graph.anatomy import Attention
from labkit.modules.batches import check_batches, evaluating, inputs, not_empty, split, valid_tokens
from labkit.modules.blocks import loss_increases
from labkit.modules.hooks import forward_hooks, reading
from labkit.modules.losses import summed_loss
from labkit.modules.stacks import layers_of, stacks
from labkit.pruning.scores import input_taylor

METHODS = ("taylor", "entropy", "confidence", "gate", "ablation")
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta, gamma and zeta of Louizos et al. 2018
PENALTY, RATE = 0.02, 0.1  # of the learned gates: weight of the expected number of open ones, Adam's step


@torch.inference_mode(False)
def head_importance(
    model: nn.Module, batches: Iterable, method: str = "taylor", *, loss_fn: Callable | None = None, seed: int = 0
) -> Tensor:
    """Importance of every query head, [layers, heads], float64 on the CPU; higher is more important.

    Rows are the attentions in the order of a forward pass (of T5: the encoder's, then of every decoder layer self and
    cross). Where a layer has fewer heads than another, the rest of its row is NaN.

    batches: read once, none is kept. Padding (attention_mask 0) counts nowhere.
    method:
        "taylor": first-order change of the loss on removing the head, (1/N) sum over examples x of |dl_x/dz_h|, z_h = 1
            a gate on the head's context vector: the absolute value of the sum over the valid tokens of x of context
            times gradient (Michel et al. 2019, equation 2, without the normalisation by layer: divide by
            `norm(dim=1, keepdim=True)` for that). l_x is the loss summed over x's terms, N counts the terms.
        "entropy": 1 - H / log n, averaged over the valid queries that can choose, H = -sum a log a over the n keys that
            the query may attend to: 1 attends to one token, 0 to all alike. A head can stare at a token and write
            nothing.
        "confidence": mean over the same queries of the largest attention probability (Voita et al. 2019, section 4).
        "gate": `learn_gates`, in [0, 1].
        "ablation": the increase of the mean loss per term when the head alone is silent, exact; negative where the
            model is better without it. A forward pass from its layer on for each head and batch.
    loss_fn: loss_fn(output, target), a mean over the examples; None takes the labels in the batches, and a decoder
        without labels predicts its own tokens.
    seed: of the noise of "gate".

    Raises InputError for an unknown method, no batches, or a model without heads. The model stays as it was.
    """
    check_module(model)
    check_choice(method, METHODS, "method")
    if method == "gate":
        return learn_gates(model, batches, loss_fn=loss_fn, seed=seed)
    parts, batches = _attentions(model, check_batches(batches, method))
    if method == "entropy":
        return _of_maps(model, parts, batches, lambda a, n: 1 - torch.special.entr(a).sum(-1) / n.log())
    if method == "confidence":
        return _of_maps(model, parts, batches, lambda a, n: a.amax(-1))
    if method == "taylor":
        return rows(input_taylor(model, {part.output: part.heads for part in parts}, batches, loss_fn))
    return rows(_ablation(model, parts, batches, loss_fn))


def _attentions(model: nn.Module, batches: Iterable) -> tuple[tuple[Attention, ...], Iterable]:
    """The attentions that the first batch goes through, and all batches, the first included."""
    with evaluating(model):
        first = next(not_empty(batches))
        args, kwargs, _ = split(model, first)  # labels too: a decoder may be called with nothing else
        record = tracing.record(model, args, kwargs)
    once = iter(batches) is batches
    return anatomy.attentions(model, record), itertools.chain([first], batches) if once else batches


def rows(values: Sequence[Tensor]) -> Tensor:
    """One row for each attention: [layers, most heads] float64 on the CPU, NaN where a layer has fewer."""
    table = torch.full((len(values), max(len(row) for row in values)), torch.nan, dtype=torch.float64)
    for row, value in zip(table, values, strict=True):
        row[: len(value)] = value.detach().double().cpu()
    return table


def _ablation(model: nn.Module, parts: Sequence[Attention], batches: Iterable, loss_fn) -> Sequence[Tensor]:
    names, stack = zip(*layers_of(model), strict=True) if len(stacks(model)) == 1 else ((), ())
    silences = []
    for part in parts:
        layer = next((i for i, name in enumerate(names) if part.name.startswith(f"{name}.")), 0)
        silences += [(layer, partial(scaling, model, [part], [gates])) for gates in 1 - torch.eye(part.heads)]
    return loss_increases(model, stack, silences, batches, loss_fn).split([part.heads for part in parts])


def lowest_heads(importance: Tensor, n: int) -> dict[int, list[int]]:
    """{layer: heads} of exactly the `n` least important heads, as `prune_heads` takes them.

    importance: [layers, heads], NaN where there is no head. Of equal scores the first goes first. One head stays in
    every layer; what a layer may not give, the next lowest of the others gives. InputError if `n` heads cannot go.
    """
    check_real(importance, "importance")
    if importance.dim() != 2 or not len(importance):
        raise InputError(f"importance has the shape {list(importance.shape)}, but it must be [layers, heads].")
    exists = ~importance.isnan()
    most = int((exists.sum(1) - 1).clamp_min(0).sum())
    if isinstance(n, bool) or not isinstance(n, Integral) or not 1 <= n <= most:
        raise InputError(
            f"n is {n!r}, but from 1 to {most} heads can go: one stays in each of {len(importance)} layers."
        )
    stays = exists.sum(1).tolist()
    lowest: dict[int, list[int]] = {}
    for index in importance.flatten().argsort(stable=True).tolist():  # NaN comes last
        layer, head = divmod(index, importance.shape[1])
        if n and stays[layer] > 1:
            lowest.setdefault(layer, []).append(head)
            stays[layer] -= 1
            n -= 1
    return {layer: sorted(heads) for layer, heads in sorted(lowest.items())}


# --- gates ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gated(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """Inside, the context of head h of layer l is multiplied by gates[l, h]; 0 is a removed head, exactly.

    gates: [layers, heads].
    """
    parts = anatomy.attentions(model)
    shape = [len(parts), max(part.heads for part in parts)]
    check_real(gates, "gates")
    if list(gates.shape) != shape:
        raise InputError(f"gates has the shape {list(gates.shape)}, but it must be [layers, heads], {shape} here.")
    with scaling(model, parts, gates):
        yield


@contextlib.contextmanager
def scaling(model: nn.Module, parts: Sequence[Attention], gates: Sequence[Tensor]) -> Iterator[None]:
    """Inside, what head h of attention i gives is multiplied by gates[i][h]."""

    def scaled(i: int, x: Tensor) -> Tensor:  # [.., heads * size]
        heads = x.unflatten(-1, (parts[i].heads, parts[i].size))
        return (heads * gates[i][: parts[i].heads, None].to(x)).flatten(-2)

    with reading(model, [part.output for part in parts], scaled):
        yield


@torch.inference_mode(False)
def learn_gates(
    model: nn.Module, batches: Iterable, *, epochs: int = 1, loss_fn: Callable | None = None, seed: int = 0
) -> Tensor:
    """Gates in [0, 1] that keep the task loss low while few are open, [layers, heads] float64; the model is frozen.

    Minimises mean loss + PENALTY * expected number of open gates by Adam (Voita et al. 2019, equation 5). While it
    learns, a gate is sampled as clip(sigmoid((log u - log(1 - u) + a) / b) (r - l) + l, 0, 1), u uniform (Louizos et
    al. 2018, equations 10 and 11); what is returned is the gate without noise, NaN where a layer has fewer heads.

    batches: read `epochs` times. loss_fn: as in `head_importance`. seed: the same one gives the same gates. InputError
    for a loss that is not finite.
    """
    check_module(model)
    check_whole(epochs, "epochs")
    seed = seeded(seed).initial_seed()
    parts, batches = _attentions(model, check_batches(batches, "gate"))
    device = next(model.parameters()).device
    logits = [torch.full((part.heads,), 2.0, device=device, requires_grad=True) for part in parts]  # 3 % are closed
    descent = torch.optim.Adam(logits, RATE)
    with evaluating(model, seed), torch.enable_grad():
        for _ in range(epochs):
            for batch in not_empty(batches):
                with scaling(model, parts, [_sampled(a) for a in logits]):
                    loss, terms = summed_loss(model, batch, loss_fn)
                if not loss.isfinite():
                    raise InputError(
                        f"The loss of a batch is {loss.item()}, from which no gate can be learnt: look for inputs or "
                        "weights that are not finite, or for an error in loss_fn."
                    )
                n_open = sum((a - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().sum() for a in logits)
                descent.zero_grad()
                (loss / max(terms, 1) + PENALTY * n_open).backward(inputs=logits)
                descent.step()
    return rows([_stretched(a.detach().sigmoid()) for a in logits])


def _sampled(a: Tensor) -> Tensor:
    u = torch.rand_like(a).clamp(1e-6, 1 - 1e-6)
    return _stretched(((u.log() - (-u).log1p() + a) / TEMPERATURE).sigmoid())


def _stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


# --- attention maps ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: nn.Module, batch: Any) -> list[Tensor]:
    """Probabilities of every attention for one batch: layers x [B, heads, queries, keys]; rows sum to 1."""
    parts, _ = _attentions(model, [batch])
    maps: dict[int, Tensor] = {}
    with evaluating(model, seed=0), _observing(model, parts, maps.__setitem__):
        model(**inputs(model, batch))
    return [maps[i] for i in sorted(maps)]


@contextlib.contextmanager
def _observing(model: nn.Module, parts: Sequence[Attention], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call see(number, probabilities) at every forward pass of each attention, as long as the `with` block runs.

    parts: the attentions of `model`.
    see: gets the attention's place in `parts` and its probabilities, [B, heads, queries, keys].

    The model computes its attentions eagerly inside, since fused kernels (sdpa, flash) return no probabilities, not
    even with `output_attentions=True`. Raises InputError for an attention that gives none eagerly.
    """

    def after(number: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        maps = [x for x in output[1:] if isinstance(x, Tensor) and x.dim() == 4]
        if not maps or not _are_probabilities(maps[-1]):
            raise InputError(
                f"{parts[number].name} gives no attention probabilities, not even computed eagerly; "
                "methods that need none: taylor, gate, ablation."
            )
        see(number, maps[-1])  # the last: T5's position biases come before the probabilities

    modules = [model.get_submodule(part.name) for part in parts]
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
def _of_maps(
    model: nn.Module, parts: Sequence[Attention], batches: Iterable, measure: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Mean of measure(a [.., keys], n [..]) over valid queries with n > 1 keys to attend to: [layers, heads]

    Queries with a single key say nothing about a head.
    """
    sums = [torch.zeros(part.heads, dtype=torch.float64) for part in parts]
    counts = [torch.zeros(part.heads, dtype=torch.float64) for part in parts]
    named: dict[str, Any] = {}

    def see(i: int, a: Tensor) -> None:
        a = a.double()  # [B, heads, queries, keys]
        n = (a > 0).sum(-1).double()  # masked keys have a probability of exactly 0
        valid = valid_tokens(model, named, parts[i].name, a[:, 0, :, :1])  # [B, queries]
        counted = valid[:, None] & (n > 1)
        sums[i] += torch.where(counted, measure(a, n), 0.0).sum((0, 2)).cpu()
        counts[i] += counted.sum((0, 2)).cpu()

    with evaluating(model, seed=0), _observing(model, parts, see):
        for batch in not_empty(batches):
            named.clear()
            named.update(inputs(model, batch))
            model(**named)
    return rows([total / count for total, count in zip(sums, counts, strict=True)])
