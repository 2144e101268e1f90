"""The work of a call: floating-point operations and bytes. `labkit.counting` counts the work."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """Work of a call.

    flops: floating-point operations of the products (matrix products, convolutions, attention, recurrent layers), a
        multiply-add being 2.
    bytes: least traffic of the whole call: memory from before that is read, once, and memory that remains, once.
    by_module: `flops` by module name, children included; "" is the whole model.
    uncounted: operators that may compute products but have no formula, and their calls.
    """

    flops: int
    bytes: int
    by_module: Mapping[str, int] = field(default_factory=dict)
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """Return the arithmetic intensity in FLOP per byte."""
        if self.bytes:
            return self.flops / self.bytes
        return math.inf if self.flops else 0.0

    def __str__(self) -> str:
        parts = [
            f"{self.flops / 1e9:.4g} GFLOP",
            f"{self.bytes / 1e6:.4g} MB",
            f"{self.intensity:.3g} FLOP/byte",
        ]
        calls = [f"{name} x{number}" for name, number in sorted(self.uncounted.items())]
        if calls:
            parts.append(f"uncounted: {', '.join(calls)}")
        return ", ".join(parts)
