"""List the prunable weights of a model, each with the owning module, and look up parts of a model by name."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.arguments import check_module
from labkit.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention
EXPERTS = ("gate_up_proj", "up_proj", "down_proj")  # the matrices of a mixture's experts, in transformers


@dataclass(frozen=True)
class Weight:
    """A prunable parameter and the owning module.

    name: the key in `state_dict()`.
    module, attribute: the parameter is `module.<attribute>`.
    transposed: the parameter is stored [in, out], as in transformers' Conv1D and gpt-oss's experts.

    Algorithms work on rows, [out, in / groups * kernel positions]: a row belongs to an output unit. The experts of a
    mixture are a stack of matrices [experts, out, in]; the rows of all experts are placed below one another.
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool

    @property
    def experts(self) -> int | None:
        """The number of stacked matrices; None for a single matrix or kernel."""
        return len(self.parameter) if is_mixture(self.module) else None

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.attribute]

    def as_rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as rows, [out, in / groups * kernel positions]."""
        matrices = tensor.mT if self.transposed else tensor
        return matrices.flatten(1) if self.experts is None else matrices.flatten(0, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return the values of `rows`, of any contiguous shape, in the parameter's shape: the inverse of `as_rows`."""
        if self.transposed:
            return rows.view(self.parameter.mT.shape).mT
        return rows.view(self.parameter.shape)

    def spread(self, statistic: Tensor) -> Tensor:
        """Repeat a statistic of the inputs for every output unit, and return it in the parameter's shape.

        statistic: [groups, in / groups * kernel], of the groups of a convolution, or of the experts.
        """
        outputs = self.as_rows(self.parameter).shape[0]
        units_per_group = outputs // len(statistic)
        return self.from_rows(statistic.repeat_interleave(units_per_group, 0))


def prunable(model: nn.Module) -> dict[str, Weight]:
    """Return the prunable weights of a model: {name in `state_dict()`: weight}.

    Prunable are the weights of Linear and Conv1d to Conv3d, the projections of nn.MultiheadAttention, transformers'
    Conv1D, and the experts of a mixture. Modules may share a weight, which is listed once, by its first prunable name.

    Not prunable: biases, norms, embeddings (unless a Linear shares the weight), transposed convolutions, recurrent
    cells, routers of mixtures, and weights in modules of any other class.
    """
    check_module(model)
    weights: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute in _prunable_attributes(module):
            parameter = module._parameters.get(attribute)
            if parameter is None or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = qualified(path, attribute)
            weights[name] = Weight(name, module, attribute, _is_transposed(module))
    return weights


def computed(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the prunable weights that are computed from other parameters: (name, how, value in the forward pass).

    how: "masks of torch.nn.utils.prune" or "a parametrization".
    """
    check_module(model)
    for path, module in model.named_modules():
        for attribute in _prunable_attributes(module):
            name = qualified(path, attribute)
            original = module._parameters.get(f"{attribute}_orig")
            mask = module._buffers.get(f"{attribute}_mask")
            is_plain_tensor = isinstance(vars(module).get(attribute), Tensor)
            if original is not None and mask is not None:
                yield name, "masks of torch.nn.utils.prune", (original * mask).detach()
            elif parametrize.is_parametrized(module, attribute) or is_plain_tensor:
                yield name, "a parametrization", getattr(module, attribute).detach()


def named_parts(model: nn.Module, parts: str | nn.Module | Iterable[str | nn.Module], argument: str) -> list[str]:
    """Return the names of parts of a model that a caller chose by name or as modules.

    parts: a module, the name of a module or parameter, or several of these.
    argument: the caller's name for `parts`, for the error.

    Raises InputError if a part is no module or parameter of `model`, or is the whole model.
    """
    check_module(model)
    is_single = isinstance(parts, (str, nn.Module)) or not isinstance(parts, Iterable)
    parts = [parts] if is_single else list(parts)
    name_of = {module: name for name, module in model.named_modules()}
    names = []
    for part in parts:
        is_module = isinstance(part, nn.Module)
        names.append(name_of.get(part, type(part).__name__) if is_module else part)
    existing = {name for name, _ in model.named_modules(remove_duplicate=False)}
    existing |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in names:
        if name not in existing or not name:
            raise InputError(
                f"{argument} names {name!r}, but the model has no such module or weight: see named_modules()."
            )
    return names


def inside(name: str, part: str) -> bool:
    """Return True if the module or parameter `name` is `part` or lies inside it; the part "" is the whole model."""
    return not part or name == part or name.startswith(f"{part}.")


def qualified(module_name: str, attribute: str) -> str:
    """Return the name of a module's attribute in the model: "layer.weight", or "weight" if the module is the model.

    module_name: name of the module in `named_modules()`, "" for the model.
    attribute: name of a parameter, a buffer or a submodule of the module.
    """
    return f"{module_name}.{attribute}" if module_name else attribute


def is_mixture(module: nn.Module) -> bool:
    """Return True if `module` holds the stacked experts of a mixture, as transformers' `use_experts_implementation`."""
    return {"is_transposed", "has_gate"} <= vars(module).keys()


def _prunable_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that are matrices or kernels of products."""
    if is_mixture(module):
        return EXPERTS
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)) or _is_transposed(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
    return ()


def _is_transposed(module: nn.Module) -> bool:
    """Return True if the module stores [in, out]: transformers' Conv1D, and experts that say so."""
    if is_mixture(module):
        return module.is_transposed
    library = sys.modules.get("transformers.pytorch_utils")  # not imported for this: whoever has a Conv1D has it
    return library is not None and isinstance(module, library.Conv1D)
