"""A decoder of the Llama type as a graph of OpenVINO, written operator by operator, with weights in few bits.

The exporters of the field trace the model and then search the trace for what an engine has a kernel for. Here the
operators stand as OpenVINO's transformations look for them: attention behind a state that grows (which OpenVINO GenAI
replaces with pages), rotary positions, RMSNorm, and weights as integers behind Subtract and Multiply, which the CPU
keeps as integers. The function is that of `labkit.attention.decoder`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit import storage
from labkit.attention.decoder import check_llama
from labkit.errors import InputError, check_choice
from labkit.quantization import weight_only
from labkit.quantization.affine import Quantized
from labkit.quantization.weight_only import WeightOnlyLinear

Node = Any  # openvino.Node


class Stored(NamedTuple):
    """A weight [out, in] as (codes - zero) scale, or as floats where there is no scale.

    codes: [out, groups, in group] or floats [out, in]. kind: their type in OpenVINO. scale: float16 [out, groups, 1].
    zero: the same shape, integers of that type, or float16; None: 0.
    """

    codes: Tensor
    kind: str
    scale: Tensor | None = None
    zero: Tensor | None = None


def _floats(dtype: torch.dtype, kind: str) -> Callable[[Tensor], Stored]:
    return lambda weight: Stored(weight.to(dtype), kind)


def _integers(quantized: Quantized) -> Stored:
    """Codes of `weight_only`: 4 bits in 4, all others in a byte."""
    signed, half = quantized.grid.lo < 0, quantized.bits == 4
    codes = quantized.codes.unflatten(1, (quantized.scale.shape[1], -1))
    kind = f"{'i' if signed else 'u'}{4 if half else 8}"
    return Stored(codes, kind, quantized.scale.half(), None if signed else quantized.zero)


def _int8(weight: Tensor) -> Stored:
    return _integers(weight_only.rtn(weight, 8, group_size=None, symmetric=True))


def _int4(weight: Tensor) -> Stored:
    return _integers(weight_only.rtn(weight, 4, group_size=64))


def _q8_0(weight: Tensor) -> Stored:
    codes, scale = storage.q8_0(_blocks(weight))
    rows = len(weight)
    return Stored(codes.view(rows, -1, 32), "i8", scale.half().view(rows, -1, 1))


def _q4_1(weight: Tensor) -> Stored:
    """Codes scale + least = (codes - zero) scale with a zero that is no integer: rounding it costs much."""
    codes, scale, least = storage.q4_1(_blocks(weight))
    rows, flat = len(weight), scale.half() == 0  # a block of one number: code 0, so that -zero scale is the number
    scale = torch.where(flat, least, scale).half()
    zero = torch.where(flat, -1, -least / scale.float()).half()
    return Stored(codes.view(rows, -1, 32), "u4", scale.view(rows, -1, 1), zero.view(rows, -1, 1))


def _blocks(weight: Tensor) -> Tensor:
    if weight.shape[1] % 32:
        raise InputError(f"Rows of {weight.shape[1]} weights are no whole blocks of 32: take int8 or float16.")
    return weight.reshape(-1, 32)


# How the products of the blocks are stored, and the head with the embedding that is tied to it.
WEIGHTS: dict[str, tuple[Callable[[Tensor], Stored], Callable[[Tensor], Stored]]] = {
    "float32": (_floats(torch.float32, "f32"),) * 2,
    "float16": (_floats(torch.float16, "f16"),) * 2,
    "int8": (_int8, _int8),  # a scale a row
    "q8_0": (_q8_0, _q8_0),  # a scale for 32; this and the next as in llama.cpp's files of that name
    "q4_1": (_q4_1, _q8_0),
    "int4": (_int4, _int8),  # zero points in groups of 64
}


@torch.no_grad()
def write_openvino(model: nn.Module, path: Path, *, weights: str = "float16") -> None:
    """`model` as an .xml file with its .bin beside it, in which weights are stored as WEIGHTS names it.

    model: a LlamaForCausalLM of transformers on the CPU; its `WeightOnlyLinear`s of affine grids are written with the
        codes that they have.
    Inputs input_ids, attention_mask, position_ids [B, T] and beam_idx [B]; output logits [B, T, V]; float32 inside.
    Raises InputError for another architecture or format.
    """
    import openvino

    check_choice(weights, WEIGHTS, "format of weights")
    check_llama(model, (nn.Linear, WeightOnlyLinear))
    openvino.save_model(_Graph(model, weights).build(), path, compress_to_fp16=False)


class _Graph:
    """B sequences of S tokens after P that the state holds, T = P + S in all."""

    def __init__(self, model: nn.Module, weights: str) -> None:
        from openvino import opset13

        self.ops, self.model, self.config = opset13, model, model.config
        self.inner, self.outer = WEIGHTS[weights]
        config = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim or config.hidden_size // config.num_attention_heads
        self.sinks: list[Node] = []

    def build(self) -> Any:
        import openvino

        ops, body = self.ops, self.model.model
        ids, mask, positions = (self._input(name, 2) for name in ("input_ids", "attention_mask", "position_ids"))
        self.beam = self._input("beam_idx", 1, np.int32)
        self.batch = ops.gather(ops.shape_of(ids), self._whole([0]), self._whole(0))  # [1]
        frequencies = self._float(body.rotary_emb.inv_freq.view(1, 1, -1))
        angles = ops.multiply(ops.convert(ops.unsqueeze(positions, self._whole(2)), "f32"), frequencies)  # [B, S, D/2]
        angles = ops.unsqueeze(ops.concat([angles, angles], -1), self._whole(1))  # [B, 1, S, D]
        self.cos, self.sin = ops.cos(angles), ops.sin(angles)
        total = ops.gather(ops.shape_of(mask), self._whole(1), self._whole(0))
        steps = ops.range(self._whole(0), total, self._whole(1), "i64")
        seen = ops.less_equal(steps, ops.unsqueeze(positions, self._whole([1, 3])))  # [B, 1, S, T]
        self.mask = ops.select(seen, self._float(0.0), self._float(-65504.0))

        head = self._weight(self.model.lm_head, self.outer)
        tied = body.embed_tokens.weight is getattr(self.model.lm_head, "weight", None)
        x = ops.gather(head if tied else self._weight(body.embed_tokens, self.outer), ids, self._whole(0))  # [B, S, W]
        for i, layer in enumerate(body.layers):
            x = ops.add(x, self._attention(i, self._norm(x, layer.input_layernorm), layer.self_attn))
            x = ops.add(x, self._feed_forward(self._norm(x, layer.post_attention_layernorm), layer.mlp))
        logits = ops.matmul(self._norm(x, body.norm), head, False, True)
        logits.output(0).set_names({"logits"})
        return openvino.Model([ops.result(logits)], self.sinks, [ids, mask, positions, self.beam], "decoder")

    def _attention(self, index: int, x: Node, layer: nn.Module) -> Node:
        ops = self.ops
        q, k, v = (
            self._split(self._linear(x, projection), heads)
            for projection, heads in (
                (layer.q_proj, self.heads), (layer.k_proj, self.groups), (layer.v_proj, self.groups)
            )
        )  # fmt: skip
        keys, values = self._state(f"{index}.key", self._rotate(k)), self._state(f"{index}.value", v)
        y = ops.scaled_dot_product_attention(self._rotate(q), keys, values, self.mask)  # [B, H, S, D]
        y = ops.reshape(self._swap(y), self._whole([0, 0, self.heads * self.width]), True)
        return self._linear(y, layer.o_proj)

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

    def _state(self, name: str, x: Node) -> Node:
        """Keys or values [B, groups, S, D] after those before them, for every head: [B, H, T, D]."""
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

    def _linear(self, x: Node, layer: nn.Module) -> Node:
        return self.ops.matmul(x, self._weight(layer, self.inner), False, True)

    def _weight(self, layer: nn.Module, store: Callable[[Tensor], Stored]) -> Node:
        """The weight [out, in] of a layer in float32, from what is stored."""
        if isinstance(layer, WeightOnlyLinear):
            if layer.format:
                raise InputError(f"{layer.format} has no kernel in this engine: take codes of an affine grid.")
            stored = _integers(layer.quantized())
        else:
            stored = store(layer.weight.detach().float())
        ops, whole = self.ops, self._constant(stored.codes, stored.kind)
        if stored.scale is None:
            return whole if stored.kind == "f32" else ops.convert(whole, "f32")
        weight = ops.convert(whole, "f16")
        if stored.zero is not None:
            integer = not stored.zero.is_floating_point()
            zero = self._constant(stored.zero, stored.kind if integer else "f16")
            weight = ops.subtract(weight, ops.convert(zero, "f16") if integer else zero)
        weight = ops.multiply(weight, self._constant(stored.scale, "f16"))
        return ops.convert(ops.reshape(weight, self._whole([len(stored.codes), -1]), False), "f32")

    def _split(self, x: Node, heads: int) -> Node:
        """[B, S, heads D] to [B, heads, S, D]."""
        return self._swap(self.ops.reshape(x, self._whole([0, 0, heads, self.width]), True))

    def _swap(self, x: Node) -> Node:
        return self.ops.transpose(x, self._whole([0, 2, 1, 3]))

    def _input(self, name: str, dimensions: int, dtype: type = np.int64) -> Node:
        node = self.ops.parameter([-1] * dimensions, dtype)
        node.set_friendly_name(name)  # by which OpenVINO looks for it, where it makes pages of the state
        node.output(0).set_names({name})
        return node

    def _constant(self, x: Tensor, kind: str) -> Node:
        import openvino

        if not kind.endswith("4"):
            return self.ops.constant(x.contiguous().numpy(), dtype=getattr(openvino.Type, kind))
        packed = openvino.Tensor(getattr(openvino.Type, kind), list(x.shape))
        packed.data[:] = storage.pack4(x).numpy()
        return self.ops.constant(packed)

    def _float(self, x: Tensor | float) -> Node:
        return self.ops.constant(torch.as_tensor(x).detach().float().numpy())

    def _whole(self, x: int | Sequence[int]) -> Node:
        return self.ops.constant(np.array(x, dtype=np.int64))
