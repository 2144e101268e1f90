"""Exact rewrites: the same function from other weights, which are easier to round.

A channel may be scaled by s > 0 where it is made and by 1 / s where it is read, if all that lies between lets a scale
pass: relu(s x) = s relu(x). Who feeds whom, and through which operators, comes from the trace of `pruning.coupling`.
Every rewrite is made on a copy in float64 first and compared with the model; only then are the weights rounded to their
own type, once. Nothing here knows a number of bits.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import EqualityError, InputError
from labkit.graph import equality, surgery
from labkit.graph import groups as coupling
from labkit.graph.dataflow import Dataflow, Route, Source
from labkit.graph.subclasses import after_norm
from labkit.modules import batches as batching
from labkit.modules.hooks import watching
from labkit.quantization import calls

EXACT = 1e-9  # of the largest output, in float64
SWEEPS, STILL = 100, 1e-4  # of equalisation over all pairs; log s from which on a sweep changes nothing


class Smoothed(nn.Module):
    """A Linear whose input is divided by a vector first, where nothing before it can take that over.

    layer: the Linear, its columns times `divisor` [in]. A multiplication an input at run time, unless what rounds the
    input next does it in passing.
    """

    def __init__(self, layer: nn.Linear, divisor: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("divisor", divisor)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input / self.divisor)


def fold_batch_norm(model: nn.Module, args: Any) -> nn.Module:
    """A copy of `model` in which every batch norm that follows a convolution or Linear is part of it.

    In eval mode y = gamma (W x + b - mean) / sqrt(var + eps) + beta: the rows of W times gamma / sqrt(var + eps), and a
    bias. Jacob et al. 2018 (arXiv:1712.05877), section 3.2, after training. The norm becomes an Identity, or the
    activation that it ends with (timm's BatchNormAct2d), and a layer without a bias gets one. A norm stays where it is
    something else: behind a sum, a concatenation or a transposed convolution, with another reader of the layer's
    output, with a layer or norm that is used twice, with no running statistics, or over another dimension than the
    layer's.

    args: an example input: a tensor, the tuple of all arguments, or a dict of keyword arguments. Raises InputError
    where the model cannot be traced on it or returns no number, EqualityError where the copy would compute something
    else.
    """
    calls.check_model(model)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return surgery.cut(model, {}, {})
    args, kwargs = _call(args)
    graph = Dataflow(model, args, kwargs)
    pairs = graph.folds(model)

    def rewrite_(new: nn.Module) -> None:
        for name, norm_name in pairs:
            layer, norm = new.get_submodule(name), new.get_submodule(norm_name)
            mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.double()
            bias = -mean * scale if layer.bias is None else (layer.bias.double() - mean) * scale
            bias = bias if norm.bias is None else bias + norm.bias.double()
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_empty(len(bias)), layer.weight.requires_grad)
            layer.weight.copy_(_by_row(layer.weight.double(), scale))
            layer.bias.copy_(bias)
            _replace_(new, norm, after_norm(norm))

    return _rewritten(model, args, kwargs, graph, rewrite_)


def equalize(model: nn.Module, args: Any) -> nn.Module:
    """A copy of `model` with batch norms folded, and the ranges of channels evened out between layers.

    Cross-layer equalisation, Nagel et al. 2019 (arXiv:1906.04721), section 4.1: with r1 = max |row of W1| that
    makes a channel and r2 = max |columns| that read it, W1 and b1 are divided and W2 is multiplied by s = sqrt(r1 / r2)
    so that both ranges are sqrt(r1 r2). Over all pairs again and again until nothing moves. A pair is a convolution or
    Linear and all layers that read it, through ReLU, pooling, flattening, products with other values: what f(s x) =
    s f(x) holds for. A channel that is never made or never read stays.

    args: as for `fold_batch_norm`. Raises InputError where a layer is clipped above (ReLU6): s x would be clipped at 6,
    not at 6 s, and the function would be another; and where the model has no pair.
    """
    model = fold_batch_norm(model, args)
    args, kwargs = _call(args)
    graph = Dataflow(model, args, kwargs)
    pairs = []
    for source in graph.sources:
        if not source.is_layer:
            continue
        route = graph.route(source)
        if route.clip:
            raise InputError(
                f"The output of {source.module or 'a layer'} is clipped from above ({route.clip}), so its channels "
                "cannot be scaled: put nn.ReLU in the place of nn.ReLU6 first, which is another function, or leave the "
                "model as it is."
            )
        if route.readers and not route.blocked:
            pairs.append((source, route))
    if not pairs:
        raise InputError(
            "Nothing in this model can be equalised: no layer feeds only layers through what lets a scale pass, such "
            "as ReLU and pooling; leave it as it is."
        )

    def rewrite_(new: nn.Module) -> None:
        with _wide(new, pairs) as wide:
            for _ in range(SWEEPS):
                largest = 0.0
                for source, route in pairs:
                    made = wide[source.names[0]].flatten(1).abs().amax(1)
                    columns, read = _columns(wide, new, route)
                    s = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
                    _scale_(wide, source, columns, s)
                    largest = max(largest, float(s.log().abs().max()))
                if largest < STILL:
                    break

    return _rewritten(model, args, kwargs, graph, rewrite_)


def smooth(model: nn.Module, batches: Iterable, alpha: float = 0.5) -> nn.Module:
    """A copy of `model` in which outliers of activations are moved into the weights of the Linears that read them.

    SmoothQuant, Xiao et al. 2023 (arXiv:2211.10438), equation 4: channel j of the input is divided, and column j of the
    weight multiplied, by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), with the maxima over all valid tokens of
    `batches` and over all Linears that read the channel. What makes the channel takes the division over: LayerNorm or
    RMSNorm, or a Linear (up_proj before down_proj). Where a norm's output is also read by something else, such as the
    shortcut of BERT's post-norm blocks, the Linears become `Smoothed`, which divide when they are called. Linears that
    are fed by none of these (attention's output, GELU's) stay.

    batches: what the model is called with; padding (attention_mask 0) does not count. alpha: from 0 (all columns
    of a weight get one maximum) to 1 (all channels of an activation do). Raises InputError for others, for batches that
    are empty or make NaN, and where nothing can be smoothed.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise InputError(
            f"alpha is {alpha!r}, but it must be from 0 (a weight's columns get even) to 1 (the activations do)."
        )
    calls.check_model(model)
    batches = batching.not_empty(batching.check_batches(batches, "smooth"))
    first = next(batches)
    args, kwargs, _ = batching.split(model, first)
    graph = Dataflow(model, args, kwargs)
    sites = scale_sites(model, graph)
    if not sites:
        raise InputError(
            "Nothing in this model can be smoothed: no Linear is fed by a LayerNorm, an RMSNorm or another Linear "
            "through what lets a scale pass; leave it as it is."
        )
    maxima = _maxima(model, itertools.chain([first], batches), [next(iter(route.readers)) for _, route in sites])

    def rewrite_(new: nn.Module) -> None:
        with _wide(new, sites) as wide:
            plan = []  # all of it from the weights as they are
            for (_, route), largest in zip(sites, maxima, strict=True):
                columns, read = _columns(wide, new, route)
                made = largest.to(read).unflatten(0, (len(read), -1)).amax(1)
                plan.append((columns, torch.where((made > 0) & (read > 0), made**alpha / read ** (1 - alpha), 1.0)))
            for (source, route), (columns, s) in zip(sites, plan, strict=True):
                if not route.blocked:
                    _scale_(wide, source, columns, s)
                    continue
                for view, (name, repeats) in zip(columns, route.readers.items(), strict=True):
                    layer = new.get_submodule(name)
                    divisor = s.to(layer.weight)  # as it is stored, so that the columns take back the same
                    view.mul_(divisor.double()[:, None])
                    _replace_(new, layer, Smoothed(layer, divisor.repeat_interleave(repeats)))

    return _rewritten(model, args, kwargs, graph, rewrite_)


# --- scales -----------------------------------------------------------------------------------------------------------


def scale_sites(model: nn.Module, graph: Dataflow) -> list[tuple[Source, Route]]:
    """Norms and Linears whose channels Linears read; of a norm something else may read them too: a blocked route."""
    pairs = []
    for source in graph.sources:
        route = graph.route(source)
        names = (*route.readers, source.module) if source.is_layer else route.readers
        linear = all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
        if route.readers and linear and not (source.is_layer and route.blocked):
            pairs.append((source, route))
    return pairs


@torch.no_grad()
def rescale_(model: nn.Module, source: Source, route: Route, s: Tensor) -> None:
    """The same function: what makes the channels divided by s [channels], the columns that read them times s."""
    with _wide(model, [(source, route)]) as wide:
        _scale_(wide, source, _columns(wide, model, route)[0], s.double())


@contextlib.contextmanager
def _wide(model: nn.Module, sites: Sequence[tuple[Source, Route]]) -> Iterator[dict[str, Tensor]]:
    """The parameters that the sites scale, in float64 to be changed in place; what they become is stored at the end."""
    parameters = dict(model.named_parameters())
    names = {name for source, _ in sites for name in source.names}
    names |= {f"{name}.weight".lstrip(".") for _, route in sites for name in route.readers}
    wide = {name: parameters[name].detach().to(torch.float64, copy=True).contiguous() for name in names}
    yield wide
    for name in names:
        parameters[name].copy_(wide[name])


def _columns(wide: Mapping[str, Tensor], model: nn.Module, route: Route) -> tuple[list[Tensor], Tensor]:
    """(views of the readers' weights, [groups, out / groups, channels / groups, terms]; their max |w| a channel)"""
    views = []
    for name, repeats in route.readers.items():
        weight, groups = wide[f"{name}.weight".lstrip(".")], getattr(model.get_submodule(name), "groups", 1)
        views.append(weight.view(groups, len(weight) // groups, weight.shape[1] // repeats, -1))
    return views, torch.stack([view.abs().amax((1, 3)).flatten() for view in views]).amax(0)


def _scale_(wide: Mapping[str, Tensor], source: Source, columns: Sequence[Tensor], s: Tensor) -> None:
    """Divides what makes the channels by s [channels], and multiplies what reads them."""
    for name in source.names:
        wide[name].copy_(_by_row(wide[name], 1 / s))
    for view in columns:
        view.mul_(s.view(len(view), 1, -1, 1))


def _by_row(x: Tensor, s: Tensor) -> Tensor:
    return x * s.view(-1, *[1] * (x.dim() - 1))


def _maxima(model: nn.Module, batches: Iterable, layers: Sequence[str]) -> list[Tensor]:
    """max |x| of each input of these Linears, over the valid tokens of all batches."""
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, _: Tensor) -> None:
        valid = batching.valid_tokens(model, named, name, x)
        x = x.flatten(0, -2)[valid.flatten()].abs().double()
        if not len(x) and name not in largest:
            raise InputError(f"There are no values in the input of {name}: begin with a batch that is not empty.")
        if not x.isfinite().all():
            raise InputError(f"There is NaN or infinity in the input of {name}: look for the batch it comes from.")
        largest[name] = torch.cat([largest.get(name, x[:0]), x]).amax(0, keepdim=True)

    with torch.no_grad(), batching.evaluating(model), watching(model, layers, look):
        for batch in batches:
            named = batching.inputs(model, batch)
            args, kwargs, _ = batching.split(model, batch)
            calls.run(model, *args, **kwargs)
    return [largest[name][0] for name in layers]


# --- copies -----------------------------------------------------------------------------------------------------------


def _call(args: Any) -> tuple[tuple, dict[str, Any]]:
    return ((), dict(args)) if isinstance(args, Mapping) else coupling.arguments(args, None)


def _replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is in the model."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@torch.inference_mode(False)  # the new model is to be trained, wherever it was made
@torch.no_grad()
def _rewritten(
    model: nn.Module, args: tuple, kwargs: Mapping, graph: Dataflow, rewrite_: Callable[[nn.Module], None]
) -> nn.Module:
    """A copy of `model` after `rewrite_`, which is tried and compared on a float64 copy before."""
    graph.check_compared()
    exact = surgery.cut(model, {}, {}).double()
    rewrite_(exact)
    report = equality.check(model, exact, graph.record, np.zeros(graph.record.labels.count, dtype=bool), args, kwargs)
    limit = max(report.tolerance, EXACT * report.scale if report.dtype == "float64" else 0.0)
    if not report.error <= limit:
        raise EqualityError(
            f"The rewritten model's outputs differ by {report.error:.2g} from the model's (largest {report.scale:.2g}, "
            f"tolerance {limit:.2g}, in {report.dtype}): its forward pass does something that the trace does not show; "
            "rewrite the part of it that is made of layers."
        )
    new = surgery.cut(model, {}, {})
    rewrite_(new)
    return new
