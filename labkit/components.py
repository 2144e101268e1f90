"""What a transformer is made of: parameters and FLOPs by component, counted on the model itself, not derived.

Which module is what comes from labkit.pruning.anatomy, FLOPs from labkit.counting. A model on the `meta` device will
do, so nothing of Llama-3-8B has to be stored. No claim about time is made here.
"""

from collections import Counter
from typing import Any

from torch import nn

from labkit.counting import count
from labkit.pruning.anatomy import anatomy

PROJECTIONS, PRODUCTS, FEED_FORWARD = "attention projections", "attention products", "feed-forward"
HEAD, EMBEDDINGS, REST = "output head", "embeddings", "norms"
COMPONENTS = (PROJECTIONS, PRODUCTS, FEED_FORWARD, HEAD, EMBEDDINGS, REST)


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each component; a tensor that two share, as a tied output head does, counts for the first."""
    found: Counter[str] = Counter(dict.fromkeys(COMPONENTS, 0))
    parts = _parts(model)
    for name, parameter in model.named_parameters():
        found[parts[name.rpartition(".")[0]]] += parameter.numel()
    return dict(found)


def flops(model: nn.Module, **inputs: Any) -> dict[str, int]:
    """FLOPs of one call of each component, a multiply-add as two.

    Attention products (scores, and the weighted sum of values) belong to no layer with weights: they are what is left.
    """
    work = count(model, **inputs)
    found: Counter[str] = Counter(dict.fromkeys(COMPONENTS, 0))
    for name, part in _parts(model).items():
        if not list(model.get_submodule(name).children()):  # by_module includes what is below
            found[part] += work.by_module.get(name, 0)
    found[PRODUCTS] = work.flops - found.total()
    return dict(found)


def _parts(model: nn.Module) -> dict[str, str]:
    """{module with weights of its own: component}. A linear layer outside of all layers is an output head.

    Also the rotary embedding, whose angles are a product of matrices in some versions of transformers.
    """
    known = anatomy(model)
    parts = {name: PROJECTIONS for one in known.attentions for name in (one.query, one.key, one.value, one.output)}
    parts |= {name: FEED_FORWARD for one in known.feed_forwards for name in (one.gate, one.up, one.down) if name}
    for name, module in model.named_modules():
        if name not in parts and next(module.parameters(recurse=False), None) is not None:
            embeds = isinstance(module, nn.Embedding) or "embeddings" in name
            parts[name] = EMBEDDINGS if embeds else HEAD if isinstance(module, nn.Linear) else REST
        elif name.endswith("rotary_emb"):
            parts[name] = EMBEDDINGS
    return parts
