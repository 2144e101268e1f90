"""Types shared by the engines: a job (a model to prepare), a runtime (a row of the table of engines), and its call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules import batches as batching

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]  # all inputs by name, in the order of the shapes, to outputs
Shapes = Mapping[str, tuple[int, ...]]  # of the inputs, by name
Sizes = Mapping[int, tuple[int, int]]  # {dimension: (least, most)}


class EngineJob(NamedTuple):
    """A model to prepare for an engine.

    name: name of the engine.
    named: the example's arguments by name.
    batches: calibration data, or None.
    folder: folder of the engine's files.
    options: arguments of the quantizing tool.
    dynamic: varying dimensions.
    """

    name: str
    model: nn.Module
    named: dict[str, Any]
    batches: Iterable | None
    folder: Path
    options: dict[str, Any]
    dynamic: Sizes

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors among the arguments, by name."""
        return {name: value for name, value in self.named.items() if isinstance(value, Tensor)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors among the arguments, by name."""
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def pieces(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the tensors of the batches as arrays, cut to the example's shapes; a short rest is left out."""
        shapes = self.shapes
        first = next(iter(shapes))
        size = shapes[first][0]  # examples of a piece
        for batch in batching.not_empty(batching.check_batches(self.batches, "calibration")):
            tensors = batching.inputs(self.model, batch)
            columns = [tensors[name].split(size) for name in shapes]
            for row in zip(*columns, strict=True):
                piece = dict(zip(shapes, row, strict=True))
                if len(piece[first]) == size:
                    check_shapes(shapes, piece)
                    yield {name: x.contiguous().numpy() for name, x in piece.items()}


class Runtime(NamedTuple):
    """A row of the table of engines: `write` makes the deployed file, `read` makes the call.

    packages: imported packages ("g++": a compiler that is started).
    takes: "any" model, float or quantized; a "float" model; a float model quantized by the engine's "tool"; a float
        model quantized by a tool with "data".
    write: job -> path of the deployed file, or the job (`no_file`) for a runtime without files.
    read: result of `write` -> run.
    """

    packages: tuple[str, ...]
    takes: str
    write: Callable[[EngineJob], Any]
    read: Callable[[Any], Run]


def no_file(job: EngineJob) -> EngineJob:
    """Leave the model in memory, where a runtime without files runs the model."""
    return job


def check_shapes(shapes: Shapes, tensors: Mapping[str, Tensor], dynamic: Sizes | None = None) -> None:
    """Raise InputError unless `tensors` have the names and shapes of `shapes`.

    dynamic: dimensions that may vary; a dimension has the same size in all tensors.
    """
    ranges = dynamic or {}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(actual.values()), ())
    varied = {}
    for dimension, (least, most) in ranges.items():
        if dimension < len(first) and least <= first[dimension] <= most:
            varied[dimension] = first[dimension]
    allowed = {name: _replaced(shape, varied) for name, shape in shapes.items()}
    if actual == allowed:
        return
    words = {dimension: f"{least} to {most}" for dimension, (least, most) in ranges.items()}
    expected = {name: _replaced(shape, words) for name, shape in shapes.items()}
    raise InputError(
        f"The engine is for {_listed(expected)} and got {_listed(actual)}: give tensors of these shapes, or prepare it "
        "for others."
    )


def _replaced(shape: tuple[int, ...], sizes: Mapping[int, Any]) -> tuple:
    """Return `shape` with the entries of `sizes` at the dimensions in `sizes`."""
    return tuple(sizes.get(dimension, size) for dimension, size in enumerate(shape))


def _listed(shapes: Mapping[str, tuple]) -> str:
    words = []
    for name, shape in shapes.items():
        sizes = ", ".join(map(str, shape))
        words.append(f"{name} [{sizes}]")
    return ", ".join(words) or "nothing"
