"""Sparse weights in packed formats, smaller in memory and faster on a CPU: SparseLinear and convert().

The formats are rows of `storage.FORMATS`; "kernel" is SELL-C-sigma (Kreutzer et al. 2014) with labkit's own CPU kernel.
For inference of nn.Linear and transformers' Conv1D only. Weights are neither pruned nor trained here.
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

HALVES = (torch.float16, torch.bfloat16)

# --- the products -----------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """Product with a packed weight: multiply(x [batch, in], parts, out_features, bias or None) -> x W^T + bias.

    devices, dtypes: devices and types of x for which the product exists.
    """

    multiply: Callable[[Tensor, Parts, int, Tensor | None], Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, *HALVES)


def _dense(
    x: Tensor,
    parts: Parts,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return F.linear(x, parts["values"], bias)


@functools.cache
def _warn_of_beta() -> None:
    """Trigger torch's warning about compressed sparse tensors, shown once a process, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _torch(
    x: Tensor,
    parts: Parts,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply by torch's own product with a COO, CSR or BSR tensor."""
    _warn_of_beta()
    dtype, in_features = x.dtype, x.shape[1]
    values = parts["values"]
    if x.device.type == "cpu" and dtype in HALVES:  # torch has no CSR or BSR product for them on a CPU
        values, x = values.float(), x.float()
    if "indices" in parts:
        shape = (out_features, in_features)
        weight = torch.sparse_coo_tensor(parts["indices"], values, shape, check_invariants=False, is_coalesced=True)
    else:
        block = values.shape[-1] if values.dim() == 3 else 1
        missing_rows, missing_columns = -out_features % block, -in_features % block  # up to whole blocks
        shape = (out_features + missing_rows, in_features + missing_columns)
        make = torch.sparse_bsr_tensor if block > 1 else torch.sparse_csr_tensor
        weight = make(parts["crow"], parts["col"], values, shape, check_invariants=False)
        x = F.pad(x, (0, missing_columns))
    padded = (weight @ x.t()).t()
    y = padded[:, :out_features].to(dtype)
    return y.contiguous() if bias is None else y + bias


def _compiled(
    x: Tensor,
    parts: Parts,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply by csrc/sparse_linear.cpp in float32, or by a dense product if the kernel is not compiled."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        raise InputError(
            f"The sparse kernel computes in float32 on a CPU, not {x.dtype} on {x.device}: convert the dense model."
        )
    if parts["values"].dtype not in sell.VALUES:  # someone called .half() or .double() on the model
        parts = {**parts, "values": parts["values"].float()}
    dtype = x.dtype
    x = x.float()
    bias = None if bias is None else bias.float()
    if native.load("sparse_linear") is None:
        weight = sell.unpack(parts, (out_features, x.shape[1])).float()
        return F.linear(x, weight, bias).to(dtype)
    return sell.multiply(x, parts, out_features, bias).to(dtype)


def _pack_2_4(weight: Tensor) -> Parts:
    return {"values": semi_structured.convert(weight)}


def _unpack_2_4(parts: Parts, shape: tuple[int, int]) -> Tensor:
    return parts["values"].to_dense()


_SINGLE = (torch.float32, *HALVES)
_TORCH_FORMATS = ["coo", "csr", *(f"bsr{block}" for block in BSR_BLOCKS)]
KERNELS: dict[str, Kernel] = {
    "dense": Kernel(_dense),
    **dict.fromkeys(_TORCH_FORMATS, Kernel(_torch)),
    "kernel": Kernel(_compiled, ("cpu",), _SINGLE),
    "kernel-bf16": Kernel(_compiled, ("cpu",), _SINGLE),
    "2:4": Kernel(_dense, ("cuda",), HALVES),
}
LAYOUTS = FORMATS | {"2:4": Format(_pack_2_4, _unpack_2_4)}


# --- the cost model ---------------------------------------------------------------------------------------------------

CACHE = 2**21  # float32 weights in a cache of 8 MiB
CALL = 200_000  # units that a call of a sparse format costs in addition
TILE = 64  # rows of x that the kernel takes at a time; a last tile is as narrow as fits
NARROW_TILES = (4, 8, 16, 32, 48)


def costs(
    out_features: int,
    in_features: int,
    nonzeros: int,
    batch_size: int,
) -> dict[str, float]:
    """Estimate the cost of a call on a CPU core in each format, {format: units}; format="auto" takes the smallest.

    out_features, in_features: shape of the weight.
    nonzeros: number n of weights that are not 0.
    batch_size: rows B of x.

    With N = out in, the unit is a multiply-add of a large dense product, so that only ratios matter. A small batch pays
    for reading the weight, all the more if it exceeds a cache of 8 MiB:

        dense   N (B + 8), beyond the cache N (B + 20);  for B = 1 half of the sum
        kernel  n (18 + 1.04 T) + 2 T out (in / 112) for each tile of T <= 64 rows of x;  for B = 1: 9 n + 10 out
        csr     n (45 + 6 B), as torch has it

    and each call of a sparse format 200,000 more. The constants were fitted to calls from 64 x 64 to 4096 x 4096 at 0
    to 95 % zeros on a CPU with AVX-512, not on the machine that runs: benchmarks/sparse_linear.py measures anew.
    """
    for name, value in {"out_features": out_features, "in_features": in_features, "batch_size": batch_size}.items():
        check_whole(value, name)
    size = out_features * in_features
    check_whole(nonzeros, "nonzeros", least=0, most=size)
    batch_size = int(batch_size)  # numpy's integers multiply lists
    reading = 8 if size < CACHE else 20
    dense = size * (batch_size + reading)
    units = {
        "dense": dense / 2 if batch_size == 1 else float(dense),
        "csr": nonzeros * (45 + 6 * batch_size) + CALL,
    }
    if native.load("sparse_linear") is not None:
        units["kernel"] = _kernel_cost(out_features, size, nonzeros, batch_size)
    return units


def _kernel_cost(
    out_features: int,
    size: int,
    nonzeros: int,
    batch_size: int,
) -> float:
    if batch_size == 1 and "avx512" in native.isas("sparse_linear"):
        return 9.0 * nonzeros + 10 * out_features + CALL
    total = 0
    for tile in _tiles(batch_size):
        total += nonzeros * (18 + 1.04 * tile) + 2 * tile * size / 112
    return total + CALL


def _tiles(batch_size: int) -> list[int]:
    """Return the widths of the tiles that the kernel divides a batch into."""
    full_tiles, rest = divmod(batch_size, TILE)
    tiles = [TILE] * full_tiles
    if rest:
        wide_enough = [width for width in (*NARROW_TILES, TILE) if rest <= width]
        tiles.append(wide_enough[0])
    return tiles


def _choose(weight: Tensor, format: str, batch_size: int) -> str:
    """Return the format of a layer: the cheapest by `costs` for "auto", "dense" if `format` cannot hold the weight."""
    if format == "auto":
        return _cheapest(weight, batch_size)
    if format == "2:4" and semi_structured.refusal(weight):
        return "dense"
    return format if weight.dtype in KERNELS[format].dtypes else "dense"


def _cheapest(weight: Tensor, batch_size: int) -> str:
    if weight.device.type != "cpu":
        return "dense"
    units = costs(*weight.shape, int(weight.count_nonzero()), batch_size)
    possible = [name for name in units if weight.dtype in KERNELS[name].dtypes]
    return min(possible, key=units.__getitem__)


# --- the layer --------------------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """Linear layer y = x W^T + bias, [..., in] -> [..., out], with W packed in a format of KERNELS, for inference.

    weight: [out, in], dense.
    bias: [out] or None.
    format: a key of KERNELS.

    W and bias are buffers, and a gradient is refused by InputError. The state dict holds the packed form only and
    cannot be loaded, because the products trust the indices: load the dense weights and convert.
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
        packed = [name for name in self._buffers if name.startswith("packed_")]
        return {name.removeprefix("packed_"): self._buffers[name] for name in packed}

    @property
    def weight(self) -> Tensor:
        """Unpack the dense weight [out, in], anew at each access."""
        return LAYOUTS[self.format].unpack(self.parts, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        flat = x.reshape(-1, self.in_features)
        y = KERNELS[self.format].multiply(flat, self.parts, self.out_features, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor) -> None:
        """Raise InputError for a gradient, for an export blind to the product, and for a wrong number of features."""
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "A SparseLinear computes no gradients: call it under torch.no_grad(), or train the dense model."
            )
        exported = torch.compiler.is_exporting() and self.format not in ("dense", "coo")
        traced = torch.jit.is_tracing() and self.format.startswith("kernel")
        if exported or traced:
            raise InputError(
                f"torch does not see into the product of the format {self.format!r}: export the dense model."
            )
        if x.shape[-1] != self.in_features:
            raise InputError(f"The input has {x.shape[-1]} features, but this layer takes {self.in_features}.")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format!r}"

    def _load_from_state_dict(self, *_: object) -> None:
        raise InputError("A SparseLinear is not loaded: load the dense model's weights, then convert it.")


def convert(model: nn.Module, *, format: str = "auto", batch_size: int = 1) -> nn.Module:
    """Return a copy of `model` for inference with a SparseLinear in the place of every nn.Linear.

    format: a key of KERNELS; a layer stays dense if the format cannot hold the weight (2:4 needs a 2:4 weight, the
        kernel is not for float64). "kernel-bf16" rounds the weights to bfloat16; all formats else keep the weights.
        "auto" takes the cheapest format by `costs`, dense included; on CUDA always dense, because no kernel for CUDA is
        known to win below some 98 % zeros.
    batch_size: the number of rows in a call, for "auto" (batch times tokens in a transformer).

    transformers' Conv1D, the linear layer of GPT-2, is converted too. Masks and parametrizations are applied. Shared
    layers stay shared. All remaining layers are copied and frozen; so is the out_proj of nn.MultiheadAttention, because
    MultiheadAttention reads the weight of out_proj directly.
    Raises InputError for a model without linear layers, and for a format that can hold none of its layers.
    """
    if format not in ("auto", *KERNELS):
        raise InputError(f"There is no format {format!r} that runs: choose one of auto, {', '.join(KERNELS)}.")
    check_whole(batch_size, "batch_size")
    if not isinstance(model, nn.Module):
        raise InputError(f"convert takes a torch.nn.Module, not a {type(model).__name__}: give the model itself.")
    weights = _linear_weights(model)
    _check_device(format, weights)
    if format in ("kernel", "kernel-bf16") and native.load("sparse_linear") is None:
        format = "csr"
    formats = {layer: _choose(weight, format, batch_size) for layer, weight in weights.items()}
    if format not in ("auto", "dense") and set(formats.values()) == {"dense"}:
        raise InputError(f"None of the model's Linear layers can be held as {format!r}: choose another format.")
    replacements = {}
    for layer, weight in weights.items():
        replacements[id(layer)] = SparseLinear(weight, layer.bias, formats[layer]).train(layer.training)
    converted = copy.deepcopy(model, _computed_tensors(model) | replacements).requires_grad_(False)
    for module in converted.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused path, which reads dense weights past the layers
    return converted


def _linear_weights(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return {linear layer: weight [out, in]} of the layers to convert; raise InputError for a model without any."""
    weights = {}
    for module in model.modules():
        weight = _weight(module)
        if weight is not None:
            weights[module] = weight
    if not weights:
        raise InputError("The model has no nn.Linear to convert: give one that has, or leave it as it is.")
    return weights


def _check_device(format: str, weights: dict[nn.Module, Tensor]) -> None:
    if format not in KERNELS:
        return
    first = next(iter(weights.values()))
    device, devices = first.device.type, KERNELS[format].devices
    if device not in devices:
        raise InputError(f"The format {format!r} runs on {' or '.join(devices)}, not on {device}.")


def _computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Copy the tensors left by hooks on modules, {id: copy}: deepcopy refuses tensors with a graph."""
    copies = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                copies[id(value)] = value.detach().clone()
    return copies


def _weight(module: nn.Module) -> Tensor | None:
    """Return the weight [out, in] in the forward pass of a linear layer, None for all modules not to be converted."""
    call = type(module).forward
    is_conv1d = f"{call.__module__}.{call.__qualname__}" == "transformers.pytorch_utils.Conv1D.forward"
    is_linear = call is nn.Linear.forward and not isinstance(module, NonDynamicallyQuantizableLinear)
    if not is_conv1d and not is_linear:
        return None
    weight = module._parameters.get("weight_orig", module.weight).detach()
    mask = module._buffers.get("weight_mask")  # whose hook may not have run since it last changed
    if mask is not None:
        weight = weight * mask
    if not weight.numel():
        return None
    return weight.t() if is_conv1d else weight  # a Conv1D stores [in, out]


# --- weights to measure with ------------------------------------------------------------------------------------------


def random_weight(out_features: int, in_features: int, sparsity: float) -> Tensor:
    """Return a random float32 weight [out, in] with exactly the fraction `sparsity` zero, at random places.

    The cost of a sparse product depends on where the zeros are, not on the values.
    """
    for name, value in {"out_features": out_features, "in_features": in_features}.items():
        check_whole(value, name)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(out_features, in_features, generator=generator)
    zeros = lowest_k(order, count_to_prune(order.numel(), sparsity))
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight.masked_fill_(zeros, 0.0)


def close(expected: Tensor, actual: Tensor) -> bool:
    """Return True if outputs are equal up to rounding: sums of some 4096 products in a new order, in a few layers."""
    eps = torch.finfo(expected.dtype).eps
    tolerance = 4096**0.5 * 8 * eps * expected.abs().max()
    return bool((actual - expected).abs().max() <= tolerance)
