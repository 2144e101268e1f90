"""The experiment that shows if an integer product is right: codes at the ends of the range, beside exact arithmetic.

Kernels for a CPU without VNNI add pairs of products in int16 before int32: two products of 255 and 127 make 64,770, but
int16 ends at 32,767, and the result is wrong without a word. Usual weights hardly ever reach such sums, extreme codes
do. `integer_kernels.probe` tests torch's kernels so, `labkit.deploy.engines` the engines.
"""

import torch
from torch import Tensor

ROWS, TERMS = 64, 504  # float32 holds every sum of 504 products of 8-bit codes exactly


def extreme_codes(lowest: int, highest: int, draw: torch.Generator) -> Tensor:
    """Draw codes from `lowest` to `highest`, int64 [64, 504]; the first three rows hold only the two ends."""
    codes = torch.randint(lowest, highest + 1, (ROWS, TERMS), generator=draw)
    codes[0] = highest
    codes[1] = lowest
    codes[2, ::2] = highest
    codes[2, 1::2] = lowest
    return codes


def count_wrong(results: Tensor, exact: Tensor) -> int:
    """Count the entries of `results` that differ from `exact`, two tensors of one shape; compared in float64."""
    return int((results.double() != exact.double()).sum())
