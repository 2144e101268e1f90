"""Every system that the course or its guide names, and whether it runs here: a table with sources, and probes.

The rows stand in targets.toml. A probe looks whether a thing is there; it starts nothing, so that "runs" says that the
course's code has what it needs, and only `engines`, `server` and the tests show that it does.
"""

import importlib.util
import platform
import shutil
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from labkit.timing.machine import fingerprint

LIVES = ("alive", "maintenance", "renamed", "ended")


@dataclass(frozen=True)
class Target:
    """A row: `runs` and `half` are probes, `guide` the guide's words for it, `read` the month of the source."""

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
        """ "runs" here, "half": what converts, compiles or emulates it does, or "absent"."""
        return next((word for word in ("runs", "half") if _holds(getattr(self, word))), "absent")

    @property
    def needs(self) -> str:
        """What it takes to try it, if it has not ended: by the probes, and the device where those look for software."""
        if self.life == "ended":
            return ""
        device = self.kind in ("accelerator", "edge") and not self.runs.startswith(("cuda:", "openvino:"))
        whole = " and ".join(["the device"] * device + _words(self.runs))
        half = " and ".join(_words(self.half))
        return "; ".join([whole] * bool(whole) + [f"half of it: {half}"] * bool(half))


_ROWS = tomllib.loads(Path(__file__).with_name("targets.toml").read_text("utf-8"))["targets"]
TARGETS: dict[str, Target] = {name: Target(name, *row) for name, row in _ROWS.items()}


def by_status() -> dict[str, list[str]]:
    """The names of the targets that run here, of which a half does, and that are absent."""
    table: dict[str, list[str]] = {"runs": [], "half": [], "absent": []}
    for name, target in TARGETS.items():
        table[target.status].append(name)
    return table


PROBES = {  # kind of thing: what it is called, whether one of this name is here
    "module": ("package {}", lambda name: importlib.util.find_spec(name) is not None),
    "program": ("program {}", lambda name: shutil.which(name) is not None),
    "feature": ("a CPU with {}", lambda name: name in _features()),
    "system": ("{} as the system", lambda name: platform.system() == name),
    "openvino": ("OpenVINO with a device {}", lambda name: name in _openvino_devices()),
    "cuda": ("an NVIDIA {} GPU", lambda name: any(_names(name, gpu) for gpu in _gpus())),
}


def _holds(probes: str) -> bool:
    """All of "kind:name,kind:name"; none is none."""
    parts = _parts(probes)
    return bool(parts) and all(PROBES[kind][1](name) for kind, name in parts)


def _words(probes: str) -> list[str]:
    return [" ".join(PROBES[kind][0].format(name).split()) for kind, name in _parts(probes)]


def _parts(probes: str) -> list[list[str]]:
    return [probe.split(":") for probe in probes.split(",")] if probes else []


def _names(name: str, gpu: str) -> bool:
    """Whether it is a word of the GPU's name, or its beginning before a hyphen: L4 is no L40S."""
    return not name or name in gpu.replace("-", " ").split()


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
