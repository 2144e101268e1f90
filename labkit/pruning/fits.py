"""Does a forward pass do the same with other sizes? Tried on the meta device: nothing is computed, no weight is copied.

The operators have to come in the same order and give the shapes that the traced ones have without what is removed. So
a pass that writes its sizes down is found out even where it happens to run.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from labkit.batches import evaluating
from labkit.pruning import surgery
from labkit.pruning.abstract import Abstract, evaluate, to_meta, undisturbed
from labkit.pruning.tracing import Result, training

if TYPE_CHECKING:
    from labkit.pruning.coupling import Coupling


# What comes in the same order whatever the sizes are. Products and moves do not: torch folds and copies by size and
# stride. But what they get wrong shows here, such as a softmax over as many rows as there were heads.
_NAMES = """convolution native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
native_layer_norm native_group_norm _softmax _log_softmax _safe_softmax relu relu6 sigmoid tanh gelu silu mish elu
leaky_relu hardswish hardsigmoid hardtanh softplus _prelu_kernel pow rsqrt embedding cat mean max_pool2d_with_indices
avg_pool2d _adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d roll constant_pad_nd linalg_vector_norm"""
COMPARED = frozenset(_NAMES.split())


class _Differs(Exception):
    """The pass does something else."""


def error(model: nn.Module, coupling: "Coupling", gone: np.ndarray, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """What goes wrong when `model` runs without the labels in `gone`; "" if every operator gives what it should."""
    kept = coupling.kept(gone)
    attributes = surgery.attributes(model, kept, coupling.sizes(gone))
    args, kwargs = to_meta((args, dict(kwargs)))
    following = _Following(coupling.record.results, gone)
    try:
        with surgery.as_if_cut(model, kept, attributes) as cut, undisturbed():
            with evaluating(model), following:
                cut(*args, **kwargs)
            if coupling.record.trained:
                with training(model), Abstract():
                    cut(*args, **kwargs)
    except Exception as failure:  # a forward pass can fail in any way
        return str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    return following.unmet()


class _Following(Abstract):
    """Compares what the operators give with what they gave in the trace, less what is gone."""

    def __init__(self, results: list[Result], gone: np.ndarray) -> None:
        super().__init__()
        self._results = [result for result in results if result.name in COMPARED]
        self._gone, self._next = gone, 0

    def run(self, name: str, func: Any, args: tuple, kwargs: dict, abstract: bool) -> Any:
        out = evaluate(name, func, args, kwargs)
        first = out[0] if isinstance(out, (list, tuple)) and out else out
        if abstract and name in COMPARED and isinstance(first, Tensor):
            if self._next == len(self._results) or self._results[self._next].name != name:
                raise _Differs(f"{name} comes where it did not before")
            result = self._results[self._next]
            self._next += 1
            expected = list(result.shape)
            for block in result.blocks:
                here = self._gone[block.labels]
                if here.any():
                    for axis, dim in enumerate(block.dims):
                        others = tuple(i for i in range(here.ndim) if i != axis)
                        expected[dim] = int((~here).any(others).sum())
            if list(first.shape) != expected:
                raise _Differs(f"{name} in {result.module or 'the model'} gives {list(first.shape)}, not {expected}")
        return out

    def unmet(self) -> str:
        return "" if self._next == len(self._results) else f"{self._results[self._next].name} does not come any more"
