"""Find the lists of layers of a model, and the linear layers of torch and of transformers.

Two questions have two definitions of a list of layers:

`stacks`, `stack`, `layers_of`: the layers of a transformer, to be removed or replaced whole. Each item of the list has
an attention or a feed-forward network, hence two linear layers or more. A model may have several lists (an
encoder-decoder has two), and a list counts with any share of the weights.

`blocks_of`: the blocks with most of a model's weights, for algorithms that change a block and then run the next block
(`blocks.walk`). Blocks may have any architecture, also a single Linear or convolution each. A walk needs a single
list, and pays only if the list holds much of the model.

The definitions agree on transformers with a single list of layers. A list of single layers has blocks, but no layers of
a transformer.
"""

from torch import nn

from labkit.errors import InputError
from labkit.modules.weights import prunable


def stacks(model: nn.Module) -> list[str]:
    """Return the names of the lists of layers: outermost lists of modules with two linear layers or more each."""
    names: list[str] = []
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in names)
        if not is_inner and _is_list_of_layers(module):
            names.append(name)
    return names


def _is_list_of_layers(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    return len(module) > 0 and all(_has_two_linear_layers(layer) for layer in module)


def _has_two_linear_layers(layer: nn.Module) -> bool:
    return sum(map(is_linear, layer.modules())) >= 2


def stack(model: nn.Module) -> str:
    """Return the name of the list of layers of `model`; raise InputError unless a single list exists."""
    names = stacks(model)
    if len(names) == 1:
        return names[0]
    what = "no list of transformer layers"
    if names:
        what = f"{len(names)} lists of layers ({', '.join(names)})"
    raise InputError(f"{type(model).__name__} has {what}: layers can be removed from a model with exactly one.")


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (qualified name, layer) of each layer of a transformer, in order; raise InputError as `stack` does."""
    name = stack(model)
    layers = model.get_submodule(name)._modules
    return [(f"{name}.{key}", layer) for key, layer in layers.items()]


def is_linear(module: nn.Module | None) -> bool:
    """Return True if `module` is an nn.Linear or transformers' Conv1D."""
    if module is None:
        return False
    is_conv1d = {"nf", "nx"} <= vars(module).keys()  # by its attributes, as transformers may not be installed
    return isinstance(module, nn.Linear) or is_conv1d


def out_dim(module: nn.Module) -> int:
    """Return the output dimension of `module.weight`: 0 in nn.Linear, 1 in transformers' Conv1D."""
    return 0 if isinstance(module, nn.Linear) else 1


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks with most of the weights; an empty list if the model has no list of blocks, or several.

    A list of blocks is an nn.ModuleList of two or more modules, all different and of the same class, with more than a
    quarter of the model's prunable weights. Lists inside a list of blocks do not count.
    """
    lists: list[list[nn.Module]] = []
    inner: set[int] = set()  # ids of the modules inside the lists so far
    for module in model.modules():
        if id(module) in inner or not _is_list_of_blocks(module):
            continue
        if _prunable_entries(module) > _prunable_entries(model) / 4:
            lists.append(list(module))
            inner |= {id(part) for part in module.modules()}
    return lists[0] if len(lists) == 1 else []


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Return True if `module` is an nn.ModuleList of two modules or more, all different and of the same class."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    classes = {type(block) for block in module}
    different = {id(block) for block in module}
    return len(classes) == 1 and len(different) == len(module)


def _prunable_entries(module: nn.Module) -> int:
    weights = prunable(module).values()
    return sum(weight.parameter.numel() for weight in weights)
