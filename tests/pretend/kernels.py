"""Operators that torch has for CUDA alone, written in operators that the CPU has too; no gradients."""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")


def register() -> None:
    """Let the pretend device run them."""
    for operator in (_thnn_fused_lstm_cell, _thnn_fused_gru_cell, _cslt_compress, _cslt_sparse_mm):
        LIBRARY.impl(operator.__name__, operator, "CUDA", allow_override=True)


def _thnn_fused_lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gates = _with_bias(input_gates, input_bias) + _with_bias(hidden_gates, hidden_bias)
    entry, forget, cell, output = gates.chunk(4, 1)
    new_cell = forget.sigmoid() * cx + entry.sigmoid() * cell.tanh()
    return output.sigmoid() * new_cell.tanh(), new_cell, gates


def _thnn_fused_gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    input_reset, input_update, input_new = _with_bias(input_gates, input_bias).chunk(3, 1)
    hidden_reset, hidden_update, hidden_new = _with_bias(hidden_gates, hidden_bias).chunk(3, 1)
    reset = (input_reset + hidden_reset).sigmoid()
    update = (input_update + hidden_update).sigmoid()
    new = (input_new + reset * hidden_new).tanh()
    workspace = torch.cat([reset, update, new, hx, hidden_new], 1)
    return new + update * (hx - new), workspace


def _with_bias(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


def _cslt_compress(input: Tensor) -> Tensor:
    """2:4 without the compression: the values stay where they are."""
    return input.clone()


def _cslt_sparse_mm(
    compressed_A: Tensor,
    dense_B: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """The product of the dense weight."""
    if dense_B.dtype is torch.int8:
        product = torch._int_mm(compressed_A, dense_B).to(out_dtype or torch.int8)
    else:
        product = compressed_A @ dense_B
    if bias is not None:
        product = product + bias[:, None]
    return product.t().contiguous() if transpose_result else product
