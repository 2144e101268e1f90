"""Wheels and models for a machine without a network, cut into trips that each carry no more than the way allows.

A trip is a folder: parts of files, and trip.json with their SHA-256. `prepare` makes trips where there is a network;
`take` collects parts where there is none, puts files together, installs packages into a folder of their own and hands
models to labkit.store. Models travel as their carrier wheels (data/manifest.toml), whose hashes are known.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit import carriers, paths, store
from labkit.atomic import replacing
from labkit.errors import DataError, InputError

SCHEMA = "labkit.trip/1"
TRIP_BYTES = 64_000_000
_LEAST_TRIP, _LEAST_PART = 1_000_000, 100_000  # bytes; a trip keeps the second free for its trip.json
_LIST = "trip.json"


@dataclass(frozen=True)
class Part:
    """Bytes of a file that travel together: which trip carries them, where they begin, how many, and their hash."""

    trip: int
    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cargo:
    """A wheel that travels, whole or in parts: of a package to install, or the carrier of a `model`."""

    file: str
    bytes: int
    sha256: str
    model: str
    parts: tuple[Part, ...]

    def part_name(self, number: int) -> str:
        return f"{self.file}.part-{number + 1:03}"


@dataclass(frozen=True)
class Taken:
    """What there is now: files that became whole, and those that later trips have still to complete."""

    whole: tuple[str, ...]
    missing: tuple[str, ...]


# where there is a network -------------------------------------------------------------------------


def prepare(folder: Path, has: Mapping[str, object], *, trip_bytes: int = TRIP_BYTES) -> list[Path]:
    """Make folder/trip-1, trip-2, ... for a machine that has the packages `has` (wheels.installed).

    Packages go first, then models, the small ones first, so that what needs little can run early. Downloads are kept in
    folder/wheels and used again. InputError for trips under 1 MB; DataError where a wheel cannot be had.
    """
    from labkit.gpu import wheels

    if trip_bytes < _LEAST_TRIP:
        raise InputError(f"A trip of {trip_bytes / 1e6:g} MB is too small to be worth one; give 1 MB or more.")
    known = store.entries()
    models = sorted(store.models(), key=lambda name: known[name].carrier.bytes)
    files = [(wheel, "") for wheel in wheels.collect(folder / "wheels" / "packages", has)]
    files += [(carriers.download(name, known[name].carrier, folder / "wheels" / name), name) for name in models]
    for older in folder.glob("trip-*"):
        shutil.rmtree(older)
    cargo = _cut(files, trip_bytes - _LEAST_PART)
    count = cargo[-1].parts[-1].trip
    for (source, _), one in zip(files, cargo, strict=True):
        with open(source, "rb") as stream:
            for number, part in enumerate(one.parts):
                place = folder / f"trip-{part.trip}"
                place.mkdir(exist_ok=True)
                (place / one.part_name(number)).write_bytes(stream.read(part.bytes))
    made = [folder / f"trip-{number}" for number in range(1, count + 1)]
    for number, place in enumerate(made, start=1):
        listed = {"schema": SCHEMA, "trip": number, "trips": count, "cargo": [asdict(one) for one in cargo]}
        (place / _LIST).write_text(json.dumps(listed), encoding="utf-8")
    return made


def _cut(files: list[tuple[Path, str]], room: int) -> list[Cargo]:
    """The files one after the other, cut wherever a trip is full."""
    cargo, trip, free = [], 1, room
    for path, model in files:
        parts, whole, start, size = [], hashlib.sha256(), 0, path.stat().st_size
        with open(path, "rb") as stream:
            while start < size:
                if free < min(_LEAST_PART, size - start):
                    trip, free = trip + 1, room
                contents = stream.read(min(free, size - start))
                whole.update(contents)
                parts.append(Part(trip, start, len(contents), hashlib.sha256(contents).hexdigest()))
                start, free = start + len(contents), free - len(contents)
        cargo.append(Cargo(path.name, size, whole.hexdigest(), model, tuple(parts)))
    return cargo


# where there is none ------------------------------------------------------------------------------


def take(folder: Path) -> Taken:
    """Take up what a trip (or a folder of trips) carries. Parts wait in the user's cache until their file is whole.

    Every part is checked before any is taken: DataError for one that is damaged or missing from its trip. What was
    taken before may come again.
    """
    found = lists(folder)
    if not found:
        raise InputError(f"There is no trip in {folder}; give a folder that `labkit gpu prepare` made, such as trip-1.")
    arrived = [part for file in found for part in _parts(file)]
    waiting = _waiting()
    for source in arrived:
        with replacing(waiting / source.name) as partial:
            shutil.copyfile(source, partial)
    cargo = _read(found[-1])
    packages = [one for one in cargo if not one.model]
    whole = [one for one in packages if _whole(one)]
    if len(whole) == len(packages):
        _install([_joined(one) for one in packages])
        activate()  # to make a model ready takes packages
        for one in (one for one in cargo if one.model):
            if store.is_ready(one.model):
                store.fetch(one.model)  # an interrupted call may have left its copy unmade
            elif _whole(one):
                store.receive(one.model, _joined(one))
            else:
                continue
            whole.append(one)
            _clear(one)
    there = tuple(one.file for one in whole)
    return Taken(there, tuple(one.file for one in cargo if one.file not in there))


def lists(folder: Path) -> list[Path]:
    """The trip.json of the trip that `folder` is, or of those that lie in it."""
    return [file for file in (folder / _LIST, *sorted(folder.glob(f"trip-*/{_LIST}"))) if file.is_file()]


def activate() -> None:
    """Let this process, and those that it starts, import the packages that were brought, if any were."""
    folder = str(packages())
    if packages().is_dir() and folder not in sys.path:
        sys.path.insert(0, folder)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, before] if before else [folder])


def packages() -> Path:
    """The folder of packages that were brought; it need not exist."""
    return paths.cache_dir() / "brought" / "packages"


def _waiting() -> Path:
    return paths.cache_dir() / "brought" / "parts"


def _read(file: Path) -> list[Cargo]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["cargo"]
        return [Cargo(**{**row, "parts": tuple(Part(**part) for part in row["parts"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a list of cargo ({error}); make the trips again with this version.") from error


def _parts(file: Path) -> Iterator[Path]:
    """The parts that lie beside a trip.json, each checked."""
    cargo = _read(file)
    trip = json.loads(file.read_text(encoding="utf-8"))["trip"]
    for one in cargo:
        for number, part in enumerate(one.parts):
            if part.trip == trip:
                found = file.parent / one.part_name(number)
                if not found.is_file():
                    raise DataError(f"{found.name} is missing from trip {trip}; bring the folder again, whole.")
                if carriers.sha256(found) != part.sha256:
                    raise DataError(f"{found.name} in trip {trip} is damaged; bring the folder again.")
                yield found


def _whole(cargo: Cargo) -> bool:
    """Whether every part lies there; sizes tell parts of another way of cutting."""
    places = [_waiting() / cargo.part_name(number) for number in range(len(cargo.parts))]
    return all(p.is_file() and p.stat().st_size == part.bytes for p, part in zip(places, cargo.parts, strict=True))


def _joined(cargo: Cargo) -> Path:
    """The file, put together and checked. DataError where its parts are of different trips' making."""
    target = _waiting().parent / "wheels" / cargo.file
    if target.is_file() and carriers.sha256(target) == cargo.sha256:
        return target
    with replacing(target) as partial:
        with open(partial, "wb") as sink:
            for number in range(len(cargo.parts)):
                with open(_waiting() / cargo.part_name(number), "rb") as source:
                    shutil.copyfileobj(source, sink)
        if carriers.sha256(partial) != cargo.sha256:
            _clear(cargo)
            raise DataError(f"The parts of {cargo.file} do not belong together; bring all trips of one making.")
    return target


def _clear(cargo: Cargo) -> None:
    for number in range(len(cargo.parts)):
        (_waiting() / cargo.part_name(number)).unlink(missing_ok=True)


def _install(wheels: list[Path]) -> None:
    """Into a folder of their own, which appears whole; nothing where the same wheels are there already."""
    folder, stamp = packages(), packages() / "installed.json"
    names = sorted(wheel.name for wheel in wheels)
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == names:
        return
    fresh = folder.with_name("packages-new")
    shutil.rmtree(fresh, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(fresh), *map(str, wheels)]
    ran = subprocess.run(command, capture_output=True, text=True) if wheels else None
    if ran and ran.returncode:
        said = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(
            f"The packages that were brought could not be installed ({said}); prepare them for this machine."
        )
    fresh.mkdir(exist_ok=True)
    (fresh / stamp.name).write_text(json.dumps(names), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
