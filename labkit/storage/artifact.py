"""The bytes of a model as it would be stored, indices, masks, scales and metadata included.

What is measured is the length of a real safetensors serialisation (safetensors.save), so a ratio of sizes is one of
files. It does not convert a model: a smaller file is not yet a faster one, and the kernels are elsewhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.errors import InputError, check_choice
from labkit.modules.evaluating import evaluating
from labkit.modules.tensors import dense_parts
from labkit.quantization.affine import Quantized
from labkit.quantization.formats import Encoded
from labkit.quantization.packing import pack_codes
from labkit.storage.formats import FORMATS


def size(model: nn.Module | Mapping[str, Tensor], format: str = "dense") -> int:
    """Bytes of `model` (a module or a state dict) stored as `format`, the file's header included.

    format: one of `storage.FORMATS`, which has their formulas: "dense", "csr", "bitmask", "nm" (2:4), "int8", "int4",
        and others. It is that of the floating point weights with at least two dimensions, read as [out, rest], plus 4
        bytes a dimension for the shape; everything else stays dense, and so does a weight that does not have the form
        (`pack` shows which ones). InputError if no weight has the form that "nm" or blocks of few bits ask for.

    Stored is what the forward pass sees: a masked weight with its zeros, not the original and the mask; a tensor that
    several layers share, once. A state dict may hold `affine.Quantized` and `formats.Encoded`, and a module its codes
    and scales as buffers; those are counted as they are.
    """
    return len(save(pack(model, format)))


def pack(model: nn.Module | Mapping[str, Tensor], format: str = "dense") -> dict[str, Tensor]:
    """The tensors that are stored, on the CPU: "layer.weight" is dense, "layer.weight:csr:values" part of it."""
    check_choice(format, FORMATS, "format")
    tensors, weights = _state(model)
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = FORMATS[format].pack(tensor) if format != "dense" and name in weights else None
        if parts is None:
            packed[name] = tensor
        else:
            parts |= {"shape": torch.tensor(tensor.shape, dtype=torch.int32)}
            packed |= {f"{name}:{format}:{part}": value for part, value in parts.items()}
    form = FORMATS[format].form
    if form and packed.keys() == tensors.keys():
        looked_at = ", ".join(sorted(weights)[:4]) or "a model without matrices"
        raise InputError(
            f"no weight has {form} (looked at {looked_at}): prune or pad the model so, or choose another format."
        )
    return packed


def _state(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Dense tensors as the forward pass sees them, by name, shared ones once; names of the weights among them."""
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
        state: dict[str, Any] = dict(model.state_dict())
        trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, value in _parametrized(model):
            owner, _, attribute = name.rpartition(".")
            hidden = f"{owner}.parametrizations.{attribute}.".lstrip(".")
            state = {key: value for key, value in state.items() if not key.startswith(hidden)} | {name: value}
            trained.add(name)
    elif isinstance(model, Mapping):
        state, trained = dict(model), set(model)
    else:
        raise InputError(f"size needs a module or a state dict, not a {type(model).__name__}: pass the model itself.")
    if hidden := [name for name in state if ".parametrizations." in f".{name}"]:
        raise InputError(f"{hidden[0]!r} needs its parametrization, which a state dict lacks: pass the model itself.")
    for name in [name[:-5] for name in state if name.endswith("_orig") and f"{name[:-5]}_mask" in state]:
        state[name] = state.pop(f"{name}_orig") * state.pop(f"{name}_mask")  # torch.nn.utils.prune
        trained.add(name)

    tensors: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for name, tensor in (pair for entry in state.items() for pair in _dense(*entry)):
        if tensor.device.type == "meta":
            raise InputError(f"{name!r} is on the meta device and has no values to store: build the model on the CPU.")
        memory = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if not tensor.numel() or memory not in seen:
            tensors[name] = tensor
        seen.add(memory)
    matrices = {name for name, t in tensors.items() if t.dim() >= 2 and t.numel() and t.is_floating_point()}
    return {name: _alone(tensor) for name, tensor in tensors.items()}, matrices & trained


def _parametrized(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors under torch.nn.utils.parametrize, as the forward pass gets them."""
    with torch.no_grad(), evaluating(model):  # in training, some parametrizations change state when they are read
        for prefix, module in model.named_modules():
            if parametrize.is_parametrized(module):
                for attribute in module.parametrizations:
                    yield f"{prefix}.{attribute}".lstrip("."), getattr(module, attribute)


def _dense(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of an entry: of a quantised tensor its integers and scales, of a sparse one its components."""
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _dense(f"{name}.{i}", item)
    elif isinstance(value, Quantized | Encoded):
        yield from ((f"{name}.{part}", array) for part, array in pack_codes(value).items())
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{name}.int_repr", value.int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield f"{name}.scale", value.q_per_channel_scales()
            yield f"{name}.zero_point", value.q_per_channel_zero_points()
        else:
            yield f"{name}.scale", torch.tensor(value.q_scale())
            yield f"{name}.zero_point", torch.tensor(value.q_zero_point(), dtype=torch.int32)
    elif isinstance(value, Tensor):  # anything else is a dtype or a version
        held = dense_parts([value])
        yield from [(name, value)] if held[0] is value else ((f"{name}.{i}", part) for i, part in enumerate(held))


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, in a storage of its own, as a file holds it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
