"""Named transformers as numbers: parameters, bytes of weights and KV cache, FLOPs per token, from the shape alone.

The rows are in shapes.toml. The formulas follow the papers of the models, and count a multiply-add as two FLOPs. No
model is built and nothing is measured; `labkit.roofline` turns bytes and FLOPs into a bound on time.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import InputError, check_whole


@dataclass(frozen=True)
class Transformer:
    """Describe the shape of a transformer.

    A decoder has an output head over the vocabulary and a KV cache. An encoder has neither, and may have a pooler.
    Parameter counts are exact: tests hold the counts against the models of the library transformers.

    layers: number of layers.
    width: size of the hidden states.
    heads, kv_heads: query heads and KV heads of a layer.
    head_dim: size of a head.
    ffn: inner size of the feed-forward part.
    vocab: size of the vocabulary.
    gated: True if the feed-forward part has three matrices (gate, up, down) instead of two.
    tied: True if the output head is the input embedding.
    experts: feed-forward parts in a layer.
    active_experts: feed-forward parts that a token uses.
    qkv_bias: True if queries, keys and values have a bias.
    bias: True if the attention output and the feed-forward matrices have a bias.
    norm_parameters: per channel, 1 for RMSNorm and 2 for LayerNorm.
    positions: learned position embeddings; 0 for rotary positions.
    segments: token types of BERT.
    pooler: True if an encoder has a pooler.
    decoder: True if the model is a decoder.
    source: the paper.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 1
    active_experts: int = 1
    qkv_bias: bool = False
    bias: bool = False
    norm_parameters: int = 1
    positions: int = 0
    segments: int = 0
    pooler: bool = False
    decoder: bool = True
    source: str = ""

    @property
    def parameters(self) -> int:
        """Return the number of all parameters, inactive experts included."""
        return self._without_experts + self.layers * self.experts * self._expert

    @property
    def active_parameters(self) -> int:
        """Return the number of parameters that a token meets: of the experts only the active ones."""
        return self._without_experts + self.layers * self.active_experts * self._expert

    @property
    def read_per_step(self) -> int:
        """Return the least number of parameters that a decode step reads.

        A step reads the active parameters, but only rows of the input embeddings. A larger batch may use more experts
        than `active_experts`, and then reads more.
        """
        looked_up = self.positions * self.width
        if not self.tied:
            looked_up += self._embedding
        return self.active_parameters - looked_up

    def weight_bytes(self, bits: float) -> float:
        """Return the bytes of all parameters at `bits` (1 to 64) per parameter, without scales."""
        return self.parameters * _checked_bits(bits) / 8

    def flops_per_token(self, context: int) -> int:
        """Return the FLOPs of a token's forward pass: matrix products only, without norms, biases, softmax and pooler.

        A sequence of n tokens costs n times flops_per_token(n) in an encoder. In a decoder, token t attends to t
        positions.

        context: number of positions that the token attends to.
        """
        check_whole(context, "context", least=0)
        layer = self._attention_matrices + self._router + self.active_experts * self._expert_matrices
        head = self._embedding if self.decoder else 0
        scores_and_values = 4 * self.layers * self.heads * self.head_dim * context
        return 2 * (self.layers * layer + head) + scores_and_values

    def kv_bytes_per_token(self, bits: float = 16) -> float:
        """Return the bytes of a token in the KV cache: 2 x layers x KV heads x head size x bits / 8, 0 in an encoder.

        bits: bits of a stored number, 1 to 64.
        """
        if not self.decoder:
            return 0.0
        numbers = 2 * self.layers * self.kv_heads * self.head_dim  # keys and values
        return numbers * _checked_bits(bits) / 8

    def kv_bytes(self, context: int, batch: int = 1, bits: float = 16) -> float:
        """Return the bytes of the KV cache of `batch` sequences of `context` tokens each."""
        check_whole(context, "context", least=0)
        check_whole(batch, "batch")
        return context * batch * self.kv_bytes_per_token(bits)

    # --- parameters of the parts ---

    @property
    def _embedding(self) -> int:
        return self.vocab * self.width

    @property
    def _attention_matrices(self) -> int:
        queries_and_output = 2 * self.width * self.head_dim * self.heads
        keys_and_values = 2 * self.width * self.head_dim * self.kv_heads
        return queries_and_output + keys_and_values

    @property
    def _attention_biases(self) -> int:
        output = self.width if self.bias else 0
        queries_keys_values = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return output + queries_keys_values

    @property
    def _expert_matrices(self) -> int:
        matrices = 3 if self.gated else 2
        return matrices * self.width * self.ffn

    @property
    def _expert(self) -> int:
        if not self.bias:
            return self._expert_matrices
        inner_matrices = 2 if self.gated else 1
        return self._expert_matrices + inner_matrices * self.ffn + self.width

    @property
    def _router(self) -> int:
        return self.width * self.experts if self.experts > 1 else 0

    @property
    def _without_experts(self) -> int:
        norm = self.norm_parameters * self.width
        layer = self._attention_matrices + self._attention_biases + self._router + 2 * norm
        outer_norm = norm  # after the last layer in decoders, before the first in BERT
        embeddings = self._embedding + (self.positions + self.segments) * self.width
        head = self._embedding if self.decoder and not self.tied else 0
        pooler = self.width * (self.width + 1) if self.pooler else 0
        return self.layers * layer + outer_norm + embeddings + head + pooler


def _checked_bits(bits: float) -> float:
    if not 1 <= bits <= 64:
        raise InputError(f"bits has to be between 1 and 64 a number, got {bits!r}: 16, 8 and 4 are usual.")
    return bits


def _read() -> dict[str, Transformer]:
    """Read shapes.toml: in each row the sizes, a table of further fields, and the paper."""
    text = Path(__file__).with_name("shapes.toml").read_text("utf-8")
    transformers = {}
    for name, (*sizes, further_fields, source) in tomllib.loads(text)["models"].items():
        transformers[name] = Transformer(name, *sizes, **further_fields, source=source)
    return transformers


ARCHITECTURES: dict[str, Transformer] = _read()
