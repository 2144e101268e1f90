"""Decoding one token on top of a KV cache, as a callable that can be timed and counted, and the bytes of that cache.

It wraps Hugging Face decoders, whose argument for the cache changed its name within transformers 5. No sampling.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError


def decode_step(model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """Fill the cache with `prompt` [batch, tokens]; the returned function writes one more token for each sequence.

    It returns the logits [batch, 1, vocabulary] and cuts the cache back to the prompt, so that every call does the same
    work. InputError for a prompt that is not [batch, tokens] or a model without a cache.
    """
    argument, cache = _filled(model, prompt)
    last = prompt[:, -1:]

    def step() -> Tensor:
        logits = model(last, use_cache=True, **{argument: cache}).logits
        cache.crop(-1)
        return logits

    return step


def cache_bytes(model: nn.Module, prompt: Tensor) -> int:
    """Bytes of the KV cache that `prompt` [batch, tokens] fills, counted on its tensors. Raises as decode_step does."""
    _, cache = _filled(model, prompt)
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def _filled(model: nn.Module, prompt: Tensor) -> tuple[str, Any]:
    """The name of the model's argument for a cache, and a cache that holds the prompt."""
    if prompt.ndim != 2 or prompt.numel() == 0 or prompt.is_floating_point():
        raise InputError(
            f"The prompt has shape {tuple(prompt.shape)}; give token ids as [batch, tokens], at least one."
        )
    accepted = inspect.signature(model.forward).parameters
    argument = next((name for name in ("cache", "past_key_values") if name in accepted), None)
    if argument is None:
        raise InputError(f"{type(model).__name__} takes no KV cache; decode_step needs a decoder of transformers.")
    with torch.inference_mode():
        filled = model(prompt, use_cache=True)
    cache = getattr(filled, "cache", None)
    cache = filled.past_key_values if cache is None else cache
    return argument, cache
