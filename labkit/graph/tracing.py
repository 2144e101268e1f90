"""A forward pass without values, every ATen operator going through a rule that ties labels.

`record` runs a copy of the model (`passes.on_copy`) on the meta device (`abstract`), and returns a `Record` of the
labels of all parameters, the sizes, the products and the operations.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labkit.errors import InputError, first_line
from labkit.graph import rules_products, rules_shapes  # noqa: F401  they enter their rules into RULES
from labkit.graph.abstract import Abstract, abstract, on_meta, tensors_in
from labkit.graph.passes import on_copy, unchanged
from labkit.graph.record import Operation, Record, traced
from labkit.graph.rules import RULES, Call
from labkit.graph.spans import Span, Spans
from labkit.modules.returned import outputs

FACTORIES = ("zeros", "ones", "full", "empty")  # their entries are alike
# Functions of several operators. The sizes of the views are torch's choice; no module has them written down.
PRODUCTS = {F.scaled_dot_product_attention, torch.matmul, torch.einsum, torch.Tensor.matmul}
PRODUCTS |= {torch.Tensor.__matmul__, torch.Tensor.__rmatmul__}
# Their result is a weight if their operand is.
PARTS = {"t", "transpose", "permute", "view", "detach", "alias", "unsqueeze", "squeeze", "expand"}
PARTS |= {"index", "index_select"}  # some experts


def record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], **options: bool) -> Record:
    """Trace `model(*args, **kwargs)` in eval mode, and in training mode too if parameters were not met.

    args, kwargs: the example input.
    options: within_groups and whole_heads of `Record`.
    Raises InputError if the model does not run on the input, or cannot be followed without values.
    """
    _check_traceable(model)
    constants = frozenset(name for name, _ in model.named_buffers())
    result = Record(constants=constants, **options)
    _run_passes(model, args, kwargs, result)
    return result


def _check_traceable(model: nn.Module) -> None:
    """Raise InputError unless `model` is an eager module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"What is traced is a {type(model).__name__}, but it must be a torch.nn.Module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"The model is wrapped in {type(model).__name__}: give model.module, and wrap the result.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputError("The model is scripted or traced: give the eager module that it was made from.")


# --- operators on their way -------------------------------------------------------------------------------------------


class Tracer(Abstract):
    """Sends every operator through a rule, and notes labels and origin of each result (`Traced`).

    record: receives the notes of the rules.
    stack: names of the running modules (`passes.Pass`).
    """

    def __init__(self, record: Record, stack: list[str]) -> None:
        super().__init__()
        self._record, self._stack = record, stack
        self._calls: Counter = Counter()

    def where(self) -> str:
        return self._stack[-1] or "the model"

    def observe(self, name: str, args: tuple, kwargs: dict, out: Any, touched: bool) -> None:
        """Put an operator through a rule, if an operand is abstract or has labels."""
        operands = list(tensors_in(args, kwargs))
        module, number = self._stack[-1], self._number(name)
        call = Call(name, args, kwargs, out, module, number, self._record)
        if not operands and isinstance(out, Tensor):
            self._label_made(call)
        repeats = name in ("expand", "repeat") and operands[0].is_floating_point()
        has_labels = touched or repeats or any(traced(x).spans for x in operands)
        if out is None or not has_labels:
            return
        dtype = kwargs.get("dtype")
        if name == "_to_copy" and dtype is not None and dtype.is_floating_point:
            self._record.names_dtype |= args[0].is_floating_point()
        spans = self._spans_of_results(call)
        self._note_results(call, operands, spans, touched)
        if name in PARTS:
            traced(out).is_weight = traced(args[0]).is_weight

    def _number(self, name: str) -> int:
        """Count the calls of an operator in the running module, and return the number of the present call."""
        place = name, self._stack[-1]
        self._calls[place] += 1
        return self._calls[place] - 1

    def _label_made(self, call: Call) -> None:
        """Give labels to a tensor made by the pass: the sizes follow the tensors beside the new tensor."""
        out = call.out
        is_filled = call.name in FACTORIES and out.is_floating_point()
        if out.is_meta or is_filled:
            traced(out).spans = self._record.free(out, range(out.dim()))
            call.record_sizes(out, traced(out).spans)

    def _spans_of_results(self, call: Call) -> Spans | list[Spans]:
        """Return the spans of the results by the operator's rule; without a rule, fix all operands."""
        rule = RULES.get(call.name)
        spans = None if rule is None else rule(call)
        if spans is not None:
            return spans
        place = f", used in {call.module}" if call.module else ""
        reason = f"labkit has no rule for the operator {call.name}{place}"
        for x in tensors_in(call.args, call.kwargs):
            self._record.fix(x, range(x.dim()), reason)
        return ()

    def _note_results(self, call: Call, operands: Sequence[Tensor], spans: Spans | list[Spans], touched: bool) -> None:
        """Note labels and origin of each result, and the operation.

        spans: spans of all results, or a list with the spans of each.
        """
        results = call.out if isinstance(call.out, (list, tuple)) else [call.out]
        spans_by_result = spans if isinstance(spans, list) else [spans] * len(results)
        for number, (x, result_spans) in enumerate(zip(results, spans_by_result, strict=True)):
            if not isinstance(x, Tensor):
                continue
            traced(x).spans = tuple(span for span in result_spans if _is_inside(span, x))
            if number == 0 and touched and not self._record.only_couples:
                self._record.operations.append(_operation(call, x, operands))
            if touched:
                traced(x).origin = len(self._record.operations) - 1


def _operation(call: Call, result: Tensor, operands: Sequence[Tensor]) -> Operation:
    origins = tuple(traced(x).origin for x in operands)
    settings = tuple(arg for arg in call.args if not isinstance(arg, Tensor))
    shape, spans = tuple(result.shape), traced(result).spans
    return Operation(call.name, call.module, shape, spans, origins, settings, call.before)


def _is_inside(span: Span, x: Tensor) -> bool:
    """Return True if `x` has the span's dimensions, in the sizes of the labels."""
    if span.dims[-1] >= x.dim():
        return False
    return tuple(x.shape[dim] for dim in span.dims) == span.labels.shape


class _Products(TorchFunctionMode):
    """Observes functions of several operators, for facts that no single operator shows.

    Sizes of the views inside a product are torch's choice: no module has the sizes written down. A scaled dot product
    by torch's default scale, the root of the width of a head, fixes the width. A module may have the shape of an RMS
    norm written down, though it is in no operator.
    """

    def __init__(self, record: Record, stack: list[str]) -> None:
        super().__init__()
        self._record, self._stack = record, stack

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            for x in (*args[:2], kwargs.get("query"), kwargs.get("key")):
                if x is not None:
                    self._record.fix(x, (x.dim() - 1,), "is the width of a head, which the scale depends on")
        if func is F.rms_norm:
            x, shape = (*args, *kwargs.values())[:2]
            dims = range(x.dim() - len(shape), x.dim())
            spans = self._record.spans(x)
            self._record.sized(self._stack[-1], x, spans, dims)
        sizes_before = len(self._record.sizes)
        out = func(*args, **kwargs)
        if func in PRODUCTS:
            del self._record.sizes[sizes_before:]
        return out


# --- passes -----------------------------------------------------------------------------------------------------------


def _run_passes(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], result: Record) -> None:
    """Fill the record: a pass in eval mode, and a pass in training mode if parameters were not met."""
    lifted = _lift(model, result)
    trainable = {name for name, _ in model.named_parameters()}
    try:
        _run_pass(model, lifted, args, kwargs, result)
    except InputError:
        raise
    except Exception as error:  # a forward pass can fail in any way
        raise InputError(_failure(model, args, kwargs, error)) from error
    if not trainable.isdisjoint(result.unmet.values()):
        result.only_couples = True
        axes_before = len(result.axes)
        try:
            _run_pass(model, lifted, args, kwargs, result, training=True)
            result.trained = True
        except Exception as error:  # what it met stays whole
            reason = f"is only met in training, which fails on the example input ({error})"
            all_labels = np.arange(result.labels.count)
            for axis in result.axes[axes_before:]:
                result.labels.pin(all_labels[axis.labels], reason)
    result.unused = [name for name in result.unmet.values() if name in trainable]


def _run_pass(
    model: nn.Module, lifted: Mapping[str, Tensor], args: tuple, kwargs: Mapping, record: Record, training: bool = False
) -> None:
    """Run a copy of the model through the tracer, and fix the sizes of the outputs.

    lifted: {parameter or buffer: abstract tensor to take the place}.
    """
    options = {"copy_input": abstract, "training": training, "called": record.called}
    with unchanged(model), on_copy(model, lifted, args, kwargs, **options) as copied:
        stack = copied.stack
        with Tracer(record, stack), _Products(record, stack):
            out = copied.run()
    results = outputs(out)
    if not any(x.numel() for x in results):
        raise InputError(
            f"The model's output ({type(out).__name__}) holds no tensor with a number in it, so that nothing could be "
            "compared: let forward return its results in tensors, and give an example input that is not empty."
        )
    for x in results:
        record.fix(x, range(x.dim()), "is the model's output")
        if not record.only_couples:
            record.returned.add(traced(x).origin)


def _lift(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """Return {parameter or buffer: abstract tensor to take the place}, the same tensor for the same memory.

    Notes aliases and unmet parameters in the record. Raises InputError for layers without a shape.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if any(nn.parameter.is_lazy(x) for _, x in named):
        raise InputError("The model has lazy layers without a shape: run it once on its inputs first.")
    shapes = {name: x.shape for name, x in named}
    lifted: dict[str, Tensor] = {}
    first_in_memory: dict[Any, tuple[str, Tensor]] = {}
    for name, x in named:
        memory = _memory(x)
        if memory in first_in_memory:
            first, lifted[name] = first_in_memory[memory]
            record.aliases.setdefault(first, []).append(name)
            continue
        weight = name.removesuffix("_mask")
        is_mask = x.dtype is torch.bool and weight != name and shapes.get(weight) == x.shape
        stand_in = on_meta(x.detach()) if is_mask else abstract(x)  # a mask shrinks with its weight
        traced(stand_in).origin = name
        lifted[name] = stand_in
        first_in_memory[memory] = (name, stand_in)
        if stand_in.is_meta:
            record.unmet[id(stand_in)] = name
    return lifted


def _memory(x: Tensor) -> Any:
    """Return a key, equal for tensors with the same memory in the same layout."""
    if x.is_meta or x.layout is not torch.strided:
        return id(x)
    return x.data_ptr() or id(x), x.shape, x.stride(), x.dtype


def _failure(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], error: Exception) -> str:
    """Tell if a pass without values failed because the model does not run on the input at all."""
    try:
        with unchanged(model), on_copy(model, {}, args, kwargs) as copied:
            copied.run()
    except Exception as real:
        return (
            f"The model does not run on the example input ({first_line(real)}): give args and kwargs as in "
            "model(*args, **kwargs)."
        )
    return f"The forward pass cannot be followed without data ({first_line(error)}): give a part of the model."
