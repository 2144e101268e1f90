"""Rotations: the same function in a turned basis, in which no channel sticks out and activations are easier to round.

SliceGPT (Ashkboos et al. 2024a, arXiv:2401.15024, theorem 1): RMSNorm without a gain commutes with an orthogonal Q, for
|x Q| = |x|, so that the writers of the residual stream can turn it and its readers turn it back. QuaRot
(Ashkboos et al. 2024b, arXiv:2404.00456): Q is a Hadamard matrix with random signs and spreads an outlier over all
channels. QuaRot's published code also removes the mean of each embedding: right before a LayerNorm, but a change of the
function before an RMSNorm, so no mean is removed in this file. No function in this file knows a number of bits.
"""

import copy
import math
import re

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
    """A Linear whose input is rotated first, for inputs that no layer before can rotate.

    layer: the Linear, its columns rotated as well, so that both rotations cancel.
    rotation: [in, in]; a matrix product an input at run time, where QuaRot's kernel needs in log2(in) additions.
    """

    def __init__(self, layer: nn.Linear, rotation: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("rotation", rotation)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input @ self.rotation)


def rotate(model: nn.Module, *, online: bool = False) -> nn.Module:
    """Return a copy of `model`, of the Llama type, that computes the same function from rotated weights.

    online: True to rotate also the input of down_proj, which has the largest outliers of all, at every call
        (`RotatedInput`): no weight can turn the product of gate and up.

    The gain of each RMSNorm is folded into the Linears that read the norm; the residual stream is turned by a Hadamard
    matrix with random signs, and so are the values of each head, between v_proj and o_proj. Weights are computed in
    float64 and rounded to their own dtype once. The head takes the last norm's gain and can no longer share its weight
    with the embedding: a tied model grows by vocabulary x width numbers (SmolLM2 by 28.3 million, 21 %), which
    `artifact.size` counts. Memory: the copy, and 4096 rows of a weight in float64.

    Raises EqualityError if the copy and the model, run on a few tokens, differ by more than roundings. Raises
    InputError for a model of another build: a norm other than RMSNorm with a plain gain (LayerNorm, Gemma's 1 + w),
    norms after a branch, experts, half precision.
    """
    calls.check_model(model)
    _check_build(model)
    new = copy.deepcopy(model)
    embedding, head = new.model.embed_tokens, new.lm_head
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        new.config.tie_word_embeddings = False
    rotations = _Rotations(embedding.weight)
    q = rotations.in_float64(embedding.weight.shape[1])
    with torch.no_grad():
        _multiply_(embedding.weight, q)
        for layer in new.model.layers:
            _rotate_readers_(layer, q)
            _rotate_values_(layer, rotations)
            _rotate_writers_(layer, q)
            if online:
                _rotate_when_called_(layer, rotations)
        _multiply_(head.weight, q, new.model.norm.weight)
        new.model.norm.weight.fill_(1)
    _check_equal(model, new)
    return new


class _Rotations:
    """Hadamard matrices with random signs, each size made once for all layers.

    like: a tensor on the device, and in the dtype, of the model.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.matrices: dict[int, Tensor] = {}
        self.narrow_matrices: dict[int, Tensor] = {}

    def in_float64(self, size: int) -> Tensor:
        """Return the rotation [size, size] in float64."""
        if size not in self.matrices:
            self.matrices[size] = hadamard(size, SEED).to(self.like.device)
        return self.matrices[size]

    def in_model_dtype(self, size: int) -> Tensor:
        """Return the rotation [size, size] in the model's dtype."""
        if size not in self.narrow_matrices:
            self.narrow_matrices[size] = self.in_float64(size).to(self.like.dtype)
        return self.narrow_matrices[size]


def _rotate_readers_(layer: nn.Module, q: Tensor) -> None:
    """Fold the gain of each norm of a layer into the Linears behind the norm, and turn their columns by q."""
    for norm_name, names in READERS.items():
        gain = layer.get_submodule(norm_name).weight
        for name in names:
            _multiply_(layer.get_submodule(name).weight, q, gain)
        gain.fill_(1)


def _rotate_values_(layer: nn.Module, rotations: _Rotations) -> None:
    """Turn the values of each head, by the rows of v_proj and the columns of o_proj."""
    attention = layer.self_attn
    size = attention.head_dim
    rotation = rotations.in_float64(size)
    for x in attention.v_proj.parameters():  # [heads * size, width], and a bias [heads * size]
        columns = x.shape[1:] or (1,)
        by_head = x.view(-1, size, *columns).mT  # [heads, width or 1, size]
        _multiply_(by_head, rotation)
    output = attention.o_proj.weight  # [width, heads * size]
    _multiply_(output.view(len(output), -1, size), rotation)


def _rotate_writers_(layer: nn.Module, q: Tensor) -> None:
    """Turn the rows of the Linears that write the residual stream by q."""
    for name in WRITERS:
        for x in layer.get_submodule(name).parameters():  # [width, in], and a bias [width]
            _multiply_(x.view(len(q), -1).t(), q)


def _rotate_when_called_(layer: nn.Module, rotations: _Rotations) -> None:
    """Turn the columns of down_proj, and its input when it is called."""
    down = layer.mlp.down_proj
    _multiply_(down.weight, rotations.in_float64(down.in_features))
    layer.mlp.down_proj = RotatedInput(down, rotations.in_model_dtype(down.in_features))


def hadamard(n: int, seed: int | None = None) -> Tensor:
    """Return an orthogonal matrix [n, n] in float64, with entries +-1 / sqrt(n) if a Hadamard matrix is at hand.

    n: size of the matrix.
    seed: seed of the rows' random signs, without which a constant input stays in one channel; None: no signs.

    Sylvester's doubling of a smaller matrix, H x [[1, 1], [1, -1]] (Kronecker), from [[1]] or, if n has an odd factor,
    from Paley's matrix: 576 = 36 x 16, 1536 = 12 x 128. If Paley has no matrix (n = 18), the odd factor gets a random
    orthogonal matrix instead, and the entries differ.
    """
    check_whole(n, "n")
    if seed is not None:
        check_whole(seed, "seed", 0)
    draw = torch.Generator().manual_seed(seed or 0)
    matrix = _hadamard_core(n, draw)
    while len(matrix) < n:
        matrix = torch.kron(matrix, SYLVESTER)
    if seed is not None:
        signs = 2 * torch.randint(2, (n, 1), generator=draw) - 1
        matrix = matrix * signs
    return matrix / matrix[0].norm()


SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def _hadamard_core(n: int, draw: torch.Generator) -> Tensor:
    """Return the smallest matrix whose doublings give an orthogonal matrix of size n, see `hadamard`."""
    power_of_two = n & -n
    odd = n // power_of_two
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for doublings in range(2, power_of_two.bit_length()):
        matrix = _paley(odd << doublings)
        if matrix is not None:
            return matrix
    random = torch.randn(odd, odd, dtype=torch.float64, generator=draw)
    return torch.linalg.qr(random).Q.contiguous()


def _paley(order: int) -> Tensor | None:
    """Return the Hadamard matrix of Paley (1933), or None if this construction has none of the order.

    Its orders are q + 1 for a prime q = 3 mod 4, and 2 q + 2 for a prime q = 1 mod 4.
    """
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return torch.eye(order, dtype=torch.float64) + _conference(q, below=-1)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        unit = torch.eye(q + 1, dtype=torch.float64)
        doubled_unit = torch.kron(unit, SYLVESTER.flip(0) * SYLVESTER[1:].t())
        return torch.kron(_conference(q, below=1), SYLVESTER) + doubled_unit
    return None


def _is_prime(q: int) -> bool:
    return all(q % divisor for divisor in range(2, math.isqrt(q) + 1))


def _conference(q: int, below: int) -> Tensor:
    """Return Paley's conference matrix [q + 1, q + 1] of a prime q; below: its first column, from the second row on."""
    squares = {x * x % q for x in range(1, q)}
    character = [0.0]
    for x in range(1, q):
        character.append(1.0 if x in squares else -1.0)
    places = torch.arange(q)
    differences = (places[:, None] - places) % q
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = below
    conference[1:, 1:] = torch.tensor(character, dtype=torch.float64)[differences]
    return conference


def _multiply_(x: Tensor, q: Tensor, gain: Tensor | None = None) -> None:
    """Replace x by x diag(gain) q along the last dimension, in float64, some rows at a time, rounded once."""
    for rows in x.split(ROWS):
        wide = rows.double() if gain is None else rows.double() * gain.double()
        rows.copy_(wide @ q)


def _check_build(model: nn.Module) -> None:
    """Raise InputError unless exactly the layers of `READERS` and `WRITERS` read and write the residual stream."""
    if reason := _obstacle(model):
        raise InputError(
            f"{type(model).__name__} cannot be rotated ({reason}): give a decoder with an RMSNorm before attention and "
            "before a gated feed-forward network, as Llama, Mistral, Qwen2 and Qwen3 are, or take fold.smooth."
        )


def _obstacle(model: nn.Module) -> str:
    """Return the first reason why a model cannot be rotated, or ""."""
    linears = {name for names in (*READERS.values(), WRITERS) for name in names}
    modules_needed = (*linears, *READERS, "model.embed_tokens", "model.norm", "lm_head")
    needed = {f"{name}.weight" for name in modules_needed}
    possible = {f"{name}.bias" for name in (*linears, "lm_head")}
    possible |= {f"{name}.weight" for name in BETWEEN}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in parameters}
    missing = sorted(needed - names)
    if missing:
        return f"{missing[0]} is missing"
    unknown = sorted(names - needed - possible)
    if unknown:
        return f"{unknown[0]} is not among its parts"
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            return f"{name} is {parameter.dtype}, which would be rounded a second time: call .float() first"
    norms = {name: module for name, module in model.named_modules() if name.endswith((*READERS, "model.norm"))}
    other_norms = [name for name, module in norms.items() if not _is_rms_norm(module)]
    if other_norms:
        return f"{other_norms[-1]} is not x / sqrt(mean x^2) times its weight"
    return ""


def _is_rms_norm(norm: nn.Module) -> bool:
    """Return True if a norm computes x / sqrt(mean x^2) times its weight."""
    weight = norm.weight.detach()
    draw = torch.Generator().manual_seed(0)
    x = 1000 * (torch.randn(4, len(weight), generator=draw) + 1).to(weight)  # so large that eps vanishes
    root_mean_square = x.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        return torch.allclose(norm(x), weight * x / root_mean_square, rtol=1e-4)


def _check_equal(model: nn.Module, new: nn.Module) -> None:
    """Raise EqualityError if logits differ by more than 8 eps sqrt(K) of the largest, as in `equality`.

    K: the terms summed in all products.
    """
    inputs = anatomy.example(model)
    with torch.no_grad(), batching.evaluating(model), batching.evaluating(new):
        expected, logits = model(**inputs).logits, new(**inputs).logits
    error = float((expected - logits).abs().max())
    largest = float(expected.abs().max())
    terms = sum(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    eps = torch.finfo(torch.float32).eps  # norms compute in float32, in any model
    tolerance = 8 * eps * terms**0.5 * largest
    if not error <= tolerance:
        raise EqualityError(
            f"The rotated model's logits differ by {error:.2g} from the model's (tolerance {tolerance:.2g}): its "
            "forward pass does something to the residual stream that its weights do not show; leave it as it is."
        )
