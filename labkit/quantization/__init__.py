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

affine.py: grids of equal steps, and tensors on them
formats.py: grids of other points: FP8, MX, NF4
packing.py: codes without gaps
observers.py: ranges of activations
simulated.py: layers that round as a kernel would
ptq.py: a whole model, calibrated on some batches
ptq_graph.py: the model's graph, and its sums
ptq_plan.py: the decisions of ptq, and its report
mixed_precision.py: a width for each layer
qat.py: weights and grids that learn under rounding
integer.py: a simulated model becomes integer kernels, and the proof
integer_graph.py: codes handed from layer to layer
integer_choice.py: the layers that are faster in integers
integer_seconds.py: the time of each layer, in integers and in floats
integer_layers.py: layers that store and multiply integers
integer_kernels.py: torch's integer products, and their probe
extreme_codes.py: operands that show wrong sums
weight_only.py: language models with weights in few bits
gptq.py: rounding a weight column by column
awq.py: scales of a weight's columns
k_quants.py: the four-bit format of llama.cpp's files
kv.py: keys and values in few bits
fold.py: batch norms folded, ranges evened out, SmoothQuant
rotation.py: rotations of the residual stream
rounding.py: AdaRound, the rounding of a layer learned
calls.py: a model's call on a batch, with errors in sentences

Bytes of a stored model: `labkit.artifact.size`. Engines outside torch: `labkit.deploy.engines`.
"""

from labkit.on_demand import submodules

__all__ = [
    "affine", "awq", "fold", "formats", "gptq", "integer", "k_quants", "kv", "mixed_precision", "observers", "ptq",
    "qat", "rotation", "rounding", "weight_only",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
