"""Numbers in few bits: grids, what is calibrated and trained on them (SIMULATED), and what multiplies integers (REAL).

`from labkit.quantization import affine` and the like; one module an idea, under the name that the field gives it. Bytes
of what is stored: `labkit.artifact.size`; engines outside torch: `labkit.deploy.engines`.
"""

from labkit import submodules

__all__ = [
    "affine", "fold", "formats", "integer", "kv", "observers", "outliers", "ptq", "qat", "rotation", "rounding",
    "weight_only",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
