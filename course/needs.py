"""What a lesson needs, read from its notebook: entries of data/manifest.toml, a compiler, a GPU.

The code names models and data sets as `models.NAME` and `datasets.NAME`; the header's row "Needs" says the rest.
Nothing is executed, and nothing is looked for on this machine: that is course.doctor.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from labkit import files, store
from labkit.errors import DataError

_USED = re.compile(r"\b(?:models|datasets)\.([a-z]\w+)|\btokenizer\(\"(\w+)\"")
_ROW = re.compile(r"^\| Needs \| (.+?) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Needs:
    """A lesson's number, the manifest's entries that it reads, and what of the machine makes it faster or complete."""

    lesson: str
    entries: tuple[str, ...]
    compiler: bool
    gpu: bool

    @property
    def models(self) -> tuple[str, ...]:
        """The entries that are fetched once."""
        return tuple(name for name in self.entries if name in store.models())


def of(notebook: Path) -> Needs:
    """The needs of one lesson; DataError where the file is no notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{notebook.name} is not a notebook that can be read ({error}); get it from the repository."
        ) from error
    code = "\n".join(text for kind, text in texts if kind == "code")
    row = _ROW.search("\n".join(text for kind, text in texts if kind == "markdown"))
    said = row[1].lower() if row else ""
    used = {found[1] or found[2] for found in _USED.finditer(code)}
    return Needs(
        lesson=notebook.stem[:2],
        entries=tuple(name for name in store.entries() if any(word.startswith(_stem(name)) for word in used)),
        compiler="compiler" in said,
        gpu=bool(re.search(r"\ba gpu\b", said)),  # "no gpu" stands there too, and means that none is needed
    )


def every() -> list[Needs]:
    """The needs of all lessons, in order."""
    return [of(notebook) for notebook in sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]


def _stem(entry: str) -> str:
    """What functions for an entry begin with: its folder in the singular, a checkpoint's network, a model's name."""
    folder, slash, file = entry.rpartition("/")
    if folder == "checkpoints":
        return file.partition("-")[0]
    return folder.replace("-", "_").removesuffix("s") if slash else entry
