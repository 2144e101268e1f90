"""A decoder in OpenVINO: the cache is passed in, and the keys and values of the new tokens come out.

An exporter would trace the model for minutes; here its graph is written, operator by operator: the function of
`labkit.attention.decoder`. Of a `WeightOnlyLinear` (8 bits, symmetric, a scale a row) the graph holds the codes, which
the engine reads as they are; it then rounds the inputs of these products to 8 bits as well, in groups, at every call.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import roofline
from labkit.attention import speculative
from labkit.attention.decoder import check_llama
from labkit.deploy import engines
from labkit.errors import InputError
from labkit.quantization.weight_only import WeightOnlyLinear

Node = Any  # openvino.Node


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
        return tuple(torch.from_numpy(results[place]) for place in range(3))


def prepare(model: nn.Module) -> DecoderEngine:
    """`model`, a LlamaForCausalLM of transformers in float32, on torch.get_num_threads() threads (of that moment).

    InputError where OpenVINO is not installed, for another architecture, and for weights in other formats.
    """
    if (missing := engines.available()["openvino"]) != "ready":
        raise InputError(missing)
    check_llama(model, (nn.Linear, WeightOnlyLinear))
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        start, path = time.perf_counter(), Path(folder) / "decoder.xml"
        with torch.no_grad():
            openvino.save_model(_Graph(model).build(), path, compress_to_fp16=False)
        written = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        engine = DecoderEngine(size, written - start, 0.0, engines.request(path))
        engine(*example(model, torch.zeros(1, 1, dtype=torch.int64)))
        return DecoderEngine(size, written - start, time.perf_counter() - written, engine.request)


def example(model: nn.Module, prompt: Tensor, new: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What an engine is called with after `prompt` [B, P]: its keys and values, and its last token, `new` times."""
    _, cache = roofline.filled_cache(model, prompt)
    memory = (torch.stack([getattr(layer, name) for layer in cache.layers], 1) for name in ("keys", "values"))
    return *memory, prompt[:, -1:].repeat(1, new)


def repeated(engine: DecoderEngine, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """`roofline.decode_step` in the engine: one more token for each text, stored behind the others; always the same."""
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


class _Graph:
    """B texts of S new tokens after P."""

    def __init__(self, model: nn.Module) -> None:
        from openvino import opset13

        self.ops, self.model, config = opset13, model, model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim or config.hidden_size // config.num_attention_heads

    def build(self) -> Any:
        import openvino

        ops, body = self.ops, self.model.model
        shape = [-1, len(body.layers), self.groups, -1, self.width]
        memory = [ops.parameter(shape, np.float32, name=name) for name in ("keys", "values")]
        ids = ops.parameter([-1, -1], np.int64, name="input_ids")
        before = ops.gather(ops.shape_of(memory[0]), self._whole(3), self._whole(0))
        after = ops.add(before, ops.gather(ops.shape_of(ids), self._whole(1), self._whole(0)))
        places = ops.unsqueeze(ops.range(before, after, self._whole(1), "i64"), self._whole(1))  # [S, 1]
        angles = ops.multiply(ops.convert(places, "f32"), self._float(body.rotary_emb.inv_freq[None]))  # [S, D / 2]
        angles, scale = ops.concat([angles, angles], -1), self._float(body.rotary_emb.attention_scaling)
        self.cos, self.sin = (ops.multiply(f(angles), scale) for f in (ops.cos, ops.sin))
        seen = ops.less_equal(ops.range(self._whole(0), after, self._whole(1), "i64"), places)  # [S, P + S]
        mask = ops.select(seen, self._float(0.0), self._float(-65504.0))
        self.mask = ops.tile(mask, self._whole([self.heads // self.groups, 1]))  # the heads of a group as rows
        head = self._weight(self.model.lm_head)
        tied = body.embed_tokens.weight is getattr(self.model.lm_head, "weight", None)
        x = ops.gather(head if tied else self._weight(body.embed_tokens), ids, self._whole(0))  # [B, S, W]
        new = []
        for i, layer in enumerate(body.layers):
            past = [ops.gather(side, self._whole(i), self._whole(1)) for side in memory]  # [B, Hkv, P, D] each
            y, *pair = self._attention(self._norm(x, layer.input_layernorm), layer.self_attn, past)
            x = ops.add(x, y)
            x = ops.add(x, self._feed_forward(self._norm(x, layer.post_attention_layernorm), layer.mlp))
            new.append([ops.unsqueeze(side, self._whole(1)) for side in pair])
        scores = ops.matmul(self._norm(x, body.norm), head, False, True)
        results = [scores, *(ops.concat(list(side), 1) for side in zip(*new, strict=True))]
        return openvino.Model([ops.result(node) for node in results], [*memory, ids], "decoder")

    def _attention(self, x: Node, layer: nn.Module, past: Sequence[Node]) -> tuple[Node, Node, Node]:
        ops = self.ops
        q, k, v = (
            self._swap(ops.reshape(self._linear(x, projection), self._whole([0, 0, -1, self.width]), True))
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )  # [B, heads, S, D]
        q, k = self._rotate(q), self._rotate(k)
        keys, values = (ops.concat(list(pair), 2) for pair in zip(past, (k, v), strict=True))  # [B, Hkv, T, D]
        rows = ops.reshape(q, self._whole([0, self.groups, -1, self.width]), True)  # [B, Hkv, H / Hkv S, D]
        y = ops.scaled_dot_product_attention(rows, keys, values, self.mask)
        y = self._swap(ops.reshape(y, self._whole([0, self.heads, -1, self.width]), True))
        y = ops.reshape(y, self._whole([0, 0, self.heads * self.width]), True)
        return self._linear(y, layer.o_proj), k, v

    def _feed_forward(self, x: Node, layer: nn.Module) -> Node:
        gate, up = self._linear(x, layer.gate_proj), self._linear(x, layer.up_proj)
        return self._linear(self.ops.multiply(self.ops.swish(gate), up), layer.down_proj)

    def _norm(self, x: Node, layer: nn.Module) -> Node:
        ops = self.ops
        square = ops.reduce_mean(ops.power(x, self._float(2.0)), self._whole([-1]), True)
        root = ops.sqrt(ops.add(square, self._float(layer.variance_epsilon)))
        return ops.multiply(ops.divide(x, root), self._float(layer.weight))

    def _rotate(self, x: Node) -> Node:
        """Rotary positions of x [B, heads, S, D]: x cos + (-x2, x1) sin."""
        ops = self.ops
        first, second = ops.split(x, self._whole(3), 2).outputs()
        turned = ops.concat([ops.multiply(second, self._float(-1.0)), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def _swap(self, x: Node) -> Node:
        return self.ops.transpose(x, self._whole([0, 2, 1, 3]))

    def _linear(self, x: Node, layer: nn.Module) -> Node:
        return self.ops.matmul(x, self._weight(layer), False, True)

    def _weight(self, layer: nn.Module) -> Node:
        if not isinstance(layer, WeightOnlyLinear):
            return self._float(layer.weight)
        weight = layer.quantized()
        if weight.codes.dtype != torch.int8 or weight.scale.shape[1] != 1:
            kind = layer.format or f"{layer.bits} bits, {weight.scale.shape[1]} scales a row"
            raise InputError(f"Weights in {kind} are not for this engine: take 8 bits, symmetric, group_size None.")
        codes = self.ops.convert(self.ops.constant(weight.codes.numpy()), "f32")
        return self.ops.multiply(codes, self._float(weight.scale.view(-1, 1)))

    def _float(self, x: Tensor | float) -> Node:
        return self.ops.constant(torch.as_tensor(x).detach().float().contiguous().numpy())

    def _whole(self, x: int | Sequence[int]) -> Node:
        return self.ops.constant(np.array(x, dtype=np.int64))
