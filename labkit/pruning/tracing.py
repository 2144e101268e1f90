"""One forward pass on the meta device, every ATen operator going through its rule: what the labels are tied by.

Nothing is computed and no weight is copied: parameters and buffers are lifted to the meta device for the call, so that
a large model costs as much as a small one with as many operators. The module's attributes are the original's.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from labkit.batches import evaluating
from labkit.pruning.abstract import Abstract, evaluate, lift, to_meta, undisturbed
from labkit.pruning.blocks import Block, Blocks, alone, block_at, fix
from labkit.pruning.labels import Labels
from labkit.pruning.rules import RULES

VIEWS = {"t", "transpose", "permute", "view", "detach", "alias", "unsqueeze", "squeeze", "expand"}  # still the weight


@dataclass
class Call:
    """One operator on its way through its rule."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    number: int  # of the calls of this operator

    def because(self, what: str) -> str:
        return f"{what} ({self.name}{f' in {self.module}' if self.module else ''})"


class Entry(NamedTuple):
    """Dimension `dim` of a parameter or buffer: its indices have the labels base, base + 1, ..."""

    name: str
    dim: int
    size: int
    base: int


class Sized(NamedTuple):
    """A size that the forward pass of `module` may have written down as a number; labels is None where it stays."""

    module: str
    size: int
    labels: np.ndarray | None
    axis: int


class Restricted(NamedTuple):
    """The n-th call of an operator works over labels: a reference without them must leave them out there.

    kind: "norm" (statistics of the kept only), "statistic" (the dimension is gone afterwards), "mask" (terms of a sum).
    """

    name: str
    module: str
    number: int
    argument: int
    dim: int
    labels: np.ndarray
    kind: str


class Cost(NamedTuple):
    """Multiply-adds of one product, `terms` in each sum; the kept share of each of `factors`, labels, scales them."""

    name: str
    module: str
    macs: int
    terms: int
    factors: tuple[np.ndarray, ...]


class Result(NamedTuple):
    """What one operator gave: the shape, and the labels that its dimensions carry."""

    name: str
    module: str
    shape: tuple[int, ...]
    blocks: Blocks


@dataclass
class Record:
    """All that one model's trace found."""

    labels: Labels = field(default_factory=Labels)
    entries: list[Entry] = field(default_factory=list)
    contracted: list[np.ndarray] = field(default_factory=list)  # labels of parameters, where a product sums over them
    sizes: list[Sized] = field(default_factory=list)
    restricted: list[Restricted] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    operators: Counter = field(default_factory=Counter)
    aliases: dict[str, list[str]] = field(default_factory=dict)  # parameters that are the memory of another one
    constants: frozenset[str] = frozenset()  # names of the buffers
    unused: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)  # in order
    names_dtype: bool = False
    trained: bool = False  # a second pass, in training mode, met parameters that the first did not

    def names(self, first: str) -> list[str]:
        """All parameters with the memory of `first`, by which the entries go."""
        return [first, *self.aliases.get(first, ())]

    def first(self, name: str) -> str:
        return next((first for first, names in self.aliases.items() if name in names), name)


class Tracer(Abstract):
    """Sends every operator through its rule. What a tensor carries is kept at the tensor, as `_blocks`."""

    def __init__(self, record: Record, lifted: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        super().__init__()
        self.record, self.labels = record, record.labels
        self._names = names  # of modules, by id
        self._stack: list[str] = [""]
        self._calls: Counter = Counter()
        self._unlabelled = {id(t): name for name, t in lifted.items() if t.device.type == "meta"}
        self._alive = list(lifted.values())
        self.only_couples = False  # in a second pass: nothing is counted twice

    # --- what the rules use -------------------------------------------------------------------------------------------

    def blocks(self, x: Tensor) -> Blocks:
        if id(x) in self._unlabelled:
            self._label(x, self._unlabelled.pop(id(x)))
        return getattr(x, "_blocks", ())

    def note(self, x: Tensor, blocks: Blocks) -> None:
        x._blocks = blocks

    def fix(self, blocks: Blocks, dims, reason: str) -> Blocks:
        return fix(self.labels, blocks, dims, reason)

    def alone(self, x: Tensor, dim: int, reason: str) -> tuple[np.ndarray | None, Blocks]:
        return alone(self.labels, self.blocks(x), dim, reason)

    def fixed(self, n: int, reason: str) -> np.ndarray:
        labels = self.labels.fresh(n)
        self.labels.pin(labels, reason)
        return labels

    def free(self, x: Tensor, dims: Iterable[int]) -> Blocks:
        """Labels of dimensions that no parameter has, and whose sizes follow what they meet."""
        return tuple(Block((d,), self.labels.fresh(x.shape[d], constant=True)) for d in dims if x.shape[d] > 1)

    def contracts(self, c: Call, *sides: tuple[Tensor, int, np.ndarray]) -> None:
        """A product sums over these labels: where one side is a weight, it is what reads the channel."""
        weights = [labels for x, _, labels in sides if getattr(x, "_is_weight", False)]
        if weights:
            self.record.contracted.extend(weights)
        elif not self.only_couples:
            x, dim, labels = sides[0]
            position = next(i for i, arg in enumerate(c.args) if arg is x)
            self.record.restricted.append(Restricted(c.name, c.module, c.number, position, dim, labels, "mask"))

    def restricts(self, c: Call, dim: int, labels: np.ndarray) -> None:
        if self.only_couples:
            return
        kind = "norm" if c.name == "native_layer_norm" else "statistic"
        self.record.restricted.append(Restricted(c.name, c.module, c.number, 0, dim, labels, kind))

    def sized(self, c: Call, out: Tensor, blocks: Blocks) -> None:
        """An operator whose sizes may be numbers that the forward pass wrote down."""
        for dim, size in enumerate(out.shape):
            block = block_at(blocks, dim)
            labels, axis = (None, 0) if block is None else (block.labels, block.dims.index(dim))
            self.record.sizes.append(Sized(c.module, size, labels, axis))

    def counts(self, c: Call, macs: int, dims: list[tuple[Tensor, int]]) -> None:
        factors = []
        for x, dim in dims:
            block = block_at(self.blocks(x), dim)
            if block is not None:
                axis = block.dims.index(dim)
                factors.append(np.moveaxis(block.labels, axis, 0).reshape(x.shape[dim], -1)[:, 0])
        self.macs(c, macs, factors)

    def macs(self, c: Call, macs: int, factors: list[np.ndarray]) -> None:
        if not self.only_couples:
            terms = macs // max(c.out.numel(), 1)
            self.record.costs.append(Cost(c.name, c.module, macs, terms, tuple(factors)))

    # --- dispatch -----------------------------------------------------------------------------------------------------

    def run(self, name: str, func: Any, args: tuple, kwargs: dict, abstract: bool) -> Any:
        out = evaluate(name, func, args, kwargs)
        number = self._calls[name]
        self._calls[name] += 1
        if not abstract or out is None:
            if isinstance(out, Tensor) and out.device.type == "meta":  # a pass makes zeros, of sizes written down
                self.note(out, self.free(out, range(out.dim())))
                self.sized(Call(name, args, kwargs, out, self._stack[-1], number), out, out._blocks)
            return out
        call = Call(name, args, kwargs, out, self._stack[-1], number)
        self.record.operators[name] += 1
        self._precision(call)
        rule = RULES.get(name)
        result = None if rule is None else rule(self, call)
        outs = out if isinstance(out, (list, tuple)) else [out]
        if result is None:
            self._unknown(call)
            result = ()
        several = result if isinstance(result, list) else [result] * len(outs)
        for i, (x, blocks) in enumerate(zip(outs, several, strict=True)):
            if isinstance(x, Tensor):
                self.note(x, tuple(b for b in blocks if b.dims[-1] < x.dim() and _fits(b, x)))
                if i == 0 and not self.only_couples:
                    self.record.results.append(Result(name, self._stack[-1], tuple(x.shape), x._blocks))
        if name in VIEWS:
            out._is_weight = getattr(args[0], "_is_weight", False)
        return out

    def _precision(self, call: Call) -> None:
        dtype = call.kwargs.get("dtype")
        if call.name == "_to_copy" and dtype is not None and dtype.is_floating_point:
            self.record.names_dtype |= call.args[0].is_floating_point()

    def _unknown(self, call: Call) -> None:
        for x in tree_leaves((call.args, call.kwargs)):
            if isinstance(x, Tensor):
                reason = f"labkit has no rule for the operator {call.name}" + (
                    f", used in {call.module}" if call.module else ""
                )
                self.fix(self.blocks(x), range(x.dim()), reason)
                self.note(x, ())

    def _label(self, x: Tensor, name: str) -> None:
        blocks = []
        for dim, size in enumerate(x.shape):
            if size > 1:
                labels = self.labels.fresh(size, constant=name in self.record.constants)
                self.record.entries.append(Entry(name, dim, size, int(labels[0])))
                blocks.append(Block((dim,), labels))
        x._blocks, x._is_weight = tuple(blocks), True

    # --- where --------------------------------------------------------------------------------------------------------

    def where(self) -> str:
        return self._stack[-1] or "the model"

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Keeps the name of the module whose forward is running."""

        def enter(module, _):
            self._stack.append(self._names.get(id(module), self._stack[-1]))

        def leave(*_):
            self._stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def unmet(self) -> list[str]:
        return list(self._unlabelled.values())


def _fits(block: Block, x: Tensor) -> bool:
    return all(x.shape[d] == n for d, n in zip(block.dims, block.labels.shape, strict=True))


def record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Record:
    """Traces a call in eval mode, and in training mode too if there are parameters that it did not meet."""
    found = Record(constants=frozenset(name for name, _ in model.named_buffers()))
    names = {id(module): name for name, module in model.named_modules()}
    lifted = lift(model)
    first = {id(x): name for name, x in reversed(lifted.items())}
    tracer = Tracer(found, {name: lifted[name] for name in reversed(first.values())}, names)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if (other := first[id(lifted[name])]) != name:
            found.aliases.setdefault(other, []).append(name)
    args, kwargs = to_meta((args, dict(kwargs)))
    with evaluating(model):
        _pass(model, lifted, args, kwargs, tracer)
    trainable = {name for name, _ in model.named_parameters()}
    if trainable & set(tracer.unmet()):
        tracer.only_couples = True
        entries = len(found.entries)
        try:
            with training(model):
                _pass(model, lifted, args, kwargs, tracer)
            found.trained = True
        except Exception as failure:  # a forward pass can fail in any way; what it met is left whole
            for entry in found.entries[entries:]:
                labels = np.arange(entry.base, entry.base + entry.size)
                found.labels.pin(labels, f"is only met in training, which fails on the example input ({failure})")
    found.unused += [name for name in tracer.unmet() if name in trainable]
    return found


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode, but for batch norms, which refuse single values; afterwards every module as it was."""
    with evaluating(model):
        for module in model.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield


def _pass(model: nn.Module, lifted: dict[str, Tensor], args: tuple, kwargs: Mapping[str, Any], tracer: Tracer) -> None:
    with undisturbed(), tracer.following(), tracer:
        out = torch.func.functional_call(model, lifted, args, kwargs, tie_weights=False)
    for x in outputs(out):
        tracer.fix(getattr(x, "_blocks", ()), range(x.dim()), "is the model's output")


def outputs(value: Any) -> list[Tensor]:
    """The tensors of a model's output, in containers and dataclasses; what another object holds (a cache) is state."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        held = value.values()
    elif isinstance(value, (list, tuple)):
        held = value
    elif is_dataclass(value):
        held = vars(value).values()
    else:
        return []
    return [x for item in held for x in outputs(item)]
