"""Results that have to leave a machine through a narrow door: a few zip files of limited size, checked when opened.

The most important files come first; what does not fit is named and left behind. Each part is whole in itself and lists
its files with their SHA-256. What goes the other way, towards the machine, is labkit.gpu.trips.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from labkit.atomic import replacing
from labkit.errors import DataError

SCHEMA = "labkit.results/1"
PARTS, PART_BYTES, ALL_BYTES = 8, 16_000_000, 64_000_000
_MANIFEST = "manifest.json"
_LISTED = 400  # bytes that a file takes in a part beside its contents: headers, directory, its line in the manifest


@dataclass(frozen=True)
class Packed:
    """The parts that were written, and a sentence for each file that is not in them."""

    parts: tuple[Path, ...]
    left_out: tuple[str, ...]


def pack(
    files: Iterable[tuple[str, Path]],
    folder: Path,
    *,
    parts: int = PARTS,
    part_bytes: int = PART_BYTES,
    all_bytes: int = ALL_BYTES,
) -> Packed:
    """Write results-1.zip, results-2.zip, ... into `folder`, which then holds no others; `files` by importance.

    files: (name inside the archive, path). At most `parts` files of at most `part_bytes`, together `all_bytes`. A file
    that is larger than a part even when compressed is left out, as is all for which there is no room any more.
    """
    chosen: list[dict[str, tuple[bytes, str]]] = []  # a part: name -> (contents, hash)
    sizes: list[int] = []
    left_out = []
    for name, path in files:
        contents = path.read_bytes()
        size = len(_zip({name: contents})) + 2 * len(name) + _LISTED
        if 2 * _LISTED + size > part_bytes:
            left_out.append(f"{name} ({size / 1e6:.1f} MB compressed) is larger than a part of {part_bytes / 1e6:g} MB")
            continue
        place = next((i for i, used in enumerate(sizes) if used + size <= part_bytes), len(sizes))
        if place == parts or sum(sizes) + size + 2 * _LISTED > all_bytes:
            left_out.append(f"{name} ({size / 1e6:.1f} MB compressed) has no room left")
            continue
        if place == len(sizes):
            chosen.append({})
            sizes.append(2 * _LISTED)
        chosen[place][name] = contents, hashlib.sha256(contents).hexdigest()
        sizes[place] += size
    written = []
    for number, part in enumerate(chosen, start=1):
        listed = {name: {"bytes": len(contents), "sha256": digest} for name, (contents, digest) in part.items()}
        manifest = {"schema": SCHEMA, "part": number, "parts": len(chosen), "files": listed}
        written.append(folder / f"results-{number}.zip")
        with replacing(written[-1]) as partial:
            inside = {_MANIFEST: json.dumps(manifest).encode(), **{name: held[0] for name, held in part.items()}}
            partial.write_bytes(_zip(inside))
    for older in set(folder.glob("results-*.zip")) - set(written):
        older.unlink()
    return Packed(tuple(written), tuple(left_out))


def unpack(part: Path) -> dict[str, bytes]:
    """The files of one part by name; DataError where one differs from the part's manifest, or is no part at all."""
    try:
        with zipfile.ZipFile(part) as archive:
            listed = json.loads(archive.read(_MANIFEST))["files"]
            found = {name: archive.read(name) for name in listed}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{part.name} is no part of results, or is cut off ({error}); bring it again.") from error
    for name, contents in found.items():
        if hashlib.sha256(contents).hexdigest() != listed[name]["sha256"]:
            raise DataError(f"{name} in {part.name} differs from its SHA-256; bring {part.name} again.")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(
                f"{part.name} wants to write to {name}, outside its folder; bring a part made by labkit gpu."
            )
    return found


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files.items():
            archive.writestr(zipfile.ZipInfo(name), contents, zipfile.ZIP_DEFLATED)  # no time: same files, same bytes
    return buffer.getvalue()
