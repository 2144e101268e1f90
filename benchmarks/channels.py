"""Structured pruning of whole models, labkit beside Torch-Pruning, each in fresh processes on one thread.

    python benchmarks/channels.py                              the models that Torch-Pruning's own numbers are known for
    python benchmarks/channels.py --models swin_t --limit 90   with seconds after which a process is ended

Half of the channels of every group, L2, random weights, 224 x 224, batch 1. A process builds the model, then times one
call from the model to the pruned one, imports left out, and reports the largest memory that it held by then. labkit's
equality check is timed by itself: Torch-Pruning has none. Without Torch-Pruning installed its columns are empty.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vgg16_bn", "googlenet", "efficientnet_b0"),
    *("convnext_tiny", "regnet_x_400mf", "mnasnet1_0", "vit_b_16", "swin_t", "shufflenet_v2_x1_0"),
)


def labkit(model: nn.Module, x: Tensor) -> dict[str, float]:
    from labkit.pruning import channels

    start = time.perf_counter()
    plan = channels.plan(model, x, ratio=0.5, criterion="l2", scope="layer")
    small = channels.apply(model, plan, x, check=False).model
    seconds = time.perf_counter() - start
    peak = memory()
    channels.apply(model, plan, x)
    check = time.perf_counter() - start - seconds
    return {"seconds": seconds, "check": check, "peak": peak, "left": size(small), "peak_checked": memory()}


def torch_pruning(model: nn.Module, x: Tensor) -> dict[str, float]:
    """As its README has it: the classifier ignored; for ViT also what its example script adds."""
    import torch_pruning as tp

    start = time.perf_counter()
    options = {"ignored_layers": [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]}
    heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    if heads:
        options["num_heads"] = {m: m.num_heads for m in heads}
        options["out_channel_groups"] = {m: m.num_heads for m in heads}
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=0.5, **options)
    pruner.step()
    if heads:
        model.hidden_dim = model.conv_proj.out_channels
    seconds = time.perf_counter() - start
    peak = memory()
    with torch.no_grad():
        model(x)
    return {"seconds": seconds, "peak": peak, "left": size(model)}


TOOLS: dict[str, Callable[[nn.Module, Tensor], dict[str, float]]] = {"labkit": labkit, "torch_pruning": torch_pruning}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def memory() -> float:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(tool: str, name: str) -> None:
    """In a process of its own: prints the result as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    importlib.import_module("labkit.pruning.channels" if tool == "labkit" else "torch_pruning")
    before = memory()
    model = torchvision.models.get_model(name, weights=None).eval()
    dense = size(model)
    result = TOOLS[tool](model, torch.randn(1, 3, 224, 224))
    bytes_ = sum(t.nbytes for t in [*model.state_dict().values()]) if tool == "labkit" else dense * 4
    print(json.dumps({**result, "dense": dense, "before": before, "bytes": bytes_}))


def repeated(tool: str, name: str, repeats: int, limit: float) -> dict[str, float] | str:
    """Medians over fresh processes, or what went wrong."""
    found = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--one", tool, name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"> {limit:.0f} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["ended"])[-1][:60]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(row[key] for row in found) for key in found[0]}


def cells(result: dict[str, float] | str) -> str:
    if isinstance(result, str):
        return f"{result:30}"
    peak = (result["peak"] - result["before"]) / result["bytes"]
    return f"{result['seconds']:6.2f} s {peak:5.1f}x {result['left'] / result['dense']:7.1%} left "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=90, help="seconds for a process")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    tools = [tool for tool in TOOLS if importlib.util.find_spec(tool)]
    print(f"torch {torch.__version__}, 1 thread, median of {options.repeats} processes; memory beyond imports / model")
    print(f"{'model':20} {'labkit':30} {'its check':>10}  {'Torch-Pruning' if len(tools) > 1 else ''}")
    for name in options.models:
        rows = {tool: repeated(tool, name, options.repeats, options.limit) for tool in tools}
        ours = rows["labkit"]
        check = f"{ours['check']:8.2f} s" if isinstance(ours, dict) else ""
        other = cells(rows["torch_pruning"]) if "torch_pruning" in rows else ""
        print(f"{name:20} {cells(ours)} {check:>10}  {other}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
