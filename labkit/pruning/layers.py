"""The layers of a running transformer: seen, passed over, or given as they were in an earlier pass.

A forward pass that differs from the last one only from some layer on need not compute what comes before it, which
halves leave-one-out measurements. Nothing is removed here; that is `depth`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from labkit.pruning import anatomy


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(qualified name, layer), in order; InputError if the model has no or several lists of layers."""
    name = anatomy.stack(model)
    return [(f"{name}.{key}", layer) for key, layer in model.get_submodule(name)._modules.items()]


def hidden(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer that is called so reads: [B, T, width]"""
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def skipping(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these layers pass their input on."""

    def after(module, args, kwargs, output):
        passed = hidden(args, kwargs)
        return passed if isinstance(output, Tensor) else (passed, *output[1:])

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def remembering(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Inside, what each layer gives is put into the list, for `resuming`."""
    outputs: list[Any] = []
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda _, __, output: outputs.append(output)).remove)
        yield outputs


@contextlib.contextmanager
def resuming(layers: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Inside, the first len(outputs) layers give these outputs and compute nothing."""
    before = [(layer, vars(layer).get("forward")) for layer, _ in zip(layers, outputs, strict=False)]
    try:
        for (layer, _), output in zip(before, outputs, strict=True):
            layer.forward = lambda *args, output=output, **kwargs: output
        yield
    finally:
        for layer, own in before:
            del layer.forward
            if own is not None:
                layer.forward = own
