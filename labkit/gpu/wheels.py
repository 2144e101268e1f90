"""Which wheels a machine without a network lacks, found from its `pip list`, and brought here for it by pip.

Requirements are followed from wheel to wheel by their own metadata, markers (PEP 508) and versions (PEP 440) read by
`packaging`; extras are not followed. There is no going back: each round takes what fits all that was asked until then.
"""

import contextlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from labkit import paths
from labkit.errors import DataError, InputError

PYTHON = "3.12"  # of the machine that the wheels are for, which is Linux on x86-64
NOT_RUN_THERE = {"jupyterlab", "ruff", "labkit"}  # the editor, the linter; labkit[cluster], for sweeps over machines
ENVIRONMENT = {
    "python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "implementation_name": "cpython",
    "implementation_version": f"{PYTHON}.0", "platform_python_implementation": "CPython", "os_name": "posix",
    "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "platform_release": "",
    "platform_version": "",
}  # fmt: skip
# pip takes a platform only as it is named; a machine with glibc 2.39 runs what was built for an older one
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def dependencies(*extras: str) -> list[Requirement]:
    """labkit's requirements and those of its extras, as pyproject.toml has them."""
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for part in lines for line in part]


def required() -> list[Requirement]:
    """What lessons, tests and benchmarks need on that machine."""
    return [one for one in dependencies("test") if one.name not in NOT_RUN_THERE]


def installed(freeze: str) -> dict[str, Version]:
    """Versions by canonical name from the text of `pip list --format=freeze`; InputError where it lists nothing."""
    found = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", freeze, re.MULTILINE):
        try:
            found[canonicalize_name(name)] = Version(version)
        except InvalidVersion:
            continue
    if not found:
        raise InputError(
            "The list of packages has no line NAME==VERSION; make it there with `python3 -m pip list --format=freeze`."
        )
    return found


def here() -> dict[str, Version]:
    """Versions of what this interpreter can import, as `installed` gives them for another machine."""
    found = {}
    for one in importlib.metadata.distributions():
        with contextlib.suppress(InvalidVersion, TypeError):  # a folder that pip left half removed
            found.setdefault(canonicalize_name(one.metadata["Name"]), Version(one.version))
    return found


def missing(has: Mapping[str, Version], asked: Iterable[Requirement]) -> list[Requirement]:
    """Those of `asked` that hold on that machine and that `has` does not meet."""
    return [one for one in asked if _holds(one) and not _meets(has, one)]


def collect(folder: Path, has: Mapping[str, Version]) -> list[Path]:
    """Download into `folder` every wheel that a machine with the packages `has` lacks; returns them, by name.

    Only wheels for PYTHON on Linux x86-64. DataError where one cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels: dict[str, Path] = {}
    have, specifiers = dict(has), {}
    asked = required()
    while asked:
        for one in filter(_holds, asked):
            name = canonicalize_name(one.name)
            specifiers[name] = specifiers.get(name, SpecifierSet()) & one.specifier
        lacking = {canonicalize_name(one.name) for one in missing(have, asked)}
        asked = []
        for wheel in _download([f"{name}{specifiers[name]}" for name in sorted(lacking)], folder):
            name, version, *_ = parse_wheel_filename(wheel.name)
            if name in wheels and wheels[name] != wheel:
                wheels[name].unlink()  # an earlier choice that does not fit what is asked by now
            wheels[name], have[name] = wheel, version
            asked += _needs(wheel)
    return [wheels[name] for name in sorted(wheels)]


def _holds(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**ENVIRONMENT, "extra": ""})


def _meets(has: Mapping[str, Version], requirement: Requirement) -> bool:
    version = has.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _needs(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]


def _download(requirements: list[str], folder: Path) -> list[Path]:
    """The wheels of these requirements, in `folder`; all in one call of pip, with the user's own settings."""
    if not requirements:
        return []
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    ran = subprocess.run([*command, "--dest", str(folder), *requirements], capture_output=True, text=True)
    if ran.returncode:
        errors = [line.removeprefix("ERROR: ") for line in ran.stderr.splitlines() if line.startswith("ERROR: ")]
        raise DataError(
            f"No wheel of {', '.join(requirements)} for Python {PYTHON} on Linux x86-64 could be had "
            f"({(errors or ['pip gave no reason'])[-1].rstrip('.')}); check the network and pip's settings."
        )
    wanted = {canonicalize_name(Requirement(one).name): Requirement(one).specifier for one in requirements}
    newest: dict[str, tuple[Version, Path]] = {}
    for wheel in folder.glob("*.whl"):  # an earlier call may have left other versions
        name, version, *_ = parse_wheel_filename(wheel.name)
        if name in wanted and wanted[name].contains(version, prereleases=True):
            newest[name] = max(newest.get(name, (version, wheel)), (version, wheel))
    return [wheel for _, wheel in newest.values()]
