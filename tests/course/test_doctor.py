"""What the doctor says where something is missing: programs, drivers, packages or data that are not there."""

import dataclasses
import importlib.metadata
import json
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import labkit

from course import doctor, hosted, notebooks
from labkit.data import fetch
from labkit.storage import native, sell

SMI = "| NVIDIA-SMI 580.65   Driver Version: 580.65.06   CUDA Version: 13.0  |"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a stand-in for a program on a PATH that has nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def put(name: str, says: str, code: int = 0) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return put


def found(name: str) -> doctor.Finding:
    seen, to_do = doctor.CHECKS[name]()
    return doctor.Finding(name, not to_do, "; ".join(filter(None, (seen, to_do))))


def as_cuda_build(monkeypatch: pytest.MonkeyPatch, version: str | None, available: bool) -> None:
    """torch as another build would describe itself; there is no GPU here."""
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("build", "smi", "good", "words"),
    [
        (None, None, True, "cpu (no CUDA device is visible to torch; every lesson runs without one)"),
        (None, SMI, False, "but torch is the CPU build; remove .venv and run ./lab setup without --cpu"),
        ("14.1", SMI, False, "but torch is built for CUDA 14.1; bring the driver up to date"),
        ("13.0", SMI, False, "torch cannot use it: restart, or reinstall the driver"),
        ("12.8", SMI, False, "nvidia-smi shows a GPU (driver 580.65.06, CUDA up to 13.0)"),
        ("13.0", "No devices were found", True, "cpu (no CUDA device is visible to torch"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_explained(program, monkeypatch, build, smi, good: bool, words: str):
    as_cuda_build(monkeypatch, build, available=False)
    if smi:
        program("nvidia-smi", smi)
    result = found("device")
    assert result.good is good and words in result.text


def test_a_hidden_gpu_is_found_in_the_environment(program, monkeypatch: pytest.MonkeyPatch):
    as_cuda_build(monkeypatch, "13.0", available=False)
    program("nvidia-smi", SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert found("device").text.endswith("torch cannot use it: CUDA_VISIBLE_DEVICES is ''; unset it")


def test_a_gpu_that_computes_is_shown_with_its_driver_and_one_that_does_not_is_bad(program, monkeypatch):
    as_cuda_build(monkeypatch, "13.0", available=True)
    card = SimpleNamespace(name="Pretended GPU", total_memory=80e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    program("nvidia-smi", SMI)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    good = found("device")
    assert good.good and good.text == (
        "cuda:0 Pretended GPU, 80 GB, compute capability 9.0; driver 580.65.06 for CUDA up to 13.0"
    )

    def no_image(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nfurther lines")

    monkeypatch.setattr(torch, "ones", no_image)
    bad = found("device")
    assert not bad.good and "computes nothing (CUDA error: no kernel image is available); install a torch" in bad.text


def test_no_compiler_is_no_fault_and_lesson_02_says_what_it_does_then(program, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    assert found("compiler").good and found("compiler").text.startswith("none (the sparse CPU kernel is left out")
    lesson = notebooks.find("02")
    assert doctor.lesson(lesson) == ("all there; without a compiler it takes its slower path", "")
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert found("compiler").text.startswith("none")
    monkeypatch.delenv("CXX")
    program("g++", "")
    assert found("compiler").text.endswith("/bin/g++; the sparse kernel is compiled on first use")
    assert doctor.lesson(lesson) == ("all there", "")


@pytest.mark.skipif(not native.isas("sparse_linear"), reason="needs a C++ compiler")
def test_the_variant_of_the_sparse_kernel_is_named_with_the_race_that_chose_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sell, "race", lambda: {"streamed": 2e-3, "cached": 1e-3})
    chosen = f"the sparse kernel is that for {native.isas('sparse_linear')[-1]}, weights cached 1.0 ms, streamed 2.0 ms"
    assert found("compiler").text.endswith(chosen)


def test_engines_that_are_missing_are_no_fault_and_named_with_what_brings_them(monkeypatch: pytest.MonkeyPatch):
    sentence = "{0} needs {0}, which is not installed: {1}."
    extra = "./lab setup --with engines"
    states = {"torch": "ready", "openvino": sentence.format("openvino", extra), "nncf": sentence.format("nncf", extra)}
    states["executorch"] = sentence.format("executorch", "./lab setup --with edge")
    monkeypatch.setattr("labkit.deploy.engines.available", lambda: states)
    assert found("engines") == doctor.Finding(
        "engines",
        True,
        "torch ready; not openvino, nncf, which nothing needs (./lab setup --with engines); "
        "not executorch, which nothing needs (./lab setup --with edge)",
    )
    monkeypatch.setattr("labkit.deploy.engines.available", lambda: dict.fromkeys(states, "ready"))
    assert found("engines").text == "torch, openvino, nncf, executorch ready"


def test_language_engines_that_are_missing_are_no_fault_and_named_with_what_brings_them(monkeypatch):
    monkeypatch.setattr("labkit.deploy.engines._present", lambda package: False)
    assert found("language engines") == doctor.Finding(
        "language engines",
        True,
        "none ready; not openvino-genai, which nothing needs (./lab setup --with llm)",
    )
    monkeypatch.setattr("labkit.deploy.engines._present", lambda package: True)
    assert found("language engines").text == "openvino-genai ready"


def test_instructions_of_another_kind_of_processor_are_not_missed(monkeypatch: pytest.MonkeyPatch):
    machine = SimpleNamespace(cpu="Some Arm", arch="aarch64", features=("neon", "bf16"))
    monkeypatch.setattr("labkit.machine.fingerprint", lambda device: machine)
    assert found("cpu").text == "Some Arm, aarch64: bf16 neon; not fp16 i8mm sve"
    machine.arch, machine.features = "x86_64", ("avx2",)
    assert found("cpu").text == "Some Arm, x86_64: avx2; not avx512 vnni bf16 fp16 amx"


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    has = {"torch": "1.13", "papermill": None}

    def version(name: str) -> str:
        if has.get(name, "there") is None:
            raise PackageNotFoundError(name)
        return has.get(name) or importlib.metadata.version(name)

    monkeypatch.setattr(hosted, "version", version)
    assert found("packages") == doctor.Finding(
        "packages", False, "missing: torch>=2.9, papermill>=2.6; run ./lab setup"
    )


def test_what_a_lesson_lacks_is_said_with_the_command_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    away = {
        name: dataclasses.replace(asset, files=(fetch.File("nowhere", 1, ""),)) if "handbook" in name else asset
        for name, asset in fetch.assets().items()
    }
    monkeypatch.setattr(fetch, "assets", lambda: away)
    assert doctor.lesson(notebooks.find("05")) == (
        "lacks handbook/calibration.txt.gz (missing), handbook/test.txt.gz (missing), smollm2 (missing)",
        "run git checkout -- data/handbook/calibration.txt.gz data/handbook/test.txt.gz and ./lab data fetch smollm2",
    )
    seen, to_do = doctor.lesson(notebooks.find("02"))
    assert (seen, to_do) == ("lacks minilm (missing)", "run ./lab data fetch minilm")
    assert found("data").text.endswith("smollm2") and "efficientnet_lite0 (missing)" in found("data").text


def test_scripts_get_json_and_an_exit_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: ("fine", ""), "two": lambda: ("", "mend it")})
    monkeypatch.setattr(notebooks, "all_lessons", lambda: [])
    result = labkit("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["good"] is False and report["machine"]["device"] in ("cpu", "cuda")
    assert report["findings"][1] == {"name": "two", "good": False, "text": "mend it"}
    monkeypatch.setitem(doctor.CHECKS, "two", lambda: ("mended", ""))
    assert labkit("doctor", "--json").exit_code == 0


@pytest.mark.timing
def test_it_takes_less_than_ten_seconds():
    began = time.perf_counter()
    assert len(list(doctor.findings())) >= len(doctor.CHECKS)
    assert time.perf_counter() - began < 10
