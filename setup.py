"""Building the wheel, beyond pyproject.toml: the wheel takes along files that labkit reads outside its folder.

The files lie in labkit/repository/ of the wheel, laid out as in the repository, where labkit.files looks for them. An
editable installation takes no files along, and reads the repository's.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TAKEN_ALONG = ("pyproject.toml", "notebooks/claims.toml", "notebooks/glossary.md", "notebooks/checks", "data")

LEFT_OUT = ("__pycache__", "prepare.py", "train_*.py")  # how the data were made


class BuildWithRepository(build_py):
    """The build of a wheel, with the files in TAKEN_ALONG."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "labkit" / "repository"
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left it
        for name in TAKEN_ALONG:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).is_dir():
                shutil.copytree(name, target / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
            else:
                shutil.copy(name, target / name)


setup(cmdclass={"build_py": BuildWithRepository})
