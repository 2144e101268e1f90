"""2:4 against dense on an NVIDIA GPU: single products over shapes, batches and types, BERT-base and a Llama block.

    python benchmarks/nm_gpu.py      everything; products: fp16, bf16, int8, 1024 to 16384 square, batch 1 to 8192
    python benchmarks/nm_gpu.py --workloads bert llama --json out.json
    python benchmarks/nm_gpu.py --workloads gemm --shapes 4096x14336 --batches 1 64 --dtypes float16

Equal before fast: a 2:4 result is compared with the dense one of the same weights before it is timed. The L2 cache is
cleared before each call. On a machine without 2:4 tensor cores it says so, lists what would run, and times nothing.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import bench, models
from labkit.pruning import nm, semi_structured, sparse, unstructured

BERT_TOKENS = 128


class Case(NamedTuple):
    label: str
    dense: Callable[[], Tensor]
    sparse: Callable[[], Tensor]
    check: Callable[[Tensor, Tensor], bool]


def two_four(out: int, width: int, dtype: torch.dtype) -> Tensor:
    """A random 2:4 weight: what a product costs does not depend on the values."""
    weight = torch.randn(out, width, device="cuda")
    weight = (weight * 32).round().clamp(-127, 127) if dtype is torch.int8 else weight / width**0.5
    return (weight * nm.mask(weight)).to(dtype)


def gemm(options: argparse.Namespace) -> Iterator[Case]:
    for name in options.dtypes:
        dtype = getattr(torch, name)
        for out, width in options.shapes:
            weight = two_four(out, width, dtype)
            packed = semi_structured.convert(weight)
            for batch in options.batches:
                label = f"gemm {name} {out}x{width} batch {batch}"
                if dtype is not torch.int8:
                    x = torch.randn(batch, width, device="cuda", dtype=dtype)
                    yield Case(label, partial(F.linear, x, weight), partial(F.linear, x, packed), sparse.close)
                elif batch > 16:  # torch._int_mm takes no fewer rows
                    x = torch.randint(-128, 128, (batch, width), device="cuda", dtype=dtype)
                    if semi_structured.backend_in_use() == "cutlass":
                        product = partial(torch.mm, packed, x.t())
                    else:  # torch.mm would return int8
                        product = partial(torch._cslt_sparse_mm, packed.packed, x.t(), out_dtype=torch.int32)
                    yield Case(label, partial(torch._int_mm, weight, x.t()), product, torch.equal)


def whole(label: str, model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Case:
    """A model at 2:4, dense against converted: activations, norms and attention cost the same in both."""
    dense = unstructured.make_permanent(nm.prune(model.cuda())).requires_grad_(False)
    return Case(label, partial(call, dense), partial(call, sparse.convert(dense, format="2:4")), sparse.close)


def bert(options: argparse.Namespace) -> Iterator[Case]:
    for name in options.dtypes:
        for batch in [n for n in (1, 32, 256) if name != "int8"]:
            tokens = torch.randint(1000, 20000, (batch, BERT_TOKENS), device="cuda")
            model = models.bert_base().to(getattr(torch, name))
            label = f"BERT-base {name} {batch} x {BERT_TOKENS} tokens"
            yield whole(label, model, lambda model, tokens=tokens: model(tokens).last_hidden_state)


def llama(options: argparse.Namespace) -> Iterator[Case]:
    for name in options.dtypes:
        for tokens in [n for n in (1, 128, 2048) if name != "int8"]:
            dtype = getattr(torch, name)
            hidden = torch.randn(1, tokens, 4096, device="cuda", dtype=dtype)
            model = models.llama3_8b_layer(dtype)
            yield whole(f"Llama-3-8B block {name} {tokens} tokens", model, lambda model, hidden=hidden: model(hidden))


WORKLOADS = {"gemm": gemm, "bert": bert, "llama": llama}


def what_would_run(options: argparse.Namespace) -> None:
    """The shape rules of both backends, for this machine's torch."""
    for backend in semi_structured.BACKENDS:
        for name in options.dtypes:
            rows, columns = semi_structured.shapes(backend)[getattr(torch, name)]
            taken = [f"{out}x{width}" for out, width in options.shapes if out % rows == width % columns == 0]
            print(f"{backend} {name}: multiples of {rows} x {columns}, so of these shapes {', '.join(taken) or 'none'}")


def shape(text: str) -> tuple[int, int]:
    """ "4096x14336" is (out, in) = (4096, 14336)."""
    out, width = text.split("x")
    return int(out), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float16", "bfloat16", "int8"), default=["float16", "bfloat16", "int8"]
    )
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(n, n) for n in (1024, 2048, 4096, 8192, 16384)])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 8192])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a comparison")
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    if reason := semi_structured.available():
        print(f"Nothing timed: {reason}")
        what_would_run(options)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {semi_structured.backend_in_use()}")
    records = []
    for workload in options.workloads:
        for case in WORKLOADS[workload](options):
            result = bench.compare(
                case.dense, case.sparse, names=("dense", "2:4"), check=case.check, budget_s=options.budget, cache="cold"
            )
            low, high = result.ci95
            print(
                f"{case.label:40} 2:4 over dense: {result.speedup:.2f}x [{low:.2f}, {high:.2f}] {result.verdict}",
                flush=True,
            )
            records.append({"label": case.label, **result.to_dict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
