"""FLOPs of a transformer's components: attention, feed-forward network, output head and embeddings."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from labkit.modules.stacks import is_linear, stacks

PROJECTIONS, PRODUCTS, FEED_FORWARD = "attention projections", "attention products", "feed-forward"
HEAD, EMBEDDINGS, REST = "output head", "embeddings", "norms"
COMPONENTS = (PROJECTIONS, PRODUCTS, FEED_FORWARD, HEAD, EMBEDDINGS, REST)


def shares_by_component(model: nn.Module, flops: int, flops_by_module: Mapping[str, int]) -> dict[str, int]:
    """Divide the FLOPs of a call among the components of a model.

    Attention products (scores, and the weighted sum of values) belong to no module with weights: the component gets
    all remaining FLOPs.

    flops: floating-point operations of the whole call.
    flops_by_module: FLOPs by module name, children included.
    """
    totals = Counter(dict.fromkeys(COMPONENTS, 0))
    for name, component in _components_by_module(model).items():
        is_leaf = not list(model.get_submodule(name).children())
        if is_leaf:
            totals[component] += flops_by_module.get(name, 0)
    totals[PRODUCTS] = flops - totals.total()
    return dict(totals)


def _components_by_module(model: nn.Module) -> dict[str, str]:
    """Return the component of each module that has weights of its own, by module name.

    In a layer, a linear module with "att" in its name belongs to the attention and any other linear module to the
    feed-forward network. A linear module outside all layers is an output head. Rotary embeddings are included as well:
    in some versions of transformers the angles are a product of matrices.
    """
    by_module = _linears_in_layers(model)
    for name, module in model.named_modules():
        has_weights = len(list(module.parameters(recurse=False))) > 0
        if name not in by_module and has_weights:
            by_module[name] = _outside_linears(name, module)
        elif name.endswith("rotary_emb"):
            by_module[name] = EMBEDDINGS
    return by_module


def _linears_in_layers(model: nn.Module) -> dict[str, str]:
    by_module = {}
    for layers in stacks(model):
        for name, module in model.get_submodule(layers).named_modules(prefix=layers):
            if is_linear(module):
                name_in_layer = name.removeprefix(layers).lower()
                by_module[name] = PROJECTIONS if "att" in name_in_layer else FEED_FORWARD
    return by_module


def _outside_linears(name: str, module: nn.Module) -> str:
    if isinstance(module, nn.Embedding) or "embeddings" in name:
        return EMBEDDINGS
    return HEAD if isinstance(module, nn.Linear) else REST
