"""Seconds to cut half of the channels and to prove the cut, beside Torch-Pruning, which proves nothing.

    python benchmarks/prune_and_prove.py                                 the 23 networks of int8_where_it_pays.py, and
                                                                         four of torchvision that take labkit longest
    python benchmarks/prune_and_prove.py --networks timm/convnext_atto torchvision/vit_b_16
    python benchmarks/prune_and_prove.py --results rows.jsonl            keeps the rows, goes on where it stopped

Each network and tool has a fresh process of one thread with a time limit, in which a tiny network was pruned before:
what the first use of torch costs is not laid at a network's door. Half of the channels of every group go, by their L2
norm, called as zoo.py does. Seconds are CPU time from the model to the pruned model; labkit's include the proof on the
example input, and "unproved" is labkit's time without it. A model that Torch-Pruning returns is run once; an error
there, in its call or in the time limit is its row's reason, and the row has no ratio.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import int8_where_it_pays
import torch
import torchvision
import zoo
from torch import Tensor, nn

TORCHVISION = ("swin_v2_t", "vit_b_16", "vgg16_bn", "maxvit_t")
LIMIT_S = 60  # of CPU time for a process

Row = dict[str, Any]


def names() -> list[str]:
    return [*int8_where_it_pays.names(), *(f"torchvision/{name}" for name in TORCHVISION)]


def build(name: str) -> tuple[nn.Module, tuple, dict[str, Tensor]]:
    """(model in eval mode with random weights, args, kwargs)."""
    library, _, network = name.partition("/")
    if library == "torchvision":
        model = torchvision.models.get_model(network, weights=None)
        return model.eval(), (torch.randn(1, 3, 224, 224),), {}
    model, named = int8_where_it_pays.build(name)
    if library == "timm":
        return model, (named["x"],), {}
    return model, (), named


# --- in a process of its own ------------------------------------------------------------------------------------------


def labkit_seconds(model: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> Row:
    from labkit.pruning import channels

    options = {"ratio": 0.5, "criterion": "l2", "scope": "layer"}
    start = time.process_time()
    channels.prune(model, args, kwargs, **options)
    seconds = time.process_time() - start
    start = time.process_time()
    channels.prune(model, args, kwargs, check=False, **options)
    return {"seconds": seconds, "unproved": time.process_time() - start}


def torch_pruning_seconds(model: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> Row:
    start = time.process_time()
    pruned, _ = zoo.torch_pruning(model, args, kwargs)
    seconds = time.process_time() - start
    with torch.no_grad():
        pruned(*args, **kwargs)
    return {"seconds": seconds}


TOOLS: dict[str, Callable[[nn.Module, tuple, dict[str, Tensor]], Row]] = {
    "labkit": labkit_seconds,
    "torch_pruning": torch_pruning_seconds,
}


def print_seconds(tool: str, name: str) -> None:
    """Print the row of a tool and a network as JSON."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    TOOLS[tool](tiny, (torch.randn(1, 3, 8, 8),), {})
    model, args, kwargs = build(name)
    try:
        row = TOOLS[tool](model, args, kwargs)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(row))


# --- all processes ----------------------------------------------------------------------------------------------------


def measured(name: str) -> Row:
    """The row of a network, with both tools and the ratio Torch-Pruning / labkit where both have seconds."""
    rows = {tool: of_process(tool, name) for tool in TOOLS}
    row = {"network": name, **rows}
    if all("seconds" in result for result in rows.values()):
        row["ratio"] = rows["torch_pruning"]["seconds"] / rows["labkit"]["seconds"]
    return row


def of_process(tool: str, name: str) -> Row:
    """The row that `print_seconds` prints in a fresh process, or the error that ended the process."""
    command = [sys.executable, __file__, "--one", tool, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"error": f"took more than {LIMIT_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["ended"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: Row) -> str:
    ours, other = row["labkit"], row["torch_pruning"]
    proved = f"{ours['seconds']:6.2f} {ours['unproved']:6.2f}" if "seconds" in ours else ours["error"]
    beside = f"{other['seconds']:6.2f}  {row.get('ratio', 0):5.2f}x" if "seconds" in other else other["error"]
    return f"{row['network']:34} {proved}  {beside[:70]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NETWORK")
    parser.add_argument("--results", type=Path, help="a file that keeps the rows: those in it are not run again")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "NETWORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print_seconds(*options.one)
        return
    print(f"{'CPU seconds of':34} labkit unproved  Torch-Pruning, over labkit with its proof", flush=True)
    for row in int8_where_it_pays.resumed(options.networks or names(), options.results, measured):
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
