"""Checks of lesson 04: cutting heads, a bound on speed-up, dropping layers.

Each tests what has to hold (the masked layer's outputs, counted FLOPs, the same answer with a cache as without) on
awkward inputs: grouped queries, heads wider than the model, the first layer among those that go.
"""

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from labkit.lesson.failures import Failures, alike, has_parts

# width of the model, size of a head, query heads, KV heads, whether there are biases, which KV heads stay
LAYERS = (
    (12, 4, 3, 3, True, [0, 2]),
    (12, 4, 3, 3, False, [1]),
    (10, 4, 6, 3, True, [0, 2]),  # grouped: two query heads read each KV head; heads wider than the model
    (16, 2, 8, 2, False, [1]),
    (12, 3, 4, 4, True, [0, 1, 2, 3]),
    (8, 4, 4, 1, True, [0]),
    (8, 2, 6, 3, True, [2, 0]),  # in another order than the layer's
)
PROJECTIONS = ("q", "k", "v", "o")


def surgery(fn: Callable, failures: Failures) -> None:
    """cut_heads(q, k, v, o, head_dim, keep) -> the four projections with only the KV heads `keep` and their queries."""
    for width, head_dim, heads, kv_heads, bias, keep in LAYERS:
        before = _attention_layer(width, head_dim, heads, kv_heads, bias)
        index = torch.tensor(keep)
        with failures.given(width=width, head_dim=head_dim, heads=heads, kv_heads=kv_heads, bias=bias, keep=keep):
            given = copy.deepcopy(before)
            after = fn(*given, head_dim, index)
            failures.expect(alike(given, before), "the modules that were given have changed; copy them before you cut")
            four = has_parts(after, 4) and all(isinstance(layer, nn.Linear) for layer in after)
            if not failures.expect(four, "return four linear layers: q, k, v, o"):
                continue
            _has_its_sizes(after, width, head_dim, heads // kv_heads * len(keep), len(keep), bias, failures)
            failures.expect(_trained(after) == _trained(before), "requires_grad has not been kept")
            _shares_nothing(after, given, failures)
            failures.need(_types(after) == _types(before), "the type of the weights or the biases has not been kept")
            _computes_the_same(after, before, head_dim, keep, failures)


def _attention_layer(width: int, head_dim: int, heads: int, kv_heads: int, bias: bool) -> list[nn.Linear]:
    """q, k, v: [width -> heads * head_dim], o back to width; float64, with every entry its own number."""
    sizes = [(width, n * head_dim) for n in (heads, kv_heads, kv_heads)] + [(heads * head_dim, width)]
    layers = [nn.Linear(*size, bias=bias, dtype=torch.float64) for size in sizes]
    generator = torch.Generator().manual_seed(width + heads)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for layer in (layers[1], layers[3]):
        layer.weight.requires_grad_(False)
    if bias:
        layers[0].bias.requires_grad_(False)
    return layers


def _parameters(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def _trained(layers: Iterable[nn.Module]) -> list[bool]:
    return [parameter.requires_grad for parameter in _parameters(layers)]


def _types(layers: Iterable[nn.Module]) -> list[torch.dtype]:
    return [parameter.dtype for parameter in _parameters(layers)]


def _shares_nothing(new: Iterable[nn.Module], old: Iterable[nn.Module], failures: Failures) -> None:
    places = {parameter.untyped_storage().data_ptr() for parameter in _parameters(old)}
    failures.expect(
        not any(parameter.untyped_storage().data_ptr() in places for parameter in _parameters(new)),
        "a parameter is shared with what was given, so that to train the new one changes the old; copy it",
    )


def _attend(layers: list[nn.Linear], x: Tensor, head_dim: int) -> Tensor:
    """Grouped-query attention of x [B, T, width] without a mask; the numbers of heads follow from the shapes."""
    with torch.no_grad():
        q, k, v = (_heads(layer(x), head_dim) for layer in layers[:3])  # [B, heads, T, dim]
        queries_per_key = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(queries_per_key, dim=1)
        v = v.repeat_interleave(queries_per_key, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
        context = scores.softmax(-1) @ v
        return layers[3](context.transpose(1, 2).flatten(2))


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _computes_the_same(after, before, head_dim: int, keep: list[int], failures: Failures) -> None:
    masked = copy.deepcopy(before)
    kv_heads = masked[1].out_features // head_dim
    columns = masked[3].weight.data.unflatten(1, (kv_heads, -1))  # [width, KV heads, the rest]
    for head in range(kv_heads):
        if head not in keep:
            columns[:, head] = 0  # the reference: the output projection does not look at what was removed
    width = before[0].in_features
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    failures.close(
        _attend(list(after), x, head_dim),
        _attend(masked, x, head_dim),
        "the outputs are not those of the layer whose output projection ignores the removed heads; look at rows and "
        "columns, at which query heads read which KV head, and at the biases",
        atol=1e-9,
    )


def _has_its_sizes(after, width: int, head_dim: int, heads: int, kv_heads: int, bias: bool, failures: Failures) -> None:
    sizes = [(width, n * head_dim) for n in (heads, kv_heads, kv_heads)] + [(heads * head_dim, width)]
    for name, layer, (fan_in, fan_out) in zip(PROJECTIONS, after, sizes, strict=True):
        failures.expect(
            tuple(layer.weight.shape) == (fan_out, fan_in),
            f"the weight of {name} has a shape that does not fit the heads that stay",
            detail=f"{tuple(layer.weight.shape)}",
        )
        named = (layer.in_features, layer.out_features) == (fan_in, fan_out)
        failures.expect(named, f"in_features or out_features of {name} does not say the new size")
        right_bias = (layer.bias is not None and layer.bias.shape == (fan_out,)) if bias else layer.bias is None
        failures.expect(right_bias, f"the bias of {name} has not the length of its outputs, or has come or gone")


# ----------------------------------------------------------------------------------------------------- a bound on speed


# width, neurons of the feed-forward network, tokens
BLOCKS = (
    (768, 3072, 128),
    (768, 3072, 512),
    (384, 1536, 1),
    (4096, 14336, 8192),
    (64, 100, 37),
)
# shares of the heads and of the neurons that stay
SHARES = (
    (1.0, 1.0),
    (0.5, 1.0),
    (7 / 12, 1.0),
    (1.0, 0.7),
    (0.25, 0.5),
    (0.0, 1.0),
    (1.0, 0.0),
)


def speedup_bound(fn: Callable, failures: Failures) -> None:
    """speedup_bound(width, ffn, tokens, heads, neurons) -> FLOPs of a whole block over those of the pruned one."""
    for width, ffn, tokens in BLOCKS:
        for heads, neurons in SHARES:
            with failures.given(width=width, ffn=ffn, tokens=tokens, heads=f"{heads:.3f}", neurons=f"{neurons:.3f}"):
                failures.close(
                    fn(width, ffn, tokens, heads, neurons),
                    _flops(width, ffn, tokens, 1.0, 1.0) / _flops(width, ffn, tokens, heads, neurons),
                    "count what is multiplied for one token: four projections, scores and weighted sum with every "
                    "token, two feed-forward matrices; then divide the whole by what is left",
                )


def _flops(width: int, ffn: int, tokens: int, heads: float, neurons: float) -> float:
    """By the sizes of the matrices, a multiply-add as two; per token, so that long sequences stay exact."""
    inner = heads * width  # of queries, keys, values and context
    matrices = [(width, inner)] * 3 + [(inner, tokens), (tokens, inner), (inner, width)]
    matrices += [(width, neurons * ffn), (neurons * ffn, width)]
    return sum(2.0 * rows * columns for rows, columns in matrices)


# -------------------------------------------------------------------------------------------------- dropping layers

DEPTH = 6  # layers of the decoder that the check drops some of
# layers that go, the mode of the model
GONE = (
    ([2, 3], "eval"),
    ([0, 1], "eval"),
    (range(2, 4), "eval"),
    ([4, 0], "train"),
    ([1, 2, 3, 4], "eval"),
)


def drop_layers(fn: Callable, failures: Failures) -> None:
    """drop_layers(model, gone) -> a new decoder without these layers, whose cache works as its prompt pass does."""
    for gone, mode in GONE:
        model = _decoder().train(mode == "train")
        with failures.given(layers=DEPTH, gone=gone, mode=mode):
            new = fn(model, copy.copy(gone))
            failures.expect(
                model.config.num_hidden_layers == DEPTH and _numbers(model) == list(range(DEPTH)),
                "the model that was given has changed; copy it, layers and config, before you cut",
            )
            failures.need(isinstance(new, nn.Module), "return the new model")
            stays = [layer for layer in range(DEPTH) if layer not in gone]
            failures.need(
                len(new.model.layers) == len(stays),
                "the new model has not the number of layers that should stay",
                detail=f"expected {len(stays)}, got {len(new.model.layers)}",
            )
            modes = {module.training for module in (new, *new.model.layers)}
            failures.expect(modes == {model.training}, "the new model has changed between train and eval mode")
            failures.expect(
                new.config.use_cache == model.config.use_cache, "the config now says another thing about the cache"
            )
            failures.expect(all(_trained([new])), "parameters that were trained are frozen in the new model")
            _shares_nothing([new], [model], failures)
            _answers_alike(new, model, gone, failures)


def _decoder() -> nn.Module:
    """A decoder of DEPTH layers, random and small, each layer doing enough to be missed."""
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds to import; the others need none of it

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": DEPTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return LlamaForCausalLM(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
        ).eval()


def _numbers(model: nn.Module) -> list[int]:
    return [layer.self_attn.layer_idx for layer in model.model.layers]


@torch.no_grad()
def _answers_alike(new: nn.Module, model: nn.Module, gone: list[int], failures: Failures) -> None:
    """The new model against the whole one whose removed layers pass their input on, without a cache and with one."""
    ids = torch.tensor([[3, 17, 9, 31, 6, 22]])
    hooks = [
        model.model.layers[layer].register_forward_hook(
            lambda _, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        )
        for layer in gone
    ]
    expected = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    same = failures.close(
        new(ids, use_cache=False).logits,
        expected,
        "a prompt at once does not give what the whole model gives when these layers pass their input on; look at "
        "which layers stay, and in which order",
        atol=1e-5,
    )
    if not same:
        return
    try:
        prompt = new(ids[:, :-2], use_cache=True)
        name = "cache" if hasattr(prompt, "cache") else "past_key_values"  # it changed within transformers 5
        cache = getattr(prompt, name)
        after = new(ids[:, -2:], use_cache=True, **{name: cache})
    except IndexError as error:
        failures.expect(False, "with a cache it fails; look at which entry each layer writes to", detail=str(error))
        return
    failures.close(
        after.logits,
        expected[:, -2:],
        "with a cache it gives other logits than without; look at the entry that says how long the cache is",
        atol=1e-5,
    )
    fits = len(cache.layers) == len(new.model.layers) == new.config.num_hidden_layers
    failures.expect(fits, "the cache, or the config's number of layers, has not one entry for each layer that stays")


CHECKS = {"04.1": surgery, "04.2": speedup_bound, "04.3": drop_layers}

TRIES = {
    "04.1": f"{len(LAYERS)} attention layers, with and without grouped queries and biases",
    "04.2": f"{len(BLOCKS)} blocks with {len(SHARES)} pairs of shares each",
    "04.3": f"{len(GONE)} ways to drop layers of a decoder of {DEPTH}, with a cache and without",
}
