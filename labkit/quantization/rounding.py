"""AdaRound and bias correction: round a layer's weight so that the outputs stay, and correct the bias afterwards.

The two functions take a float layer and inputs, and change no argument. The caller chooses layers, order and batches.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.func import functional_call

from labkit.errors import InputError, check_whole
from labkit.modules.batches import placed
from labkit.quantization import calls
from labkit.quantization.affine import Grid

STRETCH = (-0.1, 1.1)  # of the sigmoid, so that 0 and 1 are reached (gamma and zeta)
WEIGHT = 0.01  # of the regulariser (lambda)
WARM = 0.2  # of the steps go by without it
SHARP = (20.0, 2.0)  # its exponent beta, first and last
BATCH, RATE = 32, 0.05  # examples a step, and Adam's rate: with it 200 steps do nearly what 1,000 do


@torch.inference_mode(False)
def adaround(
    layer: nn.Module,
    grid: Grid,
    inputs: Tensor,
    outputs: Tensor,
    *,
    steps: int = 1000,
) -> Tensor:
    """Return codes of a layer's weight on a grid, each rounded down or up so that the layer's outputs stay.

    layer: a Linear or convolution.
    grid: grid of the weight, not in groups.
    inputs: the layer's inputs [N, ...], best of all those in the quantized model.
    outputs: outputs [N, ...] that the layer should give for them.
    steps: number of Adam's steps.

    Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv:2004.10568), section 3. With
    w = scale (clip(floor(W / scale) + h(V) + zero) - zero) and h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), Adam minimises
    over V

        mean |layer(w; inputs) - outputs|^2 + 0.01 sum (1 - |2 h(V) - 1|^beta),

    starting from h = the remainder of rounding down, so from the weight as it is; beta falls from 20 to 2 and drives
    every h to 0 or 1. The norm is over the channels of a position, the mean over all positions.

    The result is the same at every call. On `inputs` the squared error is at most that of rounding to the nearest:
    if the search ends in more, the nearest codes are returned.
    """
    _check_layer(layer)
    inputs, outputs = placed(layer, (inputs, outputs))
    _check(layer, grid, inputs, outputs, steps)
    weight = _trainable(layer.weight)
    inputs = _trainable(inputs)
    outputs = _trainable(outputs)
    grid = dataclasses.replace(grid, scale=_trainable(grid.scale), zero=_trainable(grid.zero))
    channel = -1 if isinstance(layer, nn.Linear) else 1
    steps_from_zero = weight / grid.scale
    down = steps_from_zero.floor()
    remainder = (steps_from_zero - down).clamp(0.01, 0.99)
    low, high = STRETCH
    v = torch.logit((remainder - low) / (high - low)).requires_grad_()

    def points(up: Tensor) -> Tensor:
        codes = (down + up + grid.zero).clamp(grid.lo, grid.hi)
        return (codes - grid.zero) * grid.scale

    def error(w: Tensor, rows: Tensor | slice) -> Tensor:
        y = functional_call(layer, {"weight": w.to(weight.dtype)}, (inputs[rows],))
        return (y - outputs[rows]).square().sum(channel).mean()

    adam = torch.optim.Adam([v], RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(inputs), (BATCH,), generator=generator).to(inputs.device)
            stretched = torch.sigmoid(v) * (high - low) + low
            h = stretched.clamp(0, 1)
            loss = error(points(h), rows)
            if step >= WARM * steps:
                decided = (2 * h - 1).abs()  # 1 for an h of 0 or 1
                beta = _beta(step / steps)
                loss = loss + WEIGHT * (1 - decided.pow(beta)).sum()
            adam.zero_grad()
            (v.grad,) = torch.autograd.grad(loss, [v])
            adam.step()
    learned = points((v.detach() > 0).to(down))
    nearest = grid.fake(weight)
    all_rows = slice(None)
    with torch.no_grad():
        is_better = error(learned, all_rows) < error(nearest, all_rows)
    return grid.quantize(learned if is_better else nearest)


def _trainable(x: Tensor) -> Tensor:
    """Return x detached, and no inference tensor, which autograd refuses."""
    return x.clone() if x.is_inference() else x.detach()


def _beta(progress: float) -> float:
    """Return the exponent of the regulariser after a share of the steps."""
    first, last = SHARP
    return first + (last - first) * (progress - WARM) / (1 - WARM)


def bias_correction(layer: nn.Module, weight: Tensor, mean: Tensor) -> Tensor:
    """Return the bias [out] with which a layer keeps the mean of its outputs if its weight becomes `weight`.

    layer: a Linear or convolution.
    weight: the dequantized weight, in the shape of the layer's weight.
    mean: mean [in] of the layer's inputs over examples and positions.

    Nagel et al. 2019 (arXiv:1906.04721), section 4.2: W~ = W + e shifts the outputs by e E[x] on average (for a
    convolution, e is summed over the kernel). So the bias is b - e E[x]: exact for a Linear, and for a convolution if
    all positions have the same mean, which zero padding and the edges of images do not.
    """
    _check_layer(layer)
    if not isinstance(weight, Tensor) or not isinstance(mean, Tensor):
        raise InputError("weight and mean must be tensors: make them with torch.as_tensor.")
    if not weight.isfinite().all() or not mean.isfinite().all():
        raise InputError("The weight or the mean holds NaN or infinity: look for the batch that it comes from.")
    groups = getattr(layer, "groups", 1)
    inputs_of_group = layer.weight.shape[1]
    inputs = inputs_of_group * groups
    if weight.shape != layer.weight.shape or mean.shape != (inputs,):
        raise InputError(
            f"weight is {list(weight.shape)} and mean {list(mean.shape)}, but the layer has a weight of "
            f"{list(layer.weight.shape)} and {inputs} inputs: give one mean an input."
        )
    change = weight.detach().double() - layer.weight.detach().double()
    change = change.reshape(len(weight), inputs_of_group, -1).sum(2)  # [out, in of a group]
    change_by_group = change.view(groups, -1, inputs_of_group)
    mean_by_group = mean.detach().double().view(groups, -1, 1)
    shift = change_by_group @ mean_by_group
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return (bias - shift.flatten()).to(layer.weight.dtype)


def _check_layer(layer: object) -> None:
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise InputError(
            f"layer is a {type(layer).__name__}, but it must be a Linear or a convolution: give one of these layers."
        )


def _fits(grid: object, layer: nn.Module) -> bool:
    """Return True if `grid` is a grid with a scale for the weight, or with a scale for each output channel."""
    if not isinstance(grid, Grid) or grid.scale.dim() > layer.weight.dim():
        return False
    scales = grid.scale.numel()
    in_groups = scales not in (1, *grid.scale.shape[:1])
    return not in_groups and len(layer.weight) % scales == 0


def _check(
    layer: nn.Module,
    grid: Grid,
    inputs: Tensor,
    outputs: Tensor,
    steps: int,
) -> None:
    check_whole(steps, "steps")
    if not _fits(grid, layer):
        scale = list(grid.scale.shape) if isinstance(grid, Grid) else None
        raise InputError(
            f"AdaRound rounds a layer of {len(layer.weight)} outputs on a Grid without groups, but grid is a "
            f"{type(grid).__name__} with a scale of {scale}: give one scale for each output channel, or one for all."
        )
    for name, x in {"inputs": inputs, "outputs": outputs}.items():
        is_tensor = isinstance(x, Tensor)
        if not is_tensor or x.dtype != layer.weight.dtype or not x.dim():
            kind = f"a {type(x).__name__}"
            if is_tensor:
                kind = f"{x.dtype} {list(x.shape)}"
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
        output_shape, expected = list(outputs.shape[1:]), list(result.shape[1:])
        raise InputError(
            f"An output is {output_shape}, but the layer gives {expected} for an input: give those of this layer."
        )
