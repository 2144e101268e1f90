"""Quantization-aware training, SIMULATED: weights and grids learn under the rounding of `ptq`.

There are two methods. Straight through (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877): the
grid spans the extremes of the weight at every step, or a moving average of the activation's extremes, and a gradient
passes the staircase of rounding as if it were the straight line beneath. LSQ (Esser et al. 2020, arXiv:1902.08153): the
step of the grid is a parameter with a gradient.

The modules are those of `ptq.quantize`, with quantizers whose grids move: the same values are rounded, BatchNorm is
folded, and `integer.convert` takes the trained model. Autocast is refused: bf16 has 8 bits of precision and rounds the
points of an 8-bit grid, so that another model would be trained than is converted.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from labkit.data import training
from labkit.data.training import History
from labkit.errors import InputError, check_choice, check_whole
from labkit.modules.batches import device_of
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
    """SIMULATED: return a copy of `model` to train in float32, by `finetune_` or any loop that calls `freeze` in time.

    batches, weights, activations: as for `ptq.quantize`; training starts from its ranges.
    method: "ste": a weight's range spans the extremes at every step, an activation's a moving average of the extremes
        of batches. "lsq": steps are parameters. A weight's step starts at 2 mean |w| / sqrt(Q_P), as in the paper, for
        each output channel; an activation's starts on `ptq`'s range of least squared error, whose zero point stays.

    Layers that read the same value share a grid. Quantized layers get gradients even if `model`'s are frozen. The copy
    is on `model`'s device and in eval mode, in which grids do not move; `integer.convert` takes the copy in any state.
    Raises InputError as `ptq.quantize` does, and for an unknown method. A forward pass under autocast, or in half
    precision, is refused.
    """
    check_choice(method, METHODS, "method")
    moving_quantizer = METHODS[method]
    observer = "mse" if method == "lsq" else "minmax"
    new = ptq.quantize(model, batches, weights=weights, activations=activations, observer=observer).model
    for first, *readers in _by_value(new):
        quantizer = moving_quantizer(_grid_of(first))
        if isinstance(first, QuantizationPoint):
            first.quantizer = quantizer
            input_quantizer = _Rounded(quantizer)
        else:
            first.input_quantizer = quantizer
            input_quantizer = quantizer
        for layer in readers:
            layer.input_quantizer = input_quantizer
    fakes = [module for module in new.modules() if isinstance(module, FakeQuantized)]
    for fake in fakes:
        fake.weight_quantizer = moving_quantizer(fake.weight_grid, fake.layer.weight)
        fake.layer.requires_grad_()
    device = device_of(model)
    return new.to(device).eval()


def freeze(model: nn.Module) -> None:
    """Fix every grid of a model from `prepare`, so that only weights are trained from now on.

    To be called late in training: a range that follows the last batches ends at their accidental extremes.
    """
    calls.check_model(model)
    for module in model.modules():
        if isinstance(module, _Learning):
            module.frozen = True
            module.requires_grad_(False)


# --- the two methods --------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """x on the grid; the gradient passes unchanged, and is 0 for an x that is clipped (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = _ends(grid, 0.5)  # a value that rounds to the last code is not clipped: extremes are there
        return grid.fake(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _clipped(gradient, x, *ctx.ends), None


class LearnedStep(torch.autograd.Function):
    """x on the grid, with gradients for x and for the grid's scale (Esser et al. 2020, equations 1 to 5).

    With v = x / scale and the code c = clip(round(v), -Q_N, Q_P), counted from the zero point, x becomes c scale. For
    -Q_N < v < Q_P the derivative by x is 1 and the derivative by the scale c - v; elsewhere they are 0 and c. The
    scale's gradient is multiplied by `factor`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        grid: Grid,
        factor: float,
    ) -> Tensor:
        y = grid.fake(x)
        ctx.save_for_backward(x, y, scale)
        ctx.ends, ctx.factor = _ends(grid), factor
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, scale = ctx.saved_tensors
        gradient_of_x = _clipped(gradient, x, *ctx.ends)
        times_scale = (gradient * y).addcmul_(gradient_of_x, x, value=-1)
        gradient_of_scale = times_scale.sum_to_size(scale.shape) * (ctx.factor / scale)
        return gradient_of_x, gradient_of_scale, None, None


def _ends(grid: Grid, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the least and the largest point of a grid, each moved outwards by `margin` steps."""
    scale = grid.scale.detach()
    least = (grid.lo - margin - grid.zero) * scale
    largest = (grid.hi + margin - grid.zero) * scale
    return least, largest


def _clipped(
    gradient: Tensor,
    x: Tensor,
    lo: Tensor,
    hi: Tensor,
) -> Tensor:
    """Return the gradient for each x between lo and hi, else 0."""
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
    """Straight through: the grid spans a weight's extremes, or a moving average of the extremes of activations.

    grid: grid at the start of training.
    weight: weight that the quantizer rounds; None for the quantizer of an activation.
    """

    def __init__(self, grid: Grid, weight: Tensor | None = None) -> None:
        super().__init__(grid)
        self.momentum = MOMENTUM if weight is None else 0.0
        lo, hi = _ends(grid)
        self.register_buffer("lo", lo)
        self.register_buffer("hi", hi)

    def rounded(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            self._follow(x.detach())
        return StraightThrough.apply(x, self.grid)

    def _follow(self, x: Tensor) -> None:
        """Move the grid to the extremes of x."""
        shared = [dimension for dimension, size in enumerate(self.scale.shape) if size == 1]
        keepdim = bool(shared)
        self.lo = self.momentum * self.lo + (1 - self.momentum) * torch.amin(x, shared, keepdim)
        self.hi = self.momentum * self.hi + (1 - self.momentum) * torch.amax(x, shared, keepdim)
        bits, lowest, _ = self.codes
        grid = affine.choose(self.lo, self.hi, bits, symmetric=lowest < 0)
        self.scale, self.zero = grid.scale, grid.zero


class LearnedGrid(_Learning):
    """LSQ: the scale is a parameter, with a gradient multiplied by 1 / sqrt(N Q_P) (section 2.2).

    N: the number of weights of a channel, or of features of an example. Q_P: the largest distance of a code from the
    zero point.

    grid: grid at the start of training.
    weight: weight that the quantizer rounds; None for the quantizer of an activation.
    """

    def __init__(self, grid: Grid, weight: Tensor | None = None) -> None:
        super().__init__(grid)
        zero = int(grid.zero.max())
        self.levels = max(grid.hi - zero, zero - grid.lo)  # Q_P
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
        factor = (x[0].numel() * self.levels) ** -0.5
        return LearnedStep.apply(x, self._step(), self.grid, factor)


METHODS = {"ste": FollowedRange, "lsq": LearnedGrid}


class _Rounded(nn.Module):
    """The input quantizer of a layer that reads a point: the input is rounded already, on the point's grid."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    @property
    def grid(self) -> Grid:
        return self.quantizer.grid

    def forward(self, x: Tensor) -> Tensor:
        return x


def _by_value(model: nn.Module) -> list[list[nn.Module]]:
    """Group the points and layers that round the same value on the same grid, a point first in its group.

    Without a graph each point and layer is a group.
    """
    if not isinstance(model, fx.GraphModule):
        return [[module] for module in model.modules() if isinstance(module, (FakeQuantized, QuantizationPoint))]
    values: dict[nn.Module, set[fx.Node]] = {}  # in the order of the first call
    for node in model.graph.nodes:
        place = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(place, QuantizationPoint):
            values[place] = {node}
        elif isinstance(place, FakeQuantized):
            values.setdefault(place, set()).update(node.all_input_nodes)
    groups = defaultdict(list)
    for place, nodes in values.items():
        groups[frozenset(nodes), _grid_of(place).bits].append(place)
    return list(groups.values())


def _grid_of(place: FakeQuantized | QuantizationPoint) -> Grid:
    """Return the grid on which a point, or the input of a layer, is rounded."""
    return place.grid if isinstance(place, QuantizationPoint) else place.input_grid


# --- training ---------------------------------------------------------------------------------------------------------

MOVING = 0.8  # of the steps, after which grids stay


def finetune_(
    model: nn.Module,
    batches: Iterable,
    *,
    steps: int,
    max_lr: float = 0.003,
) -> History:
    """Train a model from `prepare` in place, and freeze its grids after four fifths of the steps.

    batches, max_lr: as for `training.train_`.
    steps: number of batches to train on.

    SGD in float32, one cycle. A float model is trained in the same way, as the control of an experiment. After an error
    the model is as it was before, with grids free to move again. Raises InputError as `training.train_` does.
    """
    check_whole(steps, "steps")
    moving = [module for module in model.modules() if isinstance(module, _Learning) and not module.frozen]
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
