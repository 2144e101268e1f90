"""Makes an fp16 safetensors copy of a language model that arrives as a 4-bit GGUF file, once, in the user's cache.

The stored integers, scales and minima (llama.cpp's Q4_1: w = d q + m, groups of 32) are multiplied out. The precision
that was lost stays lost, so a baseline made of this is "dequantised Q4_1". It does not quantise, and runs no
downloaded code.
"""

import json
from pathlib import Path

from labkit import store
from labkit.errors import DataError


def fp16_copy(name: str) -> Path:
    """Folder with the fp16 safetensors, config and tokenizer of the fetched model `name`; made on the first call."""
    entry = store.entries()[name]
    return store.made(f"{name}-fp16", lambda folder: _convert(name, folder), needs_bytes=entry.fp16_copy_bytes)


def _convert(name: str, folder: Path) -> None:
    """Read the GGUF through transformers, and write a plain model: the one it returns is flagged as quantised."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from labkit.models import quietly

    source = store.path(name)
    (file,) = (file for file in store.entries()[name].files if file.path.endswith(".gguf"))
    with quietly():
        loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=file.path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.path)
        described = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig.from_dict(described))
        plain.load_state_dict(loaded.state_dict())
        if not all(parameter.isfinite().all() for parameter in plain.parameters()):
            raise DataError(f"{file.path} gives weights that are not finite; run `./lab data verify {name}`.")
        plain.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    record = {"from": file.path, "sha256": file.sha256, "weights": "dequantised Q4_1", "dtype": "float16"}
    (folder / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
