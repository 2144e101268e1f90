"""The ATen operators known to labkit, in a single table: how labels pass, whether a trial compares, how a scale passes.

To teach labkit an operator, add the name to a row of the table. An operator in no row makes all operands unprunable. A
new kind of rule is a function in `rules`, `rules_products` or `rules_shapes`.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """Operators alike in all columns.

    rule: the kind of rule by which labels pass (`rules.rule`).
    names: ATen names without namespace, overload and the underscore of an in-place form, separated by spaces.
    compared: True if a trial compares the results with the traced call (`fits`). The order of compared operators does
    not depend on sizes. The order of products and moves does, since torch folds and copies by size and stride; an error
    there shows in a compared operator further on, a softmax over a wrong number of rows, say.
    scale: how a positive scale s of each channel passes, f(s x) = s f(x) (`dataflow`):
    "same" (the shape stays), "spatial" (f works on the last dimensions), "reduces" (f reduces the dimensions in the
    arguments), "pads", "view", "clips" (f clips at a constant: a scale does not pass), or "" (a scale does not pass, or
    `dataflow` decides by the operands).
    """

    rule: str
    names: str
    compared: bool = False
    scale: str = ""


TABLE = (
    # elementwise
    Row("elementwise", "relu leaky_relu _prelu_kernel", compared=True, scale="same"),
    Row("elementwise", "neg abs", scale="same"),
    Row("elementwise", "relu6 hardtanh", compared=True, scale="clips"),
    Row("elementwise", "clamp_max", scale="clips"),
    Row("elementwise", "sigmoid tanh gelu silu mish elu hardswish hardsigmoid softplus pow rsqrt", compared=True),
    Row(
        "elementwise", "add sub rsub mul div remainder fmod floor_divide maximum minimum fmax fmin lerp addcmul addcdiv"
    ),
    Row("elementwise", "where clamp clamp_min masked_fill copy nan_to_num native_dropout dropout rrelu_with_noise"),
    Row("elementwise", "celu selu log_sigmoid_forward threshold hardshrink softshrink prelu"),
    Row("elementwise", "exp expm1 exp2 log log1p log2 log10 sqrt reciprocal square sign erf erfc"),
    Row("elementwise", "sin cos tan atan atan2 angle complex polar floor ceil round trunc frac"),
    Row("elementwise", "eq ne lt le gt ge isnan isinf isfinite logical_and logical_or logical_not logical_xor"),
    Row("elementwise", "bitwise_and bitwise_or bitwise_not bitwise_xor"),
    Row("like", "clone detach alias contiguous", scale="same"),
    Row("like", "_to_copy lift_fresh lift positive conj view_as_real_copy _conj resolve_conj to_dense view_as_real"),
    Row("like", "fill zero bernoulli uniform normal zeros_like ones_like empty_like full_like rand_like randn_like"),
    # made in the forward pass
    Row("constant", "arange zeros ones full empty rand randn randint randperm scalar_tensor eye linspace"),
    Row("constant", "empty_strided tril_indices triu_indices"),
    Row("new", "new_zeros new_ones new_full new_empty new_empty_strided"),
    # norms
    Row("batch_norm", "native_batch_norm _native_batch_norm_legit", compared=True),
    Row("batch_norm", "_native_batch_norm_legit_no_training", compared=True),
    Row("batch_norm", "cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update"),
    Row("layer_norm", "native_layer_norm", compared=True),
    Row("group_norm", "native_group_norm", compared=True),
    Row("softmax", "_softmax _log_softmax _safe_softmax", compared=True),
    # reductions
    Row("reduction", "mean", compared=True, scale="reduces"),
    Row("reduction", "sum amax amin", scale="reduces"),
    Row("reduction", "linalg_vector_norm", compared=True),
    Row("reduction", "var std var_mean std_mean norm max min any all prod"),
    Row("mixing", "cumsum cumprod sort argsort argmax argmin logcumsumexp logsumexp"),
    Row("ranking", "topk kthvalue"),
    Row("fourier", "_fft_c2c _fft_r2c _fft_c2r"),
    Row("view_as_complex", "view_as_complex"),
    # positions
    Row("spatial", "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d", compared=True, scale="spatial"),
    Row("spatial", "upsample_bilinear2d upsample_nearest2d", compared=True, scale="spatial"),
    Row("spatial", "max_pool3d_with_indices avg_pool1d avg_pool3d _adaptive_avg_pool3d", scale="spatial"),
    Row("spatial", "adaptive_max_pool2d adaptive_max_pool3d", scale="spatial"),
    Row("spatial", "upsample_nearest1d upsample_linear1d upsample_bicubic2d", scale="spatial"),
    Row("spatial", "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d", scale="spatial"),
    Row("spatial", "adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest3d upsample_trilinear3d"),
    Row("spatial", "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    Row("spatial", "reflection_pad3d replication_pad3d tril triu"),
    Row("pad", "constant_pad_nd", compared=True, scale="pads"),
    # products
    Row("matrix_product", "mm bmm"),
    Row("matrix_product_and_bias", "addmm baddbmm _sparse_addmm"),
    Row("vector_product", "mv dot vdot"),
    Row("convolution", "convolution", compared=True),
    Row("weight_norm", "_weight_norm_interface"),
    Row("embedding", "embedding", compared=True),
    Row("attention", "scaled_dot_product_attention _scaled_dot_product_attention_math"),
    Row("attention", "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    Row("attention", "_scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable"),
    # shapes
    Row("view", "view _unsafe_view reshape", scale="view"),
    Row("view", "_reshape_alias"),
    Row("as_strided", "as_strided"),
    Row("permute", "permute"),
    Row("transpose", "transpose t"),
    Row("unsqueeze", "unsqueeze"),
    Row("squeeze", "squeeze"),
    Row("expand", "expand"),
    Row("repeat", "repeat"),
    Row("flip", "flip"),
    Row("roll", "roll", compared=True),
    Row("gathered", "pixel_shuffle col2im"),
    Row("spread", "im2col pixel_unshuffle"),
    # joins and parts
    Row("cat", "cat", compared=True),
    Row("stack", "stack"),
    Row("slice", "slice", compared=True),
    Row("split", "split split_with_sizes", compared=True),
    Row("split", "unsafe_split unsafe_split_with_sizes"),
    Row("select", "select"),
    Row("unbind", "unbind"),
    Row("index", "index"),
    Row("index_select", "index_select"),
    Row("scatter", "scatter scatter_add scatter_reduce index_add index_reduce index_copy"),
    Row("gather", "gather"),
)

ROWS = {name: row for row in TABLE for name in row.names.split()}
COMPARED = frozenset(name for name, row in ROWS.items() if row.compared)


def with_rule(kind: str) -> list[str]:
    """Return the names of the operators with a kind of rule."""
    return [name for name, row in ROWS.items() if row.rule == kind]
