"""Integer layers against float32: chains of Linears at several batches, and ResNet-20, with dB and codes that differ.

    python benchmarks/int8_linear.py                     four Linears 1024 -> 4096 -> 1024 ..., one thread
    python benchmarks/int8_linear.py --inputs 4096       their other shapes
    python benchmarks/int8_linear.py --inputs 384 --outputs 384 --batches 1 16 32 64 256
                                                         rows from which oneDNN is faster than FBGEMM
    python benchmarks/int8_linear.py --model resnet20 --batches 1 8 64

Peers in the same run: bfloat16, and torch.ao's quantize_dynamic where torch still has it. Every ratio is over float32
in eager torch, where ResNet-20 has its norms, unless it says "folded". Both sides are built anew several times.
"""

import argparse
import copy
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from labkit import bench, datasets, models
from labkit.quantization import affine, fold, integer, integer_layers, ptq


class Rival(NamedTuple):
    """build() -> a callable of no arguments, with its data new in memory."""

    name: str
    build: Callable[[], Callable[[], Tensor]]


def chain(options: argparse.Namespace) -> nn.Sequential:
    widths = ([options.inputs, options.outputs] * options.layers)[: options.layers + 1]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def peer(model: nn.Module) -> nn.Module | None:
    """torch.ao's dynamic quantization, deprecated."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def call(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return partial(copy.deepcopy(model), x.clone())


def dynamic_by(kernel: str, model: nn.Module, x: Tensor, bits: int) -> Callable[[], Tensor]:
    """Quantize dynamically, with all products by one of the two kernels among which `rows` chooses."""
    real = integer.convert_dynamic(model, weights=bits)
    with mock.patch.object(integer_layers, "is_faster_by_qlinear", lambda *_: kernel == "qlinear_of_floats"):
        real(x)  # the first call packs the weights
    return partial(real, x.clone())


def linear_rivals(model: nn.Module, x: Tensor, bits: int) -> Iterator[Rival]:
    yield Rival("int8 dynamic", lambda: call(integer.convert_dynamic(model, weights=bits, rows=len(x)), x))
    for kernel in ("fbgemm", "qlinear_of_floats"):
        yield Rival(kernel, partial(dynamic_by, kernel, model, x, bits))
    simulated = ptq.quantize(model, [x], weights=bits).model
    yield Rival("int8 static", lambda: call(integer.convert(simulated), x))
    yield Rival("bfloat16", lambda: call(copy.deepcopy(model).bfloat16(), x.bfloat16()))
    if peer(model) is not None:
        yield Rival("quantize_dynamic", lambda: call(peer(model), x))


def resnet_rivals(model: nn.Module, x: Tensor, bits: int) -> Iterator[Rival]:
    simulated = ptq.quantize(model, [datasets.fashion_mnist("train", 256).images], weights=bits).model
    rows = integer.prove(integer.convert(simulated), x)
    codes, different, ties, wrong = (sum(row[key] for row in rows) for key in ("codes", "different", "ties", "wrong"))
    print(f"  {codes} codes, {ties} next to a tie: {different} differ from float64's, {wrong} of them are wrong")
    yield Rival("int8", lambda: call(integer.convert(simulated), x))
    yield Rival("float32, folded", lambda: call(fold.fold_batch_norm(model, (x[:1],)), x))
    yield Rival("bfloat16, folded", lambda: call(fold.fold_batch_norm(model, (x[:1],)).bfloat16(), x.bfloat16()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("linear", "resnet20"), default="linear")
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--weights", type=int, default=8, help="bits; 7 where a CPU has no VNNI")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a comparison")
    parser.add_argument("--builds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    records = []
    for batch in options.batches:
        if options.model == "linear":
            model, x, rivals = chain(options), torch.randn(batch, options.inputs), linear_rivals
        else:
            model, x, rivals = models.resnet20(), datasets.fashion_mnist("test", batch).images, resnet_rivals
            model.requires_grad_(False)
        y = model(x)
        print(f"{options.model}, batch {batch}, over float32 in eager torch:")
        for rival in rivals(model, x, options.weights):
            comparison = bench.compare(
                partial(call, model, x),
                rival.build,
                names=("float32", rival.name),
                budget_s=options.budget,
                builds=options.builds,
            )
            db = affine.sqnr(y, rival.build()().float())
            low, high = comparison.ci95
            print(f"  {rival.name:17} {comparison.speedup:5.2f}x [{low:.2f}, {high:.2f}]  {db:5.1f} dB", flush=True)
            records.append({"model": options.model, "batch": batch, "db": db, **comparison.to_dict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
