"""A decoder's step in an engine: a graph keeps nothing between calls, so its cache is passed in and out.

`engines.prepare(name, DecodeStep(model), example(model, prompt), dynamic=SIZES)` gives the step for any number of
texts and of tokens before; the number of new tokens is fixed. With a model of `weight_only.quantize` (8 bits,
symmetric, a scale a row) the engine reads the int8 weights; OpenVINO then rounds the inputs of each product to 8 bits
as well, in groups, at every call.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from labkit import roofline
from labkit.attention import speculative

Call = Callable[..., tuple[Tensor, Tensor, Tensor]]  # a DecodeStep, or an engine that was prepared from one
SIZES = {0: (1, 64), 3: (1, 2048)}  # what may vary: texts, tokens before


class DecodeStep(nn.Module):
    """(keys, values [B, layers, Hkv, T, D], input_ids [B, S]) to logits [B, S, V] and the S new keys and values.

    model: a decoder of transformers. It is not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.argument = model, roofline.cache_argument(model)

    def forward(self, keys: Tensor, values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache, before = DynamicCache(), keys.shape[3]
        for layer, (k, v) in enumerate(zip(keys.unbind(1), values.unbind(1), strict=True)):
            cache.update(k, v, layer)
        places = before + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        logits = self.model(input_ids, position_ids=places, use_cache=True, **{self.argument: cache}).logits
        return logits, *(x[..., before:, :] for x in _stacked(cache))


def example(model: nn.Module, prompt: Tensor, new: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What a DecodeStep is called with after `prompt` [B, T]: its last token, `new` times."""
    _, cache = roofline.filled_cache(model, prompt)
    return *_stacked(cache), prompt[:, -1:].repeat(1, new)


def repeated(call: Call, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """`roofline.decode_step` by `call`: one more token for each text, stored behind the others; the same every time."""
    *memory, last = example(model, prompt)
    memory = [F.pad(x, (0, 0, 0, 1)) for x in memory]

    @torch.inference_mode()
    def step() -> Tensor:
        logits, *new = call(*(x[..., :-1, :] for x in memory), last)
        for x, y in zip(memory, new, strict=True):
            x[..., -1:, :] = y
        return logits

    return step


def writing(call: Call, model: nn.Module, ids: Tensor, new: int, k: int = 0) -> Callable[[], speculative.Generated]:
    """Reads `ids` [T] once; the returned function continues them, greedily, by `new` tokens, the same every time.

    k: guesses by prompt lookup in each call; `call` takes 1 + k tokens, so that fewer guesses are filled up.
    """
    memory = [F.pad(x, (0, 0, 0, new + k)) for x in example(model, ids[None, :-1])[:2]]
    end = len(ids) + new

    @torch.inference_mode()
    def write() -> speculative.Generated:
        text, proposed, accepted, calls = ids, 0, 0, 0
        while (t := len(text)) < end:
            guesses = speculative.lookup(text, min(k, end - t - 1))
            fed = F.pad(torch.cat([text[-1:], guesses]), (0, k - len(guesses)))
            scores, *news = call(*(x[..., : t - 1, :] for x in memory), fed[None])
            best = scores[0].argmax(-1)  # [1 + k], of which those up to the first wrong guess are the model's own
            n = int((best[: len(guesses)] == guesses).cumprod(0).sum())
            for x, y in zip(memory, news, strict=True):
                x[..., t - 1 : t + n, :] = y[..., : n + 1, :]
            text = torch.cat([text, guesses[:n], best[n : n + 1]])
            proposed, accepted, calls = proposed + len(guesses), accepted + n, calls + 1
        return speculative.Generated(text, proposed, accepted, calls)

    return write


@torch.inference_mode()
def logits(call: Call, model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of texts [B, T], token after token as in decoding; `model` gives the first ones."""
    *memory, _ = example(model, ids[:, :1])
    memory = [F.pad(x, (0, 0, 0, ids.shape[1] - 1)) for x in memory]
    steps = [model(ids[:, :1]).logits]
    for t in range(1, ids.shape[1]):
        scores, *new = call(*(x[..., :t, :] for x in memory), ids[:, t : t + 1])
        steps.append(scores)
        for x, y in zip(memory, new, strict=True):
            x[..., t : t + 1, :] = y
    return torch.cat(steps, 1)


def _stacked(cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Keys and values of all layers, [B, layers, Hkv, T, D] each."""
    return tuple(torch.stack([getattr(layer, name) for layer in cache.layers], 1) for name in ("keys", "values"))
