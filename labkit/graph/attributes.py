"""Attributes of modules after a cut: layers of torch.nn follow parameters, numbers written down follow sizes.

A module may hold a width as a number (`self.heads = 12`), and use the number in a view. `new_sizes` gives the new value
of each size met by the pass, and `new_attributes` the attributes to be changed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.graph.passes import tensors_of
from labkit.graph.record import Record, remaining
from labkit.modules.weights import CONVOLUTIONS

Keep = Mapping[str, Mapping[int, Tensor]]  # {parameter or buffer: {dimension: indices that stay}}
Attributes = Mapping[str, Mapping[str, Any]]  # {module: {attribute: new value}}
Follows = Mapping[tuple[type, str], bool]  # {(class of a module, attribute): True if the number follows a size}

CONFIG = "config."  # before the name of an attribute of the module's config
ANY_CONVOLUTION = (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NO_SIZES = ("idx", "index", "id", "buckets")  # ends of names of numbers that can only happen to equal a size: layer_idx


def shape(x: Tensor, keep: Mapping[int, Tensor]) -> list[int]:
    """Return the shape of `x` after a cut that leaves `keep`, {dimension: remaining indices}."""
    sizes = list(x.shape)
    for dim, indices in keep.items():
        sizes[dim] = len(indices)
    return sizes


# --- numbers written down ---------------------------------------------------------------------------------------------


class Resized:
    """A module's config with a private number; all else stands in the config shared by several modules.

    shared: the shared config.
    key, value: the private number.
    """

    def __init__(self, shared: Any, key: str, value: int) -> None:
        vars(self).update({"shared": shared, key: value})

    def __getattr__(self, name: str) -> Any:
        if "shared" not in vars(self):  # a copy in the making
            raise AttributeError(name)
        key = getattr(self.shared, "attribute_map", {}).get(name, name)
        if key in vars(self):
            return vars(self)[key]
        return getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def set_attributes_(model: nn.Module, attributes: Attributes) -> None:
    """Set attributes of the modules of `model`; a name that begins with CONFIG is set in the module's config alone."""
    for name, values in attributes.items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            if attribute.startswith(CONFIG):
                module.config = Resized(module.config, attribute.removeprefix(CONFIG), value)
            else:
                setattr(module, attribute, value)


def written(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (attribute, value) of the whole numbers among a module's attributes.

    Values are numbers, and tuples or lists of numbers. Numbers of the module's config follow, with CONFIG before the
    name, unless it is saved with the module. A layer of torch.nn has no such numbers, except
    nn.MultiheadAttention.
    """
    if type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.MultiheadAttention):
        return
    values = dict(vars(module))
    config = None if hasattr(module, "save_pretrained") else values.get("config")
    while hasattr(config, "__dict__"):
        in_config = {f"{CONFIG}{key}": value for key, value in vars(config).items()}
        values = {key: value for key, value in in_config.items() if type(value) is int} | values
        config = vars(config).get("shared")
    for key, value in values.items():
        is_number = type(value) is int and not key.endswith(NO_SIZES)
        if is_number or _is_sequence_of_numbers(value):
            yield key, value


def _is_sequence_of_numbers(value: Any) -> bool:
    if type(value) not in (tuple, list, torch.Size) or not value:
        return False
    return all(type(number) is int for number in value)


class NewSize(NamedTuple):
    """The value of a size after a cut.

    certain: True if all equal sizes in the module get the same new value.
    """

    size: int
    certain: bool


def new_sizes(record: Record, gone: np.ndarray) -> dict[tuple[str, int], NewSize]:
    """Return {(module, size): new size} of the sizes in a module's forward pass, without sizes that stay.

    A size is left out if equal sizes get several new values.

    record: record of the traced call.
    gone: [labels], bool, True for removed labels.
    """
    outcomes: dict[tuple[str, int], set[int]] = defaultdict(set)
    for sized in record.sizes:
        shrinks = sized.labels is not None and gone[sized.labels].any()
        new = remaining(gone[sized.labels], sized.axis) if shrinks else sized.size
        outcomes[sized.module, sized.size].add(new)
    for axis in record.axes:  # as many experts as neurons, say
        if not gone[axis.labels].any():
            module, _, _ = axis.name.rpartition(".")
            outcomes[module, axis.size].add(axis.size)
    result = {}
    for (module, size), new_values in outcomes.items():
        changed = new_values - {size}
        if len(changed) == 1:
            (new,) = changed
            result[module, size] = NewSize(new, certain=changed == new_values)
    return result


class _Renumbering:
    """Gives the numbers of modules after a cut (`new_attributes`).

    A number equal to a size of the module's forward pass (a view's 768, 12 heads) becomes the new size if that size is
    certain (`NewSize`) and the number is no config's; entries of `follows` come first. Numbers forming a whole shape
    together become the new shape.
    """

    def __init__(self, model: nn.Module, record: Record, gone: np.ndarray, follows: Follows) -> None:
        self._record, self._gone, self._follows = record, gone, follows
        self._sizes = new_sizes(record, gone)
        self._modules = dict(model.named_modules())
        self._caller: dict[str, str] = {}
        for name in self._modules:  # a module that is not called serves its parent by other methods
            parent, _, _ = name.rpartition(".")
            self._caller[name] = name if name in record.called else self._caller[parent]

    def new_value(self, module: str, attribute: str, value: Any) -> Any:
        """Return the new value of a number, or of a tuple or list of numbers, of the module."""
        if type(value) is int:
            return self._new_number(module, attribute, value)
        operation = self._record.made.get((self._caller[module], tuple(value)))
        if operation is not None:
            return type(value)(operation.shape_without(self._gone))
        return type(value)([self._new_number(module, attribute, number) for number in value])

    def _new_number(self, module: str, attribute: str, number: int) -> int:
        caller, kind = self._caller[module], type(self._modules[module])
        new = self._sizes.get((caller, number), NewSize(number, certain=True))
        by_default = new.certain and not attribute.startswith(CONFIG)
        follows = self._follows.get((kind, attribute), by_default)
        return new.size if follows else number


# --- attributes -------------------------------------------------------------------------------------------------------


def new_attributes(
    model: nn.Module, record: Record, gone: np.ndarray, keep: Keep, follows: Follows
) -> dict[str, dict[str, Any]]:
    """Return {module: {attribute: new value}} of the attributes changed by a cut.

    record: record of a traced call of `model`.
    gone: [labels], bool, True for removed labels.
    keep: the remaining entries of parameters and buffers.
    follows: overrides the rule by which numbers follow sizes.
    """
    renumbering = _Renumbering(model, record, gone, follows)
    cuts = {}
    for name, x in tensors_of(model):
        dims = keep.get(name, {})
        cuts[id(x)] = _CutTensor(shape(x, dims), dims.get(0))
    result: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        values = {}
        for attribute, value in written(module):
            values[attribute] = renumbering.new_value(name, attribute, value)
        values |= _layer_attributes(module, cuts)
        values |= _norm_attributes(module, name, renumbering)
        for attribute, value in values.items():
            get = attrgetter(attribute)  # of a config's number too
            if get(module) != value:
                result.setdefault(name, {})[attribute] = value
    return result


def _norm_attributes(module: nn.Module, name: str, renumbering: _Renumbering) -> dict[str, Any]:
    """Return the attributes of a norm that may have no parameters, by the sizes in the traced call."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        new_shape = [renumbering.new_value(name, "normalized_shape", size) for size in module.normalized_shape]
        return {"normalized_shape": tuple(new_shape)}
    if isinstance(module, nn.GroupNorm) and module.weight is None:
        channels = renumbering.new_value(name, "num_channels", module.num_channels)
        return _group_norm_attributes(module, channels, module.num_channels)
    return {}


def _group_norm_attributes(module: nn.GroupNorm, channels: int, channels_before: int) -> dict[str, int]:
    """Return the attributes of a group norm for fewer channels: whole groups go, but a single group shrinks."""
    groups = module.num_groups
    if groups > 1:
        groups = groups * channels // channels_before
    return {"num_channels": channels, "num_groups": groups}


class _CutTensor(NamedTuple):
    """A parameter or buffer after the cut: the shape, and the remaining rows, None for all."""

    shape: list[int]
    rows: Tensor | None


def _layer_attributes(module: nn.Module, cuts: Mapping[int, _CutTensor]) -> dict[str, Any]:
    """Return the attributes of a layer of torch.nn, or transformers' Conv1D, by the shapes of its parameters.

    cuts: {id of a parameter: the parameter after the cut}.
    """
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent_attributes(module, cuts)
    weight = _weight_of(module)
    if weight is None or isinstance(module, nn.MultiheadAttention):  # its forward pass has the numbers written down
        return {}
    new_shape, rows = cuts[id(weight)]
    if isinstance(module, ANY_CONVOLUTION):
        return _convolution_attributes(module, weight, new_shape, rows)
    if isinstance(module, nn.GroupNorm):
        return _group_norm_attributes(module, new_shape[0], weight.shape[0])
    if isinstance(module, nn.Linear):
        return {"out_features": new_shape[0], "in_features": new_shape[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": new_shape[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": new_shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": new_shape[0]}
    is_conv1d = {"nf", "nx"} <= vars(module).keys()
    return {"nx": new_shape[0], "nf": new_shape[1]} if is_conv1d else {}


def _weight_of(module: nn.Module) -> Tensor | None:
    """Return the module's weight, or the parameter from which it is computed."""
    if parametrize.is_parametrized(module, "weight"):
        tensors = module.parametrizations["weight"]._parameters
        return tensors.get("original", tensors.get("original1"))
    return module._parameters.get("weight", module._parameters.get("weight_v"))  # weight_v: the older weight norm


def _recurrent_attributes(module: nn.RNNBase | nn.RNNCellBase, cuts: Mapping[int, _CutTensor]) -> dict[str, int]:
    suffix = "" if isinstance(module, nn.RNNCellBase) else "_l0"
    input_weight = module._parameters[f"weight_ih{suffix}"]
    hidden_weight = module._parameters[f"weight_hh{suffix}"]
    rows, input_size = cuts[id(input_weight)].shape
    hidden_size = module.hidden_size * rows // input_weight.shape[0]
    sizes = {"input_size": input_size, "hidden_size": hidden_size}
    if getattr(module, "proj_size", 0):
        sizes["proj_size"] = cuts[id(hidden_weight)].shape[1]
    return sizes


def _convolution_attributes(
    module: nn.Module, weight: Tensor, new_shape: list[int], rows: Tensor | None
) -> dict[str, int]:
    groups = module.groups
    if rows is not None:
        rows_per_group = weight.shape[0] // groups
        groups = len(torch.unique(rows // rows_per_group))  # groups of which something stays
    if module.transposed:
        in_channels, out_channels = new_shape[0], new_shape[1] * groups
    else:
        in_channels, out_channels = new_shape[1] * groups, new_shape[0]
    return {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
