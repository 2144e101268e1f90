"""Weights in few bits and activations as they are: for decoding, where reading the weights takes the time. SIMULATED.

Rounding to nearest, and two ways to round by what a layer is called with: GPTQ (Frantar et al. 2022, arXiv:2210.17323),
where weights that are still to be rounded make up for those that are, and AWQ (Lin et al. 2023, arXiv:2306.00978),
where channels that matter are scaled up before and their ranges clipped. Two formats, NF4 and MXFP4, stand beside them.

The bytes are real: codes, scales and zeros are what a layer stores. The speed is not: it multiplies floats that were
computed from the codes. Kernels that multiply codes: `integer`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.bits import from_bits
from labkit.errors import InputError, check_choice, check_whole
from labkit.graph.dataflow import Dataflow, Route, Source
from labkit.modules.batches import check_batches, evaluating, not_empty, split
from labkit.modules.blocks import inputs_by_block
from labkit.modules.hessians import check_layer, hessian, inverse_factor, sum_over_rows, wide
from labkit.modules.masks import make_permanent, masks
from labkit.modules.replacing import replace_
from labkit.modules.stacks import blocks_of
from labkit.modules.weights import Weight, inside, named_parts, prunable
from labkit.quantization import affine, calls, fold, formats
from labkit.quantization.affine import Grid, Quantized
from labkit.quantization.formats import Encoded
from labkit.quantization.packing import pack_codes
from labkit.quantization.simulated import bypassed

METHODS = ("rtn", "gptq", "awq", "nf4", "mxfp4")
WALKS = ("gptq", "awq")  # which look at what layers are called with
SCALE = torch.float16  # in which a group's scale is stored
BLOCK = 128  # columns whose updates wait for each other, as in GPTQ's paper
STEPS = 20  # of AWQ's grids of exponents and, down to a half, of clipped ranges


class WeightOnlyLinear(nn.Module):
    """SIMULATED: a Linear that stores its weight [out, in] in few bits and dequantizes it at every call; REAL bytes.

    Its buffers hold what `packing.pack_codes` makes of the weight, as bytes, so that no cast of the model changes a
    scale. The product is in the type of the input. The weight is not trained; gradients pass to the input.
    """

    def __init__(self, weight: Quantized | Encoded, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.bias = weight.bits, bias
        self.format = weight.format if isinstance(weight, Encoded) else ""
        self.range = (0, 0) if self.format else (weight.grid.lo, weight.grid.hi)
        for name, part in pack_codes(weight).items():
            self.register_buffer(name, part.contiguous().flatten().view(torch.uint8))

    def quantized(self) -> Quantized | Encoded:
        """The codes [out, in], and scales [out, groups, 1], that are stored."""
        codes = from_bits(self.codes, self.bits, self.out_features * self.in_features)
        codes = codes.view(self.out_features, self.in_features)
        dtype = formats.FORMATS[self.format].scale if self.format else SCALE
        scale = self.scale.view(dtype).view(self.out_features, -1, 1)
        if self.format:
            return Encoded(codes, scale, None, self.format)
        lo, hi = self.range
        if lo < 0:
            half = 2 ** (self.bits - 1)  # two's complement
            codes, zero = (codes ^ half).view(torch.int8) + -half, torch.zeros_like(scale, dtype=torch.int32)
        else:
            zero = from_bits(self.zero, self.bits, scale.numel()).view(scale.shape).int()
        return Quantized(codes, Grid(scale, zero, self.bits, lo, hi))

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]: what is multiplied, also for forward passes that look at its type."""
        return dequantize(self.quantized())

    @property
    def bits_per_weight(self) -> float:
        """Scales and zeros included."""
        return 8 * sum(buffer.nbytes for buffer in self.buffers()) / (self.out_features * self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format or f'{self.bits} bits'}"


def quantize(
    model: nn.Module,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    method: str = "rtn",
    symmetric: bool | str = False,
    batches: Iterable | None = None,
    ignore: Collection[str] = (),
    act_order: bool = True,
) -> nn.Module:
    """SIMULATED: a copy of `model` whose Linears hold their weights in `bits` bits, each one a `WeightOnlyLinear`.

    bits: 2 to 8. group_size: inputs of a row that share a scale, a divisor of each layer's inputs; None: the whole row.
    method: "rtn": each weight to the nearest point of its group's grid. "gptq": see `gptq`. "awq": see `awq` and
        `clipped`. "nf4", "mxfp4": of `formats.FORMATS`, with 4 bits and blocks of their own, so that `group_size` and
        `symmetric` do not apply.
    symmetric: False: codes have a zero point in each group. Else the name of a convention, see `affine.choose`; True is
        "restricted", the worst of them at 4 bits, and "signed" the best.
    batches: for "gptq" and "awq": what the model is called with; read once, the hidden states stay in memory.
    ignore: names of modules or weights that stay as they are.
    act_order: for "gptq": columns in the order of their inputs' size, with scales from the weights as they were.

    What is quantized: all Linears (and transformers' Conv1D) in the model's stack of blocks (`stacks.blocks_of`), or in
    all of a model that has none. The embedding and the head of a language model are outside the stack and stay: they
    are often one tied weight, and a head in few bits would be a second copy beside an embedding that still needs it.
    Norms and biases stay too. A weight with masks (`unstructured.masks`) keeps its zeros: GPTQ compensates around them.

    "gptq" and "awq" go through the model a block at a time: a block's inputs are those that the quantized blocks before
    it give. In memory: the copy, the Hessians of one block, the hidden states of the batches, the codes.

    InputError, before anything is changed, for arguments out of range, a group_size that does not divide (it names the
    divisors), weights with NaN, missing batches, and a block with other weights than Linears that ignore does not name.
    """
    calls.check_model(model)
    check_choice(method, METHODS, "method")
    check_whole(bits, "bits", 2, 8)
    affine.choose(torch.zeros(1), torch.ones(1), bits, symmetric=symmetric)  # which knows the conventions
    if method in formats.FORMATS and bits != 4:
        raise InputError(f"{method} has 4 bits, but bits is {bits}: leave it at 4, or take another method.")
    if method in WALKS:
        batches = list(not_empty(check_batches(batches, method)))
        _check_run(model, batches)
    size = formats.FORMATS[method].block if method in formats.FORMATS else group_size
    names = list(_weights(model, ignore, size))
    keep = masks(model)
    new = make_permanent(model)
    every = prunable(new)
    weights = {name: every[name] for name in names}
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    with torch.no_grad(), evaluating(new, seed=0):
        if method == "gptq":
            rounded = _gptq_(new, weights, keep, batches, options | {"act_order": act_order})
        elif method == "awq":
            rounded = _awq_(new, weights, batches, options)
        elif method == "rtn":
            rounded = {name: rtn(_rows(weight), **options) for name, weight in weights.items()}
        else:
            rounded = {name: formats.quantize(_rows(weight), method) for name, weight in weights.items()}
    for name in names:
        layer = WeightOnlyLinear(rounded.pop(name), weights[name].module.bias).train(weights[name].module.training)
        new = replace_(new, name.rpartition(".")[0], layer)
        del weights[name], every[name]
    return new


def _check_run(model: nn.Module, batches: Sequence) -> None:
    """InputError for a batch without examples, and if the model does not run on the first."""
    for batch in batches:
        calls.inputs(model, batch)
    args, kwargs, _ = split(model, batches[0])
    with torch.no_grad(), evaluating(model):
        calls.run(model, *args, **kwargs)


def _weights(model: nn.Module, ignore: Collection[str], size: int | None) -> dict[str, Weight]:
    """Those that `quantize` quantizes; InputError for one that it cannot."""
    parts, uncalled = named_parts(model, ignore, "ignore"), bypassed(model)
    stack = {id(module) for block in blocks_of(model) for module in block.modules()}
    weights = {
        name: weight
        for name, weight in prunable(model).items()
        if (not stack or id(weight.module) in stack) and not any(inside(name, part) for part in parts)
    }
    if not weights:
        raise InputError("There is no Linear to quantize: give a model that has some outside of what ignore names.")
    for name, weight in weights.items():
        kind = type(weight.module)
        if not (kind is nn.Linear or (weight.transposed and weight.experts is None)) or weight.module in uncalled:
            reader = "nn.TransformerEncoderLayer, which does not call it" if kind is nn.Linear else f"a {kind.__name__}"
            raise InputError(f"{name} is the weight of {reader}, but only Linears are quantized: name it in ignore.")
        _size(weight.as_rows(weight.parameter).shape[1], size)
        if not weight.parameter.isfinite().all():
            raise InputError(f"{name} has NaN or infinity: load other weights, or name it in ignore.")
    return weights


def _rows(weight: Weight) -> Tensor:
    """[out, in], in float32 or wider."""
    return wide(weight.as_rows(weight.parameter))


def _store_(weight: Weight, rounded: Quantized) -> None:
    weight.parameter.copy_(weight.from_rows(dequantize(rounded)))


def _gptq_(model: nn.Module, weights: Mapping, keep: Mapping, batches: Sequence, options: dict) -> dict[str, Quantized]:
    rounded = {}
    for inner, sums in inputs_by_block(model, weights, hessian, batches):
        for name, weight in inner.items():
            mask = weight.as_rows(keep[name]) if name in keep else None
            rounded[name] = gptq(_rows(weight), sums.pop(name)[0], **options, mask=mask)
            _store_(weight, rounded[name])
    return rounded


def _awq_(model: nn.Module, weights: Mapping, batches: Sequence, options: dict) -> dict[str, Quantized]:
    """Scales are folded into what makes the channels, where that is in the same block and nothing else reads it.

    Those are the norms before attention and before the feed-forward network, and up_proj, whose product with the gate
    down_proj reads. Elsewhere (attention's output) a scale would need a multiplication at run time: there is none.
    """

    def statistic(layer: nn.Module, x: Tensor) -> Tensor:  # [1, in + 1, in]
        return torch.cat([hessian(layer, x), sum_over_rows(layer, x.abs())[:, None]], 1)

    args, kwargs, _ = split(model, batches[0])
    sites = fold.scale_sites(model, Dataflow(model, args, kwargs))
    rounded = {}
    for inner, sums in inputs_by_block(model, weights, statistic, batches):
        _scale_(model, inner, sums, [pair for pair in sites if _is_inside(model, inner, *pair)], options)
        for name, weight in inner.items():
            rounded[name] = clipped(_rows(weight), sums.pop(name)[0, :-1], **options)
            _store_(weight, rounded[name])
    return rounded


def _is_inside(model: nn.Module, weights: Mapping[str, Weight], source: Source, route: Route) -> bool:
    """Whether these weights read the source's channels alone, and what makes these belongs to the same block."""
    names = {*source.names, *(f"{name}.weight".lstrip(".") for name in route.readers)}
    blocks = [{id(p) for p in block.parameters()} for block in blocks_of(model)]
    together = not blocks or any({id(model.get_parameter(name)) for name in names} <= block for block in blocks)
    alone = not route.blocked and {*route.readers.values()} == {1}
    return alone and together and names - {*source.names} <= weights.keys()


def _scale_(model: nn.Module, weights: Mapping, sums: Mapping, sites: Sequence[tuple[Source, Route]], options) -> None:
    """Multiplies columns by AWQ's scales, divides what makes their inputs, and the sums accordingly."""
    for source, route in sites:
        readers = [f"{name}.weight".lstrip(".") for name in route.readers]
        total = sums[readers[0]][0]
        rows = [_rows(weights[name]) for name in readers]
        s = awq(rows, total[:-1], total[-1], lambda weight: dequantize(rtn(weight, **options)))
        fold.rescale_(model, source, route, s)
        for name in readers:
            sums[name][0, :-1] /= s[:, None] * s


# --- one weight -------------------------------------------------------------------------------------------------------


def dequantize(weight: Quantized | Encoded) -> Tensor:
    """float32 [out, in]: code times scale in float32, not rounded to the scale's type."""
    return weight.dequantize() if isinstance(weight, Encoded) else weight.grid.dequantize(weight.codes, torch.float32)


def rtn(weight: Tensor, bits: int = 4, *, group_size: int | None = 64, symmetric: bool | str = False) -> Quantized:
    """`weight` [out, in] rounded to the nearest points of a grid for each row and group, with scales in float16.

    Codes [out, in], scales [out, groups, 1]. The arguments are those of `quantize`. InputError for what is no matrix of
    floating-point numbers.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        kind = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"weight is {kind}, but it must be floating-point numbers [out, in], at least one.")
    grid = _grid(weight, bits, group_size, symmetric)
    return Quantized(grid.quantize(weight), grid)


def _size(width: int, group_size: int | None) -> int:
    """Of a group in rows of this width; InputError if groups do not fill them."""
    if group_size is None:
        return width
    affine.check_group(width, group_size)
    return group_size


def _grid(weight: Tensor, bits: int, group_size: int | None, symmetric: bool | str) -> Grid:
    """Of the least and the largest weight of each group, with scales [out, groups, 1]."""
    groups = weight.detach().unflatten(1, (-1, _size(weight.shape[1], group_size)))
    return affine.choose(groups.amin(2, True), groups.amax(2, True), bits, symmetric=symmetric, dtype=SCALE)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    symmetric: bool | str = False,
    act_order: bool = False,
    mask: Tensor | None = None,
) -> Quantized:
    """`weight` [out, in] rounded column by column, those to the right making up for it, so that x W^T stays near.

    Frantar et al. 2022, Algorithm 1. hessian: [in, in], X^T X of the layer's inputs X [N, in]; any positive multiple of
    it gives the same result. The other arguments are those of `quantize`. mask: bool [out, in], False where a weight
    is to be zero, which the others make up for as for any rounding. Returns codes [out, in] and scales [out, groups, 1]
    in float16.

    The Hessian is damped as `hessians.inverse_factor` says. With U the upper Cholesky factor of H^-1 (H^-1 = U^T U),
    for the columns j in order:
        q_j = round(w_j) on the grid of j's group     e = (w_j - q_j) / U_jj
        W_:,j: -= e U_j,j:     within a block of columns at once, for those after it once a block (the lazy update)
    A group's grid is chosen when its first column's turn comes, from the weights as they are by then, all updates
    included: blocks end where groups do. (The published code leaves out those of the block at hand.)

    act_order: columns by H_jj, largest first. Groups stay those of neighbouring columns, whose grids are chosen from
    the weights as they were, before all ("static groups"), so that nothing has to be permuted at run time.

    With H a multiple of I this is `rtn` to the bit. An input that was always zero is rounded to nearest. Time
    O(in^3 + out in^2), memory O(in^2) in float64.
    """
    if not isinstance(weight, Tensor) or not isinstance(hessian, Tensor):
        raise InputError("weight and hessian must be tensors [out, in] and [in, in]: make them with torch.as_tensor.")
    check_layer(weight, hessian)
    width = weight.shape[1]
    size = _size(width, group_size)
    if mask is not None and (mask.shape != weight.shape or mask.dtype is not torch.bool):
        raise InputError(
            f"mask is {mask.dtype} {list(mask.shape)}, but it must be torch.bool {list(weight.shape)}, in the weight's "
            "shape: give True where a weight stays."
        )
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(width, device=diagonal.device)
    group_of = (order // size).tolist()
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    w = wide(weight)
    static = _grid(w * keep, bits, size, symmetric)
    scale, zero = static.scale[..., 0].t().contiguous(), static.zero[..., 0].t().contiguous()  # [groups, out]
    w, keep = w.t()[order].contiguous(), keep.t()[order]  # [in, out]: a column of the weight is one piece of memory
    effect = inverse_factor(hessian[order][:, order]).to(w.dtype)  # [in, in]
    effect /= effect.diagonal()[:, None].clone()  # what changing a weight by 1 takes from those after it
    block = BLOCK // size * size or BLOCK
    edges = sorted({*range(0, width, block), *range(0, width, max(size, block)), width})
    for start, end in itertools.pairwise(edges):
        errors = torch.empty_like(w[start:end])
        for j in range(start, end):
            group = group_of[j]
            if not act_order and j % size == 0:
                grid = _grid((w[j : j + size] * keep[j : j + size]).t(), bits, None, symmetric)
                scale[group], zero[group] = grid.scale[:, 0, 0], grid.zero[:, 0, 0]
            point = dataclasses.replace(static, scale=scale[group], zero=zero[group]).fake(w[j] * keep[j])
            errors[j - start] = w[j] - point
            w[j] = point
            w[j + 1 : end].addr_(effect[j, j + 1 : end], errors[j - start], alpha=-1)
        w[end:].addmm_(effect[start:end, end:].t(), errors, alpha=-1)
    grid = dataclasses.replace(static, scale=scale.t()[..., None], zero=zero.t()[..., None])
    return Quantized(grid.quantize(w[order.argsort()].t()), grid)


def awq(weights: Sequence[Tensor], hessian: Tensor, magnitude: Tensor, round_: Callable[[Tensor], Tensor]) -> Tensor:
    """s [in], by which columns of `weights`, each [out, in], are multiplied before rounding and their inputs divided.

    Lin et al. 2023, equations 4 and 5: s = m^alpha with m_j = `magnitude` [in], the mean |x_j|, and alpha the one of
    0, .05, ..., .95 with the least

        sum over weights of || X (Q(W diag(s)) diag(s)^-1 - W)^T ||^2 = tr(D H D^T)

    hessian: H = X^T X [in, in] of the inputs that all of them read. round_: Q, a weight to its points. As in the
    published code s is divided by the root of the product of its extremes, and alpha = 0, so s = 1, is tried first.
    """
    for weight in weights:
        check_layer(weight, hessian)
    if not weights or magnitude.shape != hessian.shape[:1]:
        raise InputError(
            f"There are {len(weights)} weights and {list(magnitude.shape)} magnitudes for a Hessian of "
            f"{list(hessian.shape)}: give a weight at least, and one magnitude an input."
        )
    best, least = torch.ones_like(magnitude), torch.inf
    relative = magnitude / magnitude.mean().clamp(min=torch.finfo(magnitude.dtype).tiny)
    for step in range(STEPS):
        s = relative.clamp(min=1e-4) ** (step / STEPS)
        s = s / (s.max() * s.min()).sqrt()
        changes = [round_(weight * s) / s - weight for weight in weights]
        error = sum(float(((change @ hessian) * change).sum()) for change in changes)
        if error < least:
            best, least = s, error
    return best


def clipped(
    weight: Tensor, hessian: Tensor, bits: int = 4, *, group_size: int | None = 64, symmetric=False
) -> Quantized:
    """`rtn` with the ends of each group's range drawn in as far as its own part of the layer's error falls.

    Of 1, .95, ..., .55 times the range the one with the least D_g H_gg D_g^T, D_g being what rounding changes in the
    group: the clipping search of AWQ's published code, which leaves out what groups add to each other's errors.
    """
    check_layer(weight, hessian)
    size = _size(weight.shape[1], group_size)
    groups = weight.unflatten(1, (-1, size))  # [out, groups, in group]
    lo, hi = groups.amin(2, True), groups.amax(2, True)
    inner = hessian.view(-1, size, len(hessian) // size, size).diagonal(dim1=0, dim2=2).movedim(2, 0)  # [groups, g, g]
    scale, zero, least = None, None, None
    for step in range(STEPS // 2):
        share = 1 - step / STEPS
        grid = affine.choose(lo * share, hi * share, bits, symmetric=symmetric, dtype=SCALE)
        change = (grid.fake(weight) - weight).unflatten(1, (-1, size)).transpose(0, 1)  # [groups, out, g]
        error = ((change @ inner) * change).sum(2).t()[..., None]  # [out, groups, 1]
        if least is None:
            scale, zero, least = grid.scale, grid.zero, error
        better = error < least
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
        least = torch.where(better, error, least)
    grid = dataclasses.replace(grid, scale=scale, zero=zero)
    return Quantized(grid.quantize(weight), grid)
