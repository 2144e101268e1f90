"""The instructions that a test needs: the CPU's, less what the environment forbids torch's libraries to use.

A test says `@needs("vnni")` and is skipped elsewhere. ONEDNN_MAX_CPU_ISA caps oneDNN (and OpenVINO's copy of it),
ATEN_CPU_CAPABILITY torch's own kernels, so that a machine with all of them stands in for older ones.
"""

import os

import pytest
import torch

from labkit.timing.machine import fingerprint

WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
CAPS = {  # of ONEDNN_MAX_CPU_ISA, by what they forbid
    "vnni": WITHOUT_VNNI,
    "amx": (*WITHOUT_VNNI, "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16"),
    "avx512": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
}
REASONS = {
    "vnni": "needs a CPU with VNNI, which adds products of 8-bit codes without an overflow",
    "cpu vnni": "needs a CPU with VNNI, which adds products of 8-bit codes without an overflow",
    "vectors": "needs vector instructions in torch's own kernels",
}


def has(feature: str) -> bool:
    """Whether oneDNN may use "vnni", "avx512" or "amx" here, ONNX Runtime "cpu vnni", torch's own kernels "vectors"."""
    if feature == "vectors":
        return torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    if feature == "cpu vnni":  # which asks the CPU alone
        return "vnni" in fingerprint("cpu").features
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return feature in fingerprint("cpu").features and cap not in CAPS[feature]


def needs(*features: str) -> pytest.MarkDecorator:
    """A mark that skips a test where one of these is missing."""
    missing = [feature for feature in features if not has(feature)]
    return pytest.mark.skipif(bool(missing), reason="; ".join(REASONS[feature] for feature in missing))
