"""Tables of operators: FLOPs that torch's counter leaves out, operators without products, memory that is not touched.

torch's FlopCounterMode knows most products. A table here holds the formulas of further products, and a table of names
tells which operators compute no product at all, so that only real gaps are reported as uncounted.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labkit.modules.tensors import components

# --- products that torch's counter leaves out -------------------------------------------------------------------------
#
# A formula takes the operator's arguments, and the result as `out_val`; it returns FLOPs, a multiply-add being 2.


def _matrix_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Count [..., M, K] x [..., K, N] or x [K]: each stored entry meets N (or M) numbers."""
    if b.layout is not torch.strided:
        return 2 * _stored(b) * a.shape[-2]
    columns = b.shape[-1] if b.dim() > 1 else 1
    return 2 * _stored(a) * columns


def _matrix_product_and_sum(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Count the product in bias + a x b."""
    return _matrix_product(a, b)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Count softmax(Q K^T) V, [B, H, L, D] x [B, Hkv, T, D] x [B, Hkv, T, Dv].

    Computing a score takes D multiply-adds, using a score takes Dv.
    """
    queries = query.numel() // query.shape[-1]
    scores = queries * key.shape[-2]
    return 2 * scores * (query.shape[-1] + value.shape[-1])


def _recurrent(x: Tensor, *rest: Any, **_: Any) -> int:
    """Count a recurrent layer: every weight matrix meets every time step of every sequence once."""
    weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:2]  # a list in cuDNN's operator
    steps = x.numel() // x.shape[-1]
    return 2 * steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _packed(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Count x [..., K] against a packed weight, whose N is the result's last dimension."""
    return 2 * x.numel() * out_val.shape[-1]


def _stored(tensor: Tensor) -> int:
    """Return the number of entries in a product: all of a dense tensor, the stored entries of a sparse tensor."""
    return tensor.numel() if tensor.layout is torch.strided else components(tensor)[-1].numel()


_FORMULAS = (
    (_matrix_product, "mm bmm mv dot _int_mm"),
    (_matrix_product_and_sum, "addmm _sparse_addmm baddbmm addbmm addmv"),
    (
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    (_recurrent, "mkldnn_rnn_layer _cudnn_rnn"),
    (_packed, "_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu"),
)


def _by_operator() -> dict[Any, Callable[..., int]]:
    formulas = {}
    for formula, names in _FORMULAS:
        formula._get_raw = True  # asks the counter for tensors instead of shapes
        for name in names.split():
            if hasattr(torch.ops.aten, name):  # not every build of torch has every operator
                formulas[getattr(torch.ops.aten, name)] = formula
    return formulas


FORMULAS = _by_operator()

# --- operators without products ---------------------------------------------------------------------------------------
#
# Operators that torch does not tag as pointwise, whatever their backend and their dimensions. In a name, * stands for
# any word characters and ? for a single word character.
WITHOUT_PRODUCTS = {
    "reductions": "sum nansum mean prod max* min* amax* amin* argmax* argmin* cum?* trace var var_mean std std_mean "
    "logsumexp any all equal",
    "normalisation, losses and pooling": "*norm* *softmax* *loss* *pool*",
    "activations": "glu hardswish _prelu_kernel",
    "arithmetic": "polar complex addr",
    "resampling and quantisation": "*upsample* *quantize* int_repr",
    "look-up": "isin *embedding* *scatter* index* gather take masked* where",
    "copies": "*copy* *pad* clone cat stack repeat* roll flip *shuffle im2col _coalesce _convert_weight?* lift_fresh "
    "to_?* _to_?*",
    "sorting and searching": "*sort topk kthvalue median *unique* nonzero searchsorted hist* bucketize bincount",
    "parts of matrices": "tril triu diag*",
    "creation": "empty* ones zeros full arange eye linspace scalar_tensor fill zero resize set",
    "random numbers": "rand* native_dropout uniform bernoulli multinomial exponential",
    "fused cells, without their products": "_thnn_fused?*",
}


def _any_of(names_by_kind: dict[str, str]) -> re.Pattern[str]:
    patterns = []
    for names in names_by_kind.values():
        patterns += [name.replace("*", r"\w*").replace("?", r"\w") for name in names.split()]
    return re.compile("|".join(patterns))


_WITHOUT_PRODUCTS = _any_of(WITHOUT_PRODUCTS)


def has_no_product(name: str) -> bool:
    """Return True if an operator, such as "index_select" or "add_", is in the table WITHOUT_PRODUCTS.

    name: name of the operator, without namespace and overload; the underscore of an operator in place does not matter.
    """
    is_in_place = name.endswith("_") and not name.endswith("__")
    base = name.removesuffix("_") if is_in_place else name
    return _WITHOUT_PRODUCTS.fullmatch(base) is not None


# --- memory that an operator does not touch ---------------------------------------------------------------------------

# Operator -> the argument of which no more is read than comes out.
GATHERS = {"index": "self", "index_select": "self", "gather": "self", "take": "self", "embedding": "weight"}
# Operator -> the argument whose size bounds what is written.
SCATTERS = {"index_copy_": "source", "index_add_": "source", "index_put_": "values", "scatter_": "index"}
# Operators in place that do not read the previous values.
OVERWRITES = frozenset(
    ["copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "index_copy_", "index_put_", "scatter_"]
)
