"""Replace a module of a model."""

from torch import nn


def replace_(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` into `model` wherever the module `name` is registered, and return `model`.

    name: name of the module in `model.named_modules()`; for "", the model, `new` is returned.
    new: may contain the replaced module. The training flags of `new` stay unchanged.
    """
    old = model.get_submodule(name)
    if old is model:
        return new
    for parent in list(model.modules()):  # a list, since the modules inside `new` are not to be visited
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return model
