"""The table of systems: complete, dated and sourced, its probes right about what is put before them."""

import re

import pytest

from labkit import files
from labkit.deploy import engines, language, targets
from labkit.deploy.targets import TARGETS

# Every engine, server, instruction set and device that the guide names, section 1 and its list of accelerators.
GUIDE = {
    "NVIDIA GPUs", "H100", "H200", "A100", "L4", "A10G", "AVX-512", "AVX-512 VNNI", "AMX", "SVE/SME", "ONNX",
    "OpenVINO", "TensorRT", "Triton", "vLLM", "TGI", "DeepSparse", "Apple Neural Engine", "Google Edge TPU",
    "Qualcomm Hexagon", "NVIDIA Jetson Orin", "Intel Movidius", "TPU", "Cerebras CS-2", "Graphcore IPU", "SambaNova",
}  # fmt: skip


def test_every_system_of_the_guide_is_in_the_table_once():
    named = [target.guide for target in TARGETS.values() if target.guide]
    assert set(named) == GUIDE and len(named) == len(GUIDE)


def test_the_glossary_lists_the_whole_table():
    text = (files.NOTEBOOKS / "glossary.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\* .*$", text, re.MULTILINE)
    assert listed == [
        f"* **{target.name}** ({target.kind}, {target.life}): {target.note}. Source: {target.source} ({target.read})."
        for target in TARGETS.values()
    ]


@pytest.mark.parametrize("name", TARGETS)
def test_a_row_has_a_source_a_month_and_probes_that_exist(name: str):
    target = TARGETS[name]
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", target.read) and target.read <= "2026-11"
    assert target.source and target.note and target.life in targets.LIVES
    assert target.kind in ("engine", "server", "judge", "instructions", "accelerator", "edge")
    for probe in filter(None, f"{target.runs},{target.half}".split(",")):
        assert probe.partition(":")[0] in targets.PROBES and ":" in probe
    assert target.status in ("runs", "half", "absent")
    if target.life == "ended":
        assert target.status == "absent" or target.name == "Google Edge TPU"


def test_a_status_is_what_the_probes_see(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "_features", lambda: ("avx2", "vnni"))
    monkeypatch.setattr(targets, "_gpus", lambda: ["NVIDIA L40S", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"])
    assert TARGETS["AVX-512 VNNI"].status == "runs" and TARGETS["AMX"].status == "absent"
    on = {name: TARGETS[name].status for name in ("NVIDIA GPU", "H100", "H200", "A100", "L4")}
    assert on == {"NVIDIA GPU": "runs", "H100": "runs", "H200": "absent", "A100": "runs", "L4": "absent"}
    monkeypatch.setattr(targets, "_openvino_devices", lambda: ["CPU", "NPU"])
    assert TARGETS["Intel NPU"].status == "runs"
    monkeypatch.setattr(targets, "_openvino_devices", lambda: ["CPU"])
    assert TARGETS["Intel NPU"].status != "runs"
    monkeypatch.setattr(targets, "_gpus", lambda: [])
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: name == "onnx" or None)
    assert TARGETS["ONNX Runtime"].status == "half" and TARGETS["TensorRT"].status == "absent"
    assert TARGETS["NVIDIA GPU"].status == TARGETS["OpenVINO"].status == TARGETS["TGI"].status == "absent"


def test_what_it_takes_is_what_the_probes_look_for():
    assert TARGETS["torch.compile"].needs == "package torch and program g++"
    assert TARGETS["TensorRT"].needs == "an NVIDIA GPU and package tensorrt"
    assert TARGETS["H100"].needs == "an NVIDIA H100 GPU" and TARGETS["AMX"].needs == "a CPU with amx"
    assert TARGETS["Google TPU"].needs == "the device and package libtpu", "the package alone runs nothing"
    assert TARGETS["Qualcomm Hexagon"].needs == "the device; half of it: package onnxruntime_qnn"
    assert TARGETS["Intel NPU"].needs == "OpenVINO with a device NPU; half of it: package openvino"
    assert TARGETS["DeepSparse"].needs == ""


def test_engines_that_are_ready_are_said_to_run():
    ready, rows = engines.available() | language.available(), targets.by_status()
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch"}
    names |= {
        "openvino-genai": "OpenVINO GenAI",
        "torch-compile": "torch.compile",
        "aotinductor": "AOTInductor",
    }
    for name, target in names.items():
        assert (ready[name] == "ready") <= (target in rows["runs"])
    assert sorted(name for names in rows.values() for name in names) == sorted(TARGETS)


def test_what_needs_a_gpu_that_no_test_has_is_a_row_of_the_table_and_no_engine():
    for name in ("TensorRT", "Torch-TensorRT", "vLLM"):
        assert "cuda" in TARGETS[name].runs or "CUDA" in TARGETS[name].note
    assert "CUDA, TensorRT" in TARGETS["ONNX Runtime"].note, "its execution providers"
    names = " ".join((*engines.ENGINES, *language.PACKAGES)).lower()
    assert not re.search("cuda|tensorrt|vllm", names)
