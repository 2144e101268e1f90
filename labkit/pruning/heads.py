"""How much an attention head matters, by five methods, and which heads are the lowest: exactly as many as asked for.

Michel et al. 2019 (Are Sixteen Heads Really Better than One?, Taylor), Voita et al. 2019 (Analyzing Multi-Head
Self-Attention, confidence and learned gates). Leave-one-out ablation is the ground truth that the others estimate.
Nothing is removed here; that is `transformers.prune_heads`.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

METHODS = ("taylor", "entropy", "confidence", "gate", "ablation")


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
        gradient (Michel et al. 2019, section 2.3, without its normalisation by layer: divide by
        `norm(dim=1, keepdim=True)` for that). l_x is the loss summed over x's terms, N counts the terms of all batches.
    "entropy": 1 - H / log n, averaged over the valid queries that can choose, H = -sum a log a in nats over the n keys
        that the query may attend to: 1 attends to one token, 0 to all alike. The claim that focus is importance is
        the guide's; a head can stare at one token and write nothing. Raw entropies: `attention_maps.entropy`.
    "confidence": mean over the same queries of the largest attention probability (Voita et al. 2019, section 4).
    "gate": gates learned on the frozen model with a penalty on open ones (`gates.learn_gates` with its defaults; `seed`
        is for their noise), in [0, 1].
    "ablation": the increase of the mean loss per term when the head alone is switched off, exact; negative where the
        model is better without it. One forward pass a head and batch.

    Task loss: labels in the batches, or `loss_fn(output, target)`, a mean over the examples; a decoder without labels
    predicts its own tokens. Padding (attention_mask 0) counts nowhere. label: shown on a progress bar over batches.
    Raises InputError for an unknown method, no batches, or a model without heads; the model stays as it was.
    """
    raise NotImplementedError


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
    raise NotImplementedError
