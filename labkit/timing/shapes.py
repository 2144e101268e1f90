"""Named transformers as numbers: parameters, bytes of weights and KV cache, FLOPs per token, from the shape alone.

The rows stand in shapes.toml. The formulas follow the papers that define the models and count a multiply-add as two
FLOPs. No model is built and nothing is measured; how fast a machine could be with these bytes is in labkit.roofline.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import InputError, check_whole


@dataclass(frozen=True)
class Transformer:
    """A transformer's shape. Parameter counts are exact: the tests hold them against the models of transformers.

    A decoder has an output head over the vocabulary and a KV cache; an encoder has neither, it may have a pooler.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True  # three matrices in the feed-forward part (gate, up, down), not two
    tied: bool = False  # the output head is the input embedding
    experts: int = 1  # feed-forward parts in a layer
    active_experts: int = 1  # of these, used for one token
    qkv_bias: bool = False
    bias: bool = False  # on the attention output and the feed-forward matrices
    norm_parameters: int = 1  # a channel: 1 for RMSNorm, 2 for LayerNorm
    positions: int = 0  # learned position embeddings; 0 where positions are rotary
    segments: int = 0  # BERT's token types
    pooler: bool = False
    decoder: bool = True
    source: str = ""  # the paper

    @property
    def parameters(self) -> int:
        """All of them, the experts that are not in use included."""
        return self._fixed + self.layers * self.experts * self._expert

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of the experts only the active ones."""
        return self._fixed + self.layers * self.active_experts * self._expert

    @property
    def read_per_step(self) -> int:
        """Parameters that a decode step has to read at the least: the active ones, of input embeddings only a row.

        A larger batch may wake more experts than `active_experts`, and then reads more.
        """
        looked_up = self.positions * self.width + (0 if self.tied else self._embedding)
        return self.active_parameters - looked_up

    def weight_bytes(self, bits: float) -> float:
        """Bytes of all parameters at `bits` each, without scales."""
        return self.parameters * _checked_bits(bits) / 8

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one token's forward pass that attends to `context` positions: matrix products only.

        Norms, biases, softmax and a pooler are left out. A sequence of n tokens costs n times flops_per_token(n) in an
        encoder; a decoder's token t attends to t positions.
        """
        check_whole(context, "context", least=0)
        router = self.width * self.experts if self.experts > 1 else 0
        layer = self._attention_matrices + router + self.active_experts * self._expert_matrices
        head = self._embedding if self.decoder else 0
        return 2 * (self.layers * layer + head) + 4 * self.layers * self.heads * self.head_dim * context

    def kv_bytes_per_token(self, bits: float = 16) -> float:
        """Bytes that the KV cache grows by with each token: 2 x layers x KV heads x head size x bits / 8."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _checked_bits(bits) / 8 if self.decoder else 0.0

    def kv_bytes(self, context: int, batch: int = 1, bits: float = 16) -> float:
        """Bytes of the KV cache of `batch` sequences of `context` tokens each."""
        check_whole(context, "context", least=0)
        check_whole(batch, "batch")
        return context * batch * self.kv_bytes_per_token(bits)

    @property
    def _embedding(self) -> int:
        return self.vocab * self.width

    @property
    def _attention_matrices(self) -> int:
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)  # Q and O, K and V

    @property
    def _expert_matrices(self) -> int:
        return (3 if self.gated else 2) * self.width * self.ffn

    @property
    def _expert(self) -> int:
        biases = (2 if self.gated else 1) * self.ffn + self.width if self.bias else 0
        return self._expert_matrices + biases

    @property
    def _fixed(self) -> int:
        """What does not depend on the number of active experts."""
        norm = self.norm_parameters * self.width
        router = self.width * self.experts if self.experts > 1 else 0
        qkv_bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        layer = self._attention_matrices + qkv_bias + (self.width if self.bias else 0) + router + 2 * norm
        embeddings = self._embedding + (self.positions + self.segments) * self.width
        head = self._embedding if self.decoder and not self.tied else 0
        pooler = self.width * (self.width + 1) if self.pooler else 0
        return self.layers * layer + norm + embeddings + head + pooler  # the one norm: last in decoders, first in BERT


def _checked_bits(bits: float) -> float:
    if not 1 <= bits <= 64:
        raise InputError(f"bits has to be between 1 and 64 a number, got {bits!r}: 16, 8 and 4 are usual.")
    return bits


def _read() -> dict[str, Transformer]:
    rows = tomllib.loads(Path(__file__).with_name("shapes.toml").read_text("utf-8"))["models"]
    return {name: Transformer(name, *sizes, **rest, source=source) for name, (*sizes, rest, source) in rows.items()}


ARCHITECTURES: dict[str, Transformer] = _read()
