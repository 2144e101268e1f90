"""What pyproject.toml cannot say: the wheel takes along what labkit reads of the repository's other folders.

It lies in labkit/repository/, laid out as in the repository, where labkit.files looks for it. So each file is there
once; an editable installation takes nothing along.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TAKEN_ALONG = ("pyproject.toml", "notebooks/claims.toml", "notebooks/glossary.md", "notebooks/checks", "data")

LEFT_OUT = ("__pycache__", "prepare.py", "train_*.py")  # how the data were made


class BuildWithRepository(build_py):
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
