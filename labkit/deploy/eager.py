"""The fair baseline: eager torch in the layout and on the threads that suit it, chosen by a race.

Nobody has to install anything for another layout or fewer threads, so what an engine gains counts from the best of
these ways. Let all of them run in the race of the engines, and ask the race which was the fastest:

>>> import torch
>>> from torch import nn
>>> from labkit import bench
>>> from labkit.deploy import eager
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
>>> ways = eager.ways(model, torch.randn(1, 3, 16, 16))  # {name: call without arguments}
>>> race = bench.race(dict(ways), budget_s=0.2)
>>> eager.best(race, ways)  # doctest: +SKIP
'channels last, 1 thread'
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.deploy import engines
from labkit.deploy.engines import Engine
from labkit.errors import InputError
from labkit.modules import batches as batching
from labkit.show import counted
from labkit.timing.machine import on_threads
from labkit.timing.race import Race

LAYOUTS = {"channels first": "torch", "channels last": "torch-channels-last"}  # name -> engine


@dataclass(frozen=True, eq=False)
class EagerWay:
    """A model in eager torch: `way()` calls it with its arguments, on its number of threads.

    engine: the model in a layout.
    arguments: of the model, by name.
    threads: of torch during the call.
    """

    engine: Engine
    arguments: dict[str, Tensor]
    threads: int

    def __call__(self) -> Tensor | tuple[Tensor, ...]:
        with on_threads(self.threads):
            return self.engine(**self.arguments)


def ways(model: nn.Module, args: Any) -> dict[str, EagerWay]:
    """Return the ways to call a float model eagerly, by name: each layout on one thread and on all of torch's threads.

    args: the model's arguments: a tensor, tuple or dict. Without an image among them (a tensor with 4 dimensions) there
        is a single layout, and the names tell the threads alone.
    The names are the same on every machine with as many threads, as "channels last, 1 thread".
    """
    named = batching.inputs(model, args)
    arguments = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    has_image = any(value.dim() == 4 for value in arguments.values())
    layouts = LAYOUTS if has_image else {"": "torch"}
    table = {}
    for layout, name in layouts.items():
        engine = engines.prepare(name, model, args)
        for threads in sorted({1, torch.get_num_threads()}):
            parts = [layout] if layout else []
            parts.append(counted(threads, "thread"))
            table[", ".join(parts)] = EagerWay(engine, arguments, threads)
    return table


def best(race: Race, names: Iterable[str]) -> str:
    """Return the name of the way with the least median time in a race.

    names: of the ways among the race's sides. In the last process of a recording the medians are over the processes.
    Raises InputError for names that are not in the race.
    """
    names = list(names)
    missing = [name for name in names if name not in race.sides]
    if missing or not names:
        raise InputError(f"The race has no {', '.join(missing) or 'way'}: let all the ways run in it.")
    return min(names, key=lambda name: race.sides[name].median_s)
