"""Counts what a call has to do, floating-point operations and bytes, by watching its operators go by.

The idea is that of torch's FlopCounterMode; the formulas are in `labkit.operators`. It counts work, not time: which
kernel runs, what a cache keeps and what a compiler fuses are outside it.
"""

import contextlib
import copy
import dataclasses
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from labkit import operators
from labkit.batches import evaluating
from labkit.errors import InputError
from labkit.footprint import Touch, covered, dense, nbytes, touches


@dataclass(frozen=True)
class Op:
    """One operator, all its calls together; `bytes` are its operands and its results, each once a call."""

    name: str
    calls: int
    flops: int
    elementwise_flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP per byte; an operator without products is placed by its elementwise FLOPs."""
        return (self.flops or self.elementwise_flops) / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Work:
    """What one call has to do. A multiply-add is 2 FLOPs.

    flops: of products only (matrix products, convolutions, attention, recurrent layers), as the field states them.
    bytes: least traffic of the whole call: what was there before and is read, once; what remains afterwards, once.
    elementwise_flops: of everything else, as `labkit.operators.ELEMENTWISE` has it.
    bytes_by: `bytes` as weights, inputs, state (a KV cache), captured (tensors a function brings along) and outputs.
    by_op: a row an operator, most FLOPs first, with the traffic of running one operator after the other.
    by_module: `flops` by module name, children included; "" is the whole model.
    uncounted: operators that compute but have no formula, and their calls.
    """

    flops: int
    bytes: int
    elementwise_flops: int = 0
    bytes_by: Mapping[str, int] = field(default_factory=dict)
    by_op: tuple[Op, ...] = ()
    by_module: Mapping[str, int] = field(default_factory=dict)
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """FLOP per byte; work without products is placed by its elementwise FLOPs."""
        return (self.flops or self.elementwise_flops) / self.bytes if self.bytes else 0.0

    @property
    def unfused_bytes(self) -> int:
        """Traffic when every operator reads its operands from memory and writes its results back."""
        return sum(op.bytes for op in self.by_op)

    def reduction(self, other: "Work") -> float:
        """Share of this work's FLOPs that `other` saves, 1 - other/self; InputError where the two can't be compared."""
        if dict(self.uncounted) != dict(other.uncounted):
            raise InputError(
                f"no FLOP reduction can be stated because the uncounted operators differ ({_listed(self.uncounted)} "
                f"against {_listed(other.uncounted)}): compare times, or two calls that run the same of these."
            )
        if not self.flops:
            raise InputError("no FLOP reduction can be stated of a call without FLOPs: start from one with a product.")
        return 1 - other.flops / self.flops

    def __str__(self) -> str:
        left_out = f", uncounted: {_listed(self.uncounted)}" if self.uncounted else ""
        return f"{self.flops / 1e9:.4g} GFLOP, {self.bytes / 1e6:.4g} MB, {self.intensity:.3g} FLOP/byte{left_out}"


def _listed(calls: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{n}" for name, n in sorted(calls.items())) or "none"


def count(module_or_fn: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Work:
    """FLOPs and least bytes of `module_or_fn(*inputs, **kwargs)`, found by running it once, on any device, `meta` too.

    Runs without gradients and, for a module, in eval mode; weights, buffers, inputs (a KV cache among them), training
    flags and torch's random state are afterwards as before. Compiled code runs eagerly, and the fused fast path of
    nn.MultiheadAttention in its steps, so that every operator is seen. Counts are dense: masks, causality and zeros in
    a dense tensor discount nothing; a sparse tensor counts the entries it stores. Rows looked up count as often as
    they occur, up to the size of their table. A cache that grows counts as read once and written by its growth.
    """
    if not callable(module_or_fn):
        raise InputError(
            f"count needs a module or a function, not a {type(module_or_fn).__name__}: pass what is to be run."
        )
    fn = getattr(module_or_fn, "_orig_mod", module_or_fn)  # what torch.compile wrapped
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    model = owner if isinstance(owner, nn.Module) else None
    weights = [] if model is None else [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(w) for w in weights):
        raise InputError(
            "count would fix the shapes of this model's lazy layers: run the model once on its inputs first."
        )

    given = list(_tensors((inputs, kwargs)))
    recorder = _Recorder()
    recorder.claim("inputs", [t for t, is_state in given if not is_state])
    recorder.claim("state", state := [t for t, is_state in given if is_state])
    recorder.claim("weights", weights)
    if state:  # the call changes a cache object: it gets a copy that shares the tensors
        leaves = [*tree_leaves((inputs, kwargs)), *(t for t, _ in given)]
        shared = {id(leaf): leaf for leaf in leaves if isinstance(leaf, (Tensor, nn.Module))}
        inputs, kwargs = copy.deepcopy((inputs, kwargs), shared)
    try:
        with _undisturbed(model), recorder.tracker, recorder:
            result = fn(*inputs, **kwargs)
        left = list(_tensors((result, inputs, kwargs)))
        grown = nbytes(t for t, is_state in left if is_state) - nbytes(state)
        return recorder.work([t for t, is_state in left if not is_state], max(0, grown), model, fn is model)
    finally:
        recorder.restore()


@contextlib.contextmanager
def _undisturbed(model: nn.Module | None) -> Iterator[None]:
    """Evaluation, without gradients, fused modules and compilation."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    eager = (
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"  # flex attention compiles itself, which torch refuses while we watch
    )
    was_eager = getattr(flex, eager, None)
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it costs a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(nn.Module() if model is None else model))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if was_eager is not None:
                setattr(flex, eager, True)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            if was_eager is not None:
                setattr(flex, eager, was_eager)


def _tensors(value: Any, is_state: bool = False, seen: set[int] | None = None) -> Iterator[tuple[Tensor, bool]]:
    """Tensors in nested containers; those inside an object that is no container (a KV cache) are its state."""
    seen = set() if seen is None else seen
    if isinstance(value, (str, bytes, int, float, type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value, is_state
        return
    if isinstance(value, Mapping):
        held: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = value
    else:
        is_state = is_state or not dataclasses.is_dataclass(value)
        held = list(getattr(value, "__dict__", {}).values())
    for item in held:
        yield from _tensors(item, is_state, seen)


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Call(NamedTuple):
    """One operator's call: its arguments by the names of its schema, and which of them it writes."""

    name: str  # "aten.add_"
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    written: frozenset[str]
    is_view: bool

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        if isinstance(func, HigherOrderOperator):  # has no schema
            named = {str(i): a for i, a in enumerate(args)} | kwargs
            return cls(str(func), func, args, kwargs, named, frozenset(), False)
        schema = func._schema
        named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        named |= {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        written = frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        is_view = torch.Tag.inplace_view in func.tags or any(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        return cls(str(func._overloadpacket), func, args, kwargs, named, written, is_view)

    @property
    def base(self) -> str:
        """Its name in the tables: aten.add for aten.add_."""
        return self.name[:-1] if self.name.endswith("_") and not self.name.endswith("__") else self.name

    @property
    def is_known(self) -> bool:
        tables = (operators.FLOPS, operators.ELEMENTWISE, operators.MOVES)
        return any(self.base in table for table in tables) or self._packet in flop_registry

    @property
    def _packet(self) -> Any:
        return getattr(self.func, "_overloadpacket", self.func)

    def flops(self, out: Tensor) -> tuple[int | None, int | None]:
        """FLOPs of products and of the rest; None where no table knows."""
        products: int | None = None
        if formula := operators.FLOPS.get(self.base):
            products = formula(self.named, out)
        elif self._packet in flop_registry:
            products = flop_registry[self._packet](*self.args, **self.kwargs, out_val=out)
        operands = _leaves(self.named)
        if formula := operators.ELEMENTWISE.get(self.base):
            floating = out.is_floating_point() or operands[0].is_floating_point()
            return products, formula(self.named, out) if floating else 0
        if self.base in operators.MOVES or operators.makes_new(self.name) or not operands:
            return products, 0
        if torch.Tag.pointwise in getattr(self.func, "tags", ()):
            return products, out.numel() if out.is_floating_point() else 0
        return products, None

    def traffic(self, out: Any) -> tuple[list[Touch], list[Touch]]:
        """What it reads from its arguments, and what it writes into them."""
        reads: list[Touch] = []
        writes: list[Touch] = []
        for argument, value in self.named.items():
            pieces = _packed(value) if isinstance(value, torch.ScriptObject) else touches(_leaves(value))
            gathered, elements = operators.GATHERS.get(self.name, (None, None))
            if gathered == argument:
                pieces = _some(pieces, elements(self.named, _leaves(out)[0]) * value.element_size())
            if argument in self.written:
                if source := operators.SCATTERS.get(self.name):
                    pieces = _some(pieces, sum(t.numel() for t in _leaves(self.named[source])) * value.element_size())
                writes += pieces
                if self.name in operators.OVERWRITES or argument == "out":
                    continue
            if not operators.makes_new(self.name):
                reads += pieces
        return reads, writes


_serial = itertools.count()


def _some(pieces: list[Touch], limit: int) -> list[Touch]:
    """Rows of a table, at most all of it; which ones is not known, so no two look-ups are taken for the same."""
    return [piece._replace(key=("rows", next(_serial)), nbytes=min(piece.nbytes, limit)) for piece in pieces]


def _packed(layer: torch.ScriptObject) -> list[Touch]:
    """A quantised layer's weight with its scales and zero points, and its bias."""
    if not hasattr(layer, "unpack"):
        return []
    weight, bias = layer.unpack()
    extra = [] if bias is None else [bias]
    if weight.is_quantized and weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        extra += [weight.q_per_channel_scales(), weight.q_per_channel_zero_points()]
    size = weight.numel() * weight.element_size() + nbytes(extra)
    return [Touch(id(layer), "packed", size, 0, size)]


class _Recorder(TorchDispatchMode):
    """Sees every operator of a call; knows which memory was there before, and puts back what the call changes in it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.tracker = ModuleTracker()
        self.roles: dict[int, str] = {}  # by storage, of what was handed in
        self.made: set[int] = set()  # storages that the call allocated
        self.alive: dict[int, StorageWeakRef] = {}  # keeps a freed storage's identity from being used again
        self.reads: set[Touch] = set()  # of memory from before the call
        self.writes: set[Touch] = set()
        self.saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.rows: dict[str, tuple[int, ...]] = defaultdict(lambda: (0, 0, 0, 0))
        self.modules: dict[str, int] = defaultdict(int)
        self.uncounted: dict[str, int] = defaultdict(int)

    def _storages(self, tensors: Iterable[Tensor]) -> set[int]:
        storages = [part.untyped_storage() for part in dense(tensors)]
        for storage in storages:
            self.alive.setdefault(storage._cdata, StorageWeakRef(storage))
        return {storage._cdata for storage in storages}

    def claim(self, role: str, tensors: Iterable[Tensor]) -> None:
        self.roles |= dict.fromkeys(self._storages(tensors), role)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.is_nested for t in _leaves((args, kwargs))):
            raise InputError("count can't see into nested tensors: pad the sequences, or count each length by itself.")
        call = _Call.of(func, args, kwargs or {})
        if not call.is_known and not isinstance(func, HigherOrderOperator):
            with self:  # under inference mode, operators that only call others arrive whole
                out = func.decompose(*args, **call.kwargs)
            if out is not NotImplemented:
                return out
        self._save(t for name in call.written for t in _leaves(call.named[name]))
        out = func(*args, **call.kwargs)
        self._note(call, out)
        return out

    def _save(self, tensors: Iterable[Tensor]) -> None:
        """Memory from before the call is about to change: keep what it held."""
        for part in dense(tensors):
            (storage,) = self._storages([part])
            if storage not in self.made and storage not in self.saved and part.device.type != "meta":
                self.saved[storage] = (part.untyped_storage(), part.untyped_storage().clone())

    def restore(self) -> None:
        for storage, before in self.saved.values():
            storage.copy_(before)

    def _note(self, call: _Call, out: Any) -> None:
        operands, results = _leaves(call.named), _leaves(out)
        new = self._storages(results) - self._storages(operands)
        if call.is_view or not (new or call.written):
            return
        self.made |= new - self.roles.keys()
        reads, writes = call.traffic(out)
        kept = results[:1] if call.name in operators.BYPRODUCTS else results
        fresh = [piece for piece in touches(kept) if piece.storage in new]
        self.reads |= {piece for piece in reads if piece.storage not in self.made}
        self.writes |= {piece for piece in writes if piece.storage not in self.made}

        products, rest = call.flops(results[0] if results else operands[0])
        if products is None and rest is None:
            self.uncounted[call.name] += 1
        amounts = (1, products or 0, rest or 0, covered(reads) + covered(writes) + covered(fresh))
        self.rows[call.name] = tuple(a + b for a, b in zip(self.rows[call.name], amounts, strict=True))
        for module in self.tracker.parents if products else ():
            self.modules[module] += products or 0

    def work(self, outputs: list[Tensor], grown: int, model: nn.Module | None, whole: bool) -> Work:
        """The sums; `grown` bytes of state are written besides. `whole`: the call was that of the model itself."""
        split: dict[str, int] = defaultdict(int)
        split["outputs"] = covered(piece for piece in touches(outputs) if piece.storage in self.made)
        split["state"] = grown
        for pieces in (self.reads, self.writes):
            by_role = defaultdict(list)
            for piece in pieces:
                packed = "weights" if piece.key == "packed" and model is not None else "captured"
                by_role[self.roles.get(piece.storage, packed)].append(piece)
            for role, same in by_role.items():
                split[role] += covered(same)
        split = {role: n for role, n in sorted(split.items()) if n}
        ops = [Op(name, *row) for name, row in self.rows.items()]
        modules = {name: n for name, n in self.modules.items() if name != "Global"}
        if whole:  # "Net.layer1.0" -> "layer1.0"
            modules = {name.partition(".")[2]: n for name, n in modules.items()}
        return Work(
            flops=sum(op.flops for op in ops),
            bytes=sum(split.values()),
            elementwise_flops=sum(op.elementwise_flops for op in ops),
            bytes_by=split,
            by_op=tuple(sorted(ops, key=lambda op: (-op.flops, -op.bytes, op.name))),
            by_module=modules,
            uncounted=dict(self.uncounted),
        )
