"""Attention of a decoder: exact in blocks, over every kind of cache, and with tokens guessed ahead.

Open `decoder.py` first: an example of ten lines shows a decoder on a cache.

decoder.py: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 2 or Gemma 3 on top of a cache
families.py: what these differ in, read from a transformers model
blockwise.py: exact attention without a matrix of all scores
cache.py: keys and values kept whole, evicted or quantized
paged.py: pages shared by several sequences
mla.py: attention over latents
speculative.py: generation with guesses

Requests that share a decoder are served by `labkit.deploy.serving`.
"""

from labkit.on_demand import submodules

__all__ = [
    "blockwise", "cache", "decoder", "families", "mla", "paged", "speculative",
]  # fmt: skip

__getattr__ = submodules(__name__, __all__)
