"""LLM.int8(): columns of the input with an outlier are multiplied in floating point, all others in 8 bits.

Dettmers et al. 2022 (arXiv:2208.07339), section 3. SIMULATED: floats that take the values of codes.
"""

from collections.abc import Collection

from torch import Tensor, nn


class OutlierSplit(nn.Module):
    """SIMULATED: a Linear in 8 bits whose outlier columns are multiplied as they are.

    A column j of the input is an outlier if |x_j| >= threshold in any token of the call. The other columns have a
    scale for each token and, of the weight, for each output (vector-wise, equation 5), codes -127 to 127. share: of
    the columns that were split off in the last call.
    """


def split(model: nn.Module, *, threshold: float = 6.0, ignore: Collection[str] = ()) -> nn.Module:
    """SIMULATED: a copy of `model` whose Linears are `OutlierSplit`, but for the head of a language model.

    threshold: 6 in the paper; infinity is int8 per token without a split.
    ignore: names of Linears that stay.
    """
