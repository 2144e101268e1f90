"""Rotations: the same function in a turned basis, in which no channel sticks out and activations are easier to round.

SliceGPT (Ashkboos et al. 2024a, arXiv:2401.15024, theorem 1): RMSNorm without a gain commutes with an orthogonal Q, for
|x Q| = |x|, so that all of the residual stream can be turned and turned back in the weights that write and read it.
QuaRot (Ashkboos et al. 2024b, arXiv:2404.00456): Q is a Hadamard matrix with random signs, which spreads an outlier
over all channels. QuaRot's published code also removes the mean of each embedding, which is right before a LayerNorm
and changes the function before an RMSNorm; here nothing is removed. Nothing here knows a number of bits.
"""

import copy
import math

import torch
from torch import Tensor, nn

from labkit import batches as batching
from labkit.errors import EqualityError, InputError
from labkit.pruning import anatomy

NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = {  # by the norm that they read
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
BETWEEN = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's: behind a projection, so that no rotation reaches them
ROWS = 4096  # of a weight that are in float64 at a time


class RotatedInput(nn.Module):
    """A Linear whose input is rotated first, where nothing before it can take that over.

    layer: the Linear, its columns rotated as well, so that both cancel. rotation [in, in]: a matrix product an input at
    run time; QuaRot does it in in log2(in) additions.
    """

    def __init__(self, layer: nn.Linear, rotation: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("rotation", rotation)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input @ self.rotation)


def rotate(model: nn.Module, *, online: bool = False, seed: int = 0) -> nn.Module:
    """A copy of `model`, of the Llama type, that computes the same from rotated weights.

    The gain of each RMSNorm is folded into the Linears that read it; the residual stream is turned by a Hadamard matrix
    with random signs, and so are the values of each head, between v_proj and o_proj. Weights are computed in float64
    and rounded to their own type once. The head takes the last norm's gain and can no longer share its weight with the
    embedding: a tied model grows by vocabulary x width numbers (SmolLM2 by 28.3 million, 21 %), which `artifact.size`
    counts.

    online: also rotate what down_proj reads, the largest outliers of all, at run time (`RotatedInput`): the product of
        gate and up cannot be turned in any weight.
    seed: of the signs.

    The copy is run beside the model before it is returned, on a few tokens; EqualityError if they differ by more than
    their roundings. InputError for a model of another build: a norm that is no RMSNorm with a plain gain (LayerNorm,
    Gemma's 1 + w), norms after a branch, experts, no head. Memory: the copy, and 4096 rows of a weight in float64.
    """


def hadamard(n: int, seed: int | None = None) -> Tensor:
    """An orthogonal matrix [n, n] in float64, whose entries are +-1 / sqrt(n) wherever a Hadamard matrix is at hand.

    A Kronecker product of Sylvester's [[1, 1], [1, -1]], as often as it goes, with Paley's matrix of the order that is
    left (Paley 1933: q + 1 for a prime q = 3 mod 4, 2 q + 2 for a prime q = 1 mod 4): 576 = 36 x 16, 1536 = 12 x 128.
    Where there is none (n = 18), the odd factor gets a random orthogonal matrix instead: its entries differ.

    seed: of random signs of the rows, diag(+-1) H, without which the first channel of H is the mean; None: no signs.
    """
