"""The lists of layers of a model, and its linear layers whatever library they are from."""

from torch import nn

from labkit.errors import InputError
from labkit.modules.weights import prunable


def stacks(model: nn.Module) -> list[str]:
    """The names of the lists of layers: outermost lists of modules of which each holds two linear ones or more."""
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or name.startswith(tuple(f"{n}." for n in names)):
            continue
        if len(module) and all(sum(map(is_linear, item.modules())) > 1 for item in module):
            names.append(name)
    return names


def stack(model: nn.Module) -> str:
    """The name of the one list of layers of `model`; InputError if it has none, or two as an encoder-decoder."""
    names = stacks(model)
    if len(names) == 1:
        return names[0]
    what = f"{len(names)} lists of layers ({', '.join(names)})" if names else "no list of transformer layers"
    raise InputError(f"{type(model).__name__} has {what}: layers can be removed from a model with exactly one.")


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is nn.Linear or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or (module is not None and {"nf", "nx"} <= vars(module).keys())


def out_dim(module: nn.Module) -> int:
    """The dimension of `module.weight` that runs over its outputs: 0 in nn.Linear, 1 in transformers' Conv1D."""
    return 0 if isinstance(module, nn.Linear) else 1


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(qualified name, layer) of a transformer, in order; InputError if it has no or several lists of layers."""
    name = stack(model)
    return [(f"{name}.{key}", layer) for key, layer in model.get_submodule(name)._modules.items()]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a stack; empty where there is none, or two as in an encoder-decoder.

    A stack of blocks is the one nn.ModuleList of modules of one class that holds more than a quarter of the prunable
    weights. Embeddings and the head of a language model are outside it.
    """
    stacks, inner = [], set()
    for module in model.modules():
        if id(module) in inner or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        alike = len({type(block) for block in module}) == 1 and len({id(block) for block in module}) == len(module)
        if alike and 4 * _size(module) > _size(model):
            stacks.append(list(module))
            inner |= {id(part) for part in module.modules()}
    return stacks[0] if len(stacks) == 1 else []


def _size(module: nn.Module) -> int:
    return sum(weight.parameter.numel() for weight in prunable(module).values())
