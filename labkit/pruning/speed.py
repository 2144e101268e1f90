"""What a sparse format gains in time: random patterns to try it on, the comparison with dense, where it breaks even.

Equal before fast: a format is timed only after it has given the dense result. The formats are `sparse`'s, the timing is
`labkit.bench`'s; nothing here chooses a format, which is what `sparse.costs` is for.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from labkit import bench
from labkit.errors import InputError
from labkit.measurement import Comparison
from labkit.pruning import sparse
from labkit.pruning.selection import count_to_prune, lowest_k


def random_weight(out_features: int, in_features: int, sparsity: float, *, block: int = 1, seed: int = 0) -> Tensor:
    """A float32 weight [out, in] with exactly the asked share of its block x block tiles zero, chosen at random.

    What a product costs depends on where the zeros are, not on the values. block = 1 is unstructured.
    """
    if block < 1 or out_features % block or in_features % block:
        raise InputError(
            f"{out_features} x {in_features} does not divide into blocks of {block}: give a block that divides both."
        )
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.rand(out_features // block, in_features // block, generator=generator)
    gone = lowest_k(tiles, count_to_prune(tiles.numel(), sparsity))
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight.masked_fill_(gone.repeat_interleave(block, 0).repeat_interleave(block, 1), 0.0)


def close(expected: Tensor, found: Tensor) -> bool:
    """Equal up to rounding in the outputs' type: sums of some 4096 products in another order, through a few layers."""
    eps = torch.finfo(expected.dtype).eps
    return bool((found - expected).abs().max() <= 4096**0.5 * 8 * eps * expected.abs().max())


@torch.no_grad()
def against_dense(
    weight: Tensor,
    format: str,
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    budget_s: float = 1.0,
) -> Comparison:
    """Speed-up of a Linear with `weight` [out, in] held in `format` over the same one held dense, x [batch_size, in].

    On CUDA with the L2 cleared before each call. "kernel-bf16" rounds weights, and so does the dense one beside it.
    """
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.copy_(weight.bfloat16() if format == "kernel-bf16" else weight)
    dense = dense.to(device, dtype)
    x = torch.randn(batch_size, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    fast = sparse.convert(dense, format=format, batch_size=batch_size)
    cache = "cold" if x.is_cuda else "hot"
    return bench.compare(
        lambda: dense(x), lambda: fast(x), names=("dense", format), check=close, budget_s=budget_s, cache=cache
    )


def break_even(sparsities: Sequence[float], speedups: Sequence[float]) -> float | None:
    """The first sparsity at which a speed-up reaches 1, between two measured ones; None where it never crosses.

    Between neighbours the time, 1 / speed-up, is taken to be linear in the sparsity, as it is when each kept weight
    costs the same.
    """
    points = sorted(zip(sparsities, speedups, strict=True))
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if slow < 1 <= fast:
            return low + (1 / slow - 1) / (1 / slow - 1 / fast) * (high - low)
    return None
