"""Networks of packages that labkit was not written with, pruned and judged as zoo.py does: labkit beside Torch-Pruning.

    python benchmarks/strangers.py --seed 1                           60 networks, drawn from all of strangers.toml
    python benchmarks/strangers.py --seed 1 --held-out                60 of those that labkit was not mended with
    python benchmarks/strangers.py --seed 1 --results strangers.jsonl keeps the rows, and goes on where it stopped
    python benchmarks/strangers.py --networks smp/unet monai/vnet     some
    python benchmarks/strangers.py --table                            size, outputs and seconds of every candidate

A draw takes a package after another, and of each a network. Only packages that are installed count: strangers.toml says
which versions its networks were written for. What counts as an output, and when it is equal, is said in zoo.py. One
thing is stricter here: where "equal" would rest on labkit's own proof, because a statistic runs over pruned channels
where the check sees no module, the outcome is "unjudged". "failed" is for labkit every error that is no sentence of its
own, and the time limit.
"""

import argparse
import random
import time
import tomllib
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import Tensor, nn

CANDIDATES = tomllib.loads(Path(__file__).with_name("strangers.toml").read_text(encoding="utf-8"))
DEVELOPMENT = CANDIDATES.pop("development")["names"]
DRAWN = 60


def names(held_out: bool = False) -> list[str]:
    """<package>/<network>, of what is installed; held out: but for those that labkit was mended with."""
    present = [package for package, entry in CANDIDATES.items() if find_spec(entry["module"])]
    every = [f"{package}/{network}" for package in present for network in CANDIDATES[package]["networks"]]
    return [name for name in every if not (held_out and name in DEVELOPMENT)]


def draw(candidates: list[str], seed: int, number: int = DRAWN) -> list[str]:
    """As many of the candidates as `number` says: a package after another in turn, in an order that the seed makes."""
    generator = random.Random(seed)
    shuffled = generator.sample(sorted(candidates), len(candidates))
    packages: dict[str, list[str]] = {}
    for name in shuffled:
        packages.setdefault(name.partition("/")[0], []).append(name)
    drawn: list[str] = []
    while packages and len(drawn) < number:
        drawn += [networks.pop() for networks in packages.values()]
        packages = {package: networks for package, networks in packages.items() if networks}
    return drawn[:number]


def tokens(size: int, *shape: int) -> Tensor:
    """Whole numbers from 1 to below `size`, no two of them equal where there are as many."""
    return (torch.arange(torch.Size(shape).numel()) * 7 % (size - 1) + 1).view(shape)


def make(name: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """(model, args, kwargs), as the package makes it."""
    package, _, network = name.partition("/")
    table = CANDIDATES[package]
    entry = table["networks"][network]
    source, example = (entry, table.get("input")) if isinstance(entry, str) else entry
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "randn": torch.randn, "tokens": tokens, "zoo": zoo}
    exec(table["setup"], scope)
    model = eval(source, scope)
    if isinstance(model, tuple):  # with its input
        return model
    given = eval(example, scope)
    if isinstance(given, Mapping):
        return model, (), dict(given)
    return model, given if isinstance(given, tuple) else (given,), {}


def build(name: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """(model, args, kwargs): random weights, no two entries of a parameter equal, in eval mode."""
    model, args, kwargs = make(name)
    return zoo.spread(model), args, kwargs


def judged(rows: dict[str, zoo.Row]) -> dict[str, zoo.Row]:
    """The rows of a network, none of them "equal" for what only labkit's own proof says."""
    ours = {tool: row | {"outcome": "unjudged"} for tool, row in rows.items() if zoo.OWN in row["reason"]}
    return zoo.judged(rows) | ours


def describe(name: str) -> str:
    """The size, the outputs and the seconds of a forward pass of a candidate, or what is wrong with it."""
    try:
        torch.manual_seed(0)
        model, args, kwargs = build(name)
        start = time.perf_counter()
        outputs = zoo.run(model, args, kwargs)
        seconds = time.perf_counter() - start
        again = zoo.run(model, *zoo.other(args, kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    shapes = ", ".join(str(list(x.shape)) for x in outputs[:3])
    remark = "" if all(x.isfinite().all() for x in again if x.is_floating_point()) else "not finite"
    return f"{zoo.size(model) / 1e6:6.2f} M {seconds:6.2f} s  {len(outputs)} outputs: {shapes} {remark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="none of those that labkit was mended with")
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="instead of a draw")
    parser.add_argument("--tools", nargs="+", default=[t for t in zoo.TOOLS if find_spec(t)], choices=zoo.TOOLS)
    parser.add_argument("--limit", type=float, default=60, help="seconds for a process")
    parser.add_argument("--results", type=Path, help="a file that keeps the rows: those in it are not run again")
    parser.add_argument("--table", action="store_true", help="describe the candidates; nothing is pruned")
    options = parser.parse_args()
    candidates = names(options.held_out)
    if options.table:
        warnings.simplefilter("ignore")
        for name in options.networks or candidates:
            print(f"{name:42} {describe(name)}", flush=True)
        return
    chosen = options.networks or draw(candidates, options.seed)
    zoo.LIBRARIES += tuple({CANDIDATES[name.partition("/")[0]]["module"] for name in chosen})
    zoo.survey(chosen, options.tools, options.limit, options.results, build, judged)


if __name__ == "__main__":
    main()
