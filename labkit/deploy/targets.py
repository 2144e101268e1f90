"""A table of every system that the course or its guide names, with sources, and probes for the systems on this machine.

The rows stand in targets.toml. A probe looks for a package, a program or a device, and starts nothing: "runs" says that
the course's code has all its needs; `engines`, `server` and the tests show that the code runs.
"""

import importlib.util
import platform
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from labkit.timing.machine import fingerprint

LIVES = ("alive", "maintenance", "renamed", "ended")


@dataclass(frozen=True)
class Target:
    """A row of the table.

    kind: "engine", "server", "judge", "instructions", "accelerator" or "edge".
    runs, half: probes, "kind:name,kind:name", for the whole system, and for the part that converts, compiles or
        emulates.
    life: one of LIVES.
    guide: the guide's words for the system.
    note: a fact to know.
    source: source of the note.
    read: month in which the source was read.
    """

    name: str
    kind: str
    runs: str
    half: str
    life: str
    guide: str
    note: str
    source: str
    read: str

    @property
    def status(self) -> str:
        """State on this machine: "runs", "half" (only the part of `half` runs), or "absent"."""
        if _holds(self.runs):
            return "runs"
        return "half" if _holds(self.half) else "absent"

    @property
    def needs(self) -> str:
        """Needs of the system in words, unless it has ended: the probes, and a device of its own."""
        if self.life == "ended":
            return ""
        is_device = self.kind in ("accelerator", "edge")
        is_probed = self.runs.startswith(("cuda:", "openvino:"))  # else the probes look for software only
        whole = ["the device"] if is_device and not is_probed else []
        whole += _words(self.runs)
        parts = []
        if whole:
            parts.append(" and ".join(whole))
        if self.half:
            parts.append(f"half of it: {' and '.join(_words(self.half))}")
        return "; ".join(parts)


_ROWS = tomllib.loads(Path(__file__).with_name("targets.toml").read_text("utf-8"))["targets"]
TARGETS: dict[str, Target] = {name: Target(name, *row) for name, row in _ROWS.items()}


def by_status() -> dict[str, list[str]]:
    """Return the names of the targets by status: "runs", "half", "absent"."""
    table: dict[str, list[str]] = {"runs": [], "half": [], "absent": []}
    for name, target in TARGETS.items():
        table[target.status].append(name)
    return table


class Probe(NamedTuple):
    """A kind of thing to look for.

    words: a template for the name.
    is_here: name -> True if the thing is here.
    """

    words: str
    is_here: Callable[[str], bool]


def _has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_program(name: str) -> bool:
    return shutil.which(name) is not None


def _has_feature(name: str) -> bool:
    return name in _features()


def _has_system(name: str) -> bool:
    return platform.system() == name


def _has_openvino_device(name: str) -> bool:
    return name in _openvino_devices()


def _has_gpu(name: str) -> bool:
    return any(_is_name_of(name, gpu) for gpu in _gpus())


PROBES = {
    "module": Probe("package {}", _has_package),
    "program": Probe("program {}", _has_program),
    "feature": Probe("a CPU with {}", _has_feature),
    "system": Probe("{} as the system", _has_system),
    "openvino": Probe("OpenVINO with a device {}", _has_openvino_device),
    "cuda": Probe("an NVIDIA {} GPU", _has_gpu),
}


def _holds(probes: str) -> bool:
    """Return True if everything in "kind:name,kind:name" is here; without probes, False."""
    parts = _parts(probes)
    return bool(parts) and all(PROBES[kind].is_here(name) for kind, name in parts)


def _words(probes: str) -> list[str]:
    phrases = []
    for kind, name in _parts(probes):
        phrase = PROBES[kind].words.format(name)
        phrases.append(" ".join(phrase.split()))  # without the double space of an empty name
    return phrases


def _parts(probes: str) -> list[list[str]]:
    return [probe.split(":") for probe in probes.split(",")] if probes else []


def _is_name_of(name: str, gpu: str) -> bool:
    """Return True if `name` is a word of the GPU's name, or begins a word before a hyphen: L4 is no L40S."""
    words = gpu.replace("-", " ").split()
    return not name or name in words


@cache
def _features() -> tuple[str, ...]:
    return fingerprint("cpu").features


@cache
def _openvino_devices() -> list[str]:
    if importlib.util.find_spec("openvino") is None:
        return []
    import openvino

    return openvino.Core().available_devices


@cache
def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
