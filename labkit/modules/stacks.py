"""Find the lists of layers of a model, and its linear layers whatever library they come from.

There are two definitions of a stack, for two questions:

`stacks`, `stack`, `layers_of`: the layers of a transformer, which can be removed or replaced whole. Each item of the
list holds an attention or a feed-forward network, hence two linear layers or more. A model may have several such lists
(an encoder-decoder has two), and a list of any share of the weights counts.

`blocks_of`: the blocks that hold most of a model's weights, for algorithms that change a block and then run the next
(`blocks.walk`). The blocks may be of any architecture: a single Linear or convolution each will do. Such a walk needs
a single list, and is worth the while only if the list holds much of the model.

The two agree on every transformer with one list of layers; `blocks_of` alone accepts a list of single layers.
"""

from torch import nn

from labkit.errors import InputError
from labkit.modules.weights import prunable


def stacks(model: nn.Module) -> list[str]:
    """Return the names of the lists of layers: outermost lists of modules that hold two linear layers or more each."""
    names: list[str] = []
    for name, module in model.named_modules():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        is_inner = any(name.startswith(f"{outer}.") for outer in names)
        if is_list and not is_inner and len(module) and all(map(_has_two_linear_layers, module)):
            names.append(name)
    return names


def _has_two_linear_layers(layer: nn.Module) -> bool:
    return sum(map(is_linear, layer.modules())) >= 2


def stack(model: nn.Module) -> str:
    """Return the name of the list of layers of `model`; raise InputError if there is none, or more than one."""
    names = stacks(model)
    if len(names) == 1:
        return names[0]
    what = f"{len(names)} lists of layers ({', '.join(names)})" if names else "no list of transformer layers"
    raise InputError(f"{type(model).__name__} has {what}: layers can be removed from a model with exactly one.")


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (qualified name, layer) of each layer of a transformer, in order; raise InputError as `stack` does."""
    name = stack(model)
    return [(f"{name}.{key}", layer) for key, layer in model.get_submodule(name)._modules.items()]


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether `module` is an nn.Linear or transformers' Conv1D."""
    if module is None:
        return False
    is_conv1d = {"nf", "nx"} <= vars(module).keys()  # by its attributes, as transformers may not be installed
    return isinstance(module, nn.Linear) or is_conv1d


def out_dim(module: nn.Module) -> int:
    """Return the dimension of `module.weight` that runs over outputs: 0 in nn.Linear, 1 in transformers' Conv1D."""
    return 0 if isinstance(module, nn.Linear) else 1


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that hold most of the weights; an empty list if there is no such list, or more than one.

    A list of blocks is an nn.ModuleList of two or more modules, all different and of the same class, with more than a
    quarter of the model's prunable weights. Lists inside such a list do not count.
    """
    lists: list[list[nn.Module]] = []
    inner: set[int] = set()  # ids of the modules inside the lists so far
    for module in model.modules():
        if id(module) in inner or not isinstance(module, nn.ModuleList):
            continue
        if _are_blocks(module) and 4 * _prunable_entries(module) > _prunable_entries(model):
            lists.append(list(module))
            inner |= {id(part) for part in module.modules()}
    return lists[0] if len(lists) == 1 else []


def _are_blocks(modules: nn.ModuleList) -> bool:
    """Tell whether there are two modules or more, all different and all of the same class."""
    classes = {type(module) for module in modules}
    different = {id(module) for module in modules}
    return len(modules) >= 2 and len(classes) == 1 and len(different) == len(modules)


def _prunable_entries(module: nn.Module) -> int:
    return sum(weight.parameter.numel() for weight in prunable(module).values())
