"""Preparing a notebook's kernel on a hosted service for the lessons: Colab, Kaggle, JupyterHub, any notebook server.

    !git clone --depth 1 ADDRESS inference-optimisation
    %run inference-optimisation/course/hosted.py

The checkout stays in place, read-only if you like; the working folder stays too and gets the results. Missing packages
are installed beside the packages present; models go to the user's cache. Before the installation only the standard
library is imported.
"""

import importlib
import os
import re
import site
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_THE_SERVER = {"jupyterlab", "ipykernel", "ipywidgets"}  # they run this kernel, and another version may end it


def requirements() -> dict[str, str]:
    """Map the distributions imported by lessons to lines for pip, with the versions allowed by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["course"]]
    needed = {}
    for line in lines:
        name = re.match(r"[\w-]+", line)[0]
        if name not in OF_THE_SERVER:
            needed[name] = line
    return needed


def missing(lines: list[str]) -> list[str]:
    """Keep the lines of missing and outdated packages, or all lines where `packaging`, which compares, is missing.

    pip would find nothing to do as well, after 4 s of computing for each user of a server where all is installed.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return lines
    needed = []
    for line in lines:
        requirement = Requirement(line)
        with suppress(PackageNotFoundError):
            if requirement.specifier.contains(version(requirement.name), prereleases=True):
                continue
        needed.append(line)
    return needed


def install(lines: list[str]) -> None:
    """Let pip install the packages of `lines`; a failure ends the program with pip's last line."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lines]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["no reason given"]
        reason = errors[-1].removeprefix("ERROR: ")
        sys.exit(f"What the lessons need cannot be installed ({reason}); is this notebook allowed to use the internet?")


def versions() -> dict[str, str]:
    """Map each installed distribution to its version."""
    return {distribution.name.lower(): distribution.version for distribution in distributions()}


def see_what_is_new() -> None:
    """Let the kernel import packages installed after its start, also packages installed for the user alone."""
    user = site.getusersitepackages()
    if site.ENABLE_USER_SITE and user not in sys.path:  # it is looked for when Python starts
        sys.path.append(user)
    importlib.invalidate_caches()


def use_this_labkit() -> None:
    """Let the kernel and its child processes import the checkout's labkit, also after importing a different labkit."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "labkit":
            del sys.modules[name]
    sys.path.insert(0, str(ROOT))
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def main() -> None:
    """Install the packages, find labkit, fetch the models, and tell the next step."""
    needed = requirements()
    before = versions()
    imported = set(needed) & set(sys.modules)
    print("installing what is missing, and fetching the models; this takes some minutes, once", flush=True)
    lines = list(needed.values())
    if missing(lines):
        install(lines)  # all, so that pip keeps to each line while it brings what is missing
        see_what_is_new()
    use_this_labkit()

    from labkit.data import fetch
    from labkit.errors import LabError

    try:
        for name in fetch.models():
            fetch.fetch(name)
    except LabError as error:
        sys.exit(str(error))
    after = versions()
    newer = sorted(name for name in imported if before[name] != after[name])
    if newer:
        sys.exit(f"{', '.join(newer)} has a new version: restart the kernel, run this cell again, then the lesson's.")
    print(f"ready: run the lesson's cells from the first one on; results go to {Path.cwd() / 'runs'}")


if __name__ == "__main__":
    main()
