"""Measure the bytes of a model as it would be stored, indices, masks, scales and metadata included.

The measure is the length of a real safetensors serialisation (safetensors.save), so that a ratio of sizes is a ratio of
files. No model is converted: a smaller file is not yet a faster model, and the kernels are elsewhere.
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
from labkit.modules.weights import qualified
from labkit.quantization.affine import Quantized
from labkit.quantization.formats import Encoded
from labkit.quantization.packing import pack_codes
from labkit.storage.formats import FORMATS


def size(model: nn.Module | Mapping[str, Tensor], format: str = "dense") -> int:
    """Return the bytes of a model stored in a format, the file's header included.

    model: a module or a state dict. Tensors are stored as the forward pass sees them: a masked weight with zeros, not
        the original and the mask; a tensor shared by several layers, once. A state dict may hold `affine.Quantized` and
        `formats.Encoded`, and a module codes and scales as buffers: counted in their dtypes.
    format: a row of `storage.FORMATS`, where the formulas stand: "dense", "csr", "bitmask", "nm" (2:4), "int8", "int4"
        and more. Only floating-point weights with at least two dimensions, read as [out, rest], get the format, and 4
        bytes a dimension for the shape; the rest stays dense, as do weights without the form for the format (`pack`
        shows the stored tensors).

    Raises InputError if no weight has the form for the format.
    """
    return len(save(pack(model, format)))


def pack(model: nn.Module | Mapping[str, Tensor], format: str = "dense") -> dict[str, Tensor]:
    """Return the tensors that are stored, on the CPU: "layer.weight" dense, "layer.weight:csr:values" a part of CSR.

    model, format, errors: as for `size`.
    """
    check_choice(format, FORMATS, "format")
    tensors, weights = _state(model)
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = None
        if name in weights and format != "dense":
            parts = FORMATS[format].pack(tensor)
        if parts is None:
            packed[name] = tensor
            continue
        parts["shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
        for part, array in parts.items():
            packed[f"{name}:{format}:{part}"] = array
    form = FORMATS[format].form
    if form and packed.keys() == tensors.keys():
        first_weights = sorted(weights)[:4]
        examples = ", ".join(first_weights) or "a model without matrices"
        raise InputError(
            f"no weight has {form} (looked at {examples}): prune or pad the model so, or choose another format."
        )
    return packed


# --- the tensors of a model -------------------------------------------------------------------------------------------


def _state(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Return the dense tensors that the forward pass sees, by name, shared tensors once; and the names of weights."""
    if isinstance(model, nn.Module):
        state, trained = _module_state(model)
    elif isinstance(model, Mapping):
        state, trained = dict(model), set(model)
    else:
        raise InputError(f"size needs a module or a state dict, not a {type(model).__name__}: pass the model itself.")
    for name in state:
        if ".parametrizations." in f".{name}":
            raise InputError(f"{name!r} needs its parametrization, which a state dict lacks: pass the model itself.")
    trained |= _apply_masks_(state)
    tensors = _distinct_tensors(state)
    weights = {name for name in trained & tensors.keys() if _is_matrix(tensors[name])}
    stored = {name: _detached_copy(tensor) for name, tensor in tensors.items()}
    return stored, weights


def _module_state(model: nn.Module) -> tuple[dict[str, Any], set[str]]:
    """Return a module's state dict, parametrized tensors as the forward pass gets them; and the trained names."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    state: dict[str, Any] = dict(model.state_dict())
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in _parametrized(model):
        owner, _, attribute = name.rpartition(".")
        hidden = qualified(owner, f"parametrizations.{attribute}.")
        state = {key: entry for key, entry in state.items() if not key.startswith(hidden)}
        state[name] = value
        trained.add(name)
    return state, trained


def _apply_masks_(state: dict[str, Any]) -> set[str]:
    """Replace each pair of original and mask of torch.nn.utils.prune by their product; return the names."""
    originals = [name for name in state if name.endswith("_orig")]
    names = [name.removesuffix("_orig") for name in originals]
    masked = [name for name in names if f"{name}_mask" in state]
    for name in masked:
        original = state.pop(f"{name}_orig")
        mask = state.pop(f"{name}_mask")
        state[name] = original * mask
    return set(masked)


def _distinct_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the dense tensors of a state by name, each memory once."""
    tensors: dict[str, Tensor] = {}
    seen: set[Any] = set()
    for entry, value in state.items():
        for name, tensor in _dense(entry, value):
            if tensor.device.type == "meta":
                raise InputError(
                    f"{name!r} is on the meta device and has no values to store: build the model on the CPU."
                )
            address = tensor.untyped_storage()._cdata
            memory = (address, tensor.storage_offset(), tensor.shape, tensor.stride())
            if not tensor.numel() or memory not in seen:
                tensors[name] = tensor
            seen.add(memory)
    return tensors


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.numel() > 0 and tensor.is_floating_point()


def _parametrized(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under torch.nn.utils.parametrize, by name, as the forward pass gets them."""
    with torch.no_grad(), evaluating(model):  # in training, some parametrizations change state when they are read
        for prefix, module in model.named_modules():
            if parametrize.is_parametrized(module):
                for attribute in module.parametrizations:
                    name = f"{prefix}.{attribute}".lstrip(".")
                    yield name, getattr(module, attribute)


def _dense(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors of an entry of a state dict, by name.

    A quantized tensor has codes and scales, a sparse tensor its components; an entry that is no tensor (a dtype, a
    version) has none.
    """
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _dense(f"{name}.{index}", item)
    elif isinstance(value, Quantized | Encoded):
        for part, array in pack_codes(value).items():
            yield f"{name}.{part}", array
    elif isinstance(value, Tensor) and value.is_quantized:
        for part, array in _torch_quantized(value).items():
            yield f"{name}.{part}", array
    elif isinstance(value, Tensor):
        components = dense_parts([value])
        if components[0] is value:
            yield name, value
            return
        for index, component in enumerate(components):
            yield f"{name}.{index}", component


def _torch_quantized(value: Tensor) -> dict[str, Tensor]:
    """Return the arrays of a tensor of torch.ao.quantization by name."""
    parts = {"int_repr": value.int_repr()}
    if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        parts["scale"] = value.q_per_channel_scales()
        parts["zero_point"] = value.q_per_channel_zero_points()
    else:
        parts["scale"] = torch.tensor(value.q_scale())
        parts["zero_point"] = torch.tensor(value.q_zero_point(), dtype=torch.int32)
    return parts


def _detached_copy(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU in a storage that holds nothing else, as in a file."""
    tensor = tensor.detach().cpu().contiguous()
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_part else tensor
