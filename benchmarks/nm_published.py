"""labkit's SparseGPT and Wanda beside the algorithms as published: same model, text and seeds; perplexity and time.

    python benchmarks/nm_published.py                          SmolLM2, six of its thirty blocks at 2:4, ten seeds
    python benchmarks/nm_published.py --method wanda --pattern 0.5 --seeds 3

The published side is written here from the papers, in float64 and the slow way: the model runs again from its first
layer for each block, with hooks on its layers. The perplexities of both sides are compared seed by seed; their ratio
has a Student interval over seeds. Time is that of one weight after the other, pruned by the scripts' course in float32
and by labkit from the same Hessian, in alternating order; its ratio has an exact interval of the median over weights.
"""

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit import datasets, models, stats, training
from labkit.batches import segments
from labkit.pruning import blockwise, nm
from labkit.pruning.select import count_to_prune, lowest_k
from labkit.pruning.sparsegpt import Pattern, sparsegpt


def published_sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, damp: float = 0.01, block: int = 128
) -> Tensor:
    """Frantar & Alistarh 2023, Algorithm 1, in the type of `weight` [out, in], with hessian [in, in]."""
    w, h = weight.clone(), hessian.to(weight.dtype, copy=True)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damp * h.diagonal().mean())
    block = 128
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, len(h), block):
        own, of_own = w[:, start : start + block].clone(), u[start : start + block, start : start + block]
        error, pruned = torch.zeros_like(own), torch.zeros_like(own, dtype=torch.bool)
        if not isinstance(pattern, tuple):
            scores = (own / of_own.diagonal()).square()
            pruned = scores <= scores.flatten().sort().values[int(scores.numel() * pattern)]
        for j in range(own.shape[1]):
            if isinstance(pattern, tuple) and j % pattern[1] == 0:
                n, m = pattern
                scores = (own[:, j : j + m] / of_own.diagonal()[j : j + m]).square()
                pruned.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, True)
            column = own[:, j].masked_fill(pruned[:, j], 0)
            error[:, j] = (own[:, j] - column) / of_own[j, j]
            own[:, j:] -= error[:, j : j + 1] @ of_own[j : j + 1, j:]
            own[:, j] = column
        w[:, start : start + block] = own
        w[:, start + block :] -= error @ u[start : start + block, start + block :]
    return w


def published_wanda(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Sun et al. 2024: the least |w_ij| ||x_j|| of every m, or of a row; weight [out, in], hessian [in, in]."""
    scores = weight.abs() * hessian.diagonal().to(weight.dtype).sqrt()
    n, m = pattern if isinstance(pattern, tuple) else (None, scores.shape[1])
    groups = scores.unflatten(1, (-1, m))  # [out, in / m, m]
    least = groups.topk(int(m * pattern) if n is None else m - n, dim=2, largest=False).indices
    return weight.masked_fill(torch.zeros_like(groups, dtype=torch.bool).scatter_(2, least, True).flatten(1), 0)


def labkit_wanda(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """The mask step of `blockwise` for Wanda on one weight, for the clock."""
    scores = weight.abs() * hessian.diagonal().to(weight.dtype).sqrt()
    if isinstance(pattern, tuple):
        return weight * nm.mask(scores, *pattern)
    return weight * ~lowest_k(scores, count_to_prune(scores.shape[1], pattern), dim=1)


OURS = {"sparsegpt": lambda weight, hessian, pattern: sparsegpt(weight, hessian, pattern)[0], "wanda": labkit_wanda}
PUBLISHED = {"sparsegpt": published_sparsegpt, "wanda": published_wanda}


def seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


class Reached(Exception):
    """The block whose inputs were wanted has run; what comes after it need not."""


def hessians(model: nn.Module, block: nn.Module, batches: list) -> dict[nn.Linear, Tensor]:
    """X^T X [in, in] of the inputs of each linear layer in the block, in float64, by running the model up to it."""
    sums: dict[nn.Linear, Tensor] = {}

    def add(layer: nn.Linear, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).double()
        sums[layer] = sums.get(layer, 0) + x.t() @ x

    def stop(*_: object) -> None:
        raise Reached

    handles = [part.register_forward_pre_hook(add) for part in block.modules() if isinstance(part, nn.Linear)]
    handles.append(block.register_forward_hook(stop))
    for batch in batches:
        with contextlib.suppress(Reached):
            model(batch)
    for handle in handles:
        handle.remove()
    return sums


@torch.no_grad()
def prune(model: nn.Module, blocks: list[str], batches: list, method: str, pattern: Pattern) -> tuple[nn.Module, list]:
    """The model pruned by the published algorithm, and for each weight (scripts' seconds, labkit's seconds)."""
    model, times = copy.deepcopy(model).eval(), []
    for block in tqdm(blocks, desc=f"published {method}", disable=None):
        for layer, h in hessians(model, model.get_submodule(block), batches).items():
            w, single = layer.weight, h.float()
            sides = [lambda w=w, h=single, f=f: f(w, h, pattern) for f in (PUBLISHED[method], OURS[method])]
            order = (0, 1) if len(times) % 2 else (1, 0)
            taken = {side: seconds(sides[side]) for side in order}
            times.append((taken[0], taken[1]))
            w.copy_(PUBLISHED[method](w.double(), h, pattern))
    return model, times


def pattern(text: str) -> Pattern:
    """ "2:4" is (2, 4), "0.5" a fraction."""
    kept, _, of = text.partition(":")
    return (int(kept), int(of)) if of else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=OURS, default="sparsegpt")
    parser.add_argument("--pattern", type=pattern, default=(2, 4))
    parser.add_argument("--blocks", type=int, default=6, help="of 30, evenly spread; the others stay dense")
    parser.add_argument("--segments", type=int, default=8, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment and of a test window")
    parser.add_argument("--windows", type=int, default=16, help="test windows")
    parser.add_argument("--seeds", type=int, default=10, help="2 to 10, which calibration segments are drawn")
    parser.add_argument("--json", type=Path, help="file for the perplexities and the seconds of every weight")
    options = parser.parse_args()

    tokenizer = models.tokenizer("smollm2")
    calibration, test = (
        torch.tensor(tokenizer(datasets.handbook(part), verbose=False)["input_ids"]) for part in ("calibration", "test")
    )
    test = test[: options.windows * options.length]
    model = models.smollm2()
    names = [f"model.layers.{number}" for number in range(30)]
    chosen = [names[round(number * 29 / max(options.blocks - 1, 1))] for number in range(options.blocks)]
    spared = [name for name in names if name not in chosen]
    print(f"SmolLM2-135M-Instruct, dequantised Q4_1; {options.method}, {options.pattern}, {len(chosen)} of 30 blocks")
    print(f"dense: perplexity {training.perplexity(model, test, window=options.length):.3f}")
    rows, times = [], []
    for seed in range(options.seeds):
        batches = segments(calibration, options.segments, options.length, seed=seed)
        reference, taken = prune(model, chosen, batches, options.method, options.pattern)
        pruned = blockwise.prune(model, options.pattern, method=options.method, batches=batches, ignore=spared)
        both = [training.perplexity(one, test, window=options.length) for one in (reference, pruned)]
        rows.append({"seed": seed, "published": both[0], "labkit": both[1]})
        times += taken
        print(f"seed {seed}: perplexity published {both[0]:.3f}, labkit {both[1]:.3f}", flush=True)
    ratio, low, high = (math.exp(x) for x in stats.mean_ci([math.log(r["labkit"] / r["published"]) for r in rows]))
    print(f"perplexity, labkit over published: {ratio:.4f} [{low:.4f}, {high:.4f}] over {len(rows)} seeds")
    speed, low_speed, high_speed = stats.paired_ratio(*zip(*times, strict=True))
    print(f"labkit is {speed:.2f}x faster on a weight [{low_speed:.2f}, {high_speed:.2f}] over {len(times)} weights")
    if options.json:
        options.json.write_text(json.dumps({"perplexity": rows, "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
