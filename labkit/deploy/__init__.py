"""Deployment: runtimes and what is proved of them, a server under load, pipelines, instructions, where things stand.

`engines`, `export` and `parity` belong together: written down once, shown equal, then timed. So do, for language
models, `decoder_graph`, its steps in `decoding` (lesson 13), and whole texts in `language`. Batching is simulated in
`simulation` (lesson 01), run for a decoder in `serving` (lesson 11), and behind HTTP in `server`.
"""

from labkit import submodules

__all__ = [
    "decoder_graph", "decoding", "engines", "export", "isa", "language", "parity", "pipeline", "server", "serving",
    "simulation", "targets",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
