"""A decoder of the Llama type as a graph of OpenVINO, written operator by operator, with weights in few bits.

An exporter traces the model for minutes, and the engine then searches the trace for what it has a kernel for. Here the
operators stand as OpenVINO's transformations look for them: rotary positions, RMSNorm, attention, and weights as
integers behind Subtract and Multiply, which the CPU keeps as integers. The function is that of
`labkit.attention.decoder`. Two forms: `Stateful`, whose cache is a state that grows (OpenVINO GenAI replaces it with
pages), and `Stateless`, whose cache is passed in and whose new keys and values come out.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.attention.decoder import check_llama
from labkit.bits import to_bits
from labkit.errors import InputError, check_choice
from labkit.quantization import weight_only
from labkit.quantization.affine import Quantized
from labkit.quantization.weight_only import WeightOnlyLinear

Node = Any  # openvino.Node


class Stored(NamedTuple):
    """A weight [out, in] as (codes - zero) scale, or as floats where there is no scale.

    codes: [out, in], or [out, groups, in group]. kind: their type in OpenVINO. scale: float16 [out, 1], or
    [out, groups, 1]. zero: the same shape; None: 0.
    """

    codes: Tensor
    kind: str
    scale: Tensor | None = None
    zero: Tensor | None = None


def _integers(quantized: Quantized) -> Stored:
    """Codes of `weight_only`: 4 bits in 4, all others in a byte."""
    signed, groups = quantized.grid.lo < 0, quantized.scale.shape[1]
    kind = f"{'i' if signed else 'u'}{4 if quantized.bits == 4 else 8}"
    parts = [quantized.codes.unflatten(1, (groups, -1)), quantized.scale.half(), quantized.zero]  # [out, groups, ...]
    codes, scale, zero = (part.flatten(1) for part in parts) if groups == 1 else parts
    return Stored(codes, kind, scale, None if signed else zero)


WEIGHTS: dict[str, Callable[[Tensor], Stored]] = {
    "float32": lambda weight: Stored(weight, "f32"),
    "float16": lambda weight: Stored(weight.half(), "f16"),
    # a scale a row
    "int8": lambda weight: _integers(weight_only.rtn(weight, 8, group_size=None, symmetric=True)),
}


class _Graph:
    """B texts of S tokens after P that are in the cache, T = P + S in all; H heads of queries on G of keys and values.

    model: a LlamaForCausalLM of transformers on the CPU. weights: how they are stored, a name of WEIGHTS;
        `WeightOnlyLinear`s of affine grids keep the codes that they have. All else is float32.
    Raises InputError for another architecture or format.
    """

    def __init__(self, model: nn.Module, weights: str = "float32") -> None:
        check_choice(weights, WEIGHTS, "format of weights")
        check_llama(model, (nn.Linear, WeightOnlyLinear))
        from openvino import opset13

        self.ops, self.model, config = opset13, model, model.config
        self.store = WEIGHTS[weights]
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim or config.hidden_size // config.num_attention_heads
        self.inputs: list[Node] = []
        self.sinks: list[Node] = []

    @torch.no_grad()
    def save(self, path: Path) -> None:
        """Writes the .xml file `path` and its .bin beside it."""
        import openvino

        results = [self.ops.result(x) for x in self._outputs()]
        model = openvino.Model(results, self.sinks, self.inputs, "decoder")
        openvino.save_model(model, path, compress_to_fp16=False)

    def _outputs(self) -> list[Node]:
        raise NotImplementedError

    def _attend(self, index: int, q: Node, k: Node, v: Node) -> Node:
        """Of layer `index`: q [B, H, S, D] on the cache with k and v [B, G, S, D], to [B, H, S, D]."""
        raise NotImplementedError

    def _logits(self, ids: Node, positions: Node, total: Node) -> Node:
        """Of ids [B, S] at positions [B or 1, S], T in all, [B, S, V]."""
        ops, body = self.ops, self.model.model
        frequencies = self._float(body.rotary_emb.inv_freq.view(1, 1, -1))
        angles = ops.multiply(ops.convert(ops.unsqueeze(positions, self._whole(2)), "f32"), frequencies)  # [B, S, D/2]
        angles = ops.unsqueeze(ops.concat([angles, angles], -1), self._whole(1))  # [B, 1, S, D]
        self.cos, self.sin = ops.cos(angles), ops.sin(angles)
        steps = ops.range(self._whole(0), total, self._whole(1), "i64")
        seen = ops.less_equal(steps, ops.unsqueeze(positions, self._whole([1, 3])))  # [B, 1, S, T]
        self.mask = ops.select(seen, self._float(0.0), self._float(-65504.0))
        head = self._weight(self.model.lm_head)
        tied = body.embed_tokens.weight is getattr(self.model.lm_head, "weight", None)
        x = ops.gather(head if tied else self._weight(body.embed_tokens), ids, self._whole(0))  # [B, S, W]
        for i, layer in enumerate(body.layers):
            x = ops.add(x, self._attention(i, self._norm(x, layer.input_layernorm), layer.self_attn))
            x = ops.add(x, self._feed_forward(self._norm(x, layer.post_attention_layernorm), layer.mlp))
        return ops.matmul(self._norm(x, body.norm), head, False, True)

    def _attention(self, index: int, x: Node, layer: nn.Module) -> Node:
        q, k, v = (
            self._swap(self.ops.reshape(self._linear(x, projection), self._whole([0, 0, -1, self.width]), True))
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        y = self._swap(self._attend(index, self._rotate(q), self._rotate(k), v))
        return self._linear(self.ops.reshape(y, self._whole([0, 0, self.heads * self.width]), True), layer.o_proj)

    def _feed_forward(self, x: Node, layer: nn.Module) -> Node:
        gate, up = self._linear(x, layer.gate_proj), self._linear(x, layer.up_proj)
        return self._linear(self.ops.multiply(self.ops.swish(gate), up), layer.down_proj)

    def _norm(self, x: Node, layer: nn.Module) -> Node:
        """RMSNorm."""
        ops = self.ops
        square = ops.reduce_mean(ops.power(x, self._float(2.0)), self._whole([-1]), True)
        root = ops.sqrt(ops.add(square, self._float(layer.variance_epsilon)))
        return ops.multiply(ops.multiply(x, ops.divide(self._float(1.0), root)), self._float(layer.weight))

    def _rotate(self, x: Node) -> Node:
        """Rotary positions of x [B, heads, S, D]: x cos + (-x2, x1) sin."""
        ops, half = self.ops, self.width // 2
        first, second = (
            ops.slice(x, self._whole([a]), self._whole([b]), self._whole([1]), self._whole([3]))
            for a, b in ((0, half), (half, 2 * half))
        )
        turned = ops.concat([ops.multiply(second, self._float(-1.0)), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def _linear(self, x: Node, layer: nn.Module) -> Node:
        return self.ops.matmul(x, self._weight(layer), False, True)

    def _weight(self, layer: nn.Module) -> Node:
        """The weight [out, in] of a layer in float32, from what is stored."""
        if isinstance(layer, WeightOnlyLinear):
            if layer.format:
                raise InputError(f"{layer.format} has no kernel in this engine: take codes of an affine grid.")
            stored = _integers(layer.quantized())
        else:
            stored = self.store(layer.weight.detach().float())
        ops, codes = self.ops, self._constant(stored.codes, stored.kind)
        if stored.scale is None:
            return codes if stored.kind == "f32" else ops.convert(codes, "f32")
        weight = ops.convert(codes, "f16")
        if stored.zero is not None:
            weight = ops.subtract(weight, ops.convert(self._constant(stored.zero, stored.kind), "f16"))
        weight = ops.multiply(weight, self._constant(stored.scale, "f16"))
        if stored.codes.ndim == 3:
            weight = ops.reshape(weight, self._whole([len(stored.codes), -1]), False)
        return ops.convert(weight, "f32")

    def _swap(self, x: Node) -> Node:
        """[B, heads, S, D] from [B, S, heads, D], or back."""
        return self.ops.transpose(x, self._whole([0, 2, 1, 3]))

    def _input(self, name: str, shape: Sequence[int], dtype: type = np.int64) -> Node:
        node = self.ops.parameter(list(shape), dtype)
        node.set_friendly_name(name)  # by which OpenVINO looks for it, where it makes pages of the state
        node.output(0).set_names({name})
        self.inputs.append(node)
        return node

    def _size(self, x: Node, dimension: int | Sequence[int]) -> Node:
        return self.ops.gather(self.ops.shape_of(x), self._whole(dimension), self._whole(0))

    def _constant(self, x: Tensor, kind: str) -> Node:
        import openvino

        if not kind.endswith("4"):
            return self.ops.constant(x.contiguous().numpy(), dtype=getattr(openvino.Type, kind))
        packed = openvino.Tensor(getattr(openvino.Type, kind), list(x.shape))
        packed.data[:] = to_bits(x, 4).numpy()
        return self.ops.constant(packed)

    def _float(self, x: Tensor | float) -> Node:
        return self.ops.constant(torch.as_tensor(x).detach().float().numpy())

    def _whole(self, x: int | Sequence[int]) -> Node:
        return self.ops.constant(np.array(x, dtype=np.int64))


class Stateful(_Graph):
    """Inputs input_ids and position_ids [B, S], attention_mask [B, T], beam_idx [B]; output logits [B, S, V]."""

    def _outputs(self) -> list[Node]:
        ids, mask, positions = (self._input(x, [-1, -1]) for x in ("input_ids", "attention_mask", "position_ids"))
        self.beam, self.batch = self._input("beam_idx", [-1], np.int32), self._size(ids, [0])
        logits = self._logits(ids, positions, self._size(mask, 1))
        logits.output(0).set_names({"logits"})
        return [logits]

    def _attend(self, index: int, q: Node, k: Node, v: Node) -> Node:
        keys, values = self._state(f"{index}.key", k), self._state(f"{index}.value", v)
        return self.ops.scaled_dot_product_attention(q, keys, values, self.mask)

    def _state(self, name: str, x: Node) -> Node:
        """Keys or values [B, G, S, D] after those before them, for every head: [B, H, T, D]."""
        import openvino

        ops, sizes = self.ops, [self._whole([n]) for n in (self.groups, 0, self.width)]
        empty = ops.broadcast(self._float(0.0), ops.concat([self.batch, *sizes], 0))
        shape = openvino.PartialShape([-1, self.groups, -1, self.width])
        past = ops.gather(ops.read_value(empty, name, np.float32, shape), self.beam, self._whole(0))
        everything = ops.concat([past, x], 2)
        self.sinks.append(ops.assign(everything, name))
        repeats = self._whole([1, 1, self.heads // self.groups, 1, 1])
        wide = ops.broadcast(ops.unsqueeze(everything, self._whole(2)), repeats, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(wide, self._whole([0, self.heads, -1, self.width]), True)


class Stateless(_Graph):
    """Inputs keys and values [B, layers, G, P, D], input_ids [B, S]; outputs logits, and keys and values of the S."""

    def _outputs(self) -> list[Node]:
        ops, shape = self.ops, [-1, len(self.model.model.layers), self.groups, -1, self.width]
        self.memory = [self._input(name, shape, np.float32) for name in ("keys", "values")]
        ids, self.new = self._input("input_ids", [-1, -1]), []
        past = self._size(self.memory[0], 3)
        total = ops.add(past, self._size(ids, 1))
        positions = ops.unsqueeze(ops.range(past, total, self._whole(1), "i64"), self._whole(0))  # [1, S]
        logits = self._logits(ids, positions, total)
        return [logits, *(ops.concat(list(side), 1) for side in zip(*self.new, strict=True))]

    def _attend(self, index: int, q: Node, k: Node, v: Node) -> Node:
        ops = self.ops
        self.new.append([ops.unsqueeze(x, self._whole(1)) for x in (k, v)])
        past = [ops.gather(side, self._whole(index), self._whole(1)) for side in self.memory]  # [B, G, P, D] each
        keys, values = (ops.concat(list(pair), 2) for pair in zip(past, (k, v), strict=True))
        rows = ops.reshape(q, self._whole([0, self.groups, -1, self.width]), True)  # [B, G, H / G S, D]
        y = ops.scaled_dot_product_attention(rows, keys, values, self._row_mask)
        return ops.reshape(y, self._whole([0, self.heads, -1, self.width]), True)

    @cached_property
    def _row_mask(self) -> Node:
        """The mask for the heads of a group as rows below each other: keys and values need no copy for each head."""
        return self.ops.tile(self.mask, self._whole([1, 1, self.heads // self.groups, 1]))
