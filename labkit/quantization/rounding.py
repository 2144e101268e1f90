"""Rounding one layer's weight by what the layer gives, not by what is nearest; and its bias by what rounding shifted.

AdaRound and bias correction: both take a float layer, the inputs that it sees and a grid, and change nothing. Which
layers, in which order and on which batches is the caller's.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.func import functional_call

from labkit.errors import InputError, check_whole
from labkit.quantization import calls
from labkit.quantization.affine import Grid

STRETCH = (-0.1, 1.1)  # of the sigmoid, so that 0 and 1 are reached (gamma and zeta)
WEIGHT = 0.01  # of the regulariser (lambda)
WARM = 0.2  # of the steps go by without it
SHARP = (20.0, 2.0)  # its exponent beta, first and last
BATCH, RATE = 32, 0.05  # examples a step, and Adam's rate: with it 200 steps do nearly what 1,000 do


@torch.inference_mode(False)
def adaround(layer: nn.Module, grid: Grid, inputs: Tensor, outputs: Tensor, *, steps: int = 1000) -> Tensor:
    """Codes of `layer`'s weight on `grid`, in its shape, each rounded down or up as the layer's outputs need it.

    Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv:2004.10568), section 3. With
    w = scale (clip(floor(W / scale) + h(V) + zero) - zero) and h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), Adam minimises
    over V

        mean |layer(w; inputs) - outputs|^2 + 0.01 sum (1 - |2 h(V) - 1|^beta),

    starting from h = what rounding down leaves, so from the weight as it is; beta falls from 20 to 2 and drives every h
    to 0 or 1. The norm is over one position's channels, the mean over all others.

    layer: a Linear or convolution. grid: not in groups. inputs [N, ...]: what the layer will see, in the quantized
    model best of all. outputs: what it should give for them. The same result at every call. On `inputs` the squared
    error is at most that of rounding to the nearest: where the search ends in more, the nearest codes are returned.
    """
    _check(layer, grid, inputs, outputs, steps)
    tensors = (layer.weight, inputs, outputs, grid.scale, grid.zero)
    weight, inputs, outputs, scale, zero = (x.clone() if x.is_inference() else x.detach() for x in tensors)
    grid = dataclasses.replace(grid, scale=scale, zero=zero)
    channel = -1 if isinstance(layer, nn.Linear) else 1
    down = (weight / grid.scale).floor()
    rest = (weight / grid.scale - down).clamp(0.01, 0.99)
    low, high = STRETCH
    v = torch.logit((rest - low) / (high - low)).requires_grad_()

    def points(up: Tensor) -> Tensor:
        return ((down + up + grid.zero).clamp(grid.lo, grid.hi) - grid.zero) * grid.scale

    def error(w: Tensor, rows: Tensor | slice) -> Tensor:
        y = functional_call(layer, {"weight": w.to(weight.dtype)}, (inputs[rows],))
        return (y - outputs[rows]).square().sum(channel).mean()

    adam = torch.optim.Adam([v], RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(inputs), (BATCH,), generator=generator).to(inputs.device)
            h = (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)
            loss = error(points(h), rows)
            if step >= WARM * steps:
                beta = SHARP[0] + (SHARP[1] - SHARP[0]) * (step / steps - WARM) / (1 - WARM)
                loss = loss + WEIGHT * (1 - (2 * h - 1).abs().pow(beta)).sum()
            adam.zero_grad()
            (v.grad,) = torch.autograd.grad(loss, [v])
            adam.step()
    learned, nearest = points((v.detach() > 0).to(down)), grid.fake(weight)
    with torch.no_grad():
        better = error(learned, slice(None)) < error(nearest, slice(None))
    return grid.quantize(learned if better else nearest)


def bias_correction(layer: nn.Module, weight: Tensor, mean: Tensor) -> Tensor:
    """The bias [out] with which `layer` keeps the mean of its outputs when its weight becomes `weight`.

    Nagel et al. 2019 (arXiv:1906.04721), section 4.2: W~ = W + e shifts the outputs by e E[x] on average, of a
    convolution by the sum over its kernel. So b - e E[x]: exact for a Linear, and for a convolution as far as all
    positions have the same mean, which zero padding and the edges of images do not.

    weight: in the shape of the layer's, dequantized. mean [in]: of the layer's inputs over examples and positions.
    """
    _check_layer(layer)
    if not isinstance(weight, Tensor) or not isinstance(mean, Tensor):
        raise InputError("weight and mean must be tensors: make them with torch.as_tensor.")
    if not weight.isfinite().all() or not mean.isfinite().all():
        raise InputError("The weight or the mean holds NaN or infinity: look for the batch that it comes from.")
    groups = getattr(layer, "groups", 1)
    if weight.shape != layer.weight.shape or mean.shape != (layer.weight.shape[1] * groups,):
        raise InputError(
            f"weight is {list(weight.shape)} and mean {list(mean.shape)}, but the layer has a weight of "
            f"{list(layer.weight.shape)} and {layer.weight.shape[1] * groups} inputs: give one mean an input."
        )
    change = (weight.detach().double() - layer.weight.detach().double()).reshape(*weight.shape[:2], -1).sum(2)
    shift = change.view(groups, -1, weight.shape[1]) @ mean.detach().double().view(groups, -1, 1)
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return (bias - shift.flatten()).to(layer.weight.dtype)


def _check_layer(layer: object) -> None:
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise InputError(
            f"layer is a {type(layer).__name__}, but it must be a Linear or a convolution: give one of these layers."
        )


def _check(layer: nn.Module, grid: Grid, inputs: Tensor, outputs: Tensor, steps: int) -> None:
    check_whole(steps, "steps")
    _check_layer(layer)
    fits = isinstance(grid, Grid) and grid.scale.dim() <= layer.weight.dim()
    if not fits or grid.scale.numel() not in (1, *grid.scale.shape[:1]) or len(layer.weight) % grid.scale.numel():
        scale = list(grid.scale.shape) if isinstance(grid, Grid) else None
        raise InputError(
            f"AdaRound rounds a layer of {len(layer.weight)} outputs on a Grid without groups, but grid is a "
            f"{type(grid).__name__} with a scale of {scale}: give one scale for each output channel, or one for all."
        )
    for name, x in {"inputs": inputs, "outputs": outputs}.items():
        if not isinstance(x, Tensor) or x.dtype != layer.weight.dtype or not x.dim():
            kind = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(f"{name} is {kind}, but it must be a tensor [N, ...] of {layer.weight.dtype}.")
    if not len(inputs) or len(inputs) != len(outputs):
        raise InputError(
            f"There are {len(inputs)} inputs and {len(outputs)} outputs, but each input needs what the layer should "
            "give for it: calibrate on at least one batch."
        )
    if not inputs.isfinite().all() or not outputs.isfinite().all():
        raise InputError("The inputs or outputs hold NaN or infinity: look for the batch that they come from.")
    with torch.no_grad():
        result = calls.run(layer, inputs[:1])
    if result.shape[1:] != outputs.shape[1:]:
        raise InputError(
            f"An output is {list(outputs.shape[1:])}, but the layer gives {list(result.shape[1:])} for an input: give "
            "those of this layer."
        )
