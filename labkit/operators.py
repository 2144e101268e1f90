"""What each torch operator computes and moves: the tables behind `labkit.counting`, a line an operator.

FLOP formulas are torch's own (torch.utils.flop_counter) where it has one; these tables add what it leaves at zero.
They discount nothing (masks, causality), and an operator in none of them is reported as uncounted, never guessed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labkit.footprint import components

Arguments = dict[str, Any]  # an operator's, by the names of its schema
Formula = Callable[[Arguments, Tensor], int | None]  # of the arguments and the first result; None: cannot be told


def _aten(names: str) -> list[str]:
    return [f"aten.{name}" for name in names.split()]


# ---------------------------------------------------------------------------------------------------- FLOPs of products


def _is_sparse(t: Tensor) -> bool:
    return t.layout is not torch.strided or isinstance(t, torch.sparse.SparseSemiStructuredTensor)


def _stored(t: Tensor) -> int:
    """Entries that take part in a product: all of a dense tensor, those that a sparse one stores."""
    if isinstance(t, torch.sparse.SparseSemiStructuredTensor):
        return t.numel() // 2
    return components(t)[-1].numel() if _is_sparse(t) else t.numel()


def _product(a: Tensor, b: Tensor) -> int | None:
    """[..., M, K] x [..., K, N], or x [K]: each stored entry of one meets the N (or M) numbers of the other."""
    if _is_sparse(a) and _is_sparse(b):
        return None  # depends on where the entries meet
    if _is_sparse(b):
        return 2 * _stored(b) * a.shape[-2]
    return 2 * _stored(a) * (b.shape[-1] if b.dim() > 1 else 1)


def _matmul(left: str, right: str) -> Formula:
    return lambda a, out: _product(a[left], a[right])


def _scores(a: Arguments) -> int:
    """Elements of Q K^T, [B, H, L, D] x [B, Hkv, T, D]."""
    return a["query"].numel() // a["query"].shape[-1] * a["key"].shape[-2]


def _grouped(a: Arguments, out: Tensor) -> int:
    """Mixture of experts: [T, K] x [E, K, N], each row with one of the E matrices."""
    x, w = a["self"], a["mat2"]
    return 2 * x.numel() * w.shape[-1] // (x.shape[0] if x.dim() > w.dim() else 1)


def _attention(a: Arguments, out: Tensor) -> int:
    """softmax(Q K^T) V, V [B, Hkv, T, Dv]: D multiply-adds a score, and Dv to use it."""
    return 2 * _scores(a) * (a["query"].shape[-1] + a["value"].shape[-1])


def _flex_attention(a: Arguments, out: Tensor) -> int:
    """As `_attention`; its operator has no schema, so its arguments go by their place; torch 2.11 has no formula."""
    return _attention({"query": a["0"], "key": a["1"], "value": a["2"]}, out)


def _steps(a: Arguments) -> int:
    return a["input"].numel() // a["input"].shape[-1]  # of all sequences


def _matrices(a: Arguments) -> list[Tensor]:
    return [w for w in a["weight"] if w.dim() == 2] if "weight" in a else [a["weight0"], a["weight1"]]


def _recurrent(a: Arguments, out: Tensor) -> int:
    """Every weight matrix meets every time step of every sequence once."""
    return 2 * _steps(a) * sum(w.numel() for w in _matrices(a))


def _first(a: Arguments) -> Tensor:
    return next(value for value in a.values() if isinstance(value, Tensor))


def _packed_linear(a: Arguments, out: Tensor) -> int:
    """x [..., K] against a packed weight: the result's last dimension tells N."""
    return 2 * _first(a).numel() * out.shape[-1]


def _packed_conv(a: Arguments, out: Tensor) -> int:
    return 2 * out.numel() * math.prod(a["packed_weight"].unpack()[0].shape[1:])


_RNN = _aten("mkldnn_rnn_layer _cudnn_rnn miopen_rnn")
_ATTENTION = [
    f"aten._scaled_dot_product_{kind}"
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
] + _aten("_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps")

FLOPS: dict[str, Formula] = {
    **dict.fromkeys(_aten("mm bmm _int_mm"), _matmul("self", "mat2")),
    **dict.fromkeys(_aten("addmm _addmm_activation _sparse_addmm"), _matmul("mat1", "mat2")),
    **dict.fromkeys(_aten("baddbmm addbmm"), _matmul("batch1", "batch2")),
    "aten._grouped_mm": _grouped,
    "aten.mv": _matmul("self", "vec"),
    "aten.addmv": _matmul("mat", "vec"),
    **dict.fromkeys(_aten("dot vdot"), lambda a, out: 2 * a["self"].numel()),
    **dict.fromkeys(_ATTENTION, _attention),
    "flex_attention": _flex_attention,
    **dict.fromkeys(_RNN, _recurrent),
    **dict.fromkeys(_aten("_weight_int8pack_mm _dyn_quant_matmul_4bit"), _packed_linear),
    **{f"aten._weight_int4pack_mm{suffix}": _packed_linear for suffix in ("", "_for_cpu", "_with_scales_and_zeros")},
    **{
        f"quantized.linear{kind}": _packed_linear
        for kind in ("", "_relu", "_dynamic", "_relu_dynamic", "_dynamic_fp16")
    },
    **{f"quantized.conv{d}d{relu}": _packed_conv for d in (1, 2, 3) for relu in ("", "_relu")},
}

# -------------------------------------------------------------------------------------------------- FLOPs of the others


def _out(n: int) -> Formula:
    return lambda a, out: n * out.numel()


def _in(n: int) -> Formula:
    return lambda a, out: n * _first(a).numel()


def _size(argument: str) -> Formula:
    return lambda a, out: a[argument].numel()


def _norm(n: int, with_batch_statistics: int = 0) -> Formula:
    """n an element (other n where the batch's own statistics are computed), and 1 each for weight and bias."""

    def flops(a: Arguments, out: Tensor) -> int:
        each = with_batch_statistics if a.get("training") else n
        return (each + (a["weight"] is not None) + (a.get("bias") is not None)) * out.numel()

    return flops


def _window(a: Arguments, out: Tensor) -> int:
    size, spatial = a["kernel_size"], a["self"].dim() - 2
    return out.numel() * (size[0] ** spatial if len(size) == 1 else math.prod(size))


def _cells(a: Arguments, out: Tensor) -> int:
    """Gate arithmetic a hidden unit and step, biases left out: tanh and relu cells 2, LSTM 13, GRU 10."""
    gates, work = {0: (1, 2), 1: (1, 2), 2: (4, 13), 3: (3, 10)}[a["mode"]]
    gate_rows = sum(w.shape[0] for w in _matrices(a)) // 2  # half of the matrices take the input, half the state
    return _steps(a) * gate_rows // gates * work


# Beside these, what torch tags as pointwise is 1 an output element, whatever the function. Only floating-point counts.
ELEMENTWISE: dict[str, Formula] = {
    **dict.fromkeys(_aten("sum nansum mean prod amax amin max min argmax argmin aminmax cumsum cumprod trace"), _in(1)),
    **dict.fromkeys(_aten("linalg_vector_norm norm"), _in(2)),  # square, add
    **dict.fromkeys(_aten("var std var_mean std_mean logsumexp"), _in(4)),  # add (the mean); subtract, square, add
    **dict.fromkeys(_aten("_softmax _safe_softmax _log_softmax"), _out(5)),  # max; subtract, exp, add; divide
    **dict.fromkeys(_aten("native_layer_norm native_group_norm"), _norm(5)),  # add; subtract, square, add; scale
    **dict.fromkeys(
        _aten("native_batch_norm cudnn_batch_norm miopen_batch_norm"), _norm(2, with_batch_statistics=5)
    ),  # subtract, scale
    "aten._native_batch_norm_legit_no_training": _norm(2),
    "aten._fused_rms_norm": _norm(3),  # square, add; scale
    **{f"aten.{kind}_pool{d}d": _window for kind in ("avg", "max") for d in (1, 2, 3)},
    **dict.fromkeys(_aten("max_pool2d_with_indices max_pool3d_with_indices"), _window),
    **{f"aten.{kind}_pool{d}d": _in(1) for kind in ("_adaptive_avg", "adaptive_max") for d in (2, 3)},
    "aten.upsample_linear1d": _out(2 * 2),  # a multiply-add a neighbour
    "aten.upsample_bilinear2d": _out(2 * 4),
    "aten.upsample_bicubic2d": _out(2 * 16),
    **dict.fromkeys(
        _aten("_embedding_bag _embedding_bag_forward_only"), lambda a, out: a["indices"].numel() * a["weight"].shape[1]
    ),
    **dict.fromkeys(_aten("hardswish _prelu_kernel rrelu_with_noise floor_divide polar"), _out(1)),
    **dict.fromkeys(_aten("glu addr"), _out(2)),
    **dict.fromkeys(_aten("index_add index_reduce"), _size("source")),
    **dict.fromkeys(_aten("scatter_add scatter_reduce"), _size("src")),
    **dict.fromkeys(_aten("quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize"), _out(2)),
    "aten.mse_loss": _in(3),  # subtract, square, add
    **dict.fromkeys(_aten("nll_loss_forward nll_loss2d_forward"), _size("target")),
    "aten.fake_quantize_per_tensor_affine_cachemask": _out(4),  # there and back
    "aten.fake_quantize_per_channel_affine_cachemask": _out(4),
    **dict.fromkeys(_RNN, _cells),
    "aten._thnn_fused_lstm_cell": lambda a, out: 13 * a["cx"].numel(),
    "aten._thnn_fused_gru_cell": lambda a, out: 10 * a["hx"].numel(),
    **dict.fromkeys(_ATTENTION, lambda a, out: 6 * _scores(a)),  # scale, softmax
}

# Operators that move, select, compare or make numbers: bytes but no FLOPs.
MOVES = frozenset(
    _aten(
        "clone copy _to_copy cat stack index index_select index_put index_copy index_fill gather scatter take fill "
        "zero select_scatter slice_scatter masked_fill masked_select masked_scatter where repeat roll flip tril "
        "triu embedding constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d sort topk replication_pad3d argsort kthvalue median nonzero unique_consecutive _unique2 "
        "unique_dim isin searchsorted histc any all bucketize bincount equal complex pixel_shuffle pixel_unshuffle "
        "channel_shuffle im2col resize set diag_embed upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact2d unfold_copy multinomial normal bernoulli uniform random exponential "
        "native_dropout int_repr to_sparse _to_sparse _to_dense _to_sparse_csr _to_sparse_bsr _coalesce "
        "_convert_weight_to_int4pack _convert_weight_to_int4pack_for_cpu"
    )
)


def makes_new(name: str) -> bool:
    """zeros_like and its kind: of their operand they use only the shape."""
    return name.endswith("_like") or name.startswith("aten.new_")


# ---------------------------------------------------------------------------------------------------------------- bytes

# The argument of which only some is read, and how many elements at most: as many as come out, or a matrix a row.
GATHERS: dict[str, tuple[str, Formula]] = {
    **dict.fromkeys(_aten("index index_select gather take"), ("self", _out(1))),
    "aten.embedding": ("weight", _out(1)),
    **dict.fromkeys(
        _aten("_embedding_bag _embedding_bag_forward_only"),
        ("weight", lambda a, out: a["indices"].numel() * a["weight"].shape[1]),
    ),
    "aten._grouped_mm": ("mat2", lambda a, out: a["self"].shape[0] * a["mat2"].numel() // a["mat2"].shape[0]),
}
# In place, they write as many elements as this argument has.
SCATTERS: dict[str, str] = {
    **dict.fromkeys(_aten("index_copy_ index_add_"), "source"),
    **dict.fromkeys(_aten("scatter_ scatter_add_"), "index"),
    "aten.index_put_": "values",
}
# In place, they do not read what was there.
OVERWRITES = frozenset(
    _aten("copy_ fill_ zero_ normal_ uniform_ random_ bernoulli_ exponential_ index_copy_ index_put_ scatter_")
)
# Results after the first are there for the backward pass.
BYPRODUCTS = frozenset(
    _aten(
        "native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training "
        "_fused_rms_norm _embedding_bag _embedding_bag_forward_only"
    )
    + _ATTENTION
)
