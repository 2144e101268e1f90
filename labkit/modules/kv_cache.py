"""KV cache of a transformers decoder: fill a cache with a prompt, decode a token on top."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_module, check_tensor
from labkit.errors import InputError

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the name changed within transformers 5


def decode_step(model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """Make a function that decodes a token on top of a KV cache filled with a prompt.

    Each call of the function writes a further token for each sequence, returns the logits [batch, 1, vocabulary], and
    cuts the cache back to the prompt, so that all calls do the same work.

    model: a decoder of transformers.
    prompt: token ids, [batch, tokens].
    Raises InputError for a prompt of another shape, and for a model without a cache.
    """
    argument, cache = filled_cache(model, prompt)
    last_token = prompt[:, -1:]

    def step() -> Tensor:
        logits = model(last_token, use_cache=True, **{argument: cache}).logits
        cache.crop(-1)
        return logits

    return step


def filled_cache(model: nn.Module, prompt: Tensor) -> tuple[str, Any]:
    """Fill a KV cache with a prompt, and return the name of the model's argument for a cache, and the cache.

    model, prompt, errors: as in `decode_step`.
    """
    check_module(model)
    check_tensor(prompt, "The prompt")
    if prompt.ndim != 2 or prompt.numel() == 0 or prompt.is_floating_point():
        raise InputError(
            f"The prompt has shape {tuple(prompt.shape)}; give token ids as [batch, tokens], at least one."
        )
    argument = _cache_argument(model)
    with torch.inference_mode():
        output = model(prompt, use_cache=True)
    cache = getattr(output, "cache", None)
    if cache is None:
        cache = output.past_key_values
    return argument, cache


def _cache_argument(model: nn.Module) -> str:
    accepted = inspect.signature(model.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in accepted:
            return name
    raise InputError(f"{type(model).__name__} takes no KV cache; decode_step needs a decoder of transformers.")
