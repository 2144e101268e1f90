"""Running a model without computing: floating-point tensors on the meta device, integers and booleans for real.

Shapes, positions and masks are integers, and many forward passes look at them; they are few and cheap, so they keep
their values. What a pass decides by the values of activations cannot be followed, and is an error.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from labkit.errors import InputError
from labkit.pruning import shortcuts

# Their result depends on values, which a tensor on the meta device does not have.
DATA_DEPENDENT = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave"}
DATA_DEPENDENT |= {"_unique2", "unique_dim", "unique_consecutive"}
MASKS = (torch.bool, torch.uint8)  # as an index


def to_meta(value: Any) -> Any:
    """`value` with its tensors abstract: nothing is copied but integers, to the CPU."""
    return tree_map_only(Tensor, _abstract, value)


def _abstract(x: Tensor) -> Tensor:
    if x.device.type == "meta":
        return x
    if x.is_floating_point() or x.is_complex():
        return torch.empty_like(x, device="meta", requires_grad=False)
    return x.detach().to("cpu", copy=True)


def _on_meta(x: Tensor) -> Tensor:
    return x if x.device.type == "meta" else torch.empty_like(x, device="meta")


@functools.cache
def name_of(func: Any) -> str:
    """An ATen operator's name without namespace and overload, and the one of an in-place form as of the other."""
    name = func._schema.name.removeprefix("aten::")
    return name if name.startswith("__") else name.rstrip("_")


class Abstract(TorchDispatchMode):
    """Inside, an operator with an abstract operand gives an abstract result, and one with real operands a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at: set[str] = set()  # where integer values decided something

    def where(self) -> str:
        return "the model"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = list(_tensors(args, kwargs))
        abstract = any(leaf.device.type == "meta" for leaf in leaves)
        name = name_of(func)
        masks = [x for x in args[1] if x is not None and x.dtype in MASKS] if name in ("index", "index_put") else []
        known = all(mask.device.type != "meta" for mask in masks)
        if name in DATA_DEPENDENT or (name == "index" and not known):
            if abstract:
                raise InputError(
                    f"The forward pass depends on the values of its activations ({name} in {self.where()}), so that "
                    "what hangs together may change from input to input: prune a part of the model that does not."
                )
            self.looked_at.add(self.where())
        if masks and known and abstract:
            args = (args[0], _numbered(args[1]), *args[2:])
            leaves = list(_tensors(args, kwargs))
        if abstract:
            if not all(leaf.device.type == "meta" for leaf in leaves):
                args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        elif torch.device(kwargs.get("device") or "cpu").type == "meta" and _exact(name, args, kwargs, leaves):
            kwargs["device"] = torch.device("cpu")
        try:
            return self.run(name, func, args, kwargs, abstract)
        except NotImplementedError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise InputError(
                f"The operator {name} in {self.where()} cannot run without data ({reason}): prune a part of the model "
                "that does without it."
            ) from error

    def run(self, name: str, func: Any, args: tuple, kwargs: dict, abstract: bool) -> Any:
        return evaluate(name, func, args, kwargs)


def evaluate(name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """func(*args, **kwargs), by hand where there is a shortcut."""
    result = shortcuts.result(name, args, kwargs, in_place=func._schema.name.endswith("_"))
    return func(*args, **kwargs) if result is None else result


def _tensors(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Operands of an ATen operator, which nests them in lists at most."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, Tensor))


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The indices of an `index` with masks, whose values are known, as the numbers of the entries that they pick."""
    found: list[Tensor | None] = []
    for x in indices:
        found += x.nonzero(as_tuple=True) if x is not None and x.dtype in MASKS else [x]
    return found


def _exact(name: str, args: tuple, kwargs: dict, leaves: list[Tensor]) -> bool:
    """Whether an operator that is asked to make something on the meta device makes integers or booleans."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point and not dtype.is_complex
    if leaves:
        return not leaves[0].is_floating_point()
    if name == "arange":
        return all(isinstance(arg, int) for arg in args)
    return name in ("full", "scalar_tensor") and isinstance(args[-1], int)  # True and False are ints


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, and no fused attention modules: their steps are to be seen."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def lift(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, abstract, by every name; what is the same memory is one tensor."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    lifted: dict[str, Tensor] = {}
    seen: dict[Any, Tensor] = {}
    for name, x in named:
        if nn.parameter.is_lazy(x):
            raise InputError("The model has lazy layers without a shape: run it once on its inputs first.")
        same = id(x) if x.device.type == "meta" else (x.data_ptr() or id(x), x.shape, x.stride(), x.dtype)
        if same not in seen:
            seen[same] = torch.empty_like(x, device="meta") if x.device.type == "meta" else _abstract(x)
        lifted[name] = seen[same]
    return lifted
