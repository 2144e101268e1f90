"""Operators that the CPU lacks, or computes number by number, written in operators that it has; no gradients."""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")


def register() -> None:
    """Let the pretend device run them."""
    for operator in (_thnn_fused_lstm_cell, _thnn_fused_gru_cell, _cslt_compress, _cslt_sparse_mm, _scaled_mm):
        LIBRARY.impl(operator.__name__, operator, "CUDA", allow_override=True)
    LIBRARY.impl("mm", _mm_of_compressed, "SparseCsrCUDA", allow_override=True)


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


def _scaled_mm(
    input: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """The product of FP8 numbers, added in fp32; a scale of all, or of each row of `input` and column of `mat2`."""
    product = (input.float() * scale_a) @ (mat2.float() * scale_b)
    product = _with_bias(product, bias)
    return product.to(out_dtype or input.dtype)


def _mm_of_compressed(input: Tensor, mat2: Tensor) -> Tensor:
    """The product of a CSR or BSR tensor; the CPU multiplies those of 32 and 64 bits alone."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    zeros = torch.zeros(input.shape[0], mat2.shape[1], dtype=dtype, device=mat2.device)
    return torch.addmm(zeros, _as(dtype, input), _as(dtype, mat2)).to(input.dtype)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        return tensor.to(dtype)
    indices = tensor.crow_indices(), tensor.col_indices()
    return torch.sparse_compressed_tensor(
        *indices, tensor.values().to(dtype), tensor.shape, layout=tensor.layout, check_invariants=False
    )
