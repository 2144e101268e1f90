"""LLM.int8(): multiply columns of the input with an outlier in floating point, all other columns in 8 bits.

Dettmers et al. 2022 (arXiv:2208.07339), section 3. SIMULATED: floats that take the values of codes.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules.replacing import replace_
from labkit.quantization import affine, calls
from labkit.quantization.simulated import weight_grid

THRESHOLD = 6.0  # of a magnitude, from which on a column is an outlier


class OutlierSplit(nn.Module):
    """SIMULATED: a Linear in 8 bits that multiplies outlier columns of its input in floating point.

    Column j of the input is an outlier if |x_j| >= threshold in any token of the call. The other columns have a scale
    for each token and, in the weight, for each output (the paper's vector-wise quantization), with codes -127 to 127.

    layer: the float layer.
    threshold: magnitude of an outlier.
    `columns` is the number of columns that the last call split off.
    """

    def __init__(self, layer: nn.Linear, threshold: float) -> None:
        super().__init__()
        self.layer, self.threshold, self.columns = layer, threshold, 0
        self.register_buffer("rounded", weight_grid(layer, 8).fake(layer.weight.detach()))

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, input.shape[-1])  # [tokens, in]
        outlier = (x.abs() >= self.threshold).any(0)
        self.columns = int(outlier.sum())
        usual = affine.fake_quantize(x.masked_fill(outlier, 0), axis=0) if len(x) else x
        product_of_usual = F.linear(usual, self.rounded, self.layer.bias)
        product_of_outliers = x[:, outlier] @ self.layer.weight[:, outlier].t()
        y = product_of_usual + product_of_outliers
        return y.view(*input.shape[:-1], self.layer.out_features)


def split(model: nn.Module) -> nn.Module:
    """SIMULATED: return a copy of `model` in which Linears are `OutlierSplit` with the paper's threshold.

    Raises InputError for a model without a Linear.
    """
    calls.check_model(model)
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if not layers:
        raise InputError("The model has no nn.Linear whose outliers could be split off: give one that has.")
    model = copy.deepcopy(model)
    for name in layers:
        model = replace_(model, name, OutlierSplit(model.get_submodule(name), THRESHOLD))
    return model
