"""SIMULATED layers for `ptq` and `qat`: float32 restricted to the values of codes.

A `FakeQuantized` layer rounds weight and input; a `QuantizationPoint` rounds a value for a sum. The grids lie in
`Quantizer`s and are saved with the model.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from labkit.graph.subclasses import pads_same, same_pads
from labkit.quantization import affine
from labkit.quantization.affine import Grid


class Quantizer(nn.Module):
    """SIMULATED: rounds a value to the points of a grid, which moves and is saved with the module.

    `qat` replaces it by quantizers whose grids move in training.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)
        self.codes = (grid.bits, grid.lo, grid.hi)

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero, *self.codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.fake(x)


class FakeQuantized(nn.Module):
    """SIMULATED: a Linear or Conv2d on rounded input and weight, in float32; bias and result are not rounded.

    layer: the float layer.
    weight_grid: a scale for each output channel.
    input_grid: a scale for the tensor.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight_grid: Grid, input_grid: Grid) -> None:
        super().__init__()
        self.layer = layer
        self.same = pads_same(layer)
        self.weight_quantizer = Quantizer(weight_grid)
        self.input_quantizer = Quantizer(input_grid)

    @property
    def weight(self) -> Tensor:
        """The rounded weight, for forward passes that look at the dtype of a weight (ViT, T5)."""
        return self.fake_weight()

    @property
    def weight_grid(self) -> Grid:
        return self.weight_quantizer.grid

    @property
    def input_grid(self) -> Grid:
        return self.input_quantizer.grid

    def pads(self, x: Tensor) -> tuple[int, int, int, int]:
        """Return the zeros that a Conv2d puts around x by its size, besides its padding: see `subclasses.same_pads`."""
        if not self.same:
            return 0, 0, 0, 0
        layer = self.layer
        return same_pads(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation)

    def fake_input(self, x: Tensor) -> Tensor:
        return self.input_quantizer(x)

    def fake_weight(self) -> Tensor:
        return self.weight_quantizer(self.layer.weight)

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        x = self.fake_input(input)
        weight = self.fake_weight()
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if self.same:
            x = F.pad(x, self.pads(x))
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class QuantizationPoint(nn.Module):
    """SIMULATED: rounds a value that is handed over in codes to a sum and to all further readers.

    A layer behind the point has the same grid, and rounding twice on a grid is rounding once.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.quantizer = Quantizer(grid)

    @property
    def grid(self) -> Grid:
        return self.quantizer.grid

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)


def weight_grid(layer: nn.Module, bits: int) -> Grid:
    """Choose the symmetric grid of a Linear's or Conv2d's weight [out, ...], with a scale for each output channel."""
    rows = layer.weight.detach().float().flatten(1)
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    return affine.choose(rows.amin(1).view(shape), rows.amax(1).view(shape), bits)


def bypassed(model: nn.Module) -> set[nn.Module]:
    """Return the layers that torch's fused kernel for encoders reads without a call; a replacement is not called."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    layers = set()
    for encoder in encoders:
        layers |= {encoder.linear1, encoder.linear2}
    return layers
