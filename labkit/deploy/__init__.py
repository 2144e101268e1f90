"""Deployment: a model in other runtimes, proofs that the answers are still the model's, and a server under load.

Open `engines.py` first: an example of ten lines prepares a model and judges the engine's answers.

engines.py: the table of engines; a model prepared for one of them
eager.py: the fair baseline
job.py: the request to an engine
torch_runtimes.py: torch's own engines
onnx_runtimes.py: ONNX Runtime
openvino_runtimes.py: OpenVINO
export.py: a model as a graph or an ONNX file
parity.py: an engine's answers beside the model's
decoder_graph.py: a decoder as an OpenVINO graph
decoding.py: a language model in OpenVINO, step by step
language.py: a language model in OpenVINO, by whole texts
simulation.py: batching simulated
serving.py: batching run for a decoder
server.py: batching behind HTTP
worker.py: a model in a process and on a core of its own
pipeline.py: steps of compression in any order
own_model.py: a reader's own model in the pipeline
isa.py: fewer instructions of the CPU
targets.py: systems to deploy on
"""

from labkit.on_demand import submodules

__all__ = [
    "decoder_graph", "decoding", "eager", "engines", "export", "isa", "job", "language", "onnx_runtimes",
    "openvino_runtimes", "own_model", "parity", "pipeline", "server", "serving", "simulation", "targets",
    "torch_runtimes", "worker",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
