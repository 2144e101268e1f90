"""Mixed precision: measure how much each layer suffers from few bits, and share out a budget of bytes.

`sensitivity` gives a row for each layer and width; `allocate` chooses a width for each layer; `ptq.quantize` takes the
result as `weights`.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import InputError, check_whole
from labkit.modules import batches as batching
from labkit.modules.replacing import replace_
from labkit.modules.returned import outputs
from labkit.quantization import affine, calls
from labkit.quantization.ptq_plan import Calibrated
from labkit.quantization.simulated import FakeQuantized, weight_grid

COLUMNS = {"layer", "bits", "bytes", "db"}
LARGEST_NOISE = 1e6  # HiGHS is content with 1e-6 above the least, so the largest noise is scaled to this


def sensitivity(calibrated: Calibrated, batches: Iterable, *, bits: Sequence[int] = (8, 4)) -> list[dict[str, Any]]:
    """Measure the noise in the model's output if a single layer is quantized, for each layer and each width.

    calibrated: the result of `ptq.quantize`.
    batches: batches of inputs.
    bits: widths of the weight to try, 2 to 8; the input of the layer has the calibrated grid.

    Returns rows with "layer", "bits", "bytes" (codes without gaps, and float32 scales) and "db", the signal to
    quantization noise of the output against float32's.
    Raises InputError for another `calibrated`, for other bits, and for a model that returns no number.
    """
    if not isinstance(calibrated, Calibrated):
        raise InputError(f"calibrated is a {type(calibrated).__name__}, but it must be what ptq.quantize returns.")
    if not isinstance(bits, Sequence) or not bits:
        raise InputError(f"bits is {bits!r}, but it must be a list of the widths to try, such as (8, 4).")
    for width in bits:
        check_whole(width, "bits", 2, 8)
    batches = list(batching.not_empty(batching.check_batches(batches, "sensitivity")))
    model = copy.deepcopy(calibrated.model)
    fakes = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantized)}
    for name, fake in fakes.items():
        model = replace_(model, name, fake.layer)
    for name in calibrated.plan.points:
        model.set_submodule(name, nn.Identity())

    rows = []
    with torch.no_grad(), batching.evaluating(model):
        reference = _first_outputs(model, batches)
        for (name, fake), width in itertools.product(fakes.items(), bits):
            layer, grid = fake.layer, weight_grid(fake.layer, width)
            trial = replace_(model, name, FakeQuantized(layer, grid, fake.input_grid))
            db = affine.sqnr(reference, _first_outputs(trial, batches))
            model = replace_(trial, name, layer)
            code_bytes = math.ceil(layer.weight.numel() * width / 8)
            rows.append({"layer": name, "bits": width, "bytes": code_bytes + grid.scale.nbytes, "db": db})
    return rows


def _first_outputs(model: nn.Module, batches: Iterable) -> Tensor:
    """Return the numbers of the first tensor that the model returns for each batch, one after the other."""
    first = []
    for batch in batches:
        tensors = outputs(calls.run(model, **calls.inputs(model, batch)))
        if tensors:
            first.append(tensors[0].flatten())
    if not first:
        raise InputError("The model returns no tensor whose noise could be measured: give a part of it that does.")
    return torch.cat(first)


def allocate(rows: Sequence[Mapping[str, Any]], budget: int) -> dict[str, int]:
    """Choose a width for each layer so that the noise is least and all layers together fit a budget.

    rows: a result of `sensitivity`; the noise of layers is taken to add up.
    budget: most bytes of all layers together.

    Returns {layer: bits}, for `ptq.quantize(weights=)`. The problem is a knapsack with one item of each class, solved
    exactly (scipy's HiGHS).
    Raises InputError, with the least number of bytes, if the budget is too small; and for rows of another kind.
    """
    from scipy.optimize import milp  # takes a fifth of a second to import

    if not rows or any(not row.keys() >= COLUMNS for row in rows):
        raise InputError("rows must have a layer, bits, bytes and db each, at least one: give those of sensitivity.")
    if any(math.isnan(row["db"]) or row["db"] == -math.inf for row in rows):
        raise InputError("The noise of a row is NaN or infinite: measure it on other batches.")
    check_whole(budget, "budget", 0)
    rows_of_layer: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        rows_of_layer.setdefault(row["layer"], []).append(number)
    sizes = np.array([row["bytes"] for row in rows])
    noise = np.array([10 ** (-row["db"] / 10) for row in rows])
    least = sum(min(rows[number]["bytes"] for number in numbers) for numbers in rows_of_layer.values())
    if budget < least:
        raise InputError(
            f"The budget is {budget} bytes, but these layers take {least} at least: allow that, or fewer bits."
        )
    belongs = np.zeros((len(rows_of_layer), len(rows)))  # 1 where a row is the layer's
    for place, numbers in enumerate(rows_of_layer.values()):
        belongs[place, numbers] = 1
    solution = milp(
        noise * (LARGEST_NOISE / noise.max() if noise.any() else 1),
        constraints=[(belongs, 1, 1), (sizes[None], 0, budget)],
        integrality=1,
        bounds=(0, 1),
        options={"mip_rel_gap": 0},
    )
    return {row["layer"]: row["bits"] for row, share in zip(rows, solution.x, strict=True) if share > 0.5}
