"""N:M masks: labkit's beside topk, torch.ao's WeightNormSparsifier, a copy, a loop, and its own without a compiler.

    python benchmarks/nm_mask.py                       4096 x 4096 float32, one thread; the loop on 256 x 256
    python benchmarks/nm_mask.py --dtype bfloat16 --threads 2
    python benchmarks/nm_mask.py --device cuda         without the loop and torch.ao

Each row is one interleaved comparison by labkit.bench. Every rival is shown to give labkit's mask before it is timed.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from labkit import bench
from labkit.pruning import nm, pattern

PATTERNS = [(2, 4), (1, 4), (4, 8)]


class Case(NamedTuple):
    rival: str
    weight: Tensor
    n: int
    m: int
    run: Callable[[], Tensor]
    check: Callable[[Tensor, Tensor], bool] | None = torch.equal


def by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    """As most scripts have it. Which of equal magnitudes it keeps is not defined."""
    groups = weight.abs().view(-1, m)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(n, dim=1).indices, True).view_as(weight)


def by_loop(weight: Tensor, n: int, m: int) -> Tensor:
    """Group after group in Python."""
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    flat = weight.flatten()
    for start in range(0, len(flat), m):
        chosen = torch.zeros(m, dtype=torch.bool)
        chosen[flat[start : start + m].abs().topk(n).indices] = True
        kept[start : start + m] = chosen
    return kept.view_as(weight)


def not_compiled(weight: Tensor, n: int, m: int) -> Tensor:
    """labkit's slices in chunks, as where there is no compiler."""
    with mock.patch.object(pattern, "COMPILED", math.inf):
        return nm.mask(weight, n, m)


def by_torch_ao(weight: Tensor, n: int, m: int) -> Callable[[], Tensor]:
    """A step of the sparsifier, which computes its masks; prepared before, off the clock."""
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight = nn.Parameter(weight)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])

    def step() -> Tensor:
        sparsifier.step()
        return model[0].parametrizations.weight[0].mask.bool()

    return step


def cases(options: argparse.Namespace) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    weight = torch.randn(options.size, options.size, generator=generator).to(options.device, dtype)
    for n, m in PATTERNS:
        ties = not torch.equal(by_topk(weight, n, m), nm.mask(weight, n, m))  # as there are in 16 bits
        yield Case("topk", weight, n, m, partial(by_topk, weight, n, m), None if ties else torch.equal)
        if options.device == "cpu":
            yield Case("labkit, not compiled", weight, n, m, partial(not_compiled, weight, n, m))
    copied = torch.empty_like(weight)
    yield Case("a copy into memory that is there", weight, 2, 4, partial(copied.copy_, weight), None)
    yield Case("a copy into new memory", weight, 2, 4, weight.clone, None)
    if options.device == "cpu":
        yield Case("torch.ao", weight, 2, 4, by_torch_ao(weight, 2, 4))
        small = torch.randn(256, 256, generator=generator)
        yield Case("a loop over groups", small, 2, 4, partial(by_loop, small, 2, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a comparison")
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for case in cases(options):
        ours = partial(nm.mask, case.weight, case.n, case.m)
        names = (case.rival, "labkit")
        result = bench.compare(case.run, ours, names=names, check=case.check, budget_s=options.budget)
        low, high = result.ci95
        print(
            f"{case.n}:{case.m} of {' x '.join(map(str, case.weight.shape)):11} {case.weight.dtype}  "
            f"labkit {1e3 * result.candidate.median_s:8.2f} ms, {case.rival} {1e3 * result.baseline.median_s:9.2f} ms: "
            f"{result.speedup:6.2f}x [{low:.2f}, {high:.2f}] {result.verdict}",
            flush=True,
        )
        records.append({"rival": case.rival, "n": case.n, "m": case.m, **result.to_dict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
