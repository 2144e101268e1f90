"""Deployment: a model in other runtimes, proofs that the answers are still the model's, and a server under load.

Open `engines` first: an example of ten lines prepares a model and judges the engine's answers. Then:
`export`: a model as a graph or an ONNX file. `parity`: an engine's answers beside the model's.
`job`, `torch_runtimes`, `onnx_runtimes`, `openvino_runtimes`: the rows of the table of engines, by family.
`decoder_graph`, `decoding`, `language`: language models in OpenVINO, by steps and by whole texts.
`simulation`, `serving`, `server`: batching simulated, run for a decoder, and behind HTTP.
`pipeline`: steps of compression in any order. `isa`: fewer instructions of the CPU. `targets`: systems to deploy on.
"""

from labkit import submodules

__all__ = [
    "decoder_graph", "decoding", "engines", "export", "isa", "job", "language", "onnx_runtimes", "openvino_runtimes",
    "parity", "pipeline", "server", "serving", "simulation", "targets", "torch_runtimes",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
