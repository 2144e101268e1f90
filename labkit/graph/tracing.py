"""One forward pass on the meta device, every ATen operator going through its rule: what the labels are tied by.

The pass runs on a `skeleton` of the model, so that whatever its forward pass writes down is written down in a copy.
Floating-point tensors are abstract: nothing is computed and no weight is copied. Integers and booleans are real:
shapes, positions and masks are few and cheap, and many forward passes look at them. What a pass decides by the values
of activations cannot be followed, and is an error.
"""

import contextlib
import copy
import functools
import gc
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from labkit.errors import InputError, first_line
from labkit.graph import rules_products, rules_shapes  # noqa: F401  they put their rules into RULES
from labkit.graph.rules import RULES, Call, Operation, Record
from labkit.modules.returned import outputs
from labkit.modules.undisturbed import undisturbed

# Their result depends on values, which a tensor on the meta device does not have.
DATA_DEPENDENT = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave"}
DATA_DEPENDENT |= {"_unique2", "unique_dim", "unique_consecutive"}
MASKS = (torch.bool, torch.uint8)  # as an index
MADE = ("zeros", "ones", "full", "empty")  # entries alike
PRODUCTS = {F.scaled_dot_product_attention, torch.matmul, torch.einsum, torch.Tensor.matmul}
PRODUCTS |= {torch.Tensor.__matmul__, torch.Tensor.__rmatmul__}
PARTS = {"t", "transpose", "permute", "view", "detach", "alias", "unsqueeze", "squeeze", "expand"}  # still the weight
PARTS |= {"index", "index_select"}  # some experts


# --- copies -----------------------------------------------------------------------------------------------------------


class _Duplicating(TorchFunctionMode):
    """Tensors are copied by a function, which deepcopy would not ask, and would refuse those that have a graph."""

    def __init__(self, tensor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._tensor = tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memory = args
        memory[id(x)] = self._tensor(x)
        return memory[id(x)]


def clone(x: Tensor) -> Tensor:
    return x.detach().clone()


def duplicate(value: Any, tensor: Callable[[Tensor], Tensor] = clone, memory: Mapping[int, Any] | None = None) -> Any:
    """A deep copy with tensors copied by `tensor`, but for those in memory, {id: what stands for it}."""
    try:
        with _Duplicating(tensor):
            return copy.deepcopy(value, dict(memory or {}))
    except Exception as error:
        raise InputError(
            f"The model cannot be copied, or its example input cannot ({first_line(error)}): remove what they hold "
            "besides tensors, numbers and functions, such as open files or locks."
        ) from error


def duplicate_model(
    model: nn.Module, tensors: Mapping[int, Tensor], tensor: Callable[[Tensor], Tensor] = clone
) -> nn.Module:
    """A copy of `model` with tensors[id(x)] for its parameters and buffers x; other tensors are copied by `tensor`."""
    memory: dict[int, Any] = dict(tensors)
    for module in model.modules():  # each has a dozen dictionaries for hooks, which deepcopy would take to pieces
        memory |= {id(x): type(x)() for x in vars(module).values() if type(x) in (dict, OrderedDict, set) and not x}
    return duplicate(model, tensor, memory)


def skeleton(
    model: nn.Module,
    tensors: Mapping[int, Tensor],
    tensor: Callable[[Tensor], Tensor] = clone,
    *,
    training: bool = False,
) -> nn.Module:
    """`duplicate_model` to be run in place of the model, in eval mode, or in training mode but for batch norms.

    Batch norms refuse single values in training. Experts are multiplied in batches, which every device can do.
    """
    new = duplicate_model(model, tensors, tensor)
    for module in new.modules():
        module.training = training and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    batch_experts_(new)
    return new


def batch_experts_(model: nn.Module) -> None:
    """Experts of transformers that are multiplied in groups are from now on in batches: all devices and widths can."""
    for module in model.modules():
        switch = getattr(module, "set_experts_implementation", None)
        if switch and getattr(module.config, "_experts_implementation", None) == "grouped_mm":
            switch("batched_mm")


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """No garbage collection inside: copies are made of thousands of objects that stay, and each search is in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- running without computing ----------------------------------------------------------------------------------------


def abstract(x: Tensor) -> Tensor:
    """x without its values where they are floating-point numbers, else a copy of it on the CPU."""
    if x.is_floating_point() or x.is_complex():
        if x.layout is not torch.strided:  # what it stores is its values
            return torch.empty(x.shape, dtype=x.dtype, device="meta")
        return torch.empty_like(x, device="meta", requires_grad=False)
    return x if x.device.type == "meta" else x.detach().to("cpu", copy=True)


def _on_meta(x: Tensor) -> Tensor:
    if x.device.type == "meta":
        return x
    new = torch.empty_like(x, device="meta")
    new._spans = getattr(x, "_spans", ())
    return new


@functools.cache
def name_of(func: Any) -> str:
    """An ATen operator's name without namespace and overload, and the one of an in-place form as of the other."""
    name = func._schema.name.removeprefix("aten::")
    return name if name.startswith("__") else name.rstrip("_")


class _Layout(NamedTuple):
    """An abstract tensor, as far as a result depends on it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Layout):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return tuple(map(_thawed, value)) if isinstance(value, tuple) else value


@functools.lru_cache(2**14)
def _layout(func: Any, args: tuple, kwargs: tuple) -> Any:
    return _frozen(func(*_thawed(args), **dict(_thawed(kwargs))))


@functools.cache
def _kind(func: Any) -> str:
    """What an operator gives: "new" if it writes into no operand and gives no view of one, "in place" if its first."""
    read, (first, *rest) = func._schema.returns, func._schema.arguments
    if all(spec.alias_info is None for spec in (first, *rest, *read)):
        return "new"
    written = [spec for spec in (first, *rest) if spec.alias_info is not None]
    return "in place" if written == [first] and first.alias_info.is_write and len(read) == 1 else ""


class Abstract(TorchDispatchMode):
    """Inside, an operator with an abstract operand gives an abstract result, and one with real operands a real one.

    A real tensor that something abstract is written into is abstract from then on, and so are its views.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, Tensor] = {}  # by address

    def where(self) -> str:
        return "the model"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = list(_tensors(args, kwargs))
        name = name_of(func)
        if name == "_to_copy" and _stays_zero(args[0]) and not (kwargs.get("dtype") or args[0].dtype).is_floating_point:
            args = leaves = (torch.zeros(args[0].shape),)
        real = [x for x in leaves if not x.is_meta]
        touched = len(real) < len(leaves)
        if self._written and not touched:
            touched = any(x.untyped_storage().data_ptr() in self._written for x in real)
        masks = [x for x in args[1] if x is not None and x.dtype in MASKS] if name in ("index", "index_put") else []
        unknown = any(mask.is_meta for mask in masks)
        if touched and (name in DATA_DEPENDENT or (name == "index" and unknown)):
            raise InputError(
                f"The forward pass depends on the values of its activations ({name} in {self.where()}), so that what "
                "hangs together may change from input to input: give a part of the model that does not."
            )
        if masks and touched and not unknown:
            args = (args[0], _numbered(args[1]), *args[2:])
        if touched and real:
            written = [x for x in _destinations(func, args, kwargs) if not x.is_meta]
            self._written |= {x.untyped_storage().data_ptr(): x for x in written}
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        elif torch.device(kwargs.get("device") or "cpu").type == "meta" or _is_state(name, args, leaves):
            kwargs["device"] = torch.device("cpu" if _exact(name, args, kwargs, leaves) else "meta")
        if touched and kwargs.get("device") is not None:  # that of a real operand elsewhere in the model
            kwargs["device"] = torch.device("meta")
        try:
            if touched and not real and (kind := _kind(func)):  # torch takes 0.3 ms for a sum: once for each shape
                layout = _layout(func, _frozen(args), _frozen(tuple(kwargs.items())))
                if kind == "new":
                    func = lambda *args, **kwargs: _thawed(layout)  # noqa: E731
                elif layout == _frozen(args[0]):
                    torch.autograd.graph.increment_version(args[0])
                    func = lambda x, *args, **kwargs: x  # noqa: E731
            out = self.run(name, func, args, kwargs, touched)
            if name == "zeros" and not leaves:
                out._is_zero = True
            return out
        except NotImplementedError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise InputError(
                f"The operator {name} in {self.where()} cannot run without data ({reason}): give a part of the model "
                "that does without it."
            ) from error

    def run(self, name: str, func: Any, args: tuple, kwargs: dict, touched: bool) -> Any:
        return func(*args, **kwargs)


def _tensors(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Operands of an ATen operator, which nests them in lists at most."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, Tensor))


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The indices of an `index` with masks, whose values are real, as the numbers of the entries that they pick."""
    numbers: list[Tensor | None] = []
    for x in indices:
        numbers += x.nonzero(as_tuple=True) if x is not None and x.dtype in MASKS else [x]
    return numbers


def _destinations(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The operands that an operator writes into."""
    names = (spec.name for spec in func._schema.arguments)
    operands = {**dict(zip(names, args, strict=False)), **kwargs}
    specs = [spec for spec in func._schema.arguments if spec.alias_info is not None and spec.alias_info.is_write]
    return [operands[spec.name] for spec in specs if isinstance(operands.get(spec.name), Tensor)]


def _stays_zero(x: Tensor) -> bool:
    """Whether it is zeros that nothing was written into so far."""
    return getattr(x, "_is_zero", False) and x._version == 0


def _is_state(name: str, args: tuple, leaves: Sequence[Tensor]) -> bool:
    """Whether a pass makes what it will write into or add to, and more than a sum that starts at zero."""
    return name in ("zeros", "empty") and not leaves and math.prod(args[0]) > 1


def _exact(name: str, args: tuple, kwargs: dict, leaves: Sequence[Tensor]) -> bool:
    """Whether an operator that is asked to make something on the meta device makes what should have its values.

    That is integers and booleans, and what is filled with something: the mask that a decoder makes for itself.
    """
    dtype = kwargs.get("dtype")
    if name in ("ones", "full"):
        return True
    if dtype is not None:
        return not dtype.is_floating_point and not dtype.is_complex
    if leaves:
        return not leaves[0].is_floating_point()
    if name == "arange":
        return all(isinstance(arg, int) for arg in args)
    return name == "scalar_tensor" and isinstance(args[-1], int)  # True and False are ints


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model, and the random numbers of Python and numpy, are as they were.

    Passes run on copies, but a hook may close over a module of the model itself and write into that.
    """
    usual = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
    places: dict[int, Any] = {}
    for module in model.modules():
        _containers({key: value for key, value in vars(module).items() if key not in usual}, places)
        places[id(vars(module))] = vars(module)
    contents = [(place, _content(place)) for place in places.values()]
    buffers = [(x, x._version, x.detach().clone()) for x in model.buffers() if not (x.is_meta or x.is_inference())]
    python, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for place, content in contents:
            if list(map(id, _content(place))) != list(map(id, content)):
                _refill_(place, content)
        for x, version, before in buffers:
            if x._version != version:
                with torch.no_grad():
                    x.copy_(before)


def _containers(value: Any, seen: dict[int, Any]) -> None:
    """Puts `value`, and the containers in it, into `seen`, {id: container}, if it is one that can change."""
    if not isinstance(value, (dict, list, tuple, set, deque)) or id(value) in seen:
        return
    seen[id(value)] = value
    for item in value.values() if isinstance(value, dict) else value:
        _containers(item, seen)


def _content(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _refill_(container: Any, content: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        container.update(zip(content[:half], content[half:], strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


@contextlib.contextmanager
def following(model: nn.Module, called: set[str]) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, outermost first; "" is the model. called: gets them all."""
    names = {id(module): name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))
        called.add(stack[-1])

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


# --- the trace --------------------------------------------------------------------------------------------------------


class Tracer(Abstract):
    """Sends every operator through its rule. What a tensor carries are its `_spans` and its `_origin`."""

    def __init__(self, record: Record, stack: list[str]) -> None:
        super().__init__()
        self._record, self._stack = record, stack
        self._calls: Counter = Counter()

    def where(self) -> str:
        return self._stack[-1] or "the model"

    def run(self, name: str, func: Any, args: tuple, kwargs: dict, touched: bool) -> Any:
        out = func(*args, **kwargs)
        module, record = self._stack[-1], self._record
        number = self._calls[name, module]
        self._calls[name, module] += 1
        leaves = list(_tensors(args, kwargs))
        if not leaves and isinstance(out, Tensor) and (out.is_meta or (name in MADE and out.is_floating_point())):
            out._spans = record.free(out, range(out.dim()))
            Call(name, args, kwargs, out, module, number, record).sized(out, out._spans)
        repeated = name in ("expand", "repeat") and leaves[0].is_floating_point()
        if out is None or not (touched or repeated or any(getattr(x, "_spans", ()) for x in leaves)):
            return out
        if name == "_to_copy" and (dtype := kwargs.get("dtype")) is not None and dtype.is_floating_point:
            record.names_dtype |= args[0].is_floating_point()
        call = Call(name, args, kwargs, out, module, number, record)
        rule = RULES.get(name)
        result = None if rule is None else rule(call)
        if result is None:
            self._unknown(call)
            result = ()
        outs = out if isinstance(out, (list, tuple)) else [out]
        several = result if isinstance(result, list) else [result] * len(outs)
        for i, (x, spans) in enumerate(zip(outs, several, strict=True)):
            if isinstance(x, Tensor):
                x._spans = tuple(s for s in spans if s.dims[-1] < x.dim() and _fits(s, x))
                if i == 0 and touched and not record.only_couples:
                    operands = tuple(getattr(operand, "_origin", None) for operand in leaves)
                    settings = tuple(arg for arg in args if not isinstance(arg, Tensor))
                    record.operations.append(
                        Operation(name, module, tuple(x.shape), x._spans, operands, settings, call.before)
                    )
                if touched:
                    x._origin = len(record.operations) - 1
        if name in PARTS:
            out._is_weight = getattr(args[0], "_is_weight", False)
        return out

    def _unknown(self, call: Call) -> None:
        place = f", used in {call.module}" if call.module else ""
        for x in tree_leaves((call.args, call.kwargs)):
            if isinstance(x, Tensor):
                self._record.fix(x, range(x.dim()), f"labkit has no rule for the operator {call.name}{place}")


def _fits(span, x: Tensor) -> bool:
    return all(x.shape[d] == n for d, n in zip(span.dims, span.labels.shape, strict=True))


class _Products(TorchFunctionMode):
    """Products of many operators: sizes of the views in them are torch's own, which no module has written down.

    Scaled dot products by torch's default scale, the root of the width of a head, fix that width. The shape that an RMS
    norm runs over is such a size, though none of its operators has it.
    """

    def __init__(self, record: Record, stack: list[str]) -> None:
        super().__init__()
        self._record, self._stack = record, stack

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            for x in (*args[:2], kwargs.get("query"), kwargs.get("key")):
                if x is not None:
                    self._record.fix(x, (x.dim() - 1,), "is the width of a head, which the scale depends on")
        if func is F.rms_norm:
            x, shape = (*args, *kwargs.values())[:2]
            dims = range(x.dim() - len(shape), x.dim())
            self._record.sized(self._stack[-1], x, self._record.spans(x), dims)
        sizes = len(self._record.sizes)
        out = func(*args, **kwargs)
        if func in PRODUCTS:
            del self._record.sizes[sizes:]
        return out


def record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], **options: bool) -> Record:
    """Traces a call in eval mode, and in training mode too if there are parameters that it did not meet.

    options: within_groups and whole_heads of `Record`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"What is traced is a {type(model).__name__}, but it must be a torch.nn.Module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"The model is wrapped in {type(model).__name__}: give model.module, and wrap the result.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputError("The model is scripted or traced: give the eager module that it was made from.")
    constants = frozenset(name for name, _ in model.named_buffers())
    result = Record(constants=constants, **options)
    with unchanged(model):
        _passes(model, args, kwargs, result)
    return result


def _passes(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], result: Record) -> None:
    """Fills the record: one pass, and another in training mode if there are parameters that the first did not meet."""
    lifted = _lift(model, result)
    trainable = {name for name, _ in model.named_parameters()}
    try:
        _pass(model, lifted, args, kwargs, result)
    except InputError:
        raise
    except Exception as error:  # a forward pass can fail in any way
        raise InputError(_failure(model, args, kwargs, error)) from error
    if trainable & set(result.unmet.values()):
        result.only_couples = True
        before = len(result.axes)
        try:
            _pass(model, lifted, args, kwargs, result, training=True)
            result.trained = True
        except Exception as error:  # what it met stays whole
            for axis in result.axes[before:]:
                labels = np.arange(axis.base, axis.base + axis.size)
                result.labels.pin(labels, f"is only met in training, which fails on the example input ({error})")
    result.unused = [name for name in result.unmet.values() if name in trainable]


def _lift(model: nn.Module, record: Record) -> dict[int, Tensor]:
    """{id of a parameter or buffer: what stands for it in the trace}; what is the same memory is one tensor."""
    named = [*model.named_parameters(), *model.named_buffers()]
    if any(nn.parameter.is_lazy(x) for _, x in named):
        raise InputError("The model has lazy layers without a shape: run it once on its inputs first.")
    shapes = {name: x.shape for name, x in named}
    lifted: dict[int, Tensor] = {}
    seen: dict[Any, tuple[str, Tensor]] = {}
    for name, x in named:
        dense = x.device.type != "meta" and x.layout is torch.strided
        memory = (x.data_ptr() or id(x), x.shape, x.stride(), x.dtype) if dense else id(x)
        if memory in seen:
            first, lifted[id(x)] = seen[memory]
            record.aliases.setdefault(first, []).append(name)
            continue
        masks = x.dtype is torch.bool and name.endswith("_mask") and shapes.get(name[:-5]) == x.shape
        lifted[id(x)] = _on_meta(x.detach()) if masks else abstract(x)  # a mask shrinks with its weight
        lifted[id(x)]._origin = name
        seen[memory] = (name, lifted[id(x)])
        if lifted[id(x)].device.type == "meta":
            record.unmet[id(lifted[id(x)])] = name
    return lifted


def _pass(
    model: nn.Module, lifted: Mapping[int, Tensor], args: tuple, kwargs: Mapping, record: Record, training: bool = False
) -> None:
    traced = skeleton(model, lifted, training=training)
    args, kwargs = duplicate((args, dict(kwargs)), abstract)
    with undisturbed(), following(traced, record.called) as stack, Tracer(record, stack), _Products(record, stack):
        out = traced(*args, **kwargs)
    results = outputs(out)
    if not any(x.numel() for x in results):
        raise InputError(
            f"The model's output ({type(out).__name__}) holds no tensor with a number in it, so that nothing could be "
            "compared: let forward return its results in tensors, and give an example input that is not empty."
        )
    for x in results:
        record.fix(x, range(x.dim()), "is the model's output")
        if not record.only_couples:
            record.returned.add(getattr(x, "_origin", None))


def _failure(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], error: Exception) -> str:
    """Why a pass without data failed: the real one fails too, or it does not."""
    try:
        args, kwargs = duplicate((args, dict(kwargs)))
        with undisturbed():
            skeleton(model, {})(*args, **kwargs)
    except Exception as real:
        return (
            f"The model does not run on the example input ({first_line(real)}): give args and kwargs as in "
            "model(*args, **kwargs)."
        )
    return f"The forward pass cannot be followed without data ({first_line(error)}): give a part of the model."
