"""Numbers in few bits: grids, models calibrated or trained on grids (SIMULATED), and products of integers (REAL).

Open `affine.py` first: it begins with an example, and everything else here stands on its grids.

    >>> import torch
    >>> from labkit.quantization import integer, ptq
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
    >>> x = torch.randn(64, 16)
    >>> calibrated = ptq.quantize(model, [x], weights=7)  # SIMULATED: float32 that takes only the values of codes
    >>> calibrated.model(x).shape
    torch.Size([64, 4])
    >>> integers = integer.convert(calibrated.model)  # REAL: int8 stored and multiplied
    >>> sum(row["wrong"] for row in integer.prove(integers, x))
    0

Then, each idea under the name that the field gives it: `formats` (FP8, MX, NF4), `observers`, `ptq` and `qat` for whole
models, `integer` for kernels, `weight_only` with `gptq` and `awq` for language models, `fold` and `rotation` for exact
rewrites, `rounding`, `outliers`, `kv`. Bytes of a stored model: `labkit.artifact.size`; engines outside torch:
`labkit.deploy.engines`.
"""

from labkit import submodules

__all__ = [
    "affine", "awq", "fold", "formats", "gptq", "integer", "kv", "mixed_precision", "observers", "outliers", "ptq",
    "qat", "rotation", "rounding", "weight_only",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
