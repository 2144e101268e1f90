"""Files that are there whole or not at all: written under another name in the same folder, and renamed at the end."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from labkit.errors import DataError

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # no space, no quota, too large, read-only


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
