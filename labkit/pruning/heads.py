"""How much an attention head matters, by five methods, and which heads are the lowest: exactly as many as asked for.

Michel et al. 2019 (Are Sixteen Heads Really Better than One?, Taylor), Voita et al. 2019 (Analyzing Multi-Head
Self-Attention, confidence and learned gates). Leave-one-out ablation is the ground truth that the others estimate.
Nothing is removed here; that is `transformers.prune_heads`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.batches import check_batches, evaluating, not_empty, summed_loss
from labkit.errors import InputError
from labkit.pruning import anatomy, attention_maps, gates
from labkit.pruning.blockwise import layers_of, remembering, resuming
from labkit.pruning.scores import input_taylor

METHODS = ("taylor", "entropy", "confidence", "gate", "ablation")


@torch.inference_mode(False)
def head_importance(
    model: nn.Module,
    batches: Iterable,
    method: str = "taylor",
    *,
    loss_fn: Callable | None = None,
    seed: int = 0,
    label: str = "",
) -> Tensor:
    """Importance of every query head, [layers, heads], float64 on the CPU; higher is more important.

    Rows are the attentions in the model's order (of T5: the encoder's, then of every decoder layer self and cross).
    Where a layer has fewer heads than another, the rest of its row is NaN. `batches` is read once and none is kept.

    method:
    "taylor": first-order change of the loss on removing the head, (1/N) sum over examples x of |dl_x/dz_h|, z_h = 1 a
        gate on the head's context vector: the absolute value of the sum over the valid tokens of x of context times
        gradient (Michel et al. 2019, without its normalisation by layer: divide by
        `norm(dim=1, keepdim=True)` for that). l_x is the loss summed over x's terms, N counts the terms of all batches.
    "entropy": 1 - H / log n, averaged over the valid queries that can choose, H = -sum a log a in nats over the n keys
        that the query may attend to: 1 attends to one token, 0 to all alike. The claim that focus is importance is
        the guide's; a head can stare at one token and write nothing. Raw entropies: `attention_maps.entropy`.
    "confidence": mean over the same queries of the largest attention probability (Voita et al. 2019).
    "gate": gates learned on the frozen model with a penalty on open ones (`gates.learn_gates` with its defaults; `seed`
        is for their noise), in [0, 1].
    "ablation": the increase of the mean loss per term when the head alone is switched off, exact; negative where the
        model is better without it. A forward pass from its layer on for each head and batch.

    Task loss: labels in the batches, or `loss_fn(output, target)`, a mean over the examples; a decoder without labels
    predicts its own tokens. Padding (attention_mask 0) counts nowhere. label: shown on a progress bar over batches.
    Raises InputError for an unknown method, no batches, or a model without heads; the model stays as it was.
    """
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
    check_batches(batches, method)
    anatomy.attentions(model)
    if method == "entropy":
        return 1 - attention_maps.entropy(model, batches, normalised=True, label=label)
    if method == "confidence":
        return attention_maps.confidence(model, batches, label=label)
    if method == "gate":
        return gates.learn_gates(model, batches, loss_fn=loss_fn, seed=seed, label=label)
    batches = tqdm(batches, desc=label, disable=not label, mininterval=2)
    if method == "taylor":
        readers = {part.output: part.heads for part in anatomy.attentions(model)}
        return gates.rows(input_taylor(model, readers, batches, loss_fn))
    return _ablation(model, batches, loss_fn)


@torch.no_grad()
def _ablation(model: nn.Module, batches: Iterable, loss_fn: Callable | None) -> Tensor:
    parts = anatomy.attentions(model)
    stack = layers_of(model) if len(anatomy.anatomy(model).stacks) == 1 else []
    sums = [torch.zeros(part.heads, dtype=torch.float64) for part in parts]
    terms = 0
    with evaluating(model, seed=0):
        for batch in not_empty(batches):
            with remembering([layer for _, layer in stack]) as outputs:
                dense, n = summed_loss(model, batch, loss_fn)
            for total, part in zip(sums, parts, strict=True):
                first = next((i for i, (name, _) in enumerate(stack) if part.name.startswith(f"{name}.")), 0)
                with resuming([layer for _, layer in stack], outputs[:first]):
                    for head in range(part.heads):
                        with gates.scaling(model, [part], lambda _, contexts, head=head: _all_but(head, contexts)):
                            loss, _ = summed_loss(model, batch, loss_fn)
                        total[head] += float(loss.double() - dense.double())
            terms += n
    return gates.rows([total / max(terms, 1) for total in sums])


def _all_but(head: int, contexts: Tensor) -> Tensor:
    """1 for every head but 0 for this one: [heads, 1]"""
    ones = contexts.new_ones(contexts.shape[-2], 1)
    ones[head] = 0
    return ones


def lowest_heads(
    importance: Tensor, n: int, *, min_heads: int = 1, group: int = 1, even: bool = False
) -> dict[int, list[int]]:
    """{layer: heads} of exactly the `n` least important heads, as `prune_heads` takes them.

    importance: [layers, heads], NaN where there is no head. Of equal scores the first goes first. min_heads: as many
    stay in every layer; what a layer may not give, the next lowest of the others gives.
    group: query heads that share a key-value head (heads / KV heads), which go together, by their mean; `n` has to be
    a multiple of it. even: instead, as many query heads go from every such group of the layer (its lowest from each,
    by their mean), so that all KV heads stay; `n` has to be a multiple of the number of groups.
    Raises InputError if `n` heads cannot go.
    """
    _check(importance, n, min_heads, group)
    layers = len(importance)
    units: list[tuple[float, int, list[int]]] = []  # (score, layer, heads that go together), lowest of a layer first
    for layer in range(layers):
        own = importance[layer][~importance[layer].isnan()].double()
        if len(own) % group:
            raise InputError(f"Layer {layer} has {len(own)} heads, which is no multiple of group, {group}.")
        table = torch.arange(len(own)).view(-1, group)  # [groups, group]
        if even:
            order = own[table].argsort(dim=1, stable=True)  # of each group its lowest first
            table = table.gather(1, order).T  # [group, groups]
        scores = own[table].mean(1)
        ranked = scores.argsort(stable=True).tolist()
        units += [(float(scores[unit]), layer, table[unit].tolist()) for unit in ranked]
    return _take(units, n, min_heads, {layer: int((~importance[layer].isnan()).sum()) for layer in range(layers)})


def _check(importance: Tensor, n: int, min_heads: int, group: int) -> None:
    if importance.dim() != 2 or not len(importance):
        raise InputError(f"importance has the shape {list(importance.shape)}, but it must be [layers, heads].")
    for name, value, least in (("n", n, 1), ("min_heads", min_heads, 1), ("group", group, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}, but it must be a whole number from {least}.")


def _take(units: list, n: int, min_heads: int, left: dict[int, int]) -> dict[int, list[int]]:
    """Units by their scores until exactly n heads are gone; a layer that is down to min_heads gives none."""
    chosen: dict[int, list[int]] = {}
    missing = n
    for _, layer, heads in sorted(units, key=lambda unit: unit[0]):
        if len(heads) <= missing and left[layer] - len(heads) >= min_heads:
            chosen.setdefault(layer, []).extend(heads)
            left[layer] -= len(heads)
            missing -= len(heads)
    if missing:
        raise InputError(
            f"{n} heads cannot go with {min_heads} left in every layer: {n - missing} can, in steps of "
            f"{sorted({len(heads) for _, _, heads in units})}; ask for fewer."
        )
    return {layer: sorted(heads) for layer, heads in sorted(chosen.items())}
