"""Folders of the course, the user's cache, and atomic writing of files.

In the repository, where `./lab` installs labkit in editable mode, the folders lie beside the package. A wheel contains
the files that labkit reads, laid out as in the repository (setup.py). A file is written under a temporary name in the
same folder and renamed at the end, so that no reader sees half a file.
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
    """Return the folder for fetched models: LABKIT_CACHE, else XDG_CACHE_HOME/labkit, else ~/.cache/labkit.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification asks. The folder is not created.
    Raises InputError for a path "~name" if the machine has no such user.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    parent = xdg if os.path.isabs(xdg) else "~/.cache"
    folder = os.environ.get("LABKIT_CACHE") or Path(parent, "labkit")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise InputError(
            f"The folder for models is {folder}, and there is no such user's home; set LABKIT_CACHE to a folder."
        ) from None


def set_up_with(extra: str) -> str:
    """Return the command that installs the packages of an extra of pyproject.toml, such as "engines".

    The command never names the distribution, because pip would look it up in an index.
    """
    if COMMAND == "./lab":
        return f"./lab setup --with {extra}"
    return f"pip install 'FILE.whl[{extra}]'" if IN_WHEEL else f"pip install -e '.[{extra}]'"


def restore(names: Sequence[str]) -> str:
    """Return the command that restores committed files; `names` are paths below data/."""
    if IN_WHEEL:
        return "pip install --force-reinstall --no-deps FILE.whl"
    return f"git checkout -- {' '.join(f'data/{name}' for name in names)}"


def child_environment(**settings: str) -> dict[str, str]:
    """Return the environment of this process with `settings`, for a Python child that imports the same labkit."""
    folders = [str(PACKAGE.parent)]
    if os.environ.get("PYTHONPATH"):
        folders.append(os.environ["PYTHONPATH"])
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(folders)}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename the file to `path` at the end.

    The folder of `path` is created. After an error `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_told(place: Path | None = None) -> Iterator[None]:
    """Turn the system's error about a full or read-only disk into a DataError; any other error passes through.

    place: the file or folder being written, if the error names no file.
    """
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
    """Turn an error of the system into an InputError: `what` failed, the system's reason in brackets, the `cure`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, shutil.Error):  # a list of (source, destination, reason), an entry per file
            first_failure = error.args[0][0]
            reason = first_failure[2]
        else:
            reason = error.strerror or error
        raise InputError(f"{what} ({reason}); {cure}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, and create its folder."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
