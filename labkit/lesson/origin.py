"""Origin of a record: the time, labkit's version and the course's commit."""

import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from labkit import files


def origin() -> dict[str, Any]:
    """Return the fields of a new record about the origin: the time, labkit's version, the course's commit."""
    try:
        labkit = version(files.DISTRIBUTION)
    except PackageNotFoundError:
        labkit = "unknown"
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "labkit": labkit, "git": _git()}


def _git() -> dict[str, Any] | None:
    """Return the course's commit, and if files differ from it ("dirty"); None outside a clone."""
    if files.IN_WHEEL:  # the environment may lie in a clone of something else
        return None
    try:
        commit = _git_output("rev-parse", "HEAD")
        changes = _git_output("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git_output(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
