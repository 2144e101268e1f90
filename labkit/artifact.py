"""The bytes of a model as it would be stored, indices, masks and metadata included.

What is measured is the length of a real safetensors serialisation (safetensors.save), so a ratio of sizes is one of
files. It does not convert a model: a smaller file is not yet a faster one, and the kernels are elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from labkit.batches import evaluating
from labkit.errors import InputError
from labkit.footprint import components
from labkit.pruning import nm_packed
from labkit.pruning.nm_pattern import is_nm

Parts = dict[str, Tensor]


def size(model: nn.Module | Mapping[str, Tensor], format: str = "dense") -> int:
    """Bytes of `model` (a module or a state dict) stored as `format`, the file's header included.

    Stored is what the forward pass sees: a masked weight with its zeros, not the original and the mask; a tensor that
    several layers share, once. The format is that of the weights with at least two dimensions, read as [out, rest];
    everything else stays dense. With N weights of s bytes, of which n are not zero, in R rows, and 4 bytes a dimension
    for the shape:

    dense    N s
    csr      n (s + 4) + 4 (R + 1)     smaller than dense above 50 % zeros at fp32, above 66.7 % at 2 bytes
    bitmask  n s + N / 8               13.1 % of dense at 90 % zeros and fp32
    nm       N s / 2 + N / 8           2:4 along the input channels: 56.25 % of dense at 2 bytes, 53.1 % at fp32

    With "nm", a weight that is not 2:4 stays dense, as hardware would have it (`pack` shows which ones); if none is 2:4
    there is nothing to store so, and that is an InputError.
    """
    return len(save(pack(model, format)))


def pack(model: nn.Module | Mapping[str, Tensor], format: str = "dense") -> dict[str, Tensor]:
    """The tensors that are stored, on the CPU: "layer.weight" is dense, "layer.weight:csr:values" part of it."""
    if format != "dense" and format not in FORMATS:
        raise InputError(f"there is no format {format!r}: choose from dense, {', '.join(FORMATS)}.")
    state, weights = _state(model)
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = FORMATS[format].encode(tensor) if format != "dense" and name in weights else None
        packed |= {name: tensor} if parts is None else {f"{name}:{format}:{part}": t for part, t in parts.items()}
    if format == "nm" and packed.keys() == state.keys():
        looked_at = ", ".join(sorted(weights)[:4]) or "a model without matrices"
        raise InputError(
            f"no weight has two zeros in each four input channels (looked at {looked_at}): prune the model to 2:4, "
            "or choose another format."
        )
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors that `pack` was given, value for value; of shared ones the first name."""
    state: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], Parts] = {}
    for name, tensor in packed.items():
        stem, *form = name.rsplit(":", 2)
        if len(form) == 2 and form[0] in FORMATS:
            parts.setdefault((stem, form[0]), {})[form[1]] = tensor
        else:
            state[name] = tensor
    return state | {stem: FORMATS[format].decode(held) for (stem, format), held in parts.items()}


# -------------------------------------------------------------------------------------------------------- the formats


class Format(NamedTuple):
    """How a dense weight is stored and read back; None where it doesn't have the form."""

    encode: Callable[[Tensor], Parts | None]
    decode: Callable[[Parts], Tensor]


def _shape(w: Tensor) -> Tensor:
    return torch.tensor(w.shape, dtype=torch.int32)


def _to_csr(w: Tensor) -> Parts:
    rows = w.flatten(1)
    kept = rows != 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    if starts[-1] > torch.iinfo(torch.int32).max:
        raise InputError("a weight has more non-zeros than int32 row pointers can count: choose the format bitmask.")
    columns = kept.nonzero()[:, 1]
    return {"values": rows[kept], "columns": columns.int(), "starts": starts.int(), "shape": _shape(w)}


def _from_csr(parts: Parts) -> Tensor:
    starts = parts["starts"].long()
    w = torch.zeros(parts["shape"].tolist(), dtype=parts["values"].dtype)
    rows = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    w.flatten(1)[rows, parts["columns"].long()] = parts["values"]
    return w


def _to_bitmask(w: Tensor) -> Parts:
    kept = w != 0
    return {"values": w[kept], "bits": torch.from_numpy(np.packbits(kept.numpy())), "shape": _shape(w)}


def _from_bitmask(parts: Parts) -> Tensor:
    w = torch.zeros(parts["shape"].tolist(), dtype=parts["values"].dtype)
    kept = np.unpackbits(parts["bits"].numpy(), count=w.numel()).astype(bool)
    w.view(-1)[torch.from_numpy(kept)] = parts["values"]
    return w


def _to_nm(w: Tensor) -> Parts | None:
    """2:4 along the input channels, in the layout of `nm_packed`; None for another weight."""
    if not is_nm(w, 2, 4):
        return None
    packed = nm_packed.compress(w, 2, 4)
    return {"values": packed.values, "places": packed.metadata, "shape": _shape(w)}


def _from_nm(parts: Parts) -> Tensor:
    shape = tuple(parts["shape"].tolist())
    return nm_packed.decompress(nm_packed.Packed(parts["values"], parts["places"], shape, 2, 4))


FORMATS: dict[str, Format] = {
    "csr": Format(_to_csr, _from_csr),
    "bitmask": Format(_to_bitmask, _from_bitmask),
    "nm": Format(_to_nm, _from_nm),
}

# --------------------------------------------------------------------------------------------- what the forward sees


def _state(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Dense tensors by name, shared ones once, and the names of those that are weights of two dimensions or more."""
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
        state: dict[str, Any] = dict(model.state_dict())
        trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, value in _parametrized(model):
            owner, _, tensor = name.rpartition(".")
            hidden = f"{owner}.parametrizations.{tensor}.".lstrip(".")
            state = {key: kept for key, kept in state.items() if not key.startswith(hidden)} | {name: value}
            trained.add(name)
    elif isinstance(model, Mapping):
        state, trained = dict(model), set(model)
    else:
        raise InputError(f"size needs a module or a state dict, not a {type(model).__name__}: pass the model itself.")
    if hidden := [name for name in state if ".parametrizations." in f".{name}"]:
        raise InputError(f"{hidden[0]!r} needs its parametrization, which a state dict lacks: pass the model itself.")
    for name in [name for name in state if name.endswith("_orig") and f"{name[:-5]}_mask" in state]:
        value = state.pop(name) * state.pop(f"{name[:-5]}_mask")  # torch.nn.utils.prune
        state[name[:-5]] = value
        trained.add(name[:-5])

    tensors: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name, value in state.items():
        for part, t in _plain(name, value):
            if t.device.type == "meta":
                raise InputError(
                    f"{part!r} is on the meta device and has no values to store: build the model on the CPU."
                )
            memory = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
            if t.numel() == 0 or memory not in seen:
                tensors[part] = t
            seen.add(memory)
    weights = {name for name, t in tensors.items() if name in trained and t.dim() >= 2 and t.is_floating_point()}
    return {name: _own(t) for name, t in tensors.items()}, weights


def _parametrized(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors under torch.nn.utils.parametrize, as the forward pass gets them."""
    with torch.no_grad(), evaluating(model):  # in training, some parametrizations change state when they are read
        for prefix, module in model.named_modules():
            if parametrize.is_parametrized(module):
                for tensor in module.parametrizations:
                    yield f"{prefix}.{tensor}".lstrip("."), getattr(module, tensor)


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of an entry: of a quantised tensor its integers and scales, of a sparse one its components."""
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _plain(f"{name}.{i}", item)
    elif not isinstance(value, Tensor):
        return  # a dtype, a version
    elif is_traceable_wrapper_subclass(value):
        for inner in value.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(value, inner))
    elif value.is_quantized:
        yield f"{name}.int_repr", value.int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield f"{name}.scale", value.q_per_channel_scales()
            yield f"{name}.zero_point", value.q_per_channel_zero_points()
        else:
            yield f"{name}.scale", torch.tensor(value.q_scale())
            yield f"{name}.zero_point", torch.tensor(value.q_zero_point(), dtype=torch.int32)
    elif value.layout is torch.strided:
        yield name, value
    else:
        for i, component in enumerate(components(value)):
            yield f"{name}.{i}", component


def _own(t: Tensor) -> Tensor:
    """On the CPU, in a storage of its own, as a file holds it."""
    t = t.detach().cpu().contiguous()
    return t.clone() if t.untyped_storage().nbytes() > t.nbytes else t
