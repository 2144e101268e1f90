"""Where the pretend device cannot be had, a sentence says why."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from labkit.files import ROOT
from pretend import library

ANOTHER_BUILD = f"The pretend device needs torch's CUDA build, and torch {torch.__version__} here is another build."


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch as its tested CUDA build describes itself."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", f"{library.TESTED[0]}.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_another_build_of_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library.obstacle() == ANOTHER_BUILD


def test_an_untested_torch(cuda_build: pytest.MonkeyPatch):
    cuda_build.setattr(torch, "__version__", "2.99.1")
    assert "was tested with torch 2.13, and not with 2.99.1" in library.obstacle()


def test_a_card(cuda_build: pytest.MonkeyPatch):
    cuda_build.setattr(torch.cuda, "is_available", lambda: True)
    assert library.obstacle() == "A CUDA device is here, so that none has to be pretended."


def test_no_compiler(cuda_build: pytest.MonkeyPatch, tmp_path: Path):
    cuda_build.setenv("PATH", str(tmp_path))
    assert library.obstacle() == "The pretend device is compiled with g++, which is not installed here."
    with pytest.raises(library.Unavailable, match="is not installed here"):
        library.load()


def test_nothing_stands_against_it(cuda_build: pytest.MonkeyPatch, tmp_path: Path):
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    cuda_build.setenv("PATH", str(tmp_path))
    assert library.obstacle() is None


def test_a_compiler_that_fails_leaves_no_library(cuda_build: pytest.MonkeyPatch, tmp_path: Path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "device.cpp:1: error: no such header" >&2\nexit 1\n')
    compiler.chmod(0o755)
    cuda_build.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    cuda_build.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(library.Unavailable, match=r"cannot compile the pretend device: device\.cpp:1: error"):
        library.load()
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.fixture
def skipped_tests(tmp_path: Path) -> Callable[..., str]:
    """skipped_tests("-p", "plugin"): what pytest --pretend-gpu prints with no compiler on the path; no test passes."""
    here = Path(__file__).with_name("test_device.py")

    def printed(*arguments: str) -> str:
        options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:nbval", "--pretend-gpu", *arguments]
        command = [sys.executable, "-m", "pytest", *options, str(here)]
        environment = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and " passed" not in done.stdout, done.stdout
        return done.stdout

    return printed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_tests_are_skipped_with_the_sentence(skipped_tests: Callable[..., str]):
    """About the compiler, or about torch where it is another build or version."""
    assert "The pretend device " in skipped_tests()


@pytest.mark.slow
def test_where_a_card_is_nothing_is_pretended_and_no_test_runs_a_second_time(
    skipped_tests: Callable[..., str], tmp_path: Path
):
    (tmp_path / "a_card.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n", encoding="utf-8")
    printed = skipped_tests("-p", "a_card")
    assert "a CUDA device is here: these tests run on it without --pretend-gpu" in printed
    assert "the device is pretended" not in printed


@pytest.mark.slow
@pytest.mark.skipif(library.obstacle() != ANOTHER_BUILD or not shutil.which("g++"), reason="nothing would be installed")
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="needs ./lab setup")
def test_the_script_that_may_not_install_the_cuda_build_says_that_it_is_not_there(tmp_path: Path):
    environment = os.environ | {"LABKIT_CACHE": str(tmp_path), "PYTHONPATH": ""}
    script = [str(ROOT / ".ci" / "pretend"), "--if-there"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("no GPU is pretended: torch here is the CPU build; ")
    assert list(tmp_path.iterdir()) == []


def test_operators_that_take_a_number_of_the_cpu_are_read_from_torchs_own_table():
    names = set(library.operators_with_cpu_scalars())
    assert {"aten::add.Tensor", "aten::mul.Tensor"} <= names
    assert not {"aten::mm", "aten::cat", "aten::index_select"} & names
