"""Sparse weights that are really smaller and, on a CPU, really faster: the formats, SparseLinear, and convert().

CSR, COO, BSR and bitmask are the textbook's formats; "kernel" is SELL-C-sigma (Kreutzer et al. 2014) with labkit's own
CPU kernel, see kernels. For inference only: nothing here prunes, trains or touches any layer but nn.Linear.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from labkit.errors import InputError
from labkit.pruning import kernels, semi_structured

Parts = dict[str, Tensor]
HALVES = (torch.float16, torch.bfloat16)
BSR_BLOCKS = (4, 8, 16, 32)

# --- the formats ------------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """A way to hold a weight W [out, in] with zeros.

    pack(W) -> parts; unpack(parts, out, in) -> W; multiply(x [batch, in], parts, out, bias or None) -> x W^T + bias,
    None for a format that is only for storing; check(parts, out, in) raises if the parts are not of such a weight.
    """

    pack: Callable[[Tensor], Parts]
    unpack: Callable[[Parts, int, int], Tensor]
    multiply: Callable[[Tensor, Parts, int, Tensor | None], Tensor] | None
    check: Callable[[Parts, int, int], None]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, *HALVES)


def _dense_check(parts: Parts, out_features: int, in_features: int) -> None:
    if parts["weight"].shape != (out_features, in_features):
        raise InputError(f"A weight of {out_features} x {in_features} is needed, not {list(parts['weight'].shape)}.")


def _dense_multiply(x: Tensor, parts: Parts, out_features: int, bias: Tensor | None) -> Tensor:
    return F.linear(x, parts["weight"], bias)


def _coo_pack(weight: Tensor) -> Parts:
    sparse = weight.to_sparse_coo().coalesce()
    return {"indices": sparse.indices().contiguous(), "values": sparse.values()}  # int64: torch has no other for COO


def _csr_pack(weight: Tensor, indices: torch.dtype) -> Parts:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sparse = weight.to_sparse_csr()
    crow, col = sparse.crow_indices().to(indices), sparse.col_indices().to(indices)
    return {"crow": crow, "col": col, "values": sparse.values()}


def _bsr_pack(weight: Tensor, block: int) -> Parts:
    """The weight is padded with zeros to whole blocks; values are [blocks, block, block]."""
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, -in_features % block, 0, -out_features % block))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
        sparse = padded.to_sparse_bsr((block, block))
    crow, col = sparse.crow_indices().int(), sparse.col_indices().int()
    return {"crow": crow, "col": col, "values": sparse.values()}


def _torch_sparse(parts: Parts, out_features: int, in_features: int, invariants: bool = False) -> Tensor:
    """The torch sparse tensor of COO, CSR or BSR parts; it shares their memory."""
    values = parts["values"]
    if "indices" in parts:
        shape = (out_features, in_features)
        return torch.sparse_coo_tensor(
            parts["indices"], values, shape, check_invariants=invariants, is_coalesced=not invariants
        )
    if values.ndim == 1:
        make, shape = torch.sparse_csr_tensor, (out_features, in_features)
    else:
        block = values.shape[-1]
        make, shape = (
            torch.sparse_bsr_tensor,
            (out_features + -out_features % block, in_features + -in_features % block),
        )
    return make(parts["crow"], parts["col"], values, shape, check_invariants=invariants)


def _torch_unpack(parts: Parts, out_features: int, in_features: int) -> Tensor:
    return _torch_sparse(parts, out_features, in_features).to_dense()[:out_features, :in_features].contiguous()


def _torch_check(parts: Parts, out_features: int, in_features: int) -> None:
    try:
        _torch_sparse(parts, out_features, in_features, invariants=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The stored sparse weight is not one of {out_features} x {in_features}: {reason}") from error


def _torch_multiply(x: Tensor, parts: Parts, out_features: int, bias: Tensor | None) -> Tensor:
    dtype = x.dtype
    if x.device.type == "cpu" and dtype in HALVES:  # torch has no CSR or BSR product for them on a CPU
        parts, x = {**parts, "values": parts["values"].float()}, x.float()
    weight = _torch_sparse(parts, out_features, x.shape[1])
    x = F.pad(x, (0, weight.shape[1] - x.shape[1]))
    y = (weight @ x.t()).t()[:, :out_features].to(dtype)
    return y.contiguous() if bias is None else y + bias


def _bitmask_pack(weight: Tensor) -> Parts:
    """One bit a weight, the lowest bit first, and the weights that are not zero."""
    kept = (weight != 0).flatten()
    bits = F.pad(kept, (0, -len(kept) % 8)).view(-1, 8).to(torch.uint8)
    mask = (bits << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(1, dtype=torch.uint8)
    return {"mask": mask, "values": weight.flatten()[kept]}


def _bitmask_kept(parts: Parts, size: int) -> Tensor:
    mask = parts["mask"]
    return (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1).flatten()[:size].bool()


def _bitmask_unpack(parts: Parts, out_features: int, in_features: int) -> Tensor:
    dense = parts["values"].new_zeros(out_features * in_features)
    dense[_bitmask_kept(parts, len(dense))] = parts["values"]
    return dense.view(out_features, in_features)


def _bitmask_check(parts: Parts, out_features: int, in_features: int) -> None:
    size = out_features * in_features
    if len(parts["mask"]) != -(-size // 8) or int(_bitmask_kept(parts, size).sum()) != len(parts["values"]):
        raise InputError(f"The stored bitmask does not belong to a weight of {out_features} x {in_features}.")


def _kernel_multiply(x: Tensor, parts: Parts, out_features: int, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        raise InputError(
            f"The sparse kernel computes in float32 on a CPU, not {x.dtype} on {x.device}: convert the dense model."
        )
    if parts["values"].dtype not in kernels.VALUES:  # someone called .half() or .double() on the model
        parts = {**parts, "values": parts["values"].float()}
    wide = None if bias is None else bias.float()
    if kernels.load() is None:
        return F.linear(x.float(), kernels.unpack(parts, out_features, x.shape[1]).float(), wide).to(x.dtype)
    return kernels.multiply(x.float(), parts, out_features, wide).to(x.dtype)


def _two_four_pack(weight: Tensor) -> Parts:
    return {"weight": semi_structured.convert(weight)}


def _two_four_unpack(parts: Parts, out_features: int, in_features: int) -> Tensor:
    return parts["weight"].to_dense()


_TORCH = {"unpack": _torch_unpack, "multiply": _torch_multiply, "check": _torch_check}
_KERNEL = {"unpack": kernels.unpack, "multiply": _kernel_multiply, "check": kernels.check, "devices": ("cpu",)}

FORMATS: dict[str, Format] = {
    "dense": Format(
        lambda weight: {"weight": weight.clone()}, lambda parts, *_: parts["weight"], _dense_multiply, _dense_check
    ),
    "coo": Format(_coo_pack, **_TORCH),
    "csr": Format(partial(_csr_pack, indices=torch.int32), **_TORCH),
    "csr64": Format(partial(_csr_pack, indices=torch.int64), **_TORCH),
    **{f"bsr{block}": Format(partial(_bsr_pack, block=block), **_TORCH) for block in BSR_BLOCKS},
    "bitmask": Format(_bitmask_pack, _bitmask_unpack, None, _bitmask_check),
    "kernel": Format(kernels.pack, **_KERNEL, dtypes=(torch.float32, *HALVES)),
    "kernel-bf16": Format(lambda w: kernels.pack(w.bfloat16()), **_KERNEL, dtypes=(torch.float32, *HALVES)),
    "2:4": Format(_two_four_pack, _two_four_unpack, _dense_multiply, _dense_check, ("cuda",), HALVES),
}
RUNNABLE = tuple(name for name, format in FORMATS.items() if format.multiply)


def stored_bytes(weight: Tensor, format: str) -> int:
    """Bytes of the safetensors file that holds `weight` (2-D, or read as [out, rest]) in `format`, in its own dtype.

    With n of N weights of s bytes kept in R rows, and beside a header of a few hundred bytes: dense N s, coo
    n (s + 16), csr n (s + 4) + 4 (R + 1), csr64 twice its indices, bitmask n s + N / 8, bsr with b x b blocks of which
    k are kept k (b^2 s + 4) + 4 (R / b + 1), kernel n (s + 1) and some padding, where s is 2 or 4: float16 becomes
    float32.
    """
    if format not in FORMATS or "cpu" not in FORMATS[format].devices:
        names = ", ".join(name for name, entry in FORMATS.items() if "cpu" in entry.devices)
        raise InputError(f"There is no format {format!r} for storing: choose one of {names}.")
    if weight.ndim < 2 or weight.dtype not in FORMATS[format].dtypes:
        raise InputError(
            f"A {weight.ndim}-dimensional weight of {weight.dtype} cannot be stored as {format!r}: give a floating "
            "point matrix."
        )
    parts = FORMATS[format].pack(weight.detach().cpu().flatten(1))
    return len(save({name: tensor.contiguous() for name, tensor in parts.items()}))


# --- the cost model ---------------------------------------------------------------------------------------------------


def costs(out_features: int, in_features: int, nonzeros: int, batch_size: int) -> dict[str, float]:
    """What "auto" believes that one call costs on one CPU core, {format: units}; the smallest wins.

    The unit is one multiply-add of a large dense product, so only ratios matter. B: batch_size, rows of x; N = out in;
    n: nonzeros. A small batch pays for reading the weight, the more where it exceeds a cache of 8 MiB:

        dense   N (B + 8), beyond the cache N (B + 20);  for B = 1 half of it
        kernel  n (18 + 1.04 T) + 2 T out (in / 112) for each tile of T <= 64 rows of x;  for B = 1: 9 n + 10 out
        csr     n (45 + 6 B), as torch has it

    and each call of a sparse format 200,000 more. Fitted to calls from 64 x 64 to 4096 x 4096 at 0 to 95 % zeros on a
    CPU with AVX-512; the ratios are not measured anew on yours: benchmarks/sparse_linear.py does that.
    """
    dense = out_features * in_features * (batch_size + (8 if out_features * in_features < 2**21 else 20))
    call = 200_000
    found = {
        "dense": dense / 2 if batch_size == 1 else float(dense),
        "csr": nonzeros * (45 + 6 * batch_size) + call,
    }
    if kernels.load() is None:
        return found
    if batch_size == 1 and "avx512" in kernels.isas():
        return found | {"kernel": 9.0 * nonzeros + 10 * out_features + call}
    full, rest = divmod(batch_size, 64)
    rounded = next((width for width in (4, 8, 16, 32, 48) if rest <= width), 64)
    tiles = [64] * full + [rounded] * (rest > 0)
    row_blocks = out_features * in_features / 112
    return found | {"kernel": sum(nonzeros * (18 + 1.04 * t) + 2 * t * row_blocks for t in tiles) + call}


def _choose(weight: Tensor, format: str, batch_size: int) -> str:
    """The format for this layer: "auto" by cost, "bsr" by bytes, and dense for one that `format` cannot hold."""
    if format == "auto":
        if weight.device.type != "cpu":
            return "dense"
        found = costs(*weight.shape, int(weight.count_nonzero()), batch_size)
        allowed = [name for name in found if weight.dtype in FORMATS[name].dtypes]
        return min(allowed, key=found.__getitem__)
    if format == "bsr":
        return min((f"bsr{block}" for block in BSR_BLOCKS), key=lambda name: stored_bytes(weight, name))
    if format == "2:4" and semi_structured.refusal(weight):
        return "dense"
    return format if weight.dtype in FORMATS[format].dtypes else "dense"


# --- the layer --------------------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """y = x W^T + bias as nn.Linear computes it, with W held in one of FORMATS: [..., in] -> [..., out].

    For inference: W and bias are buffers, and asking for a gradient is an InputError. The state dict holds the packed
    form only; it loads into any SparseLinear of the same shape and format, whatever its number of nonzeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, format: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format = format
        self._names: tuple[str, ...] = ()
        for name, part in FORMATS[format].pack(weight.detach()).items():
            self.register_buffer(f"packed_{name}", part)
            self._names += (name,)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def parts(self) -> Parts:
        return {name: self._buffers[f"packed_{name}"] for name in self._names}

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], made anew each time."""
        return FORMATS[self.format].unpack(self.parts, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "A SparseLinear computes no gradients: call it under torch.no_grad(), or train the dense model."
            )
        if x.shape[-1] != self.in_features:
            raise InputError(f"The input has {x.shape[-1]} features, but this layer takes {self.in_features}.")
        flat = x.reshape(-1, self.in_features)
        y = FORMATS[self.format].multiply(flat, self.parts, self.out_features, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format!r}"
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Another weight has another number of nonzeros: takes the sizes as they come, once they are found sound."""
        keys = {name: f"{prefix}packed_{name}" for name in self._names}
        if all(key in state_dict for key in keys.values()):
            FORMATS[self.format].check({n: state_dict[k] for n, k in keys.items()}, self.out_features, self.in_features)
            for name, key in keys.items():
                held = self._buffers[f"packed_{name}"]
                if held.shape != state_dict[key].shape:
                    self._buffers[f"packed_{name}"] = held.new_empty(state_dict[key].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def convert(model: nn.Module, *, format: str = "auto", batch_size: int = 1) -> nn.Module:
    """A copy of `model` for inference in which every nn.Linear is a SparseLinear; `model` stays as it was.

    format: "auto" takes the cheapest by `costs` for calls with `batch_size` rows (batch times tokens in a transformer),
        dense where dense wins; on CUDA it stays dense, since no kernel there is known to win before some 98 % zeros.
        "bsr" takes the block size that stores in the fewest bytes; else one of RUNNABLE. A layer that the format
        cannot hold (2:4 asks for a 2:4 weight, the kernel not for float64) is dense.
        "kernel-bf16" rounds the weights to bfloat16; every other format computes with the same weights.

    A weight is what the forward pass sees: masks and parametrizations are applied. Shared layers stay shared. What is
    not a Linear is copied and frozen; the out_proj of nn.MultiheadAttention stays, for its weight is read from outside.
    """
    if format not in ("auto", "bsr", *RUNNABLE):
        raise InputError(f"There is no format {format!r} that runs: choose one of auto, bsr, {', '.join(RUNNABLE)}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}: give the number of rows that a call has, 1 or more.")
    if not isinstance(model, nn.Module):
        raise InputError(f"convert takes a torch.nn.Module, not a {type(model).__name__}: give the model itself.")
    linears = [module for module in model.modules() if _convertible(module)]
    if not linears:
        raise InputError("The model has no nn.Linear to convert: give one that has, or leave it as it is.")
    weights = [_seen(linear) for linear in linears]
    if format in FORMATS and (device := weights[0].device.type) not in FORMATS[format].devices:
        raise InputError(f"The format {format!r} runs on {' or '.join(FORMATS[format].devices)}, not on {device}.")
    if format in ("kernel", "kernel-bf16") and kernels.load() is None:
        format = "csr"
    chosen = [_choose(weight, format, batch_size) for weight in weights]
    if format not in ("auto", "dense") and set(chosen) == {"dense"}:
        raise InputError(f"None of the model's Linear layers can be held as {format!r}: choose another format.")
    memo = {id(part): part.detach().clone() for part in _made_by_hooks(model)}  # deepcopy refuses them
    for linear, weight, name in zip(linears, weights, chosen, strict=True):
        memo[id(linear)] = SparseLinear(weight, linear.bias, name).train(linear.training)
    converted = copy.deepcopy(model, memo).requires_grad_(False)
    for module in converted.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused path, which reads dense weights past the layers
    return converted


def _convertible(module: nn.Module) -> bool:
    """A Linear that computes what nn.Linear does, with a weight that only it uses."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return (
        plain
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and module.in_features * module.out_features > 0
    )


def _seen(linear: nn.Linear) -> Tensor:
    """The weight in the forward pass; a mask's hook may not have run since it last changed."""
    mask = linear._buffers.get("weight_mask")
    original = linear._parameters.get("weight_orig", linear.weight)
    return original.detach() if mask is None else original.detach() * mask


def _made_by_hooks(model: nn.Module) -> list[Tensor]:
    return [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf]
