"""Attention that never holds all scores, what a decoder keeps between tokens, and tokens guessed ahead.

`from labkit.attention import blockwise` and the like; one module an idea. How requests share a decoder:
`labkit.deploy.serving`.
"""

from labkit import submodules

__all__ = [
    "blockwise", "cache", "decoder", "mla", "paged", "speculative",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
