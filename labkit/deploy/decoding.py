"""A decoder in OpenVINO, step by step: the cache is passed in, and the keys and values of the new tokens come out.

The graph is `decoder_graph.Stateless`. For a `WeightOnlyLinear` the graph holds the codes, which the engine reads as
they are; the engine then rounds the inputs of these products to 8 bits as well, in groups, at every call.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.attention import speculative
from labkit.deploy import decoder_graph, engines
from labkit.errors import InputError
from labkit.modules import kv_cache


@dataclass(frozen=True, eq=False)
class DecoderEngine:
    """A decoder in OpenVINO, called with keys and values [B, layers, Hkv, P, D] and input_ids [B, S].

    A call returns logits [B, S, V], and keys and values of the S tokens. B, P and S may vary from call to call.
    bytes: size of the file.
    prepare_seconds: time to write the file.
    load_seconds: time to read and compile the file and give the first result.
    request: an openvino.InferRequest.
    """

    bytes: int
    prepare_seconds: float
    load_seconds: float
    request: Any

    def __call__(self, keys: Tensor, values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (keys, values, input_ids)
        arrays = [x.detach().contiguous().numpy() for x in inputs]
        results = self.request.infer(arrays, share_inputs=True)
        logits_shape = results[0].shape
        if logits_shape[:2] != tuple(input_ids.shape):
            raise InputError(
                f"OpenVINO gives logits {list(logits_shape)} for tokens {list(input_ids.shape)}, as it does for "
                "weights in few bits where ONEDNN_MAX_CPU_ISA forbids AVX-512: keep float32 weights, or lift the cap."
            )
        return tuple(torch.from_numpy(results[place]) for place in range(3))


def prepare(model: nn.Module) -> DecoderEngine:
    """Prepare a decoder for OpenVINO, on the current number of torch's threads.

    model: a LlamaForCausalLM of transformers in float32.
    Raises InputError if OpenVINO is not installed or gives no result on this CPU, for other architectures, and for
    weights without an affine grid.
    """
    engines.check_present("A decoder's graph", ("openvino",))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = Path(folder) / "decoder.xml"
        decoder_graph.Stateless(model).save(path)
        written = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        request = engines.request(path)
        first_call = DecoderEngine(size, written - start, 0.0, request)
        first_call(*example(model, torch.zeros(1, 1, dtype=torch.int64)))
        loaded = time.perf_counter()
    return DecoderEngine(size, written - start, loaded - written, request)


def example(model: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return arguments of an engine after `prompt` [B, P]: keys, values, and the prompt's last token [B, 1] again."""
    _, cache = kv_cache.filled_cache(model, prompt)
    keys = torch.stack([layer.keys for layer in cache.layers], 1)
    values = torch.stack([layer.values for layer in cache.layers], 1)
    return keys, values, prompt[:, -1:]


class _Memory:
    """Keys and values [B, layers, Hkv, P + room, D] of the P tokens of `prompt` [B, P], with room for more tokens."""

    def __init__(self, model: nn.Module, prompt: Tensor, room: int) -> None:
        keys, values, _ = example(model, prompt)
        self.keys = F.pad(keys, (0, 0, 0, room))
        self.values = F.pad(values, (0, 0, 0, room))

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first tokens."""
        return self.keys[..., :tokens, :], self.values[..., :tokens, :]

    def store(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [B, layers, Hkv, S, D] of the tokens from `start` on."""
        end = start + keys.shape[-2]
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values


def writing(
    engine: DecoderEngine, model: nn.Module, ids: Tensor, new: int, k: int = 0
) -> Callable[[], speculative.Generated]:
    """Read `ids` [T] by `model` once, and return a function that continues `ids` greedily by `new` tokens.

    k: most guesses by prompt lookup in a step.
    Every call of the function writes the same text.
    """
    memory = _Memory(model, ids[None, :-1], room=new + k)
    return partial(_write, engine, memory, ids, new, k)


@torch.inference_mode()
def _write(engine: DecoderEngine, memory: _Memory, ids: Tensor, new: int, k: int) -> speculative.Generated:
    text = ids
    end = len(ids) + new
    proposed = accepted = calls = 0
    while len(text) < end:
        stored = len(text) - 1  # all tokens but the last are in the memory
        guesses = speculative.lookup(text, min(k, end - len(text) - 1))
        fed = torch.cat([text[-1:], guesses])
        logits, keys, values = engine(*memory.first(stored), fed[None])
        best = logits[0].argmax(-1)  # the model's token after each token that was fed
        is_right = (best[:-1] == guesses).cumprod(0)  # until the first wrong guess
        right = int(is_right.sum())
        read = right + 1  # of the tokens that were fed, the last of `text` and the right guesses
        memory.store(stored, keys[..., :read, :], values[..., :read, :])
        text = torch.cat([text, best[:read]])
        proposed += len(guesses)
        accepted += right
        calls += 1
    return speculative.Generated(text, proposed, accepted, calls)


@torch.inference_mode()
def logits(engine: DecoderEngine, model: nn.Module, ids: Tensor) -> Tensor:
    """Compute logits [B, T, V] of texts [B, T], token after token as in decoding; `model` gives the first logits."""
    tokens = ids.shape[1]
    memory = _Memory(model, ids[:, :1], room=tokens - 1)
    steps = [model(ids[:, :1]).logits]
    for place in range(1, tokens):
        token = ids[:, place : place + 1]
        scores, keys, values = engine(*memory.first(place), token)
        steps.append(scores)
        memory.store(place, keys, values)
    return torch.cat(steps, 1)
