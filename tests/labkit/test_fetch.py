"""Fetching against real trouble: a wheel made here, a real pip, a local index, damaged bytes, a killed process."""

import contextlib
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
from refusals import check_refusal

from labkit.data import fetch
from labkit.errors import DataError

WEIGHTS = b"weights " * 40_000  # 320 kB
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
FETCH = "import pathlib, sys; from labkit import fetch; fetch.DATA = pathlib.Path(sys.argv[1]); fetch.fetch('tiny')"

fetch_tiny = partial(fetch.fetch, "tiny")
data_error = partial(check_refusal, error=DataError)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path) -> bytes:
    """A wheel with weights, and a module that must never run."""
    members = {
        "tiny_weights/__init__.py": b"raise RuntimeError('downloaded code was run')",
        "tiny_weights/model.bin": WEIGHTS,
        "tiny_weights-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        "tiny_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:  # stored: the wheel is as large as the weights
        for name, content in members.items():
            archive.writestr(name, content)
    return (folder / WHEEL).read_bytes()


def write_manifest(
    data: Path, wheel: bytes, *, wheel_sha256: str = "", member_sha256: str = "", member: str = ""
) -> None:
    data.mkdir(exist_ok=True)
    (data / "small.txt").write_bytes(b"committed")
    (data / "manifest.toml").write_text(f"""
        [[file]]
        path = "small.txt"
        bytes = 9
        sha256 = "{sha256(b"committed")}"
        licence = "CC0-1.0"
        attribution = ""
        provenance = "this test"
        [[model]]
        name = "tiny"
        licence = "CC0-1.0"
        attribution = ""
        provenance = "this test"
        [model.carrier]
        name = "tiny-weights"
        version = "1.0"
        wheel = "{WHEEL}"
        bytes = {len(wheel)}
        sha256 = "{wheel_sha256 or sha256(wheel)}"
        [[model.file]]
        path = "weights/model.bin"
        member = "{member or "tiny_weights/model.bin"}"
        bytes = {len(WEIGHTS)}
        sha256 = "{member_sha256 or sha256(WEIGHTS)}"
    """)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, a manifest that lists one of them, and an empty cache."""
    write_manifest(tmp_path / "data", write_wheel(tmp_path / "simple" / "tiny-weights"))
    monkeypatch.setattr(fetch, "DATA", tmp_path / "data")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "simple" / "tiny-weights"))
    return tmp_path / "simple" / "tiny-weights"


@pytest.fixture
def slow_index(index: Path, monkeypatch: pytest.MonkeyPatch):
    """A local package index that takes two seconds to send the wheel; `.sent` counts how often it was asked for."""

    class Pages(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile) -> None:
            if self.path.endswith(".whl"):
                server.sent += 1
            while part := source.read(len(WEIGHTS) // 20):
                outputfile.write(part)
                time.sleep(0.1)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client was killed: that is what the test wants
                super().handle()

        def log_message(self, *args: object) -> None:
            pass

    pages = partial(Pages, directory=index.parent.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), pages)
    server.sent = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.parent.parent))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield server
    server.shutdown()


def fetch_in_a_process(index: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, str(index.parent.parent / "data")]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def cached(tmp_path: Path) -> set[str]:
    """Files in the cache, unfinished ones included; locks are empty and stay."""
    cache = tmp_path / "cache"
    return {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"}


def test_fetch_unpacks_the_listed_members_and_runs_nothing(index: Path, tmp_path: Path) -> None:
    folder = fetch.fetch("tiny")
    assert (folder / "weights/model.bin").read_bytes() == WEIGHTS
    assert cached(tmp_path) == {"tiny/weights/model.bin"}
    assert "tiny_weights" not in sys.modules  # importing it would have raised
    (index / WHEEL).unlink()
    assert fetch.fetch("tiny") == fetch.path("tiny") == folder  # no second download


def test_what_there_is_and_where(index: Path) -> None:
    assert [(row.name, row.kind, row.state) for row in fetch.assets().values()] == [
        ("small.txt", "committed", "ready"),
        ("tiny", "fetched", "missing"),
    ]
    data_error("is missing; run `./lab data fetch tiny` (0 MB, once)", lambda: fetch.path("tiny"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"wheel_sha256": "0" * 64}, "SHA-256 of tiny-weights==1.0 differs ... run the same command"),
        (
            {"member_sha256": "0" * 64},
            "does not hold what ... model.bin has another SHA-256 ... bring the course up to date",
        ),
        ({"member": "tiny_weights/other.bin"}, "does not hold what data/manifest.toml lists"),
    ],
)
def test_what_the_manifest_does_not_list_is_refused_and_leaves_nothing(
    index: Path, tmp_path: Path, wrong: dict[str, str], sentence: str
) -> None:
    write_manifest(tmp_path / "data", (index / WHEEL).read_bytes(), **wrong)
    data_error(sentence, fetch_tiny)
    assert cached(tmp_path) == set()


@pytest.mark.slow
def test_no_network_is_said_and_the_next_call_goes_on(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.delenv("PIP_NO_INDEX")
        offline.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
        offline.setenv("PIP_FIND_LINKS", str(tmp_path))
        offline.setenv("PIP_RETRIES", "1")
        data_error("index did not answer; check the network, then run the same command", fetch_tiny)
    assert cached(tmp_path) == set()
    assert fetch.fetch("tiny") == fetch.path("tiny")


@pytest.mark.slow
def test_index_without_the_wheel_is_told_in_pips_words(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.parent.parent))
    data_error("said: No matching distribution found for tiny-weights==1.0 ... ; check pip's", fetch_tiny)


@pytest.mark.slow
def test_killed_download_leaves_no_model_and_the_next_call_fetches(slow_index, index: Path, tmp_path: Path) -> None:
    process = fetch_in_a_process(index)
    deadline = time.monotonic() + 60
    while not slow_index.sent and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # half of the wheel is under way
    process.communicate()
    assert fetch.asset("tiny").state == "missing"
    fetch.fetch("tiny")
    assert cached(tmp_path) == {"tiny/weights/model.bin"}
    assert slow_index.sent == 2


@pytest.mark.slow
def test_two_processes_fetch_once(slow_index, index: Path) -> None:
    processes = [fetch_in_a_process(index) for _ in range(2)]
    stderr = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], stderr
    assert slow_index.sent == 1
    assert "another process is at work on it; waiting" in "".join(stderr)


def test_too_little_space_is_said_before_anything_is_fetched(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100_000})())
    data_error("tiny needs 1 MB in ... and 0 MB are free; free some space, or", fetch_tiny)
    assert cached(tmp_path) == set()


def test_cache_that_cannot_be_written_is_said(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file" / "cache"))
    data_error("could not be written into ... Not a directory ... another folder in LABKIT_CACHE", fetch_tiny)


@pytest.mark.slow
def test_truncated_model_is_noticed_at_once_and_fetched_again(index: Path) -> None:
    file = fetch.fetch("tiny") / "weights/model.bin"
    file.write_bytes(WEIGHTS[:-1])
    data_error("is damaged; run `./lab data fetch tiny`", lambda: fetch.path("tiny"))
    fetch.fetch("tiny")
    assert file.read_bytes() == WEIGHTS


@pytest.mark.slow
def test_a_changed_byte_is_found_by_verify_and_mended_by_fetch(index: Path, tmp_path: Path) -> None:
    file = fetch.fetch("tiny") / "weights/model.bin"
    file.write_bytes(b"X" + WEIGHTS[1:])
    data_error("its SHA-256 differs from data/manifest.toml; run `./lab data fetch tiny`", lambda: fetch.verify("tiny"))
    fetch.fetch("tiny")
    assert fetch.verify("tiny") == file.parent.parent
    (tmp_path / "data/small.txt").write_bytes(b"committeX")
    data_error(
        "data/small.txt is damaged ... restore it with `git checkout -- data/small.txt`",
        lambda: fetch.verify("small.txt"),
    )


def test_unknown_name_lists_all_names(index: Path) -> None:
    for function in (fetch.path, fetch.fetch, fetch.verify):
        check_refusal("nothing is called 'big' ... it lists small.txt, tiny", partial(function, "big"))


def test_unreadable_manifest_is_said(index: Path, tmp_path: Path) -> None:
    (tmp_path / "data/manifest.toml").write_text("[[file")
    data_error("data/manifest.toml cannot be read ... git checkout", fetch.assets)


def test_a_folder_is_built_once_and_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "result").write_bytes(b"result")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.build_once(tmp_path / "cache/thing", fill)
    assert cached(tmp_path) == set()
    for _ in range(2):
        assert (fetch.build_once(tmp_path / "cache/thing", fill) / "result").read_bytes() == b"result"
    assert len(calls) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_disk_that_fills_up_while_building_is_said(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        Path("/dev/full").write_bytes(b"more")

    data_error(
        "thing could not be written ... No space left on device ... free some space there",
        lambda: fetch.build_once(tmp_path / "cache/thing", fill),
    )
    assert cached(tmp_path) == set()


def test_every_file_under_data_is_in_the_manifest_with_its_hash_licence_and_source() -> None:
    code = {"manifest.toml", "README.md"}
    paths = {file.relative_to(fetch.DATA).as_posix() for file in fetch.DATA.rglob("*") if file.is_file()}
    data = {name for name in paths - code if not name.startswith(("LICENSES/", "recorded/")) and ".py" not in name}
    committed = {name for name, row in fetch.assets().items() if not row.carrier}
    assert data == committed
    for name in committed:
        fetch.verify(name)
    for row in fetch.assets().values():
        assert row.licence and row.attribution and row.provenance, row.name
