"""Named transformers as numbers: parameters, bytes of weights and KV cache, FLOPs per token, from the shape alone.

The formulas follow the papers that define the models (each row names its own) and count a multiply-add as two FLOPs.
No model is built and nothing is measured; how fast a machine could be with these bytes and FLOPs is in labkit.roofline.
"""

from dataclasses import dataclass

from labkit.errors import InputError


@dataclass(frozen=True)
class Transformer:
    """A transformer's shape. Parameter counts are exact: the tests hold them against the models of transformers.

    A decoder has an output head over the vocabulary and a KV cache; an encoder has neither, it may have a pooler.
    """

    name: str
    source: str
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

    @property
    def matrix_parameters(self) -> int:
        """Weights that one token is multiplied with: attention, active experts and their router, output head."""
        head = self._embedding if self.decoder else 0
        active = self.active_experts * self._expert_matrices
        return self.layers * (self._attention_matrices + self._router + active) + head

    def weight_bytes(self, bits: float, group: int | None = None) -> float:
        """Bytes of all parameters at `bits` each, and what each `group` of them needs besides: see bytes_per_weight."""
        return self.parameters * bytes_per_weight(bits, group)

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one token's forward pass that attends to `context` positions: matrix products only.

        Norms, biases, softmax and a pooler are left out. A sequence of n tokens costs n times flops_per_token(n) in an
        encoder; a decoder's token t attends to t positions.
        """
        _whole("context", context, least=0)
        return 2 * self.matrix_parameters + 4 * self.layers * self.heads * self.head_dim * context

    def kv_bytes_per_token(self, bits: float = 16) -> float:
        """Bytes that the KV cache grows by with each token: 2 x layers x KV heads x head size x bits / 8."""
        _bits(bits)
        return 2 * self.layers * self.kv_heads * self.head_dim * bits / 8 if self.decoder else 0.0

    def kv_bytes(self, context: int, batch: int = 1, bits: float = 16) -> float:
        """Bytes of the KV cache of `batch` sequences of `context` tokens each."""
        _whole("context", context, least=0)
        _whole("batch", batch, least=1)
        return context * batch * self.kv_bytes_per_token(bits)

    def decode_bytes(
        self, context: int, batch: int = 1, bits: float = 16, kv_bits: float = 16, group: int | None = None
    ) -> float:
        """Least bytes that one decode step of the whole batch reads: the weights once, and every sequence's cache."""
        return self.read_per_step * bytes_per_weight(bits, group) + self.kv_bytes(context, batch, kv_bits)

    @property
    def _embedding(self) -> int:
        return self.vocab * self.width

    @property
    def _attention_matrices(self) -> int:
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)  # Q and O, K and V

    @property
    def _router(self) -> int:
        return self.width * self.experts if self.experts > 1 else 0

    @property
    def _expert_matrices(self) -> int:
        return (3 if self.gated else 2) * self.width * self.ffn

    @property
    def _expert(self) -> int:
        biases = (2 if self.gated else 1) * self.ffn + self.width if self.bias else 0
        return self._expert_matrices + biases

    @property
    def _fixed(self) -> int:
        """What does not depend on the number of experts."""
        norm = self.norm_parameters * self.width
        qkv_bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        layer = self._attention_matrices + qkv_bias + (self.width if self.bias else 0) + self._router + 2 * norm
        embeddings = self._embedding + (self.positions + self.segments) * self.width
        head = self._embedding if self.decoder and not self.tied else 0
        pooler = self.width * (self.width + 1) if self.pooler else 0
        return self.layers * layer + norm + embeddings + head + pooler  # the one norm: last in decoders, first in BERT


def bytes_per_weight(bits: float, group: int | None = None) -> float:
    """Stored bytes a weight: bits / 8, and per `group` of weights a 16-bit scale and a zero point of `bits`.

    GPTQ (Frantar et al. 2023) and AWQ (Lin et al. 2024) store groups so: 4 bits in groups of 128 take 4.16 bits.
    """
    _bits(bits)
    if group is None:
        return bits / 8
    _whole("group", group, least=1)
    return (bits + (16 + bits) / group) / 8


def _bits(bits: float) -> None:
    if not 1 <= bits <= 64:
        raise InputError(f"bits has to be between 1 and 64 a number, got {bits!r}: 16, 8 and 4 are usual.")


def _whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise InputError(f"{name} has to be a whole number from {least} on, got {value!r}: give a count.")


_ROWS = (
    Transformer(
        name="GPT-2",
        source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners: the 124M model",
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        ffn=3072,
        vocab=50257,
        positions=1024,
        gated=False,
        tied=True,
        qkv_bias=True,
        bias=True,
        norm_parameters=2,
    ),
    Transformer(
        name="BERT-base",
        source="Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers",
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        ffn=3072,
        vocab=30522,
        positions=512,
        segments=2,
        gated=False,
        qkv_bias=True,
        bias=True,
        norm_parameters=2,
        pooler=True,
        decoder=False,
    ),
    Transformer(
        name="SmolLM2-135M",
        source="Allal et al. 2025, SmolLM2: When Smol Goes Big",
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        vocab=49152,
        tied=True,
    ),
    Transformer(
        name="Llama-2-7B",
        source="Touvron et al. 2023, Llama 2: Open Foundation and Fine-Tuned Chat Models",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        ffn=11008,
        vocab=32000,
    ),
    Transformer(
        name="Mistral-7B",
        source="Jiang et al. 2023, Mistral 7B, table 1",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        vocab=32000,
    ),
    Transformer(
        name="Qwen2-7B",
        source="Yang et al. 2024, Qwen2 Technical Report, table 1",
        layers=28,
        width=3584,
        heads=28,
        kv_heads=4,
        head_dim=128,
        ffn=18944,
        vocab=152064,
        qkv_bias=True,
    ),
    Transformer(
        name="Llama-3-8B",
        source="Grattafiori et al. 2024, The Llama 3 Herd of Models, table 3",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        vocab=128256,
    ),
    Transformer(
        name="Mixtral-8x7B",
        source="Jiang et al. 2024, Mixtral of Experts, table 1",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        vocab=32000,
        experts=8,
        active_experts=2,
    ),
    Transformer(
        name="Llama-3-70B",
        source="Grattafiori et al. 2024, The Llama 3 Herd of Models, table 3",
        layers=80,
        width=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ffn=28672,
        vocab=128256,
    ),
)

ARCHITECTURES: dict[str, Transformer] = {row.name: row for row in _ROWS}
