"""One rule an operator: how labels pass through it. An operator without a rule makes all that flows into it unprunable.

Every rule gets the tracer `t` and the call `c` and returns the blocks of the result. c.args are the operator's
positional arguments as its ATen schema has them; t.blocks(x) are the labels that x carries (see `blocks`). None says
that the rule does not cover the case. The table RULES at the end is the whole list; products and shapes have modules of
their own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from labkit.pruning import rules_products as products
from labkit.pruning import rules_shapes as shapes
from labkit.pruning.blocks import Blocks, Side, block_at, combine, moved, without

if TYPE_CHECKING:
    from labkit.pruning.tracing import Call, Tracer


# --- elementwise ------------------------------------------------------------------------------------------------------


def elementwise(t: "Tracer", c: "Call") -> Blocks:
    """Every operand is aligned at its last dimension and repeated where it has size 1."""
    shape = c.out.shape
    sides = []
    for x in (x for x in (*c.args, *c.kwargs.values()) if isinstance(x, Tensor)):
        shift = len(shape) - x.dim()
        present = frozenset(d + shift for d in range(x.dim()) if x.shape[d] == shape[d + shift] > 1)
        blocks = moved(t.blocks(x), range(shift, len(shape)))
        sides.append(Side(blocks, present))
    return combine(t.labels, sides, c.because("meets a dimension of fixed size"))


def like(t: "Tracer", c: "Call") -> Blocks:
    return t.blocks(c.args[0])


def constant(t: "Tracer", c: "Call") -> Blocks:
    """Made in the forward pass with a size that is a number."""
    return ()


def new(t: "Tracer", c: "Call") -> Blocks:
    """Filled evenly, with sizes of the operand: taken to follow it (`fits` tries whether it does)."""
    x = c.args[0]
    if x.dim() != c.out.dim():
        return ()
    blocks = tuple(b for b in t.blocks(x) if all(x.shape[d] == c.out.shape[d] for d in b.dims))
    t.sized(c, c.out, blocks)
    return blocks


# --- normalisation ----------------------------------------------------------------------------------------------------


def batch_norm(t: "Tracer", c: "Call") -> Blocks:
    """Per channel (dimension 1): the channel's scale, shift and running statistics go with it."""
    x = c.args[0]
    labels, blocks = t.alone(x, 1, c.because("shares its labels with another dimension"))
    for vector in (v for v in c.args[1:5] if isinstance(v, Tensor)):
        own = block_at(t.blocks(vector), 0)
        if own is None:
            continue
        if labels is None:
            t.labels.pin(own.labels, c.because("belongs to a fixed dimension"))
        else:
            t.labels.tie(labels, own.labels)
    return blocks


def layer_norm(t: "Tracer", c: "Call") -> Blocks:
    """Over the last dimensions, scale and shift in the same shape. The statistics then are those of what is kept."""
    x, shape = c.args[:2]
    n = x.dim()
    normalised = range(n - len(shape), n)
    blocks = t.blocks(x)
    reason = c.because("is normalised over together with a dimension that is kept")
    for block in blocks:
        inside = set(block.dims) & set(normalised)
        if inside and len(block.dims) > 1:
            blocks = t.fix(blocks, inside, reason)
    everywhere = frozenset(d for d in range(n) if x.shape[d] > 1)
    sides = [Side(blocks, everywhere)]
    for vector in (v for v in c.args[2:4] if isinstance(v, Tensor)):
        shift = n - vector.dim()
        present = frozenset(d + shift for d in range(vector.dim()) if vector.shape[d] > 1)
        sides.append(Side(moved(t.blocks(vector), range(shift, n)), present))
    blocks = combine(t.labels, sides, c.because("meets a dimension of fixed size"))
    for block in blocks:
        if set(block.dims) & set(normalised):
            t.restricts(c, block.dims[0], block.labels)
    return blocks


def group_norm(t: "Tracer", c: "Call") -> Blocks:
    """Whole groups go, and the others stay equal; with one group it is a norm over all channels, as layer_norm."""
    x, weight, bias, groups = *c.args[:3], c.args[6]
    labels, blocks = t.alone(x, 1, c.because("shares its labels with another dimension"))
    for vector in (v for v in (weight, bias) if isinstance(v, Tensor)):
        own = block_at(t.blocks(vector), 0)
        if own and labels is None:
            t.labels.pin(own.labels, c.because("belongs to a fixed dimension"))
        elif own:
            t.labels.tie(labels, own.labels)
    if labels is not None and groups > 1:
        t.labels.tie(labels.reshape(groups, -1)[:, :1], labels.reshape(groups, -1))
    elif labels is not None:
        return t.fix(blocks, (1,), c.because("is normalised over with all other channels and positions"))
    return blocks


def softmax(t: "Tracer", c: "Call") -> Blocks:
    """Over one dimension, whose parts all depend on each other."""
    return t.fix(t.blocks(c.args[0]), (c.args[1] % c.args[0].dim(),), c.because("is normalised over by a softmax"))


# --- reductions -------------------------------------------------------------------------------------------------------


def reduction(t: "Tracer", c: "Call") -> Blocks:
    """Over some dimensions. A statistic over channels (mean, variance, maximum) is from then on that of the kept."""
    x = c.args[0]
    dims = c.args[1] if len(c.args) > 1 else c.kwargs.get("dim")
    if c.name in ("linalg_vector_norm", "norm"):
        dims = c.args[2] if len(c.args) > 2 else None
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = {d % x.dim() for d in dims} if x.dim() else set()
    blocks = t.blocks(x)
    for block in blocks:
        inside = set(block.dims) & dims
        if inside and len(block.dims) > 1:
            blocks = t.fix(blocks, inside, c.because("is reduced"))
    for block in blocks:
        if set(block.dims) <= dims:
            t.restricts(c, block.dims[0], block.labels)
    blocks = tuple(block for block in blocks if not set(block.dims) & dims)
    return without(blocks, dims, x.dim(), _first(c.out).dim())


def _first(out) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def along(dim_at: int, default: int = -1) -> Callable:
    """A rule for operators that mix the entries of one dimension (cumsum, sort, topk): it keeps its size."""

    def rule(t: "Tracer", c: "Call") -> Blocks:
        x = c.args[0]
        dim = c.args[dim_at] if len(c.args) > dim_at else default
        blocks = t.fix(t.blocks(x), (dim % x.dim(),), c.because("has its entries mixed"))
        return without(blocks, {dim % x.dim()}, x.dim(), _first(c.out).dim())

    return rule


def spatial(t: "Tracer", c: "Call") -> Blocks:
    """Pooling, resampling, padding: positions change, the leading dimensions (batch, channel) do not."""
    x, out = c.args[0], _first(c.out)
    changing = 0
    while changing < x.dim() and x.shape[changing] == out.shape[changing]:
        changing += 1
    least = {"max_pool1d": 1, "avg_pool1d": 1}.get(c.name, 3 if "3d" in c.name else 1 if "1d" in c.name else 2)
    first = min(changing, max(x.dim() - least, 0))
    return t.fix(t.blocks(x), range(first, x.dim()), c.because("has positions, not channels, in it"))


def pad(t: "Tracer", c: "Call") -> Blocks:
    """Constants at the ends of dimensions: fixed, so that a padded channel dimension keeps its size."""
    x, padding = c.args[:2]
    padded = {x.dim() - 1 - i // 2 for i, p in enumerate(padding) if p}
    return t.fix(t.blocks(x), padded, c.because("is padded with constants"))


# --- the table --------------------------------------------------------------------------------------------------------

_TABLE: list[tuple[Callable, str]] = [
    (
        elementwise,
        """add sub rsub mul div pow remainder fmod floor_divide maximum minimum fmax fmin where clamp clamp_min
        clamp_max relu relu6 sigmoid tanh gelu silu mish elu celu selu leaky_relu hardswish hardsigmoid hardtanh
        softplus log_sigmoid_forward threshold hardshrink softshrink _prelu_kernel prelu exp expm1 exp2 log log1p log2
        log10 sqrt rsqrt reciprocal square neg abs sign erf erfc sin cos tan atan atan2 floor ceil round trunc frac
        isnan isinf isfinite eq ne lt le gt ge logical_and logical_or logical_not logical_xor
        bitwise_and bitwise_or bitwise_not bitwise_xor masked_fill lerp addcmul addcdiv copy nan_to_num
        native_dropout dropout rrelu_with_noise complex""",
    ),
    (
        like,
        """clone detach alias _to_copy contiguous lift_fresh lift positive fill zero bernoulli uniform normal
        zeros_like ones_like empty_like full_like rand_like randn_like conj view_as_real_copy _conj resolve_conj
        to_dense""",
    ),
    (
        constant,
        """arange zeros ones full empty rand randn randint randperm scalar_tensor eye linspace empty_strided
        tril_indices triu_indices""",
    ),
    (new, "new_zeros new_ones new_full new_empty new_empty_strided"),
    (products.mm, "mm"),
    (products.addmm, "addmm"),
    (products.bmm, "bmm"),
    (products.baddbmm, "baddbmm"),
    (products.mv, "mv"),
    (products.dot, "dot"),
    (products.convolution, "convolution"),
    (products.embedding, "embedding"),
    (
        batch_norm,
        """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        _batch_norm_with_update _batch_norm_no_update""",
    ),
    (layer_norm, "native_layer_norm"),
    (group_norm, "native_group_norm"),
    (softmax, "_softmax _log_softmax _safe_softmax"),
    (reduction, "mean sum var std var_mean std_mean amax amin linalg_vector_norm norm max min any all prod"),
    (along(1), "cumsum cumprod sort argsort argmax argmin logcumsumexp logsumexp tril_ triu_"),
    (along(2), "topk kthvalue"),
    (
        spatial,
        """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
        _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d
        _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        tril triu""",
    ),
    (pad, "constant_pad_nd"),
    (shapes.view, "view _unsafe_view reshape _reshape_alias"),
    (shapes.as_strided, "as_strided"),
    (shapes.permute, "permute"),
    (shapes.transpose, "transpose t"),
    (shapes.unsqueeze, "unsqueeze"),
    (shapes.squeeze, "squeeze"),
    (shapes.expand, "expand"),
    (shapes.repeat, "repeat"),
    (shapes.cat, "cat"),
    (shapes.stack, "stack"),
    (shapes.slice_, "slice"),
    (shapes.select, "select"),
    (shapes.unbind, "unbind"),
    (shapes.split, "split split_with_sizes"),
    (shapes.index, "index"),
    (shapes.index_select, "index_select"),
    (shapes.flip, "flip roll"),
    (shapes.pixel_shuffle, "pixel_shuffle"),
    (
        products.attention,
        """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math
        _scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention""",
    ),
]
RULES: dict[str, Callable] = {name: rule for rule, names in _TABLE for name in names.split()}
