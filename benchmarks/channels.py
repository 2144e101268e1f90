"""Structured pruning of whole models, labkit beside Torch-Pruning, each in fresh processes on one thread.

    python benchmarks/channels.py                              the models that Torch-Pruning's own numbers are known for
    python benchmarks/channels.py --models swin_t --limit 90   with seconds after which a process is ended
    python benchmarks/channels.py --zoo                        which architectures of timm and transformers are pruned:
                                                               zoo.py, and its options

Half of the channels of every group, L2, random weights, 224 x 224, batch 1. A process builds the model, then times one
call from the model to the pruned one, imports left out. Another process has pruned two layers before, so that what the
first use of torch costs is not laid at the model's door, and reports the largest memory from then on, the dense model's
own included, over the bytes of the dense model. labkit's equality check is a column by itself: Torch-Pruning has none.
Without Torch-Pruning installed its columns are empty.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import psutil
import torch
import torchvision
import zoo
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
    peak, left = memory(), size(small)
    del small
    channels.apply(model, plan, x)
    check = time.perf_counter() - start - seconds
    return {"seconds": seconds, "check": check, "left": left, "memory": peak, "memory_checked": memory()}


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
    return {"seconds": seconds, "left": size(model), "memory": peak}


TOOLS: dict[str, Callable[[nn.Module, Tensor], dict[str, float]]] = {"labkit": labkit, "torch_pruning": torch_pruning}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def memory() -> float:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(tool: str, name: str, warm: bool) -> None:
    """In a process of its own: prints the result as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    importlib.import_module("labkit.pruning.channels" if tool == "labkit" else "torch_pruning")
    if warm:
        TOOLS[tool](nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(1, 3, 8, 8))
    before = psutil.Process().memory_info().rss
    model, image = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    dense, bytes_ = size(model), sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    result = TOOLS[tool](model, image)
    shares = {key: (result.pop(key) - before) / bytes_ for key in list(result) if key.startswith("memory")}
    print(json.dumps({**result, **shares, "left": result["left"] / dense}))


def process(tool: str, name: str, limit: float, warm: bool) -> dict[str, float] | str:
    """What `one` prints, or what went wrong."""
    command = [sys.executable, __file__, "--one", tool, name, "warm" if warm else "cold"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"> {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["ended"])[-1][:60]
    return json.loads(done.stdout.splitlines()[-1])


def measured(tools: list[str], name: str, repeats: int, limit: float) -> dict[str, dict[str, float] | str]:
    """By tool: medians of the seconds over fresh processes, the tools in turn; memory of a warm one."""
    found: dict[str, list] = {tool: [] for tool in tools}
    for _ in range(repeats):
        for tool in tools:
            if not any(isinstance(row, str) for row in found[tool]):
                found[tool].append(process(tool, name, limit, warm=False))
    rows: dict[str, dict[str, float] | str] = {}
    for tool, results in found.items():
        last = results[-1] if isinstance(results[-1], str) else process(tool, name, limit, warm=True)
        seconds = {key: statistics.median(row[key] for row in results) for key in ("seconds", "check") if key in last}
        rows[tool] = last if isinstance(last, str) else last | seconds
    return rows


def cells(result: dict[str, float] | str) -> str:
    if isinstance(result, str):
        return f"{result:30}"
    return f"{result['seconds']:6.2f} s {result['memory']:5.1f}x {result['left']:7.1%} left "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--zoo", nargs=argparse.REMAINDER, help="zoo.py, with the options that follow")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=90, help="seconds for a process")
    parser.add_argument("--one", nargs=3, metavar=("TOOL", "MODEL", "STATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.zoo is not None:
        zoo.main(options.zoo)
        return
    if options.one:
        tool, name, state = options.one
        one(tool, name, warm=state == "warm")
        return
    tools = [tool for tool in TOOLS if find_spec(tool)]
    print(f"torch {torch.__version__}, 1 thread, median of {options.repeats} processes; memory: peak / dense model")
    print(f"{'model':20} {'labkit':30} {'its check':>16}  {'Torch-Pruning' if len(tools) > 1 else ''}")
    for name in options.models:
        rows = measured(tools, name, options.repeats, options.limit)
        ours = rows["labkit"]
        check = f"{ours['check']:6.2f} s {ours['memory_checked']:5.1f}x" if isinstance(ours, dict) else ""
        other = cells(rows["torch_pruning"]) if "torch_pruning" in rows else ""
        print(f"{name:20} {cells(ours)} {check:>16}  {other}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
