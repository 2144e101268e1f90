"""What goes to a machine without a network and what comes back, with wheels made here, a real pip and small limits."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from labkit import carriers, paths, store
from labkit.errors import DataError, InputError
from labkit.gpu import packing, steps, trips, wheels

MB = 1_000_000
HAS = {"torch": Version("2.11.0+cu130"), "pytest": Version("9.0")}
MANIFEST = """[[model]]
name = "{name}"
licence = "CC0-1.0"
attribution = ""
provenance = "this test"
[model.carrier]
name = "{name}-weights"
version = "1.0"
wheel = "{wheel}"
bytes = {size}
sha256 = "{hash}"
[[model.file]]
path = "model.bin"
member = "{name}_weights/model.bin"
bytes = {n}
sha256 = "{digest}"
"""
PROJECT = """[project]
dependencies = ["torch>=2.9", "alpha>=2", "jupyterlab>=4"]
optional-dependencies.test = ["pytest>=8", "ruff>=0.6", "windows-only; sys_platform == 'win32'"]
"""


def write_wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = (), weights: bytes = b"") -> Path:
    """A pure Python wheel; `weights` make it as large as a test wants."""
    info = f"{name}-{version}.dist-info"
    metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"])
    members = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n".encode(),
        f"{name}/model.bin": weights,
        f"{info}/METADATA": "\n".join([metadata, *(f"Requires-Dist: {one}" for one in needs), ""]).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{member},sha256={base64.urlsafe_b64encode(hashlib.sha256(held).digest()).rstrip(b'=').decode()},{len(held)}"
        for member, held in members.items()
    ]
    members[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, held in members.items():
            archive.writestr(member, held)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of which alpha is missing, and a folder that pip takes wheels from."""
    return serve(tmp_path, monkeypatch)


def serve(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """alpha needs beta and gamma, beta an older gamma than the newest."""
    folder, course = place / "index", place / "course"
    write_wheel(
        folder, "alpha", "2.1", ("beta", "gamma>=1", "delta; extra == 'more'", "torch", "old; python_version<'3'")
    )
    write_wheel(folder, "beta", "1.0", ("gamma<2",))
    write_wheel(folder, "gamma", "1.5")
    write_wheel(folder, "gamma", "2.0")
    course.mkdir()
    (course / "pyproject.toml").write_text(PROJECT)
    monkeypatch.setattr(paths, "ROOT", course)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


class Journey:
    """Trips of at most 1 MB with three packages and two models, whose weights are known."""

    def __init__(self, folder: Path, weights: dict[str, bytes]) -> None:
        self.folder, self.weights = folder, weights
        self.trips = sorted(folder.glob("trip-*"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Made once: pip takes seconds."""
    place, weights = tmp_path_factory.mktemp("prepared"), {"small": os.urandom(300_000), "large": os.urandom(2 * MB)}
    with pytest.MonkeyPatch.context() as patch:
        index, rows = serve(place, patch), []
        for name, held in weights.items():
            wheel = write_wheel(index, f"{name}_weights", "1.0", weights=held)
            rows.append(
                MANIFEST.format(
                    name=name,
                    wheel=wheel.name,
                    size=wheel.stat().st_size,
                    n=len(held),
                    hash=carriers.sha256(wheel),
                    digest=hashlib.sha256(held).hexdigest(),
                )
            )
        (place / "data").mkdir()
        (place / "data" / "manifest.toml").write_text("".join(rows))
        patch.setattr(store, "DATA", place / "data")
        trips.prepare(place / "trips", HAS, trip_bytes=MB)
    return Journey(place / "trips", weights)


@pytest.fixture
def journey(prepared: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journey:
    """A copy of the trips, and a machine with an empty cache and without an index."""
    monkeypatch.setattr(store, "DATA", prepared.folder.parent / "data")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    return Journey(Path(shutil.copytree(prepared.folder, tmp_path / "trips")), prepared.weights)


# which wheels are missing --------------------------------------------------------------------------


def test_a_list_of_packages_is_read():
    found = wheels.installed("torch==2.11.0+cu130\nJupyter_Client==8.10\nlocal @ file:///x\nodd==not-a-version\n")
    assert found == {"torch": Version("2.11.0+cu130"), "jupyter-client": Version("8.10")}
    with pytest.raises(InputError, match="make it there with `python3 -m pip list --format=freeze`"):
        wheels.installed("Package    Version\n")


def test_only_what_is_missing_there_is_brought_with_what_it_needs(index: Path, tmp_path: Path):
    assert [str(one) for one in wheels.missing(HAS, wheels.required())] == ["alpha>=2"]
    found = wheels.collect(tmp_path / "wheels", HAS)
    assert [one.name.rsplit("-", 3)[0] for one in found] == ["alpha-2.1", "beta-1.0", "gamma-1.5"]


def test_a_version_that_is_too_old_there_is_brought_anew(index: Path, tmp_path: Path):
    has = {**HAS, "alpha": Version("1.0"), "beta": Version("1.0"), "gamma": Version("1.1")}
    assert [one.name.split("-")[0] for one in wheels.collect(tmp_path / "wheels", has)] == ["alpha"]


def test_a_wheel_that_cannot_be_had_is_named(index: Path, tmp_path: Path):
    (index / "beta-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DataError, match=r"No wheel of beta.* for Python 3.12 on Linux x86-64 could be had"):
        wheels.collect(tmp_path / "wheels", HAS)


def test_the_course_s_own_requirements_are_met_here():
    names = {one.name for one in wheels.required()}
    assert wheels.missing(wheels.here(), wheels.required()) == []
    assert {"torch", "papermill", "nbval", "pytest"} <= names
    assert not names & {"labkit", "jupyterlab"}  # labkit is not installed there: it runs from the repository


# trips ---------------------------------------------------------------------------------------------


def test_trips_keep_their_limit_and_bring_everything(journey: Journey, tmp_path: Path):
    assert [folder.name for folder in journey.trips] == ["trip-1", "trip-2", "trip-3"]
    assert all(sum(file.stat().st_size for file in folder.iterdir()) <= MB for folder in journey.trips)
    first = trips.take(journey.trips[0])
    assert store.is_ready("small") and not store.is_ready("large")
    assert first.missing == ("large_weights-1.0-py3-none-any.whl",) and len(first.whole) == 4
    code = "import alpha, gamma; print(alpha.VERSION, gamma.VERSION)"  # what was brought, in a process started here
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2.1 1.5\n"
    assert trips.take(journey.trips[1]).missing == first.missing
    assert trips.take(journey.trips[2]).missing == ()
    for name, weights in journey.weights.items():
        assert (store.path(name) / "model.bin").read_bytes() == weights
    left = [file.name for file in (tmp_path / "cache" / "brought" / "parts").iterdir()]
    assert not any("weights" in name for name in left)  # a large model does not lie there twice


def test_trips_may_come_in_any_order_twice_and_together(journey: Journey):
    for number in (2, 1, 2):
        assert trips.take(journey.trips[number]).whole == ()  # packages are in the first, and models wait for them
    assert trips.take(journey.folder).missing == ()
    assert trips.take(journey.trips[0]).missing == ()


def test_a_damaged_part_is_refused_before_anything_is_taken(journey: Journey, tmp_path: Path):
    part = max(journey.trips[1].glob("*.part-*"), key=lambda file: file.stat().st_size)
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=rf"{part.name} in trip 2 is damaged; bring the folder again"):
        trips.take(journey.folder)
    assert not (tmp_path / "cache").exists()
    part.unlink()
    with pytest.raises(DataError, match="is missing from trip 2"):
        trips.take(journey.trips[1])


def test_parts_of_different_makings_are_not_mixed(journey: Journey):
    for folder in journey.trips:  # as another making would list it: other contents under the same names
        listed = json.loads((folder / "trip.json").read_text())
        for one in listed["cargo"]:
            one["sha256"] = "0" * 64 if one["model"] == "large" else one["sha256"]
        (folder / "trip.json").write_text(json.dumps(listed))
    with pytest.raises(DataError, match="do not belong together; bring all trips of one making"):
        trips.take(journey.folder)
    assert not store.is_ready("large")


def test_a_wheel_that_is_not_the_manifest_s_is_no_model(journey: Journey, tmp_path: Path):
    other = write_wheel(tmp_path / "other", "large_weights", "1.0", weights=b"other")
    with pytest.raises(DataError, match=r"is not the wheel that data/manifest\.toml lists for large"):
        store.receive("large", other)
    assert other.exists() and not store.is_ready("large")


def test_a_trip_that_is_none_is_said(tmp_path: Path):
    with pytest.raises(InputError, match=r"There is no trip in .*; give a folder that `labkit gpu prepare` made"):
        trips.take(tmp_path)
    (tmp_path / "trip.json").write_text("[]")
    with pytest.raises(DataError, match="is not a list of cargo"):
        trips.take(tmp_path)
    with pytest.raises(InputError, match="is too small to be worth one; give 1 MB or more"):
        trips.prepare(tmp_path / "trips", HAS, trip_bytes=1000)


# results -------------------------------------------------------------------------------------------


def written(folder: Path, **sizes: int) -> list[tuple[str, Path]]:
    """Files of random bytes, which do not compress."""
    for name, size in sizes.items():
        (folder / name).write_bytes(os.urandom(size))
    return [(f"gpu/{name}", folder / name) for name in sizes]


def test_parts_keep_their_limits_and_unpack_to_what_was_packed(tmp_path: Path):
    files = written(tmp_path, a=40_000, b=30_000, c=25_000, d=5_000, e=90_000)
    packed = packing.pack(files, tmp_path, parts=3, part_bytes=100_000)
    assert [part.name for part in packed.parts] == ["results-1.zip", "results-2.zip"] and packed.left_out == ()
    assert all(part.stat().st_size <= 100_000 for part in packed.parts)
    found = {name: held for part in packed.parts for name, held in packing.unpack(part).items()}
    assert found == {name: path.read_bytes() for name, path in files}


def test_the_least_important_is_left_out_with_a_sentence(tmp_path: Path):
    files = written(tmp_path, record=60_000, log=60_000, other=60_000, small=1_000)
    packed = packing.pack(files, tmp_path, parts=2, part_bytes=70_000)
    assert packed.left_out == ("gpu/other (0.1 MB compressed) has no room left",)
    assert "gpu/small" in packing.unpack(packed.parts[0])
    packed = packing.pack(files, tmp_path, parts=8, part_bytes=70_000, all_bytes=130_000)
    assert len(packed.parts) == 2 and sum(part.stat().st_size for part in packed.parts) <= 130_000


def test_a_file_over_sixteen_megabytes_is_left_out_unless_it_compresses(tmp_path: Path):
    files = written(tmp_path, noise=17 * MB, kept=1000)
    (tmp_path / "text").write_bytes(b"again and again " * (2 * MB))
    packed = packing.pack([*files, ("gpu/text", tmp_path / "text")], tmp_path)
    assert packed.left_out == ("gpu/noise (17.0 MB compressed) is larger than a part of 16 MB",)
    assert set(packing.unpack(packed.parts[0])) == {"gpu/kept", "gpu/text"}


def test_packing_again_leaves_no_older_part(tmp_path: Path):
    files = written(tmp_path, a=60_000, b=60_000)
    packing.pack(files, tmp_path, part_bytes=70_000)
    packing.pack(files[:1], tmp_path, part_bytes=70_000)
    assert [part.name for part in tmp_path.glob("results-*")] == ["results-1.zip"]


def repacked(part: Path, change) -> Path:
    """The same part with its members changed."""
    with zipfile.ZipFile(part) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(part, "w") as archive:
        for name, held in change(members).items():
            archive.writestr(name, held)
    return part


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda members: {**members, "gpu/a": b"other"}, "gpu/a in results-1.zip differs from its SHA-256; bring"),
        (lambda members: {"manifest.json": members["manifest.json"]}, "results-1.zip is no part of results"),
        (lambda members: {"gpu/a": members["gpu/a"]}, "results-1.zip is no part of results"),
    ],
    ids=["changed", "a file gone", "no manifest"],
)
def test_a_damaged_part_of_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, sentence: str):
    (part,) = packing.pack(written(tmp_path, a=1000), tmp_path).parts
    repacked(part, change)
    monkeypatch.setattr(paths, "RECORDED", tmp_path / "recorded")
    with pytest.raises(DataError, match=sentence):
        steps.take(tmp_path, tmp_path / "home")
    assert not (tmp_path / "home").exists() and not (tmp_path / "recorded").exists()


def test_a_part_that_was_cut_off_is_refused(tmp_path: Path):
    (part,) = packing.pack(written(tmp_path, a=50_000), tmp_path).parts
    part.write_bytes(part.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"results-1.zip is no part of results, or is cut off"):
        packing.unpack(part)


@pytest.mark.parametrize("name", ["gpu/../../outside", "/outside"])
def test_results_write_nothing_outside_their_folders(tmp_path: Path, name: str):
    packing.pack([(name, written(tmp_path, a=10)[0][1])], tmp_path)
    with pytest.raises(DataError, match="outside its folder"):
        steps.take(tmp_path, tmp_path / "home" / "gpu")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "home").exists()
