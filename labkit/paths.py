"""Where things are: the course's folders beside the package, and the user's cache for what is fetched once.

labkit is installed editable by `./lab`, so the folders are found from this file.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RECORDED = DATA / "recorded"
NOTEBOOKS = ROOT / "notebooks"


def cache_dir() -> Path:
    """The folder for fetched models: LABKIT_CACHE, else XDG_CACHE_HOME/labkit, else ~/.cache/labkit; not made here."""
    if chosen := os.environ.get("LABKIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkit"
