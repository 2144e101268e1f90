"""The course's folders, the user's cache, and files that are there whole or not at all.

In the repository, where `./lab` installs labkit editable, the folders lie beside the package. In a wheel the package
brings what it reads of them along, laid out as in the repository (setup.py). A file is written under another name in
the same folder, and renamed at the end.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from labkit.errors import DataError, InputError

DISTRIBUTION = "inference-labkit"  # as in pyproject.toml; the name `labkit` belongs to another project's distribution
PACKAGE = Path(__file__).resolve().parent
IN_WHEEL = (PACKAGE / "repository").is_dir()
ROOT = PACKAGE / "repository" if IN_WHEEL else PACKAGE.parent
DATA = ROOT / "data"
RECORDED = DATA / "recorded"
NOTEBOOKS = ROOT / "notebooks"
CHECKS = NOTEBOOKS / "checks"  # of the exercises, a file a lesson
COMMAND = "./lab" if (ROOT / "lab").exists() else "labkit"  # a class's release has no ./lab, nor has a wheel
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # no space, no quota, too large, read-only


def cache_dir() -> Path:
    """The folder for fetched models: LABKIT_CACHE, else XDG_CACHE_HOME/labkit, else ~/.cache/labkit; not made here.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification asks.
    InputError where it lies in the home of a user that this machine does not have.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    usual = Path(xdg if os.path.isabs(xdg) else "~/.cache", "labkit")
    asked = os.environ.get("LABKIT_CACHE") or usual
    try:
        return Path(asked).expanduser()
    except RuntimeError:
        raise InputError(
            f"The folder for models is {asked}, and there is no such user's home; set LABKIT_CACHE to a folder."
        ) from None


def set_up_with(extra: str) -> str:
    """The command that brings the packages of an extra of pyproject.toml, such as "engines".

    It never names the distribution, which pip would look for in its index.
    """
    if COMMAND == "./lab":
        return f"./lab setup --with {extra}"
    return f"pip install 'FILE.whl[{extra}]'" if IN_WHEEL else f"pip install -e '.[{extra}]'"


def restore(names: Sequence[str]) -> str:
    """The command that brings committed files back, `names` being their paths below data/."""
    if IN_WHEEL:
        return "pip install --force-reinstall --no-deps FILE.whl"
    return f"git checkout -- {' '.join(f'data/{name}' for name in names)}"


def child_environment(**settings: str) -> dict[str, str]:
    """This process's environment with `settings`, for a Python child that imports the same labkit."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **settings, "PYTHONPATH": path}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path to write to, which becomes `path`; its folder is made. After an error `path` is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_told(place: Path | None = None) -> Iterator[None]:
    """A disk that takes no more, found while `place` was written, becomes a DataError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or place or "A file"
        raise DataError(
            f"{where} could not be written ({os.strerror(error.errno)}) and was left as it was; "
            "free some space there, or choose another folder."
        ) from error


@contextlib.contextmanager
def refused(what: str, cure: str = "fix that, then try again") -> Iterator[None]:
    """An error of the system becomes an InputError: `what` failed, the system's reason in brackets, and the `cure`."""
    try:
        yield
    except OSError as error:
        several = isinstance(error, shutil.Error)  # one reason a file
        reason = error.args[0][0][2] if several else error.strerror or error
        raise InputError(f"{what} ({reason}); {cure}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with its folder."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
