"""A model without some entries, on the meta device: what its modules' numbers become, and does it do the same then?

The operators have to come in the same order and give the shapes that the traced ones have without what is removed. So
a pass that writes its sizes down is found out even where it happens to run. Nothing is computed.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.errors import first_line
from labkit.graph.rules import Operation, Record
from labkit.graph.tracing import Abstract, abstract, duplicate, following, skeleton
from labkit.modules.undisturbed import undisturbed

Keep = Mapping[str, Mapping[int, Tensor]]  # {parameter or buffer: {dimension: indices that stay}}
Attributes = Mapping[str, Mapping[str, Any]]  # {module: {attribute: new value}}

CONFIG = "config."  # before the name of an attribute that is one of the module's config
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NO_SIZES = ("idx", "index", "id", "buckets")  # ends of names of numbers that can only happen to equal a size: layer_idx

# What comes in the same order whatever the sizes are. Products and moves do not: torch folds and copies by size and
# stride. But what they get wrong shows here, such as a softmax over as many rows as there were heads.
_NAMES = """convolution native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
split split_with_sizes slice
native_layer_norm native_group_norm _softmax _log_softmax _safe_softmax relu relu6 sigmoid tanh gelu silu mish elu
leaky_relu hardswish hardsigmoid hardtanh softplus _prelu_kernel pow rsqrt embedding cat mean max_pool2d_with_indices
avg_pool2d _adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d roll constant_pad_nd linalg_vector_norm"""
COMPARED = frozenset(_NAMES.split())


class _Differs(Exception):
    """The pass does something else."""


class Mismatch(NamedTuple):
    """What goes wrong, in which module, and after how many operators (of those that are compared, of all)."""

    why: str
    module: str
    after: tuple[int, int]


def trial(
    model: nn.Module, record: Record, gone: np.ndarray, keep: Keep, attributes: Attributes, args: tuple, kwargs: Mapping
) -> Mismatch | None:
    """What goes wrong when `model` runs without the labels in `gone`; None if every operator gives what it should."""
    tensors = {id(x): _abstract(x, keep.get(name, {})) for name, x in tensors_of(model)}
    comparing, stack = _Comparing(record.operations, gone), [""]
    try:
        for training in (False, True) if record.trained else (False,):
            cut = skeleton(model, tensors, training=training)
            set_attributes_(cut, attributes)
            inputs, options = duplicate((args, dict(kwargs)), abstract)
            with undisturbed(), following(cut, set()) as stack, Abstract() if training else comparing:
                cut(*inputs, **options)
        comparing.finish()
    except Exception as error:  # a forward pass can fail in any way
        return Mismatch(first_line(error), stack[-1], comparing.reached)
    return None


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def shape(x: Tensor, keep: Mapping[int, Tensor]) -> list[int]:
    return [len(keep[d]) if d in keep else n for d, n in enumerate(x.shape)]


def _abstract(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        return torch.empty(shape(x, keep), dtype=x.dtype, device="meta")
    for dim, indices in keep.items():
        x = x.index_select(dim, indices.to(x.device))
    return abstract(x)


class _Comparing(Abstract):
    """Compares what the operators give with what they gave in the trace, less what is gone."""

    def __init__(self, operations: list[Operation], gone: np.ndarray) -> None:
        super().__init__()
        self._expected = [operation for operation in operations if operation.name in COMPARED]
        self._gone, self._next, self._count = gone, 0, 0

    @property
    def reached(self) -> tuple[int, int]:
        return self._next, self._count

    def run(self, name: str, func: Any, args: tuple, kwargs: dict, touched: bool) -> Any:
        out = func(*args, **kwargs)
        self._count += 1
        first = out[0] if isinstance(out, (list, tuple)) and out else out
        if touched and name in COMPARED and isinstance(first, Tensor):
            if self._next == len(self._expected) or self._expected[self._next].name != name:
                raise _Differs(f"{name} comes where it did not before")
            operation = self._expected[self._next]
            self._next += 1
            expected = shape_of(operation, self._gone)
            if operation.before is not None:
                x, dim, start = args[:3]
                start = slice(start, None).indices(x.shape[dim])[0]
                if start != (here := int((~self._gone[operation.before]).sum())):
                    raise _Differs(f"slice in {operation.module or 'the model'} starts at {start}, not {here}")
            if list(first.shape) != expected and first.numel():  # nothing is known of an empty part
                place = operation.module or "the model"
                raise _Differs(f"{name} in {place} gives {list(first.shape)}, not {expected}")
        return out

    def finish(self) -> None:
        if rest := self._expected[self._next :]:
            raise _Differs(f"{rest[0].name} does not come any more")


def shape_of(operation: Operation, gone: np.ndarray) -> list[int]:
    """What the operator gives without the labels in `gone`."""
    shape = list(operation.shape)
    for span in operation.spans:
        if (here := gone[span.labels]).any():
            for axis, dim in enumerate(span.dims):
                shape[dim] = remaining(here, axis)
    return shape


def remaining(gone: np.ndarray, axis: int) -> int:
    """How many slices along `axis` have something that stays."""
    return int((~gone).any(tuple(i for i in range(gone.ndim) if i != axis)).sum())


# --- attributes -------------------------------------------------------------------------------------------------------


class Resized:
    """A module's config: what is set here is its alone, all else stands in the one that it shares with others."""

    def __init__(self, shared: Any, key: str, value: int) -> None:
        vars(self).update({"shared": shared, key: value})

    def __getattr__(self, name: str) -> Any:
        if "shared" not in vars(self):  # a copy in the making
            raise AttributeError(name)
        key = getattr(self.shared, "attribute_map", {}).get(name, name)
        return vars(self)[key] if key in vars(self) else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def set_attributes_(model: nn.Module, attributes: Attributes) -> None:
    for name, values in attributes.items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            if attribute.startswith(CONFIG):
                module.config = Resized(module.config, attribute.removeprefix(CONFIG), value)
            else:
                setattr(module, attribute, value)


def written(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(attribute, value) of the whole numbers that a module has written down, alone and in tuples or lists, and of
    those in the config that it has, if it is not a model that is saved with it.
    """
    if not type(module).__module__.startswith("torch.nn") or isinstance(module, nn.MultiheadAttention):
        values = dict(vars(module))
        config = None if hasattr(module, "save_pretrained") else values.get("config")
        while hasattr(config, "__dict__"):
            values = {f"{CONFIG}{key}": value for key, value in vars(config).items() if type(value) is int} | values
            config = vars(config).get("shared")
        for key, value in values.items():
            several = type(value) in (tuple, list, torch.Size) and value and all(type(n) is int for n in value)
            if several or (type(value) is int and not key.endswith(NO_SIZES)):
                yield key, value


def attributes(model: nn.Module, keep: Keep, new: Callable[[str, str, Any], Any]) -> dict[str, dict[str, Any]]:
    """{module: {attribute: new value}} that agree with the entries that stay.

    Layers of torch.nn follow from the shapes of their parameters. What other modules have `written` becomes
    new(module, attribute, value).
    """
    result: dict[str, dict[str, Any]] = {}
    shapes, rows = {}, {}
    for name, x in tensors_of(model):
        shapes[id(x)], rows[id(x)] = shape(x, keep.get(name, {})), keep.get(name, {}).get(0)
    for name, module in model.named_modules():
        values = {key: new(name, key, value) for key, value in written(module)} | _layer(module, shapes, rows)
        values |= _norm(module, partial(new, name))
        if changed := {key: value for key, value in values.items() if attrgetter(key)(module) != value}:
            result[name] = changed
    return result


def _norm(module: nn.Module, new: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The attributes of a norm that has no parameters to tell them, by the sizes that it was called with."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(new("normalized_shape", n) for n in module.normalized_shape)}
    if isinstance(module, nn.GroupNorm) and module.weight is None:
        channels = new("num_channels", module.num_channels)
        groups = module.num_groups if module.num_groups == 1 else module.num_groups * channels // module.num_channels
        return {"num_channels": channels, "num_groups": groups}
    return {}


def _layer(module: nn.Module, shapes: Mapping[int, list[int]], rows: Mapping[int, Tensor | None]) -> dict[str, Any]:
    """The attributes of a layer of torch.nn (or transformers' Conv1D) by the shapes of its parameters.

    rows: which entries of their first dimension stay, None for all.
    """
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        last = "" if isinstance(module, nn.RNNCellBase) else "_l0"
        weight = module._parameters[f"weight_ih{last}"]
        (rows, into), hidden = shapes[id(weight)], shapes[id(module._parameters[f"weight_hh{last}"])][1]
        sizes = {"input_size": into, "hidden_size": module.hidden_size * rows // weight.shape[0]}
        return sizes | ({"proj_size": hidden} if getattr(module, "proj_size", 0) else {})
    weight = module._parameters.get("weight", module._parameters.get("weight_v"))  # of the older weight norm
    if parametrize.is_parametrized(module, "weight"):
        tensors = module.parametrizations["weight"]._parameters
        weight = tensors.get("original", tensors.get("original1"))
    if weight is None or isinstance(module, nn.MultiheadAttention):  # whose numbers its forward pass writes down
        return {}
    now = shapes[id(weight)]
    if isinstance(module, CONVOLUTIONS):
        groups = module.groups
        if (stays := rows[id(weight)]) is not None:  # groups of which something stays
            groups = len(torch.unique(stays // (weight.shape[0] // groups)))
        into, out = (now[0], now[1] * groups) if module.transposed else (now[1] * groups, now[0])
        return {"in_channels": into, "out_channels": out, "groups": groups}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups if module.num_groups == 1 else module.num_groups * now[0] // weight.shape[0]
        return {"num_channels": now[0], "num_groups": groups}
    if isinstance(module, nn.Linear):
        return {"out_features": now[0], "in_features": now[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": now[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": now[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": now[0]}
    return {"nx": now[0], "nf": now[1]} if {"nf", "nx"} <= vars(module).keys() else {}
