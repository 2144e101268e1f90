"""Watch the modules of a model in a forward pass, or change the inputs and outputs: the manager of torch's hooks.

`forward_hooks` registers a hook on several modules, and removes it at the end of the `with` block, errors or not.
`watching` and `reading` are built on `forward_hooks`, as are the walk over blocks (`blocks`) and the sums over a
layer's inputs (`hessians`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from labkit.errors import InputError


@contextmanager
def forward_hooks(modules: Sequence[nn.Module], hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """Call `hook` at every forward pass of the modules, as long as the `with` block runs.

    modules: the same module may be listed several times.
    hook: called after a forward pass as hook(number, args, kwargs, output), with the module's index in `modules` as
        the number. A result other than None replaces the output.
    before: call hook(number, args, kwargs) ahead of the forward pass instead. A result (args, kwargs) replaces the
        arguments.
    """

    def call(number: int, _: nn.Module, *values: Any) -> Any:
        return hook(number, *values)

    with ExitStack() as handles:
        for number, module in enumerate(modules):
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handle = register(partial(call, number), with_kwargs=True)
            handles.callback(handle.remove)
        yield


@contextmanager
def watching(model: nn.Module, names: Iterable[str], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call look(name, input, result) after every forward pass of the named modules, as long as the `with` block runs.

    names: names of modules called with a single tensor, from `model.named_modules()`.
    look: gets the module's name, the input tensor and the result.

    Raises InputError for a name without a module.
    """
    names = list(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise InputError(
                f"{type(model).__name__} has no module {name!r}: take a name from model.named_modules(), such as "
                f"{', '.join(map(repr, list(modules)[1:4]))}."
            )

    def hook(number: int, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        values = (*args, *kwargs.values())
        look(names[number], values[0], result)

    with forward_hooks([modules[name] for name in names], hook):
        yield


@contextmanager
def reading(model: nn.Module, names: Sequence[str], act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call act(number, input) before every forward pass of the named modules, as long as the `with` block runs.

    names: names of modules with a tensor as the first positional argument.
    act: gets the module's index in `names` and the input tensor. A tensor as the result replaces the input.
    """

    def hook(number: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        replacement = act(number, args[0])
        if replacement is None:
            return None
        return (replacement, *args[1:]), kwargs

    with forward_hooks([model.get_submodule(name) for name in names], hook, before=True):
        yield


def first_tensor(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among the arguments of a call: the hidden states [B, T, width] read by a block."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None
