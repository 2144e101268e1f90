"""The prunable weights of a model, each with its place, and parts of a model by name."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.arguments import check_module
from labkit.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


EXPERTS = ("gate_up_proj", "up_proj", "down_proj")  # the matrices of a mixture's experts, in transformers


@dataclass(frozen=True)
class Weight:
    """One prunable parameter and where it lives. Its rows are output units: [out, in / groups * kernel positions].

    The experts of a mixture are a stack of matrices [experts, out, in], whose rows stand below one another here.
    """

    name: str
    module: nn.Module
    attribute: str
    transposed: bool  # transformers' Conv1D keeps [in, out], and gpt-oss its experts

    @property
    def experts(self) -> int | None:
        """How many matrices are stacked; None where it is no stack."""
        return len(self.parameter) if is_mixture(self.module) else None

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.attribute]

    def as_rows(self, tensor: Tensor) -> Tensor:
        tensor = tensor.mT if self.transposed else tensor
        return tensor.flatten(1) if self.experts is None else tensor.flatten(0, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The values of the rows, in any contiguous shape, in the parameter's."""
        return rows.view(self.parameter.mT.shape).mT if self.transposed else rows.view(self.parameter.shape)

    def spread(self, statistic: Tensor) -> Tensor:
        """A statistic of the inputs, [groups, in / groups * kernel], repeated for every output unit of its group.

        The groups are those of a convolution, or the experts.
        """
        out = self.as_rows(self.parameter).shape[0]
        return self.from_rows(statistic.repeat_interleave(out // len(statistic), 0))


def prunable(model: nn.Module) -> dict[str, Weight]:
    """The weights of Linear, Conv1d to Conv3d, nn.MultiheadAttention's projections, transformers' Conv1D and experts.

    Keyed by the name in `state_dict()`; a weight that modules share is there once, under its first prunable name.
    Not there: biases, norms, embeddings (unless a Linear shares them), transposed convolutions, recurrent cells,
    routers of mixtures, and other weights kept outside such modules.
    """
    check_module(model)
    weights: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute in _attributes(module):
            parameter = module._parameters.get(attribute)
            if parameter is None or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{attribute}" if path else attribute
            weights[name] = Weight(name, module, attribute, _is_transposed(module))
    return weights


def computed(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Prunable weights that are no parameters themselves: (name, what computes it, value in the forward pass)."""
    check_module(model)
    for path, module in model.named_modules():
        for attribute in _attributes(module):
            name = f"{path}.{attribute}" if path else attribute
            original, mask = module._parameters.get(f"{attribute}_orig"), module._buffers.get(f"{attribute}_mask")
            if original is not None and mask is not None:
                yield name, "masks of torch.nn.utils.prune", (original * mask).detach()
            elif parametrize.is_parametrized(module, attribute) or isinstance(vars(module).get(attribute), Tensor):
                yield name, "a parametrization", getattr(module, attribute).detach()


def named_parts(model: nn.Module, parts: str | nn.Module | Iterable[str | nn.Module], argument: str) -> list[str]:
    """`parts`, one or several, as names; an InputError about `argument` if one is no module or parameter of `model`."""
    check_module(model)
    several = isinstance(parts, Iterable) and not isinstance(parts, (str, nn.Module))
    parts = list(parts) if several else [parts]
    name_of = {module: name for name, module in model.named_modules()}
    parts = [name_of.get(part, type(part).__name__) if isinstance(part, nn.Module) else part for part in parts]
    existing = {name for name, _ in model.named_modules(remove_duplicate=False)}
    existing |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for part in parts:
        if part not in existing or not part:
            raise InputError(
                f"{argument} names {part!r}, but the model has no such module or weight: see named_modules()."
            )
    return parts


def inside(name: str, part: str) -> bool:
    """Whether the parameter `name` is `part` or lies in the module `part`."""
    return name == part or name.startswith(f"{part}.")


def is_mixture(module: nn.Module) -> bool:
    """Whether it holds the experts of a mixture as transformers' `use_experts_implementation` has them."""
    return {"is_transposed", "has_gate"} <= vars(module).keys()


def _attributes(module: nn.Module) -> tuple[str, ...]:
    """Which of a module's own parameters are prunable weights: the matrices and kernels of products, nothing else."""
    if is_mixture(module):
        return EXPERTS
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)) or _is_transposed(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ()


def _is_transposed(module: nn.Module) -> bool:
    if is_mixture(module):
        return module.is_transposed
    loaded = sys.modules.get("transformers.pytorch_utils")  # not imported for this: whoever has such a layer has it
    return loaded is not None and isinstance(module, loaded.Conv1D)
