"""Sparse weights that are really smaller and, on a CPU, really faster: SparseLinear, convert(), and what they gain.

The formats are `storage.FORMATS`; "kernel" is SELL-C-sigma (Kreutzer et al. 2014) with labkit's own CPU kernel. For
inference only: nothing here prunes, trains or touches any layer but nn.Linear and transformers' Conv1D.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from labkit.errors import InputError, check_whole
from labkit.pruning import semi_structured
from labkit.pruning.select import count_to_prune, lowest_k
from labkit.storage import native, sell
from labkit.storage.formats import BSR_BLOCKS, FORMATS, Format, Parts
from labkit.timing import bench

HALVES = (torch.float16, torch.bfloat16)

# --- the products -----------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """How a packed weight is multiplied with: multiply(x [batch, in], parts, out, bias or None) -> x W^T + bias."""

    multiply: Callable[[Tensor, Parts, int, Tensor | None], Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, *HALVES)


def _dense(x: Tensor, parts: Parts, out_features: int, bias: Tensor | None) -> Tensor:
    return F.linear(x, parts["values"], bias)


@functools.cache
def _warn_of_beta() -> None:
    """torch warns once a process that its compressed sparse tensors are in beta: here, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _torch(x: Tensor, parts: Parts, out_features: int, bias: Tensor | None) -> Tensor:
    """By torch's own product with a COO, CSR or BSR tensor."""
    _warn_of_beta()
    dtype, in_features, values = x.dtype, x.shape[1], parts["values"]
    if x.device.type == "cpu" and dtype in HALVES:  # torch has no CSR or BSR product for them on a CPU
        values, x = values.float(), x.float()
    if "indices" in parts:
        weight = torch.sparse_coo_tensor(
            parts["indices"], values, (out_features, in_features), check_invariants=False, is_coalesced=True
        )
    else:
        block = values.shape[-1] if values.dim() == 3 else 1
        make = torch.sparse_bsr_tensor if block > 1 else torch.sparse_csr_tensor
        shape = (out_features + -out_features % block, in_features + -in_features % block)
        weight = make(parts["crow"], parts["col"], values, shape, check_invariants=False)
        x = F.pad(x, (0, -in_features % block))
    y = (weight @ x.t()).t()[:, :out_features].to(dtype)
    return y.contiguous() if bias is None else y + bias


def _compiled(x: Tensor, parts: Parts, out_features: int, bias: Tensor | None) -> Tensor:
    """By csrc/sparse_linear.cpp."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        raise InputError(
            f"The sparse kernel computes in float32 on a CPU, not {x.dtype} on {x.device}: convert the dense model."
        )
    if parts["values"].dtype not in sell.VALUES:  # someone called .half() or .double() on the model
        parts = {**parts, "values": parts["values"].float()}
    wide = None if bias is None else bias.float()
    if native.load("sparse_linear") is None:
        weight = sell.unpack(parts, (out_features, x.shape[1])).float()
        return F.linear(x.float(), weight, wide).to(x.dtype)
    return sell.multiply(x.float(), parts, out_features, wide).to(x.dtype)


_SINGLE = (torch.float32, *HALVES)
KERNELS: dict[str, Kernel] = {
    "dense": Kernel(_dense),
    **dict.fromkeys(["coo", "csr", *(f"bsr{block}" for block in BSR_BLOCKS)], Kernel(_torch)),
    "kernel": Kernel(_compiled, ("cpu",), _SINGLE),
    "kernel-bf16": Kernel(_compiled, ("cpu",), _SINGLE),
    "2:4": Kernel(_dense, ("cuda",), HALVES),
}
_ON_GPU = Format(lambda w: {"values": semi_structured.convert(w)}, lambda parts, _: parts["values"].to_dense())
LAYOUTS = FORMATS | {"2:4": _ON_GPU}


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
    for name, value in {"out_features": out_features, "in_features": in_features, "batch_size": batch_size}.items():
        check_whole(value, name)
    check_whole(nonzeros, "nonzeros", least=0, most=out_features * in_features)
    batch_size = int(batch_size)  # numpy's integers multiply lists
    size, call = out_features * in_features, 200_000
    dense = size * (batch_size + (8 if size < 2**21 else 20))
    units = {"dense": dense / 2 if batch_size == 1 else float(dense), "csr": nonzeros * (45 + 6 * batch_size) + call}
    if native.load("sparse_linear") is None:
        return units
    if batch_size == 1 and "avx512" in native.isas("sparse_linear"):
        return units | {"kernel": 9.0 * nonzeros + 10 * out_features + call}
    full, rest = divmod(batch_size, 64)
    rounded = next((width for width in (4, 8, 16, 32, 48) if rest <= width), 64)
    tiles = [64] * full + [rounded] * (rest > 0)
    return units | {"kernel": sum(nonzeros * (18 + 1.04 * t) + 2 * t * size / 112 for t in tiles) + call}


def _choose(weight: Tensor, format: str, batch_size: int) -> str:
    """The format for this layer: "auto" by cost, and dense for one that `format` cannot hold."""
    if format == "auto":
        if weight.device.type != "cpu":
            return "dense"
        units = costs(*weight.shape, int(weight.count_nonzero()), batch_size)
        return min((name for name in units if weight.dtype in KERNELS[name].dtypes), key=units.__getitem__)
    if format == "2:4" and semi_structured.refusal(weight):
        return "dense"
    return format if weight.dtype in KERNELS[format].dtypes else "dense"


# --- the layer --------------------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """y = x W^T + bias as nn.Linear computes it, with W [out, in] packed in one of KERNELS: [..., in] -> [..., out].

    For inference: W and bias are buffers, and asking for a gradient is an InputError. The state dict holds the packed
    form only, and cannot be loaded: the products trust their indices, so it is the dense weights that are loaded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, format: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format = format
        for name, part in LAYOUTS[format].pack(weight.detach()).items():
            self.register_buffer(f"packed_{name}", part)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def parts(self) -> Parts:
        packed = (name for name in self._buffers if name.startswith("packed_"))
        return {name.removeprefix("packed_"): self._buffers[name] for name in packed}

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], made anew each time."""
        return LAYOUTS[self.format].unpack(self.parts, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "A SparseLinear computes no gradients: call it under torch.no_grad(), or train the dense model."
            )
        exported = torch.compiler.is_exporting() and self.format not in ("dense", "coo")
        if exported or (torch.jit.is_tracing() and self.format.startswith("kernel")):
            raise InputError(
                f"torch does not see into the product of the format {self.format!r}: export the dense model."
            )
        if x.shape[-1] != self.in_features:
            raise InputError(f"The input has {x.shape[-1]} features, but this layer takes {self.in_features}.")
        flat = x.reshape(-1, self.in_features)
        y = KERNELS[self.format].multiply(flat, self.parts, self.out_features, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format!r}"

    def _load_from_state_dict(self, *_) -> None:
        raise InputError("A SparseLinear is not loaded: load the dense model's weights, then convert it.")


def convert(model: nn.Module, *, format: str = "auto", batch_size: int = 1) -> nn.Module:
    """A copy of `model` for inference in which every nn.Linear is a SparseLinear; `model` stays as it was.

    format: "auto" takes the cheapest by `costs` for calls with `batch_size` rows (batch times tokens in a transformer),
        dense where dense wins; on CUDA it stays dense, since no kernel there is known to win before some 98 % zeros.
        Else one of KERNELS; a layer that the format cannot hold (2:4 asks for a 2:4 weight, the kernel not for
        float64) is dense. "kernel-bf16" rounds the weights to bfloat16; the others compute with the same weights.

    transformers' Conv1D, the linear layer of GPT-2, is converted too. A weight is what the forward pass sees: masks and
    parametrizations are applied. Shared layers stay shared. What is no linear layer is copied and frozen; the out_proj
    of nn.MultiheadAttention stays, for its weight is read from outside.
    """
    if format not in ("auto", *KERNELS):
        raise InputError(f"There is no format {format!r} that runs: choose one of auto, {', '.join(KERNELS)}.")
    check_whole(batch_size, "batch_size")
    if not isinstance(model, nn.Module):
        raise InputError(f"convert takes a torch.nn.Module, not a {type(model).__name__}: give the model itself.")
    weights = {module: weight for module in model.modules() if (weight := _weight(module)) is not None}
    if not weights:
        raise InputError("The model has no nn.Linear to convert: give one that has, or leave it as it is.")
    if format in KERNELS:
        device, devices = next(iter(weights.values())).device.type, KERNELS[format].devices
        if device not in devices:
            raise InputError(f"The format {format!r} runs on {' or '.join(devices)}, not on {device}.")
    if format in ("kernel", "kernel-bf16") and native.load("sparse_linear") is None:
        format = "csr"
    formats = {module: _choose(weight, format, batch_size) for module, weight in weights.items()}
    if format not in ("auto", "dense") and set(formats.values()) == {"dense"}:
        raise InputError(f"None of the model's Linear layers can be held as {format!r}: choose another format.")
    computed = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    memo = {id(x): x.detach().clone() for x in computed if not x.is_leaf}  # by hooks; deepcopy refuses them
    for module, weight in weights.items():
        memo[id(module)] = SparseLinear(weight, module.bias, formats[module]).train(module.training)
    converted = copy.deepcopy(model, memo).requires_grad_(False)
    for module in converted.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused path, which reads dense weights past the layers
    return converted


def _weight(module: nn.Module) -> Tensor | None:
    """The weight [out, in] in the forward pass of a linear layer that alone reads it, None of any other module."""
    call = type(module).forward
    transposed = f"{call.__module__}.{call.__qualname__}" == "transformers.pytorch_utils.Conv1D.forward"  # [in, out]
    if (not transposed and call is not nn.Linear.forward) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    mask = module._buffers.get("weight_mask")  # whose hook may not have run since it last changed
    weight = module._parameters.get("weight_orig", module.weight).detach()
    weight = weight if mask is None else weight * mask
    return (weight.t() if transposed else weight) if weight.numel() else None


# --- what a format gains in time --------------------------------------------------------------------------------------


def random_weight(out_features: int, in_features: int, sparsity: float, *, block: int = 1) -> Tensor:
    """A float32 weight [out, in] with exactly the asked share of its block x block tiles zero, chosen at random.

    What a product costs depends on where the zeros are, not on the values. block = 1 is unstructured.
    """
    for name, value in {"out_features": out_features, "in_features": in_features, "block": block}.items():
        check_whole(value, name)
    if block < 1 or out_features % block or in_features % block:
        raise InputError(
            f"{out_features} x {in_features} does not divide into blocks of {block}: give a block that divides both."
        )
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(out_features // block, in_features // block, generator=generator)
    gone = lowest_k(tiles, count_to_prune(tiles.numel(), sparsity))
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight.masked_fill_(gone.repeat_interleave(block, 0).repeat_interleave(block, 1), 0.0)


def close(expected: Tensor, actual: Tensor) -> bool:
    """Equal up to rounding in the outputs' type: sums of some 4096 products in another order, through a few layers."""
    eps = torch.finfo(expected.dtype).eps
    return bool((actual - expected).abs().max() <= 4096**0.5 * 8 * eps * expected.abs().max())


@torch.no_grad()
def against_dense(
    weight: Tensor,
    format: str,
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    budget_s: float = 1.0,
) -> bench.Comparison:
    """Speed-up of a Linear with `weight` [out, in] held in `format` over the same one held dense, x [batch_size, in].

    On CUDA with the L2 cleared before each call.
    """
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.copy_(weight)
    dense = dense.to(device, dtype)
    x = torch.randn(batch_size, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    fast = convert(dense, format=format, batch_size=batch_size)
    cache = "cold" if x.is_cuda else "hot"
    return bench.compare(
        lambda: dense(x), lambda: fast(x), names=("dense", format), check=close, budget_s=budget_s, cache=cache
    )
