"""Quantization-aware training, SIMULATED: weights learn under the rounding of `ptq`, and the grids with them.

Two methods, which differ in what a grid follows. Straight through (Bengio et al. 2013, arXiv:1308.3432; Jacob et al.
2018, arXiv:1712.05877): the grid spans the extremes, those of the weight at every step and a moving average of the
activation's, and a gradient passes the staircase as if it were the line that it follows. LSQ (Esser et al. 2020,
arXiv:1902.08153): the step of the grid is a parameter with a gradient of its own.

The modules are those of `ptq.quantize`, with quantizers whose grids move: what is rounded where stays as it was,
BatchNorm is folded, and `integer.convert` takes the trained model. bf16 has 8 bits of precision and rounds the
points of an 8-bit grid, so that another model would be trained than the one that is converted: autocast is refused.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from labkit.data import training
from labkit.data.training import History
from labkit.errors import InputError, check_choice, check_whole
from labkit.quantization import affine, calls, ptq
from labkit.quantization.affine import Grid
from labkit.quantization.observers import MOMENTUM
from labkit.quantization.simulated import FakeQuantized, QuantizationPoint, Quantizer


def prepare(
    model: nn.Module,
    batches: Iterable,
    *,
    weights: int | Mapping[str, int] = 4,
    activations: int | Mapping[str, int] = 4,
    method: str = "ste",
) -> nn.Module:
    """A SIMULATED copy of `model` to train, in float32: `finetune_`, or any loop that calls `freeze` in time.

    batches, weights, activations: see `ptq.quantize`, whose ranges training starts from.
    method: "ste": a weight's range is its extremes at every step, an activation's a moving average of the batches'.
        "lsq": steps are parameters. That of a weight starts at 2 mean |w| / sqrt(Q_P), the paper's, for each output
        channel; that of an activation on `ptq`'s range of least squared error, whose zero point stays.

    Layers that read the same value share its grid. Quantized layers get gradients even where `model`'s are frozen. The
    copy is on `model`'s device and in eval mode, in which grids do not move; `integer.convert` takes it in whatever
    state it is. InputError as of `ptq.quantize`, and for an unknown method; a forward pass under autocast, or in half
    precision, is refused.
    """
    check_choice(method, METHODS, "method")
    moving = METHODS[method]
    observer = "mse" if method == "lsq" else "minmax"
    new = ptq.quantize(model, batches, weights=weights, activations=activations, observer=observer).model
    for first, *readers in _by_value(new):
        quantizer = moving(first.grid if isinstance(first, QuantizationPoint) else first.input_grid)
        if isinstance(first, QuantizationPoint):
            first.quantizer, again = quantizer, _Rounded(quantizer)
        else:
            first.input_quantizer = again = quantizer
        for layer in readers:
            layer.input_quantizer = again
    for layer in [x for x in new.modules() if isinstance(x, FakeQuantized)]:
        layer.weight_quantizer = moving(layer.weight_grid, layer.layer.weight)
        layer.layer.requires_grad_()
    return new.to(next(model.parameters()).device).eval()


def freeze(model: nn.Module) -> None:
    """From now on every grid stays where it is, and only weights are trained.

    Late in training: a range that follows the last batches ends where these happened to be.
    """
    calls.check_model(model)
    for quantizer in [x for x in model.modules() if isinstance(x, _Learning)]:
        quantizer.frozen = True
        quantizer.requires_grad_(False)


# --- the two methods --------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """x on the grid; its gradient passes unchanged, and is 0 where x is clipped (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = _ends(grid, 0.5)  # what rounds to the last code is not clipped: extremes are there
        return grid.fake(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _clipped(gradient, x, *ctx.ends), None


class LearnedStep(torch.autograd.Function):
    """x on the grid, with gradients for x and for the grid's scale (Esser et al. 2020, equations 1 to 5).

    With v = x / scale and the code c = clip(round(v), -Q_N, Q_P), counted from the zero point, x becomes c scale. Its
    derivative is 1 by x where -Q_N < v < Q_P, and 0 elsewhere; by the scale it is c - v there, and c elsewhere. The
    scale's gradient is multiplied by `factor`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, grid: Grid, factor: float) -> Tensor:
        y = grid.fake(x)
        ctx.save_for_backward(x, y, scale)
        ctx.ends, ctx.factor = _ends(grid), factor
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, scale = ctx.saved_tensors
        passed = _clipped(gradient, x, *ctx.ends)
        change = (gradient * y).addcmul_(passed, x, value=-1)  # times scale
        return passed, change.sum_to_size(scale.shape) * (ctx.factor / scale), None, None


def _ends(grid: Grid, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """The least and the largest point, and so many steps beyond."""
    return tuple((end - grid.zero) * grid.scale.detach() for end in (grid.lo - margin, grid.hi + margin))


def _clipped(gradient: Tensor, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The gradient where x is between lo and hi, else 0."""
    if lo.dim():
        return torch.where((x > lo) & (x < hi), gradient, 0)
    return torch.ops.aten.hardtanh_backward(gradient, x, float(lo), float(hi))  # one pass instead of four


class _Learning(Quantizer):
    """A quantizer whose grid moves in training until it is frozen."""

    frozen = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize < 4:
            raise InputError(
                "A quantized model is trained in float32, since bfloat16 and float16 lack points of an 8-bit grid and "
                'the converted model would be another one: pass precision="fp32", or leave autocast.'
            )
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FollowedRange(_Learning):
    """Straight through: the grid spans a weight's extremes, or a moving average of those of batches of activations."""

    def __init__(self, grid: Grid, weight: Tensor | None = None) -> None:
        super().__init__(grid)
        self.momentum = MOMENTUM if weight is None else 0.0
        for name, end in zip(("lo", "hi"), _ends(grid), strict=True):
            self.register_buffer(name, end)

    def rounded(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            shared = [d for d, size in enumerate(self.scale.shape) if size == 1]
            lo, hi = (end(x.detach(), shared, bool(shared)) for end in (torch.amin, torch.amax))
            self.lo = self.momentum * self.lo + (1 - self.momentum) * lo
            self.hi = self.momentum * self.hi + (1 - self.momentum) * hi
            grid = affine.choose(self.lo, self.hi, self.codes[0], symmetric=self.codes[1] < 0)
            self.scale, self.zero = grid.scale, grid.zero
        return StraightThrough.apply(x, self.grid)


class LearnedGrid(_Learning):
    """LSQ: the scale is a parameter.

    Its gradient is multiplied by 1 / sqrt(N Q_P), section 2.2, with N the weights of a channel, or the features of an
    example. Q_P: the code of a grid that is furthest from its zero point, counted from there.
    """

    def __init__(self, grid: Grid, weight: Tensor | None = None) -> None:
        super().__init__(grid)
        self.levels = max(grid.hi - int(grid.zero.max()), int(grid.zero.max()) - grid.lo)
        if weight is not None:
            size = weight.detach().abs().flatten(1).mean(1).view(grid.scale.shape)
            scale = affine.stored(2 * size / self.levels**0.5, torch.float32)
        else:
            scale = grid.scale.clone()
        del self.scale
        self.scale = nn.Parameter(scale)

    @property
    def grid(self) -> Grid:
        return Grid(self._step().detach(), self.zero, *self.codes)

    def _step(self) -> Tensor:
        return self.scale.abs().clamp(min=2.0**-126)  # a large update can drive a parameter through zero

    def rounded(self, x: Tensor) -> Tensor:
        return LearnedStep.apply(x, self._step(), self.grid, (x[0].numel() * self.levels) ** -0.5)


METHODS = {"ste": FollowedRange, "lsq": LearnedGrid}


class _Rounded(nn.Module):
    """The input of a layer that reads a point: rounded already, on the point's grid."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    @property
    def grid(self) -> Grid:
        return self.quantizer.grid

    def forward(self, x: Tensor) -> Tensor:
        return x


def _by_value(model: nn.Module) -> list[list[nn.Module]]:
    """The points and layers that round the same value on the same grid, a point first; without a graph each alone."""
    places = [x for x in model.modules() if isinstance(x, (FakeQuantized, QuantizationPoint))]
    if not isinstance(model, fx.GraphModule):
        return [[place] for place in places]
    values: dict[nn.Module, set[fx.Node]] = {}  # in the order of the first call
    for node in model.graph.nodes:
        place = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(place, QuantizationPoint):
            values[place] = {node}
        elif isinstance(place, FakeQuantized):
            values.setdefault(place, set()).update(node.all_input_nodes)
    groups = defaultdict(list)
    for place, nodes in values.items():
        bits = (place.grid if isinstance(place, QuantizationPoint) else place.input_grid).bits
        groups[frozenset(nodes), bits].append(place)
    return list(groups.values())


# --- training ---------------------------------------------------------------------------------------------------------

MOVING = 0.8  # of the steps, after which grids stay


def finetune_(model: nn.Module, batches: Iterable, *, steps: int, max_lr: float = 0.003) -> History:
    """Train what `prepare` returned, in place, for `steps` batches; its grids are frozen after four fifths of them.

    SGD in float32, one cycle. A float model is trained in the same way, as the control of an experiment. After an error
    the model is as it was, its grids free to move again; InputError as from `training.train_`.
    """
    check_whole(steps, "steps")
    moving = [x for x in model.modules() if isinstance(x, _Learning) and not x.frozen]
    done = 0

    def loss_fn(model: nn.Module, batch: training.Batch) -> Tensor:
        nonlocal done
        if done == round(MOVING * steps):
            freeze(model)
        done += 1
        return training.task_loss(model, batch)

    passes = {"epochs": steps, "steps": steps}  # as many over the batches as the steps need
    recipe = {"max_lr": max_lr, "weight_decay": 0.0, "warmup": 0.1, "precision": "fp32"}
    try:
        return training.train_(model, batches, **passes, **recipe, loss_fn=loss_fn)
    except Exception:
        for quantizer in moving:
            quantizer.frozen = False
            quantizer.requires_grad_(True)
        raise
