"""A decoder in OpenVINO: the cache is passed in, and the keys and values of the new tokens come out.

The graph is that of `decoder_graph`. Of a `WeightOnlyLinear` it holds the codes, which the engine reads as they are; it
then rounds the inputs of these products to 8 bits as well, in groups, at every call.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
    """(keys, values [B, layers, Hkv, P, D], input_ids [B, S]) to logits [B, S, V], and keys and values of the S tokens.

    B, P and S may vary from call to call. bytes: of the file. prepare_seconds: to write it; load_seconds: to read and
    compile it and give the first result.
    """

    bytes: int
    prepare_seconds: float
    load_seconds: float
    request: Any

    def __call__(self, keys: Tensor, values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        arrays = [x.detach().contiguous().numpy() for x in (keys, values, input_ids)]
        results = self.request.infer(arrays, share_inputs=True)
        if results[0].shape[:2] != tuple(input_ids.shape):
            raise InputError(
                f"OpenVINO gives logits {list(results[0].shape)} for tokens {list(input_ids.shape)}, as it does for "
                "weights in few bits where ONEDNN_MAX_CPU_ISA forbids AVX-512: keep float32 weights, or lift the cap."
            )
        return tuple(torch.from_numpy(results[place]) for place in range(3))


def prepare(model: nn.Module) -> DecoderEngine:
    """`model`, a LlamaForCausalLM of transformers in float32, on torch.get_num_threads() threads (of that moment).

    InputError where OpenVINO is not installed or gives no result on this CPU, for another architecture, and for weights
    that are no affine grid.
    """
    engines.check_present("A decoder's graph", ("openvino",))
    with tempfile.TemporaryDirectory() as folder:
        start, path = time.perf_counter(), Path(folder) / "decoder.xml"
        decoder_graph.Stateless(model).save(path)
        written = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        engine = DecoderEngine(size, written - start, 0.0, engines.request(path))
        engine(*example(model, torch.zeros(1, 1, dtype=torch.int64)))
        return DecoderEngine(size, written - start, time.perf_counter() - written, engine.request)


def example(model: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an engine is called with after `prompt` [B, P]: its keys and values, and its last token once more."""
    _, cache = kv_cache.filled_cache(model, prompt)
    memory = (torch.stack([getattr(layer, name) for layer in cache.layers], 1) for name in ("keys", "values"))
    return *memory, prompt[:, -1:]


def repeated(engine: DecoderEngine, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """`kv_cache.decode_step` in the engine: one more token for each text, stored behind the others; always the same."""
    *memory, last = example(model, prompt)
    memory = [F.pad(x, (0, 0, 0, 1)) for x in memory]

    @torch.inference_mode()
    def step() -> Tensor:
        logits, *new = engine(*(x[..., :-1, :] for x in memory), last)
        for x, y in zip(memory, new, strict=True):
            x[..., -1:, :] = y
        return logits

    return step


def writing(
    engine: DecoderEngine, model: nn.Module, ids: Tensor, new: int, k: int = 0
) -> Callable[[], speculative.Generated]:
    """Reads `ids` [T] by `model` once; the returned function continues them greedily by `new` tokens, always the same.

    k: up to so many guesses by prompt lookup in each call.
    """
    memory = [F.pad(x, (0, 0, 0, new + k)) for x in example(model, ids[None, :-1])[:2]]
    end = len(ids) + new

    @torch.inference_mode()
    def write() -> speculative.Generated:
        text, proposed, accepted, calls = ids, 0, 0, 0
        while (t := len(text)) < end:
            guesses = speculative.lookup(text, min(k, end - t - 1))
            fed = torch.cat([text[-1:], guesses])
            scores, *news = engine(*(x[..., : t - 1, :] for x in memory), fed[None])
            best = scores[0].argmax(-1)  # of which those up to the first wrong guess are the model's own
            n = int((best[:-1] == guesses).cumprod(0).sum())
            for x, y in zip(memory, news, strict=True):
                x[..., t - 1 : t + n, :] = y[..., : n + 1, :]
            text = torch.cat([text, guesses[:n], best[n : n + 1]])
            proposed, accepted, calls = proposed + len(guesses), accepted + n, calls + 1
        return speculative.Generated(text, proposed, accepted, calls)

    return write


@torch.inference_mode()
def logits(engine: DecoderEngine, model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of texts [B, T], token after token as in decoding; `model` gives the first ones."""
    *memory, _ = example(model, ids[:, :1])
    memory = [F.pad(x, (0, 0, 0, ids.shape[1] - 1)) for x in memory]
    steps = [model(ids[:, :1]).logits]
    for t in range(1, ids.shape[1]):
        scores, *new = engine(*(x[..., :t, :] for x in memory), ids[:, t : t + 1])
        steps.append(scores)
        for x, y in zip(memory, new, strict=True):
            x[..., t : t + 1, :] = y
    return torch.cat(steps, 1)
