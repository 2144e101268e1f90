"""Rotations: the same function in a turned basis, in which no channel sticks out and activations are easier to round.

SliceGPT (Ashkboos et al. 2024a, arXiv:2401.15024, theorem 1): RMSNorm without a gain commutes with an orthogonal Q, for
|x Q| = |x|, so that all of the residual stream can be turned and turned back in the weights that write and read it.
QuaRot (Ashkboos et al. 2024b, arXiv:2404.00456): Q is a Hadamard matrix with random signs, which spreads an outlier
over all channels. QuaRot's published code also removes the mean of each embedding, which is right before a LayerNorm
and changes the function before an RMSNorm; here nothing is removed. Nothing here knows a number of bits.
"""

import copy
import math
import re
from functools import cache

import torch
from torch import Tensor, nn

from labkit.errors import EqualityError, InputError, check_whole
from labkit.graph import anatomy
from labkit.modules import batches as batching
from labkit.quantization import calls

READERS = {  # of the residual stream, by the norm before them
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
BETWEEN = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3's, between a projection and the scores: not turned
SEED = 0  # of the signs: the same rotation every time
ROWS = 4096  # of a weight that are in float64 at a time


class RotatedInput(nn.Module):
    """A Linear whose input is rotated first, where nothing before it can take that over.

    layer: the Linear, its columns rotated as well, so that both cancel. rotation [in, in]: a matrix product an input at
    run time; QuaRot's kernel does it in in log2(in) additions.
    """

    def __init__(self, layer: nn.Linear, rotation: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("rotation", rotation)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input @ self.rotation)


def rotate(model: nn.Module, *, online: bool = False) -> nn.Module:
    """A copy of `model`, of the Llama type, that computes the same from rotated weights.

    The gain of each RMSNorm is folded into the Linears that read it; the residual stream is turned by a Hadamard matrix
    with random signs, and so are the values of each head, between v_proj and o_proj. Weights are computed in float64
    and rounded to their own type once. The head takes the last norm's gain and can no longer share its weight with the
    embedding: a tied model grows by vocabulary x width numbers (SmolLM2 by 28.3 million, 21 %), which `artifact.size`
    counts.

    online: also rotate what down_proj reads, the largest outliers of all, when it is called (`RotatedInput`): the
        product of gate and up cannot be turned by any weight.
    The copy is run beside the model before it is returned, on a few tokens; EqualityError if they differ by more than
    their roundings. InputError for a model of another build: a norm that is no RMSNorm with a plain gain (LayerNorm,
    Gemma's 1 + w), norms after a branch, experts, half precision. Memory: the copy, and 4096 rows of a weight in
    float64.
    """
    calls.check_model(model)
    _check_build(model)
    new = copy.deepcopy(model)
    embedding, head, layers = new.model.embed_tokens, new.lm_head, new.model.layers
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        new.config.tie_word_embeddings = False
    width, size = embedding.weight.shape[1], layers[0].self_attn.head_dim
    matrix = cache(lambda n: hadamard(n, SEED).to(embedding.weight.device))
    narrow = cache(lambda n: matrix(n).to(embedding.weight.dtype))  # one for all layers
    q = matrix(width)
    with torch.no_grad():
        _multiply_(embedding.weight, q)
        for layer in layers:
            for norm, names in READERS.items():
                for name in names:
                    _multiply_(layer.get_submodule(name).weight, q, layer.get_submodule(norm).weight)
                layer.get_submodule(norm).weight.fill_(1)
            values, output, down = (layer.get_submodule(name) for name in ("self_attn.v_proj", *WRITERS))
            for x in values.parameters():  # [heads size, width], and a bias: [heads, width or 1, size]
                _multiply_(x.view(-1, size, *x.shape[1:] or (1,)).mT, matrix(size))
            _multiply_(output.weight.view(width, -1, size), matrix(size))
            for x in (*output.parameters(), *down.parameters()):  # [width, in], and a bias
                _multiply_(x.view(width, -1).t(), q)
            if online:
                _multiply_(down.weight, matrix(down.in_features))
                layer.mlp.down_proj = RotatedInput(down, narrow(down.in_features))
        _multiply_(head.weight, q, new.model.norm.weight)
        new.model.norm.weight.fill_(1)
    _check_equal(model, new)
    return new


def hadamard(n: int, seed: int | None = None) -> Tensor:
    """An orthogonal matrix [n, n] in float64, whose entries are +-1 / sqrt(n) wherever a Hadamard matrix is at hand.

    Sylvester's doubling of a smaller one, H x [[1, 1], [1, -1]] (Kronecker), from [[1]] or, where n has an odd factor,
    from Paley's matrix: 576 = 36 x 16, 1536 = 12 x 128. Where there is none (n = 18), the odd factor gets a random
    orthogonal matrix instead, and the entries differ.

    seed: of random signs of the rows, without which a constant input stays in one channel; None: no signs.
    """
    check_whole(n, "n")
    if seed is not None:
        check_whole(seed, "seed", 0)
    draw = torch.Generator().manual_seed(seed or 0)
    power = n & -n
    odd = n // power
    orders = [odd << doublings for doublings in range(2, power.bit_length())]
    core = next((matrix for order in orders if (matrix := _paley(order)) is not None), None)
    if odd == 1:
        core = torch.ones(1, 1, dtype=torch.float64)
    elif core is None:
        core = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=draw)).Q.contiguous()
    while len(core) < n:
        core = torch.kron(core, SYLVESTER)
    if seed is not None:
        core = core * (2 * torch.randint(2, (n, 1), generator=draw) - 1)
    return core / core[0].norm()


SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def _paley(order: int) -> Tensor | None:
    """The Hadamard matrix of Paley (1933): q + 1 for a prime q = 3 mod 4, 2 q + 2 for one that is 1 mod 4; or None."""
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 != residue or not all(q % divisor for divisor in range(2, math.isqrt(q) + 1)):
            continue
        squares = {x * x % q for x in range(1, q)}
        character = torch.tensor([0.0, *(1.0 if x in squares else -1.0 for x in range(1, q))], dtype=torch.float64)
        places = torch.arange(q)
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0] = 1, 1 if residue == 1 else -1
        conference[1:, 1:] = character[(places[:, None] - places) % q]
        unit = torch.eye(q + 1, dtype=torch.float64)
        if residue == 3:
            return unit + conference
        return torch.kron(conference, SYLVESTER) + torch.kron(unit, SYLVESTER.flip(0) * SYLVESTER[1:].t())
    return None


def _multiply_(x: Tensor, q: Tensor, gain: Tensor | None = None) -> None:
    """x <- x diag(gain) q along the last dimension, in float64, some rows at a time, rounded once."""
    for rows in x.split(ROWS):
        wide = rows.double() if gain is None else rows.double() * gain.double()
        rows.copy_(wide @ q)


def _check_build(model: nn.Module) -> None:
    """InputError unless the residual stream is written and read by the layers that are known here, and by no other."""
    linear = {name for names in (*READERS.values(), WRITERS) for name in names}
    needed = {f"{name}.weight" for name in (*linear, *READERS, "model.embed_tokens", "model.norm", "lm_head")}
    possible = {f"{name}.bias" for name in (*linear, "lm_head")} | {f"{name}.weight" for name in BETWEEN}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in parameters}
    reason = ""
    if odd := sorted(needed - names) or sorted(names - needed - possible):
        reason = f"{odd[0]} is {'missing' if odd[0] in needed else 'not among its parts'}"
    elif half := [name for name, x in parameters.items() if x.dtype not in (torch.float32, torch.float64)]:
        reason = f"{half[0]} is {parameters[half[0]].dtype}, which would be rounded a second time: call .float() first"
    else:
        for name, module in model.named_modules():
            if name.endswith((*READERS, "model.norm")) and not _is_rms_norm(module):
                reason = f"{name} is not x / sqrt(mean x^2) times its weight"
    if reason:
        raise InputError(
            f"{type(model).__name__} cannot be rotated ({reason}): give a decoder with an RMSNorm before attention and "
            "before a gated feed-forward network, as Llama, Mistral, Qwen2 and Qwen3 are, or take fold.smooth."
        )


def _is_rms_norm(norm: nn.Module) -> bool:
    weight = norm.weight.detach()
    x = 1000 * (torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 1).to(weight)  # eps vanishes
    with torch.no_grad():
        return torch.allclose(norm(x), weight * x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-4)


def _check_equal(model: nn.Module, new: nn.Module) -> None:
    """EqualityError beyond 8 eps sqrt(K) of the largest logit, K the terms summed in all products, as in `equality`."""
    inputs = anatomy.example(model)
    with torch.no_grad(), batching.evaluating(model), batching.evaluating(new):
        expected, logits = model(**inputs).logits, new(**inputs).logits
    error, largest = float((expected - logits).abs().max()), float(expected.abs().max())
    terms = sum(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    tolerance = 8 * torch.finfo(torch.float32).eps * terms**0.5 * largest  # in which norms compute, in any model
    if not error <= tolerance:
        raise EqualityError(
            f"The rotated model's logits differ by {error:.2g} from the model's (tolerance {tolerance:.2g}): its "
            "forward pass does something to the residual stream that its weights do not show; leave it as it is."
        )
