"""A pruned MLP at batch 64: DeepSparse, labkit's kernel, torch's CSR, each against dense torch in the same process.

    python benchmarks/deepsparse_mlp.py --json data/recorded/MACHINE/deepsparse_mlp.json

DeepSparse was discontinued in June 2025; its last wheel that works is 1.8.0 for Python 3.11 on Linux, which wants an
old numpy: `pip install deepsparse==1.8.0 torch scipy psutil networkx safetensors tqdm pydantic filelock` into an
environment of its own, and run this there with PYTHONPATH set to the repository. Where it is missing the other two are
timed without it. Six layers of 1024 x 1024 with ReLU, as in the figures that the lesson quotes, or --width 2048
--layers 4; one thread; every candidate gives the dense result.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from labkit import bench, machine
from labkit.pruning import sparse, unstructured


def pruned_mlp(width: int, layers: int, sparsity: float) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*parts).eval().requires_grad_(False)
    return unstructured.make_permanent(unstructured.prune(model, sparsity, scope="layer"))


def deepsparse_engine(model: nn.Sequential, batch: int, width: int) -> Callable[[Tensor], Tensor] | None:
    """The model compiled by DeepSparse for one core, or None where that is not installed."""
    try:
        import deepsparse
        import onnx
        from onnx import helper, numpy_helper
    except ImportError:
        return None
    nodes, weights, last = [], [], "x"
    for number, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            weights.append(numpy_helper.from_array(layer.weight.numpy(), f"w{number}"))
            weights.append(numpy_helper.from_array(layer.bias.numpy(), f"b{number}"))
            nodes.append(helper.make_node("Gemm", [last, f"w{number}", f"b{number}"], [f"y{number}"], transB=1))
        else:
            nodes.append(helper.make_node("Relu", [last], [f"y{number}"]))
        last = f"y{number}"
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, width]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlp.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
        engine = deepsparse.compile_model(str(path), batch_size=batch, num_cores=1)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(engine.run([np.ascontiguousarray(x.numpy())])[0])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a comparison")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in options.batches:
        for sparsity in options.sparsities:
            model, x = pruned_mlp(options.width, options.layers, sparsity), torch.randn(batch, options.width)
            candidates = {
                "DeepSparse 1.8": deepsparse_engine(model, batch, options.width),
                "labkit kernel": sparse.convert(model, format="kernel", batch_size=batch),
                "torch CSR": sparse.convert(model, format="csr", batch_size=batch),
            }
            for name, candidate in candidates.items():
                if candidate is None:
                    continue
                found = bench.compare(
                    partial(model, x), partial(candidate, x), names=("dense torch", name), check=sparse.close,
                    budget_s=options.budget,
                )  # fmt: skip
                row = {"batch": batch, "sparsity": sparsity, "engine": name, "speed-up": round(found.speedup, 3)}
                rows.append({**row, "low": round(found.ci95[0], 3), "high": round(found.ci95[1], 3)})
                print(f"batch {batch:3} {sparsity:.0%} {name:15} {found}")
    if options.json:
        facts = machine.fingerprint("cpu")
        options.json.write_text(
            json.dumps({"machine": facts.label, "threads": 1, "torch": facts.torch, "width": options.width,
                        "layers": options.layers, "rows": rows}, indent=1) + "\n"
        )  # fmt: skip


if __name__ == "__main__":
    main()
