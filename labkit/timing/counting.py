"""Count the work of a call, floating-point operations and bytes, by watching its operators.

FLOPs are those of torch's FlopCounterMode, with further formulas from `operators.py`. Bytes are the least that any
execution moves (`traffic.py`). Work is not time: the kernel that runs, the contents of a cache and the fusions of a
compiler play no part.

>>> import torch
>>> from labkit.counting import count
>>> linear, x = torch.nn.Linear(256, 128), torch.ones(8, 256)
>>> work = count(linear, x)
>>> work.flops == 2 * 8 * 256 * 128  # a multiply-add is 2
True
>>> work.bytes == 4 * (256 * 128 + 128 + 8 * 256 + 8 * 128)  # weight, bias, input and output, once each
True
>>> print(work)
0.0005243 GFLOP, 0.1439 MB, 3.64 FLOP/byte
"""

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from labkit.errors import InputError
from labkit.modules.batches import placed
from labkit.modules.evaluating import evaluating
from labkit.modules.undisturbed import undisturbed
from labkit.timing.operators import FORMULAS
from labkit.timing.traffic import Traffic, distinct_bytes, nbytes, pieces
from labkit.timing.work import Work

NOT_SEARCHED = (str, bytes, int, float, type, nn.Module)  # values without tensors of the call


def count(module_or_fn: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Work:
    """Count FLOPs and least bytes of `module_or_fn(*inputs, **kwargs)` by running the call once.

    The call runs without gradients, a module in eval mode, on any device including `meta`. Training flags, torch's
    random state and a KV cache among the inputs are restored. Compiled code runs eagerly, and the fused fast path of
    nn.MultiheadAttention runs in steps, so that every operator is seen.

    Counts are dense: masks, causality and zeros in a dense tensor discount nothing; a sparse tensor counts its stored
    entries. Rows looked up count as often as they occur, up to the size of their table. A growing cache counts as read
    once and written by its growth.

    module_or_fn: a module or a function.
    inputs, kwargs: arguments of the call; a module's are placed on its device.
    Raises InputError for an object that cannot be called, for nested tensors, and for a tuple or dict of inputs in
    place of separate inputs. Other errors of the call pass through.
    """
    if not callable(module_or_fn):
        raise InputError(
            f"count needs a module or a function, not a {type(module_or_fn).__name__}: pass what is to be run."
        )
    fn = getattr(module_or_fn, "_orig_mod", module_or_fn)  # the module inside torch.compile's wrapper
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if isinstance(fn, nn.Module):
        inputs, kwargs = placed(fn, (inputs, kwargs))
    states = _Inventory((inputs, kwargs)).of_objects
    if states:
        inputs, kwargs = _with_cache_objects_copied(inputs, kwargs, states)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    traffic = Traffic(with_formula={str(packet) for packet in counter.flop_registry})
    with _undisturbed(owner), traffic, counter:
        result = _run(fn, inputs, kwargs)

    remaining = _Inventory((result, inputs, kwargs))
    results = [piece for piece in pieces(remaining.in_containers) if piece.storage in traffic.made]
    growth = max(0, nbytes(remaining.of_objects) - nbytes(states))
    moved = distinct_bytes(traffic.reads) + distinct_bytes(traffic.writes) + distinct_bytes(results) + growth
    flops, by_module = _flops(counter, strip_class=fn is owner)
    return Work(flops, moved, by_module, dict(traffic.uncounted))


def _run(fn: Callable[..., Any], inputs: tuple, kwargs: Mapping[str, Any]) -> Any:
    try:
        return fn(*inputs, **kwargs)
    except (AttributeError, TypeError) as error:
        are_packed = len(inputs) == 1 and isinstance(inputs[0], tuple | list | Mapping)
        if not are_packed:
            raise
        star = "**" if isinstance(inputs[0], Mapping) else "*"
        raise InputError(
            f"count takes inputs one by one, as the call does, not in a {type(inputs[0]).__name__}: write "
            f"count(model, {star}inputs)."
        ) from error


@contextlib.contextmanager
def _undisturbed(owner: object) -> Iterator[None]:
    """Run a call without gradients, fused modules and compilation, a module in eval mode; restore all states."""
    model = owner if isinstance(owner, nn.Module) else nn.Identity()
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import would cost a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model))
        stack.enter_context(undisturbed())
        yield


def _flops(counter: FlopCounterMode, strip_class: bool) -> tuple[int, dict[str, int]]:
    """Return the FLOPs of a call in total and by module; `strip_class` makes "Net.layer1.0" "layer1.0"."""
    by_module = {}
    for name, by_operator in counter.get_flop_counts().items():
        by_module[name] = sum(by_operator.values())
    total = by_module.pop("Global", 0)
    if strip_class:
        by_module = {name.partition(".")[2]: flops for name, flops in by_module.items()}
    return total, by_module


def _with_cache_objects_copied(inputs: tuple, kwargs: dict[str, Any], states: list[Tensor]) -> tuple[tuple, dict]:
    """Copy the arguments of a call, because it changes cache objects; copies share all tensors and modules."""
    shared = {}
    for leaf in (*tree_leaves((inputs, kwargs)), *states):
        if isinstance(leaf, (Tensor, nn.Module)):
            shared[id(leaf)] = leaf
    return copy.deepcopy((inputs, kwargs), shared)


class _Inventory:
    """List the tensors in a nested value.

    in_containers: tensors in dicts, lists, tuples, sets and dataclasses.
    of_objects: tensors inside other objects, such as a KV cache: the state of the objects.
    """

    def __init__(self, value: Any) -> None:
        self.in_containers: list[Tensor] = []
        self.of_objects: list[Tensor] = []
        self._seen: set[int] = set()
        self._add(value, is_state=False)

    def _add(self, value: Any, is_state: bool) -> None:
        if isinstance(value, NOT_SEARCHED) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            tensors = self.of_objects if is_state else self.in_containers
            tensors.append(value)
            return
        if isinstance(value, Mapping):
            items = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = list(value)
        else:
            items = list(getattr(value, "__dict__", {}).values())
            is_state = is_state or not dataclasses.is_dataclass(value)
        for item in items:
            self._add(item, is_state)
