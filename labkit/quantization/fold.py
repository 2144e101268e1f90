"""Exact rewrites: the same function from other weights, which are easier to round.

A layer may scale a channel by s > 0 if its readers scale it by 1 / s and all operators between let a scale
pass: relu(s x) = s relu(x). `graph.dataflow` finds readers and operators in a trace. Every rewrite is made on a copy in
float64 first and compared with the model; only then are weights rounded to the model's dtype, once. No function in this
file knows a number of bits.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import arguments
from labkit.errors import EqualityError, InputError
from labkit.graph import equality
from labkit.graph.dataflow import Dataflow, Route, Source
from labkit.graph.passes import full_copy
from labkit.graph.subclasses import after_norm
from labkit.modules import batches as batching
from labkit.modules.hooks import watching
from labkit.modules.replacing import replace_
from labkit.modules.weights import qualified
from labkit.quantization import calls

EXACT = 1e-9  # of the largest output, in float64
SWEEPS, STILL = 100, 1e-4  # of equalization over all pairs; log s from which on a sweep changes nothing


class Site(NamedTuple):
    """Channels that can be scaled: the operation that makes the channels, and the route to the readers."""

    source: Source
    route: Route


class Smoothed(nn.Module):
    """A Linear with an input divided by a vector first, for inputs that no layer before can divide.

    layer: the Linear, with columns multiplied by `divisor` [in]. The division costs a multiplication an input at run
    time, unless the next rounding of the input divides in passing.
    """

    def __init__(self, layer: nn.Linear, divisor: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("divisor", divisor)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input / self.divisor)


# --- batch norm -------------------------------------------------------------------------------------------------------


def fold_batch_norm(model: nn.Module, args: Any) -> nn.Module:
    """Return a copy of `model` in which batch norms after a convolution or Linear are part of the layer.

    args: an example input: a tensor, the tuple of all arguments, or a dict of keyword arguments.

    In eval mode y = gamma (W x + b - mean) / sqrt(var + eps) + beta: the rows of W times gamma / sqrt(var + eps), and a
    bias. Jacob et al. 2018 (arXiv:1712.05877), section 3.2, after training. The norm becomes an Identity, or the
    activation that the norm ends with (timm's BatchNormAct2d), and a layer without a bias gets one. A norm stays
    elsewhere: behind a sum, a concatenation or a transposed convolution, with another reader of the layer's output,
    with a layer or norm that is used twice, with no running statistics, or over another dimension than the layer's.

    Raises InputError if the model cannot be traced on `args` or returns no number, EqualityError if the copy would
    compute something else.
    """
    calls.check_model(model)
    new = full_copy(model)
    _fold_(new, *_call(new, args))
    return new


def fold_if_proved_(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Fold the batch norms of `model` in place as `fold_batch_norm` does, and return "".

    If the result cannot be proved equal, leave the model as it is and return the reason.
    """
    try:
        _fold_(model, args, kwargs)
    except (InputError, EqualityError) as error:
        cause, _, _ = str(error).rpartition(": ")  # without the remedy
        return cause or str(error)
    return ""


def _fold_(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Fold the batch norms of `model` in place, after a proof; the model is unchanged if an error is raised."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        graph = Dataflow(model, args, kwargs)
        graph.check_compared()
        pairs = graph.folds(model)
        _rewrite_(model, graph, partial(_fold_norms_, pairs=pairs))


def _fold_norms_(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold the norm of each pair (layer, norm) of names into the layer."""
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        mean = norm.running_mean.double()
        bias = -mean * scale if layer.bias is None else (layer.bias.double() - mean) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_empty(len(bias)), layer.weight.requires_grad)
        layer.weight.copy_(_by_row(layer.weight.double(), scale))
        layer.bias.copy_(bias)
        replace_(model, norm_name, after_norm(norm).train(norm.training))


# --- cross-layer equalization -----------------------------------------------------------------------------------------


def equalize(model: nn.Module, args: Any) -> nn.Module:
    """Return a copy of `model` with batch norms folded, and the ranges of channels evened out between layers.

    args: as for `fold_batch_norm`.

    Cross-layer equalization, Nagel et al. 2019 (arXiv:1906.04721), section 4.1: with r1 = max |row of W1| that makes a
    channel and r2 = max |columns| that read the channel, W1 and b1 are divided by s = sqrt(r1 / r2) and W2 is
    multiplied by s, so that both ranges are sqrt(r1 r2). All pairs take their turn again and again until nothing moves.
    A pair is a convolution or Linear and all layers that read its output, through operators with f(s x) = s f(x): ReLU,
    pooling, flattening, products with other values. A channel that is never made or never read stays.

    Raises InputError for a layer that is clipped above (ReLU6): s x would be clipped at 6, not at 6 s, and the function
    would change; and for a model without a pair.
    """
    new = fold_batch_norm(model, args)
    graph = Dataflow(new, *_call(new, args))
    graph.check_compared()
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
            pairs.append(Site(source, route))
    if not pairs:
        raise InputError(
            "Nothing in this model can be equalised: no layer feeds only layers through what lets a scale pass, such "
            "as ReLU and pooling; leave it as it is."
        )
    _rewrite_(new, graph, partial(_equalize_, pairs=pairs))
    return new


def _equalize_(model: nn.Module, pairs: Sequence[Site]) -> None:
    """Even out the ranges of all pairs in turn until a sweep changes nothing."""
    with _in_float64(model, pairs) as parameters:
        for _ in range(SWEEPS):
            largest_change = 0.0
            for source, route in pairs:
                range_made = parameters[source.names[0]].flatten(1).abs().amax(1)
                columns = _columns(parameters, model, route)
                range_read = _largest_by_channel(columns)
                s = torch.where((range_made > 0) & (range_read > 0), (range_made / range_read).sqrt(), 1.0)
                _scale_(parameters, source, columns, s)
                largest_change = max(largest_change, float(s.log().abs().max()))
            if largest_change < STILL:
                break


# --- SmoothQuant ------------------------------------------------------------------------------------------------------


def smooth(model: nn.Module, batches: Iterable, alpha: float = 0.5) -> nn.Module:
    """Return a copy of `model` in which outliers of activations are moved into the weights of the next Linears.

    batches: batches of inputs; padding (attention_mask 0) does not count.
    alpha: number from 0 (all columns of a weight get one maximum) to 1 (all channels of an activation do).

    SmoothQuant, Xiao et al. 2023 (arXiv:2211.10438), equation 4: channel j of the input is divided, and column j of the
    weight multiplied, by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), with the maxima over all valid tokens of
    `batches` and over all Linears behind the channel. The operation before takes the division over: LayerNorm or
    RMSNorm, or a Linear (up_proj before down_proj). If a norm's output has more readers, as the shortcut of BERT's
    post-norm blocks, the Linears become `Smoothed` and divide at every call. Linears with a different input
    (attention's output, GELU's) stay.

    Raises InputError for an alpha out of range, for batches that are empty or make NaN, and for a model without a
    Linear to smooth.
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
    graph.check_compared()
    sites = scale_sites(model, graph)
    if not sites:
        raise InputError(
            "Nothing in this model can be smoothed: no Linear is fed by a LayerNorm, an RMSNorm or another Linear "
            "through what lets a scale pass; leave it as it is."
        )
    first_readers = [next(iter(route.readers)) for _, route in sites]
    maxima = _input_maxima(model, itertools.chain([first], batches), first_readers)
    rewrite_ = partial(_smooth_, sites=sites, input_maxima=maxima, alpha=alpha)
    new = full_copy(model)
    _rewrite_(new, graph, rewrite_)
    return new


def _smooth_(
    model: nn.Module,
    sites: Sequence[Site],
    input_maxima: Sequence[Tensor],
    alpha: float,
) -> None:
    """Scale the channels of each site.

    input_maxima: max |x| of each input [in] of the Linears that read the channels, site by site.
    """
    with _in_float64(model, sites) as parameters:
        plan = []  # all scales are taken from the weights before any change
        for (_, route), largest in zip(sites, input_maxima, strict=True):
            columns = _columns(parameters, model, route)
            column_maxima = _largest_by_channel(columns)
            channel_maxima = largest.to(column_maxima).unflatten(0, (len(column_maxima), -1)).amax(1)
            is_used = (channel_maxima > 0) & (column_maxima > 0)
            s = torch.where(is_used, channel_maxima**alpha / column_maxima ** (1 - alpha), 1.0)
            plan.append((columns, s))
        for (source, route), (columns, s) in zip(sites, plan, strict=True):
            if route.blocked:
                _divide_when_called_(model, route, columns, s)
            else:
                _scale_(parameters, source, columns, s)


def _divide_when_called_(
    model: nn.Module,
    route: Route,
    columns: Sequence[Tensor],
    s: Tensor,
) -> None:
    """Make the Linears that read a route's channels `Smoothed`, with the divisor s [channels]."""
    for view, (name, repeats) in zip(columns, route.readers.items(), strict=True):
        layer = model.get_submodule(name)
        divisor = s.to(layer.weight)  # as it is stored, so that the columns take back the same
        view.mul_(divisor.double()[:, None])
        smoothed = Smoothed(layer, divisor.repeat_interleave(repeats))
        replace_(model, name, smoothed.train(layer.training))


# --- scales -----------------------------------------------------------------------------------------------------------


def scale_sites(model: nn.Module, graph: Dataflow) -> list[Site]:
    """Return the norms and Linears whose channels only Linears read.

    The channels of a norm may have other readers as well: then the route is blocked.
    """
    sites = []
    for source in graph.sources:
        route = graph.route(source)
        names = (*route.readers, source.module) if source.is_layer else route.readers
        all_linear = all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
        is_blocked_layer = source.is_layer and bool(route.blocked)
        if route.readers and all_linear and not is_blocked_layer:
            sites.append(Site(source, route))
    return sites


@torch.no_grad()
def rescale_(
    model: nn.Module,
    source: Source,
    route: Route,
    s: Tensor,
) -> None:
    """Divide the channels of a source by s [channels], and multiply the columns of all readers by s."""
    with _in_float64(model, [Site(source, route)]) as parameters:
        _scale_(parameters, source, _columns(parameters, model, route), s.double())


@contextlib.contextmanager
def _in_float64(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Yield the parameters of the sites in float64, to be changed in place; store them in the model at the end."""
    parameters = dict(model.named_parameters())
    names = set()
    for source, route in sites:
        names |= set(source.names)
        names |= {qualified(layer, "weight") for layer in route.readers}
    in_float64 = {name: parameters[name].detach().to(torch.float64, copy=True).contiguous() for name in names}
    yield in_float64
    for name in names:
        parameters[name].copy_(in_float64[name])


def _columns(parameters: Mapping[str, Tensor], model: nn.Module, route: Route) -> list[Tensor]:
    """Return a view of each reader's weight: [groups, out / groups, channels / groups, weights a channel]."""
    views = []
    for name, repeats in route.readers.items():
        weight = parameters[qualified(name, "weight")]
        groups = getattr(model.get_submodule(name), "groups", 1)
        channels = weight.shape[1] // repeats
        views.append(weight.view(groups, len(weight) // groups, channels, -1))
    return views


def _largest_by_channel(columns: Sequence[Tensor]) -> Tensor:
    """Return max |w| of the columns that read each channel, over all readers: [channels]."""
    maxima = [view.abs().amax((1, 3)).flatten() for view in columns]
    return torch.stack(maxima).amax(0)


def _scale_(
    parameters: Mapping[str, Tensor],
    source: Source,
    columns: Sequence[Tensor],
    s: Tensor,
) -> None:
    """Divide the parameters of a source by s [channels], and multiply the columns of all readers by s."""
    for name in source.names:
        parameters[name].copy_(_by_row(parameters[name], 1 / s))
    for view in columns:
        view.mul_(s.view(len(view), 1, -1, 1))


def _by_row(x: Tensor, s: Tensor) -> Tensor:
    return x * s.view(-1, *[1] * (x.dim() - 1))


def _input_maxima(model: nn.Module, batches: Iterable, layers: Sequence[str]) -> list[Tensor]:
    """Return max |x| of each input [in] of the named Linears, over the valid tokens of all batches."""
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, _: Tensor) -> None:
        valid = batching.valid_tokens(model, named, name, x)
        x = x.flatten(0, -2)[valid.flatten()].abs().double()
        if not len(x) and name not in largest:
            raise InputError(f"There are no values in the input of {name}: begin with a batch that is not empty.")
        if not x.isfinite().all():
            raise InputError(f"There is NaN or infinity in the input of {name}: look for the batch it comes from.")
        so_far = largest.get(name, x[:0])
        largest[name] = torch.cat([so_far, x]).amax(0, keepdim=True)

    with torch.no_grad(), batching.evaluating(model), watching(model, layers, look):
        for batch in batches:
            named = batching.inputs(model, batch)
            args, kwargs, _ = batching.split(model, batch)
            calls.run(model, *args, **kwargs)
    return [largest[name][0] for name in layers]


# --- proof ------------------------------------------------------------------------------------------------------------


def _call(model: nn.Module, args: Any) -> tuple[tuple, dict[str, Any]]:
    """Return the positional and keyword arguments of an example input, on the model's device."""
    example = ((), dict(args)) if isinstance(args, Mapping) else arguments(args, None)
    return batching.placed(model, example)


@torch.inference_mode(False)  # the new layers are to be trained, wherever they were made
@torch.no_grad()
def _rewrite_(
    model: nn.Module,
    graph: Dataflow,
    rewrite_: Callable[[nn.Module], None],
) -> None:
    """Change `model` by `rewrite_`, which is tried and compared on a float64 copy before.

    graph: of `model`, or of a model that computes the same with the same layers; its output can be compared.
    """
    exact = full_copy(model).double()
    rewrite_(exact)
    nothing_cut = np.zeros(graph.record.labels.count, dtype=bool)
    report = equality.check(model, exact, graph.record, nothing_cut, *graph.example)
    limit = report.tolerance
    if report.dtype == "float64":
        limit = max(limit, EXACT * report.scale)
    if not report.error <= limit:
        raise EqualityError(
            f"The rewritten model's outputs differ by {report.error:.2g} from the model's (largest {report.scale:.2g}, "
            f"tolerance {limit:.2g}, in {report.dtype}): its forward pass does something that the trace does not show; "
            "rewrite the part of it that is made of layers."
        )
    rewrite_(model)
