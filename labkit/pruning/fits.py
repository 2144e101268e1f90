"""Does a forward pass run with other sizes? Tried on the meta device: nothing is computed, no weight is copied."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from labkit.counting import evaluating
from labkit.pruning import surgery
from labkit.pruning.abstract import Abstract, to_meta, undisturbed
from labkit.pruning.tracing import outputs

if TYPE_CHECKING:
    from labkit.pruning.coupling import Coupling


def error(model: nn.Module, coupling: "Coupling", gone: np.ndarray, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """What goes wrong when `model` runs without the labels in `gone`; "" if it gives outputs of the same shapes."""
    kept = coupling.kept(gone)
    attributes = surgery.attributes(model, kept, coupling.sizes(gone))
    cut = surgery.cut(model, kept, attributes, meta=True)
    args, kwargs = to_meta((args, dict(kwargs)))
    try:
        with undisturbed(), evaluating(cut), Abstract():
            shapes = [list(x.shape) for x in outputs(cut(*args, **kwargs))]
            if coupling.record.trained:
                for module in cut.modules():
                    module.training = True
                cut(*args, **kwargs)
    except Exception as failure:
        return str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    return "" if shapes == coupling.record.shapes else f"the output becomes {shapes}"
