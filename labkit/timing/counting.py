"""Counts what a call has to do, floating-point operations and bytes, by watching its operators go by.

FLOPs are those of torch's FlopCounterMode, with formulas for what it leaves out; bytes are the least that any execution
moves. It counts work, not time: which kernel runs, what a cache keeps and what a compiler fuses are outside it.
"""

import contextlib
import copy
import dataclasses
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from labkit.arguments import check_module
from labkit.errors import InputError
from labkit.modules.evaluating import evaluating
from labkit.modules.stacks import is_linear, stacks
from labkit.modules.tensors import components, dense_parts
from labkit.modules.undisturbed import undisturbed


@dataclass(frozen=True)
class Work:
    """What one call has to do.

    flops: of products only (matrix products, convolutions, attention, recurrent layers), a multiply-add being 2.
    bytes: least traffic of the whole call: what was there before and is read, once; what remains afterwards, once.
    by_module: `flops` by module name, children included; "" is the whole model.
    uncounted: operators that may compute products but have no formula, and their calls.
    """

    flops: int
    bytes: int
    by_module: Mapping[str, int] = field(default_factory=dict)
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes if self.bytes else math.inf if self.flops else 0.0

    def __str__(self) -> str:
        calls = ", ".join(f"{name} x{n}" for name, n in sorted(self.uncounted.items()))
        left_out = f", uncounted: {calls}" if calls else ""
        return f"{self.flops / 1e9:.4g} GFLOP, {self.bytes / 1e6:.4g} MB, {self.intensity:.3g} FLOP/byte{left_out}"


def count(module_or_fn: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Work:
    """FLOPs and least bytes of `module_or_fn(*inputs, **kwargs)`, found by running it once, on any device, `meta` too.

    Runs without gradients and, for a module, in eval mode; training flags, torch's random state and a KV cache among
    the inputs are afterwards as before. Compiled code runs eagerly, and the fused fast path of nn.MultiheadAttention in
    its steps, so that every operator is seen. Counts are dense: masks, causality and zeros in a dense tensor discount
    nothing; a sparse tensor counts the entries it stores. Rows looked up count as often as they occur, up to the size
    of their table. A cache that grows counts as read once and written by its growth.
    Raises InputError for what cannot be called, for nested tensors, and for a tuple of inputs that the call does not
    take as its one input; what else the call raises passes through.
    """
    if not callable(module_or_fn):
        raise InputError(
            f"count needs a module or a function, not a {type(module_or_fn).__name__}: pass what is to be run."
        )
    fn = getattr(module_or_fn, "_orig_mod", module_or_fn)  # what torch.compile wrapped
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    states = [t for t, is_state in _tensors((inputs, kwargs)) if is_state]
    if states:  # the call changes a cache object: it gets a copy that shares the tensors
        leaves = [*tree_leaves((inputs, kwargs)), *states]
        shared = {id(leaf): leaf for leaf in leaves if isinstance(leaf, (Tensor, nn.Module))}
        inputs, kwargs = copy.deepcopy((inputs, kwargs), shared)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    traffic = _Traffic({str(packet) for packet in counter.flop_registry})
    with _undisturbed(owner if isinstance(owner, nn.Module) else None), traffic, counter:
        result = _run(fn, inputs, kwargs)

    remains = list(_tensors((result, inputs, kwargs)))
    growth = _nbytes(t for t, is_state in remains if is_state) - _nbytes(states)
    made = [piece for piece in _pieces(t for t, is_state in remains if not is_state) if piece.storage in traffic.made]
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    total = flops.pop("Global", 0)
    if fn is owner:  # "Net.layer1.0" -> "layer1.0"
        flops = {name.partition(".")[2]: n for name, n in flops.items()}
    nbytes = _covered(traffic.reads) + _covered(traffic.writes) + _covered(made) + max(0, growth)
    return Work(total, nbytes, flops, dict(traffic.uncounted))


def _run(fn: Callable[..., Any], inputs: tuple, kwargs: Mapping[str, Any]) -> Any:
    try:
        return fn(*inputs, **kwargs)
    except (AttributeError, TypeError) as error:
        packed = len(inputs) == 1 and isinstance(inputs[0], tuple | list | Mapping)
        if not packed:
            raise
        star = "**" if isinstance(inputs[0], Mapping) else "*"
        raise InputError(
            f"count takes inputs one by one, as the call does, not in a {type(inputs[0]).__name__}: write "
            f"count(model, {star}inputs)."
        ) from error


@contextlib.contextmanager
def _undisturbed(model: nn.Module | None) -> Iterator[None]:
    """Evaluation without gradients, fused modules and compilation; training flags and random state come back."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it costs a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model if model is not None else nn.Identity()))
        stack.enter_context(undisturbed())
        yield


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


# --- FLOPs that torch's counter leaves out ----------------------------------------------------------------------------


def _stored(t: Tensor) -> int:
    """Entries that take part in a product: all of a dense tensor, those that a sparse one stores."""
    return t.numel() if t.layout is torch.strided else components(t)[-1].numel()


def _product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """[..., M, K] x [..., K, N], or x [K]: each stored entry of one meets the N (or M) numbers of the other."""
    if b.layout is not torch.strided:
        return 2 * _stored(b) * a.shape[-2]
    return 2 * _stored(a) * (b.shape[-1] if b.dim() > 1 else 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """softmax(Q K^T) V, [B, H, L, D] x [B, Hkv, T, D] x [B, Hkv, T, Dv]: a score takes D multiply-adds, its use Dv."""
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return 2 * scores * (query.shape[-1] + value.shape[-1])


def _recurrent(x: Tensor, *rest: Any, **_: Any) -> int:
    """Every weight matrix meets every time step of every sequence once."""
    weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:2]  # cuDNN's come as a list
    matrices = [w for w in weights if w.dim() == 2]
    return 2 * (x.numel() // x.shape[-1]) * sum(w.numel() for w in matrices)


def _packed(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """x [..., K] against a packed weight: the result's last dimension tells N."""
    return 2 * x.numel() * out_val.shape[-1]


def _formulas() -> dict[Any, Callable[..., int]]:
    """By operator; each takes the operator's arguments and its result as `out_val`."""
    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    attention = [f"_scaled_dot_product_{kind}" for kind in (*kinds, "fused_attention_overrideable")]
    packed = ("_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")
    table = {
        _product: ("mm", "bmm", "mv", "dot", "_int_mm"),
        lambda bias, a, b, *_, **__: _product(a, b): ("addmm", "_sparse_addmm", "baddbmm", "addbmm", "addmv"),
        _attention: attention,
        _recurrent: ("mkldnn_rnn_layer", "_cudnn_rnn"),
        _packed: packed,
    }
    for formula in table:
        formula._get_raw = True  # tensors, not their shapes
    aten = torch.ops.aten
    return {getattr(aten, name): f for f, names in table.items() for name in names if hasattr(aten, name)}


FORMULAS = _formulas()

# Operators without products that torch does not tag as pointwise, whatever their backend and their dimensions.
WITHOUT_PRODUCTS = re.compile(
    r"(nan)?sum|mean|prod|(arg|a)?(max|min)\w*|cum\w+|trace|(var|std)(_mean)?|logsumexp|\w*(norm|softmax|loss|pool)\w*"
    r"|glu|hardswish|_prelu_kernel|polar|complex|addr|\w*(upsample|quantize)\w*|int_repr|any|all|equal|isin"
    r"|\w*(embedding|scatter|copy|pad)\w*|index\w*|gather|take|masked\w*|where|\w*sort|topk|kthvalue|median"
    r"|\w*unique\w*|nonzero|searchsorted|hist\w*|bucketize|bincount|clone|cat|stack|repeat\w*|roll|flip|tri[lu]|fill"
    r"|zero|resize|set|diag\w*|\w*shuffle|im2col|empty\w*|ones|zeros|full|arange|eye|linspace|scalar_tensor|rand\w*"
    r"|native_dropout|_thnn_fused\w+|uniform|bernoulli|multinomial|exponential|_?to_\w+|_coalesce|_convert_weight\w+|lift_fresh"
)

# --- bytes ------------------------------------------------------------------------------------------------------------

# The argument of which no more is read than comes out, and the one of which no more is written than goes in.
GATHERS = dict.fromkeys(("index", "index_select", "gather", "take"), "self") | {"embedding": "weight"}
SCATTERS = {"index_copy_": "source", "index_add_": "source", "index_put_": "values", "scatter_": "index"}
# In place, they do not read what was there.
OVERWRITES = frozenset(
    ["copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "index_copy_", "index_put_", "scatter_"]
)


class _Piece(NamedTuple):
    """`nbytes` of the bytes `lo` to `hi` of a storage."""

    storage: int
    lo: int
    hi: int
    nbytes: int


def _pieces(tensors: Iterable[Tensor]) -> list[_Piece]:
    """The memory behind tensors: each element once, however it is permuted, reshaped or expanded."""
    touched = []
    for t in dense_parts(tensors):
        item, lo = t.element_size(), t.storage_offset() * t.element_size()
        dims = [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if stride]
        span = (1 + sum(stride * (size - 1) for stride, size in dims)) * item if t.numel() else 0
        elements = math.prod(size for _, size in dims) * item  # windows that overlap touch no more than their span
        touched.append(_Piece(t.untyped_storage()._cdata, lo, lo + span, min(elements, span)))
    return touched


def _covered(pieces: Iterable[_Piece]) -> int:
    """Distinct bytes: the sum over distinct pieces, but no more in a storage than they span together."""
    storages: dict[int, list[_Piece]] = defaultdict(list)
    for piece in set(pieces):
        storages[piece.storage].append(piece)
    return sum(
        min(sum(p.nbytes for p in same), max(p.hi for p in same) - min(p.lo for p in same))
        for same in storages.values()
    )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in dense_parts(tensors))


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Traffic(TorchDispatchMode):
    """Sees every operator of a call and what it reads and writes of the memory that was there before."""

    supports_higher_order_operators = True

    def __init__(self, with_formula: set[str]) -> None:
        super().__init__()
        self.with_formula = with_formula
        self.made: set[int] = set()  # storages that the call allocated
        self.alive: dict[int, StorageWeakRef] = {}  # keeps a freed storage's identity from being used again
        self.reads: set[_Piece] = set()
        self.writes: set[_Piece] = set()
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _leaves((args, kwargs))
        if any(t.is_nested for t in operands):
            raise InputError("count can't see into nested tensors: pad the sequences, or count each length by itself.")
        before = self._storages(operands)
        out = func(*args, **kwargs)
        results = _leaves(out)
        new = self._storages(results) - before
        if isinstance(func, HigherOrderOperator):
            named, written = {str(i): a for i, a in enumerate(args)} | kwargs, set()
        else:
            arguments = func._schema.arguments
            named = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
            written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        if not new and (not written or torch.Tag.inplace_view in func.tags):  # a view
            return out
        self.made |= new
        self._note(func, named, written, results)
        return out

    def _storages(self, tensors: Iterable[Tensor]) -> set[int]:
        storages = [part.untyped_storage() for part in dense_parts(tensors)]
        for storage in storages:
            self.alive.setdefault(storage._cdata, StorageWeakRef(storage))
        return {storage._cdata for storage in storages}

    def _note(self, func: Any, named: Mapping[str, Any], written: set[str], results: list[Tensor]) -> None:
        packet = str(getattr(func, "_overloadpacket", func))
        name = packet.removeprefix("aten.")
        only_shape = name.endswith("_like") or name.startswith("new_")  # of their operand
        for argument, value in named.items():
            touched = _pieces(_leaves(value))
            if GATHERS.get(name) == argument:
                touched = [p._replace(nbytes=min(p.nbytes, results[0].nbytes)) for p in touched]
            if argument in written:
                if source := SCATTERS.get(name):
                    size = sum(t.numel() for t in _leaves(named[source])) * value.element_size()
                    touched = [p._replace(nbytes=min(p.nbytes, size)) for p in touched]
                self.writes |= {p for p in touched if p.storage not in self.made}
                if name in OVERWRITES or argument == "out":
                    continue
            if not only_shape:
                self.reads |= {p for p in touched if p.storage not in self.made}
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
        if not (packet in self.with_formula or pointwise or only_shape or WITHOUT_PRODUCTS.fullmatch(base)):
            self.uncounted[packet] += 1


# --- components of a transformer --------------------------------------------------------------------------------------

PROJECTIONS, PRODUCTS, FEED_FORWARD = "attention projections", "attention products", "feed-forward"
HEAD, EMBEDDINGS, REST = "output head", "embeddings", "norms"


def parameters_by_component(model: nn.Module) -> dict[str, int]:
    """Parameters of each component; a tensor that two share, as a tied output head does, counts for the first.

    A model on the `meta` device will do.
    """
    check_module(model)
    totals, parts = _no_components(), _component_of(model)
    for name, parameter in model.named_parameters():
        totals[parts[name.rpartition(".")[0]]] += parameter.numel()
    return dict(totals)


def flops_by_component(model: nn.Module, **inputs: Any) -> dict[str, int]:
    """FLOPs of one call of each component, a multiply-add as two.

    Attention products (scores, and the weighted sum of values) belong to no layer with weights: they are what is left.
    """
    check_module(model)
    work, totals = count(model, **inputs), _no_components()
    for name, component in _component_of(model).items():
        if not list(model.get_submodule(name).children()):  # by_module includes what is below
            totals[component] += work.by_module.get(name, 0)
    totals[PRODUCTS] = work.flops - totals.total()
    return dict(totals)


def _no_components() -> Counter[str]:
    return Counter(dict.fromkeys((PROJECTIONS, PRODUCTS, FEED_FORWARD, HEAD, EMBEDDINGS, REST), 0))


def _component_of(model: nn.Module) -> dict[str, str]:
    """{module with weights of its own: component}.

    A linear module in a layer belongs to the attention, where its name says so, or to the feed-forward network; one
    outside of all layers is an output head. Also the rotary embedding, whose angles are a product of matrices in some
    versions of transformers.
    """
    parts: dict[str, str] = {}
    for layers in stacks(model):
        for name, module in model.get_submodule(layers).named_modules(prefix=layers):
            if is_linear(module):
                attends = "att" in name.removeprefix(layers).lower()
                parts[name] = PROJECTIONS if attends else FEED_FORWARD
    for name, module in model.named_modules():
        if name not in parts and next(module.parameters(recurse=False), None) is not None:
            embeds = isinstance(module, nn.Embedding) or "embeddings" in name
            parts[name] = EMBEDDINGS if embeds else HEAD if isinstance(module, nn.Linear) else REST
        elif name.endswith("rotary_emb"):
            parts[name] = EMBEDDINGS
    return parts
