"""Makes a notebook's kernel elsewhere ready for the lessons: on Colab, Kaggle, JupyterHub, any server of notebooks.

    !git clone --depth 1 ADDRESS inference-optimisation
    %run inference-optimisation/course/hosted.py

The checkout stays where it is, read-only if you like, and so does the working folder, which gets the results. Packages
that are missing are installed beside those that are there; models go to the user's cache. Only the standard library is
imported before that.
"""

import importlib
import os
import re
import site
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_THE_SERVER = {"jupyterlab", "ipykernel", "ipywidgets"}  # they run this kernel, and another version may end it


def requirements() -> dict[str, str]:
    """List what the lessons import, by the distribution's name, each with the versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["course"]]
    named = {re.match(r"[\w-]+", line)[0]: line for line in lines}
    return {name: line for name, line in named.items() if name not in OF_THE_SERVER}


def install(lines: list[str]) -> None:
    """Let pip install what is missing or too old, and nothing where all is there; SystemExit with pip's last word."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lines]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        sys.exit(f"What the lessons need cannot be installed ({reason}); is this notebook allowed to use the internet?")


def versions() -> dict[str, str]:
    """The version of each installed distribution, by its name."""
    return {distribution.name.lower(): distribution.version for distribution in distributions()}


def see_what_is_new() -> None:
    """Let this kernel import what was installed after it had started, for this user alone too."""
    user = site.getusersitepackages()
    if site.ENABLE_USER_SITE and user not in sys.path:  # it is looked for when Python starts
        sys.path.append(user)
    importlib.invalidate_caches()


def use_this_labkit() -> None:
    """Let this kernel and its child processes import the checkout's labkit, also after another one was imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "labkit"]:
        del sys.modules[name]
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def main() -> None:
    """Install, find labkit, fetch the models, and say what comes next."""
    needed = requirements()
    before, imported = versions(), {*needed} & {*sys.modules}
    print("installing what is missing, and fetching the models; this takes some minutes, once", flush=True)
    install(list(needed.values()))
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
