"""Sparse formats against dense and against torch's CSR, in one Linear or a whole model, timed by labkit.bench.

    python benchmarks/sparse_linear.py                  the CPU kernel in a Linear of 4096 x 4096, one thread
    python benchmarks/sparse_linear.py --model mlp      four Linears of 2048 x 2048; or minilm, with 64 tokens a row
    python benchmarks/sparse_linear.py --device cuda --dtype float16 --formats csr bsr32 2:4 --batches 64 1024

A candidate is shown to give the dense result before it is timed. Nothing is tuned here; see labkit.pruning.sparse.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labkit import bench, models
from labkit.pruning import sparse, unstructured

TOKENS = 64


class Case(NamedTuple):
    label: str
    names: tuple[str, str]
    baseline: Callable[[], Tensor]
    candidate: Callable[[], Tensor]


def linear(options: argparse.Namespace, batch: int) -> tuple[nn.Module, Tensor]:
    """Weights and inputs are random: what a Linear costs does not depend on their values."""
    layer = nn.Linear(options.inputs, options.outputs)
    return layer, torch.randn(batch, options.inputs)


def mlp(options: argparse.Namespace, batch: int) -> tuple[nn.Module, Tensor]:
    layers = [part for _ in range(4) for part in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(batch, 2048)


class Encoder(nn.Module):
    """MiniLM as a function from token numbers to its last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = models.minilm()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state


def minilm(options: argparse.Namespace, batch: int) -> tuple[nn.Module, Tensor]:
    return Encoder(), torch.randint(1000, 20000, (batch, TOKENS))


MODELS = {"linear": linear, "mlp": mlp, "minilm": minilm}


def cut(model: nn.Module, sparsity: float, format: str) -> nn.Module:
    """A dense copy with the zeros, and the rounding of weights, that `format` computes with."""
    if format == "2:4":
        sparsity = 0.0
    model = unstructured.make_permanent(unstructured.prune(model, sparsity, scope="layer"))
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and format == "2:4":  # any two of four: the time is the same
            layer.weight.view(-1, 4)[:, 2:] = 0
        if isinstance(layer, nn.Linear) and format == "kernel-bf16":
            layer.weight.copy_(layer.weight.bfloat16())
    return model


def cases(options: argparse.Namespace) -> Iterator[Case]:
    dtype = getattr(torch, options.dtype)
    for sparsity in options.sparsities:
        for format in options.formats:
            for batch in options.batches:
                torch.manual_seed(0)
                model, x = MODELS[options.model](options, batch)
                dense = cut(model.eval().requires_grad_(False), sparsity, format).to(options.device, dtype)
                x = x.to(options.device, dtype if x.is_floating_point() else None)
                rows = x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()
                fast = sparse.convert(dense, format=format, batch_size=rows)
                label = f"{options.model} {'2:4' if format == '2:4' else f'{sparsity:.0%}'} batch {batch}"
                yield Case(label, ("dense", format), partial(dense, x), partial(fast, x))
                if options.device == "cpu" and format.startswith("kernel"):
                    csr = sparse.convert(dense, format="csr")
                    yield Case(label, ("torch.sparse CSR", format), partial(csr, x), partial(fast, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="linear")
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 128])
    parser.add_argument("--formats", nargs="+", choices=("auto", *sparse.KERNELS), default=["kernel"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a comparison")
    parser.add_argument("--json", type=Path, help="file for every sample")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for case in cases(options):
        comparison = bench.compare(
            case.baseline,
            case.candidate,
            names=case.names,
            check=sparse.close,
            budget_s=options.budget,
            cache="cold" if options.device == "cuda" else "hot",
        )
        low, high = comparison.ci95
        print(
            f"{case.label:24} {case.names[1]} over {case.names[0]}: {comparison.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        )
        records.append({"label": case.label, **comparison.to_dict()})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
