"""A decoder of the Llama type as a graph of OpenVINO, written operator by operator, with weights in few bits.

The function is that of `labkit.attention.decoder`, and the forward pass is written a second time for two reasons. An
exporter needs minutes to trace the model. And the engine finds its kernels by patterns of operators: rotary positions,
RMSNorm and attention stand here as OpenVINO's transformations expect them, and weights as integers behind Subtract and
Multiply, which the CPU keeps as integers; torch has no such operators to trace. Shared with `attention.decoder`: the
check of the model and the width of a head. Of the decoders of the Llama type it is Llama alone that is drawn here.

Two forms: `Stateful`, with a growing cache inside (OpenVINO GenAI replaces the state with pages), and `Stateless`, with
the cache passed in and the new keys and values coming out.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.attention.families import check_decoder, head_width
from labkit.bits import to_bits
from labkit.errors import InputError, check_choice
from labkit.quantization import weight_only
from labkit.quantization.affine import Quantized
from labkit.quantization.weight_only import WeightOnlyLinear

Node = Any  # openvino.Node
HIDDEN = -65504.0  # added to the score of a token that may not be read: float16's least number


class Stored(NamedTuple):
    """A weight [out, in] as (codes - zero) scale, or as floats if `scale` is None.

    codes: [out, in], or [out, groups, in group].
    kind: type of the codes in OpenVINO, such as "u4".
    scale: float16 [out, 1], or [out, groups, 1].
    zero: zero points in the same shape; None: 0.
    """

    codes: Tensor
    kind: str
    scale: Tensor | None = None
    zero: Tensor | None = None


def _integers(quantized: Quantized) -> Stored:
    """Store codes of `weight_only`: 4-bit codes in 4 bits, all others in a byte."""
    is_signed = quantized.grid.lo < 0
    bits = 4 if quantized.bits == 4 else 8
    groups = quantized.scale.shape[1]
    codes = quantized.codes.unflatten(1, (groups, -1))  # [out, groups, in group]
    scale = quantized.scale.half()
    zero = quantized.zero
    if groups == 1:
        codes, scale, zero = codes.flatten(1), scale.flatten(1), zero.flatten(1)
    if is_signed:
        return Stored(codes, f"i{bits}", scale)
    return Stored(codes, f"u{bits}", scale, zero)


def _float32(weight: Tensor) -> Stored:
    return Stored(weight, "f32")


def _float16(weight: Tensor) -> Stored:
    return Stored(weight.half(), "f16")


def _int8(weight: Tensor) -> Stored:
    """Round to 8 bits with a scale per row."""
    return _integers(weight_only.rtn(weight, 8, group_size=None, symmetric=True))


WEIGHTS: dict[str, Callable[[Tensor], Stored]] = {"float32": _float32, "float16": _float16, "int8": _int8}


class _Operators:
    """Operators of OpenVINO on plain numbers: sizes, axes and indices become int64 constants.

    Operators without such arguments are called on `opset`.
    """

    def __init__(self) -> None:
        from openvino import opset13

        self.opset = opset13

    def floats(self, x: Tensor | float) -> Node:
        return self.opset.constant(torch.as_tensor(x).detach().float().numpy())

    def integers(self, x: int | Sequence[int]) -> Node:
        return self.opset.constant(np.array(x, dtype=np.int64))

    def reshape(self, x: Node, *sizes: int) -> Node:
        """Reshape x; 0 copies the size of x, -1 is the rest."""
        return self.opset.reshape(x, self.integers(sizes), True)

    def unsqueeze(self, x: Node, axes: int | Sequence[int]) -> Node:
        return self.opset.unsqueeze(x, self.integers(axes))

    def swap_heads(self, x: Node) -> Node:
        """Transpose [B, S, heads, D] to [B, heads, S, D], or back."""
        return self.opset.transpose(x, self.integers([0, 2, 1, 3]))

    def pick(self, x: Node, index: Node | int, axis: int) -> Node:
        """Take the entries `index` of x along an axis."""
        if isinstance(index, int):
            index = self.integers(index)
        return self.opset.gather(x, index, self.integers(axis))

    def size(self, x: Node, dimension: int | Sequence[int]) -> Node:
        """Return the size of a dimension of x: a scalar, or [1] if the dimension is in a list."""
        sizes = self.opset.shape_of(x)
        return self.opset.gather(sizes, self.integers(dimension), self.integers(0))

    def steps(self, start: Node, end: Node) -> Node:
        """Return the whole numbers from `start` to `end`, without `end`."""
        return self.opset.range(start, end, self.integers(1), "i64")

    def last_axis(self, x: Node, start: int, end: int) -> Node:
        """Slice x [B, heads, S, D] along D."""
        ends = [self.integers([start]), self.integers([end])]
        return self.opset.slice(x, *ends, self.integers([1]), self.integers([3]))

    def product(self, x: Node, weight: Node) -> Node:
        """Multiply x [..., in] with a weight [out, in]."""
        return self.opset.matmul(x, weight, False, True)


def _is_drawn(model: nn.Module) -> bool:
    """Return True if `_Graph` draws all parts of a decoder of the Llama type."""
    config = model.config
    if config.model_type != "llama":
        return False
    has_bias = any(module.bias is not None for name, module in model.named_modules() if name.endswith("_proj"))
    is_scaled = model.model.rotary_emb.attention_scaling != 1
    return config.hidden_act == "silu" and not has_bias and not is_scaled


class _Graph:
    """Graph of a decoder for B texts of S new tokens, with P tokens in the cache, T = P + S in all.

    H heads of queries share G heads of keys and values, of D numbers each; V token ids.
    model: a LlamaForCausalLM of transformers on the CPU.
    weights: storage of the weights, a name of WEIGHTS; a `WeightOnlyLinear` of an affine grid keeps its codes. All else
        is float32.
    Raises InputError for another architecture or format.
    """

    def __init__(self, model: nn.Module, weights: str = "float32") -> None:
        check_choice(weights, WEIGHTS, "format of weights")
        check_decoder(model, (nn.Linear, WeightOnlyLinear))
        if not _is_drawn(model):
            raise InputError(
                f"This {type(model).__name__} has parts that are not drawn for OpenVINO: give a LlamaForCausalLM "
                "without biases, with silu and without yarn, or generate by labkit.attention or labkit.deploy.serving."
            )
        self.ops = _Operators()
        self.model = model
        self.store = WEIGHTS[weights]
        self.heads = model.config.num_attention_heads
        self.groups = model.config.num_key_value_heads
        self.width = head_width(model.config)
        self.inputs: list[Node] = []
        self.sinks: list[Node] = []

    @torch.no_grad()
    def save(self, path: Path) -> None:
        """Write the .xml file `path`, and beside it a .bin file with the weights."""
        import openvino

        results = [self.ops.opset.result(x) for x in self._outputs()]
        model = openvino.Model(results, self.sinks, self.inputs, "decoder")
        openvino.save_model(model, path, compress_to_fp16=False)

    def _outputs(self) -> list[Node]:
        raise NotImplementedError

    def _attend(self, layer: int, q: Node, k: Node, v: Node) -> Node:
        """Attend from q [B, H, S, D] to the cache of a layer and the new k and v [B, G, S, D]: [B, H, S, D]."""
        raise NotImplementedError

    # --- layers -------------------------------------------------------------------------------------------------------

    def _logits(self, ids: Node, positions: Node, total: Node) -> Node:
        """Compute the logits [B, S, V] of ids [B, S] at positions [B or 1, S]; total: T, a scalar."""
        body, lm_head = self.model.model, self.model.lm_head
        self.cos, self.sin = self._rotation(positions)
        self.mask = self._causal_mask(positions, total)
        head = self._weight(lm_head)
        is_tied = body.embed_tokens.weight is getattr(lm_head, "weight", None)
        embedding = head if is_tied else self._weight(body.embed_tokens)
        x = self.ops.pick(embedding, ids, 0)  # [B, S, W]
        for number, layer in enumerate(body.layers):
            attended = self._attention(number, self._norm(x, layer.input_layernorm), layer.self_attn)
            x = self.ops.opset.add(x, attended)
            fed = self._feed_forward(self._norm(x, layer.post_attention_layernorm), layer.mlp)
            x = self.ops.opset.add(x, fed)
        return self.ops.product(self._norm(x, body.norm), head)

    def _rotation(self, positions: Node) -> tuple[Node, Node]:
        """Compute cos and sin of the rotary angles, [B or 1, 1, S, D] each."""
        ops = self.ops
        frequencies = ops.floats(self.model.model.rotary_emb.inv_freq.view(1, 1, -1))
        columns = ops.opset.convert(ops.unsqueeze(positions, 2), "f32")
        angles = ops.opset.multiply(columns, frequencies)  # [B, S, D / 2]
        both_halves = ops.opset.concat([angles, angles], -1)
        angles = ops.unsqueeze(both_halves, 1)
        return ops.opset.cos(angles), ops.opset.sin(angles)

    def _causal_mask(self, positions: Node, total: Node) -> Node:
        """Return 0 where a token may be read, and HIDDEN elsewhere: [B or 1, 1, S, T]."""
        ops = self.ops
        steps = ops.steps(ops.integers(0), total)
        readable = ops.opset.less_equal(steps, ops.unsqueeze(positions, [1, 3]))
        return ops.opset.select(readable, ops.floats(0.0), ops.floats(HIDDEN))

    def _attention(self, number: int, x: Node, layer: nn.Module) -> Node:
        q = self._by_head(self._linear(x, layer.q_proj))
        k = self._by_head(self._linear(x, layer.k_proj))
        v = self._by_head(self._linear(x, layer.v_proj))
        y = self._attend(number, self._rotate(q), self._rotate(k), v)
        side_by_side = self.ops.reshape(self.ops.swap_heads(y), 0, 0, self.heads * self.width)
        return self._linear(side_by_side, layer.o_proj)

    def _by_head(self, x: Node) -> Node:
        """Turn [B, S, heads D] into [B, heads, S, D]."""
        return self.ops.swap_heads(self.ops.reshape(x, 0, 0, -1, self.width))

    def _feed_forward(self, x: Node, layer: nn.Module) -> Node:
        gate = self.ops.opset.swish(self._linear(x, layer.gate_proj))
        up = self._linear(x, layer.up_proj)
        return self._linear(self.ops.opset.multiply(gate, up), layer.down_proj)

    def _norm(self, x: Node, layer: nn.Module) -> Node:
        """Apply RMSNorm: x / sqrt(mean(x^2) + epsilon) weight."""
        ops, opset = self.ops, self.ops.opset
        square = opset.power(x, ops.floats(2.0))
        mean = opset.reduce_mean(square, ops.integers([-1]), True)
        root = opset.sqrt(opset.add(mean, ops.floats(layer.variance_epsilon)))
        inverse = opset.divide(ops.floats(1.0), root)
        return opset.multiply(opset.multiply(x, inverse), ops.floats(layer.weight))

    def _rotate(self, x: Node) -> Node:
        """Apply rotary positions to x [B, heads, S, D]: x cos + (-x2, x1) sin, with x1 and x2 the halves of x."""
        ops, opset = self.ops, self.ops.opset
        half = self.width // 2
        first = ops.last_axis(x, 0, half)
        second = ops.last_axis(x, half, 2 * half)
        minus_second = opset.multiply(second, ops.floats(-1.0))
        turned = opset.concat([minus_second, first], -1)
        return opset.add(opset.multiply(x, self.cos), opset.multiply(turned, self.sin))

    def _linear(self, x: Node, layer: nn.Module) -> Node:
        return self.ops.product(x, self._weight(layer))

    # --- weights ------------------------------------------------------------------------------------------------------

    def _weight(self, layer: nn.Module) -> Node:
        """Return the weight [out, in] of a layer in float32, computed from the stored numbers."""
        stored = self._stored(layer)
        ops, opset = self.ops, self.ops.opset
        codes = self._constant(stored.codes, stored.kind)
        if stored.scale is None:
            return codes if stored.kind == "f32" else opset.convert(codes, "f32")
        weight = opset.convert(codes, "f16")
        if stored.zero is not None:
            zero = self._constant(stored.zero, stored.kind)
            weight = opset.subtract(weight, opset.convert(zero, "f16"))
        weight = opset.multiply(weight, self._constant(stored.scale, "f16"))
        if stored.codes.ndim == 3:
            shape = ops.integers([len(stored.codes), -1])
            weight = opset.reshape(weight, shape, False)
        return opset.convert(weight, "f32")

    def _stored(self, layer: nn.Module) -> Stored:
        if not isinstance(layer, WeightOnlyLinear):
            return self.store(layer.weight.detach().float())
        if layer.format:
            raise InputError(f"{layer.format} has no kernel in this engine: take codes of an affine grid.")
        return _integers(layer.quantized())

    def _constant(self, x: Tensor, kind: str) -> Node:
        """Make a constant of the OpenVINO type `kind`; two codes of 4 bits share a byte."""
        import openvino

        dtype = getattr(openvino.Type, kind)
        if not kind.endswith("4"):
            return self.ops.opset.constant(x.contiguous().numpy(), dtype=dtype)
        packed = openvino.Tensor(dtype, list(x.shape))
        packed.data[:] = to_bits(x, 4).numpy()
        return self.ops.opset.constant(packed)

    def _input(self, name: str, shape: Sequence[int], dtype: type = np.int64) -> Node:
        node = self.ops.opset.parameter(list(shape), dtype)
        node.set_friendly_name(name)  # by which OpenVINO looks for an input, when it makes pages of the state
        node.output(0).set_names({name})
        self.inputs.append(node)
        return node


class Stateful(_Graph):
    """Graph with the cache as a state. Arguments: see `_Graph`.

    Inputs: input_ids and position_ids [B, S], attention_mask [B, T], beam_idx [B]. Output: logits [B, S, V].
    """

    def _outputs(self) -> list[Node]:
        ids = self._input("input_ids", [-1, -1])
        mask = self._input("attention_mask", [-1, -1])
        positions = self._input("position_ids", [-1, -1])
        self.beam = self._input("beam_idx", [-1], np.int32)
        self.batch = self.ops.size(ids, [0])
        logits = self._logits(ids, positions, total=self.ops.size(mask, 1))
        logits.output(0).set_names({"logits"})
        return [logits]

    def _attend(self, layer: int, q: Node, k: Node, v: Node) -> Node:
        keys = self._repeat(self._append(f"{layer}.key", k))
        values = self._repeat(self._append(f"{layer}.value", v))
        return self.ops.opset.scaled_dot_product_attention(q, keys, values, self.mask)

    def _append(self, name: str, x: Node) -> Node:
        """Put keys or values [B, G, S, D] behind those of the state `name`: [B, G, T, D]."""
        import openvino

        opset = self.ops.opset
        sizes = [self.batch]
        for size in (self.groups, 0, self.width):
            sizes.append(self.ops.integers([size]))
        empty = opset.broadcast(self.ops.floats(0.0), opset.concat(sizes, 0))
        shape = openvino.PartialShape([-1, self.groups, -1, self.width])
        state = opset.read_value(empty, name, np.float32, shape)
        past = self.ops.pick(state, self.beam, 0)
        everything = opset.concat([past, x], 2)
        self.sinks.append(opset.assign(everything, name))
        return everything

    def _repeat(self, x: Node) -> Node:
        """Repeat keys or values [B, G, T, D] for every query head: [B, H, T, D]."""
        repeats = self.ops.integers([1, 1, self.heads // self.groups, 1, 1])
        wide = self.ops.opset.broadcast(self.ops.unsqueeze(x, 2), repeats, broadcast_spec="BIDIRECTIONAL")
        return self.ops.reshape(wide, 0, self.heads, -1, self.width)


class Stateless(_Graph):
    """Graph with the cache passed in. Arguments: see `_Graph`.

    Inputs: keys and values [B, layers, G, P, D], input_ids [B, S]. Outputs: logits [B, S, V], and the keys and values
    of the S tokens, [B, layers, G, S, D].
    """

    def _outputs(self) -> list[Node]:
        ops, opset = self.ops, self.ops.opset
        shape = [-1, len(self.model.model.layers), self.groups, -1, self.width]
        self.past_keys = self._input("keys", shape, np.float32)
        self.past_values = self._input("values", shape, np.float32)
        self.new_keys: list[Node] = []
        self.new_values: list[Node] = []
        ids = self._input("input_ids", [-1, -1])
        past = ops.size(self.past_keys, 3)
        total = opset.add(past, ops.size(ids, 1))
        positions = ops.unsqueeze(ops.steps(past, total), 0)  # [1, S]
        logits = self._logits(ids, positions, total)
        return [logits, opset.concat(self.new_keys, 1), opset.concat(self.new_values, 1)]

    def _attend(self, layer: int, q: Node, k: Node, v: Node) -> Node:
        ops, opset = self.ops, self.ops.opset
        self.new_keys.append(ops.unsqueeze(k, 1))
        self.new_values.append(ops.unsqueeze(v, 1))
        keys = opset.concat([ops.pick(self.past_keys, layer, 1), k], 2)  # [B, G, T, D]
        values = opset.concat([ops.pick(self.past_values, layer, 1), v], 2)
        rows = ops.reshape(q, 0, self.groups, -1, self.width)  # [B, G, H / G S, D]
        y = opset.scaled_dot_product_attention(rows, keys, values, self._row_mask)
        return ops.reshape(y, 0, self.heads, -1, self.width)

    @cached_property
    def _row_mask(self) -> Node:
        """Mask for rows of attention: the H / G heads of a group below each other, so keys need no copy per head."""
        repeats = self.ops.integers([1, 1, self.heads // self.groups, 1])
        return self.ops.opset.tile(self.mask, repeats)
