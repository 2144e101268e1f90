"""Attention of a decoder: exact in blocks, over every kind of cache, and with tokens guessed ahead.

Open `decoder` first: an example of ten lines shows a decoder on a cache. Then:
`blockwise`: exact attention without a matrix of all scores. `mla`: attention over latents.
`cache`: keys and values kept whole, evicted or quantized. `paged`: pages shared by several sequences.
`speculative`: generation with guesses. Requests that share a decoder are served by `labkit.deploy.serving`.
"""

from labkit import submodules

__all__ = [
    "blockwise", "cache", "decoder", "mla", "paged", "speculative",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
