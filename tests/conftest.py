"""What several test files need: small lessons, an environment without a network, and GPU tests that skip themselves."""

import gc
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import course  # noqa: F401  (before the first import of nbformat, which it makes faster)

PARAMETERS = 'PRESET = "class"\nDEVICE = "auto"\nSEED = 0\nRATIO: float = 0.5\nRESULTS_DIR = "runs"'
NO_GPU = pytest.StashKey[str]()  # why tests marked gpu are skipped
OF_LESSONS = r"notebooks/test_runs\.py|pretend/test_lessons\.py"  # a lesson each test
PRETENDED = pytest.StashKey[bool]()  # True if the device of tests/pretend was installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fix", action="store_true", help="rewrite lessons that are not in canonical form")
    parser.addoption("--pretend-gpu", action="store_true", help="tests marked gpu run on the device of tests/pretend")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NO_GPU] = "needs a CUDA device"
    config.stash[PRETENDED] = False
    if config.getoption("--pretend-gpu"):
        from pretend import device, library

        try:
            device.install()
            config.stash[PRETENDED] = True
        except library.Unavailable as error:
            config.stash[NO_GPU] = str(error)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long ones first, so that no worker waits for another at the end: lessons, then files by their slow tests."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.get_closest_marker("lesson") is None, -slow[item.path]))
    for item in items:
        if mark := item.get_closest_marker("gpu"):
            pretended_will_do = mark.kwargs.get("pretended", True)
            if reason := reason_to_skip(config, pretended_will_do):
                item.add_marker(pytest.mark.skip(reason=reason))


def reason_to_skip(config: pytest.Config, pretended_will_do: bool) -> str:
    """Say why a test marked gpu is skipped here; an empty text if it runs."""
    import torch

    if not torch.cuda.is_available():
        return config.stash[NO_GPU]
    if config.stash[PRETENDED]:
        return "" if pretended_will_do else "needs a card's clock or memory, and the device is pretended"
    if config.getoption("--pretend-gpu"):
        return "a CUDA device is here: these tests run on it without --pretend-gpu"
    return ""


def pytest_collection_finish() -> None:
    """What is imported now stays: labkit.bench collects garbage before it measures, and would search it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object):
    """`--dist loadfile`: one worker does a file, and builds once what its tests share; but a lesson is a task alone."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if re.search(OF_LESSONS, nodeid) else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n) sets the number of torch's threads, for the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    """An environment in which a child process of Python has no network (Python's sockets, the hub's client)."""
    blocked = str(Path(__file__).parent / "no_network")
    path = os.pathsep.join(filter(None, [blocked, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def write_lesson() -> Callable[..., Path]:
    """write_lesson(folder, "code", ..., name=, parameters=, ranges=): a small lesson notebook on the disk."""

    def write(
        folder: Path, *code: str, name: str = "01_small", parameters: str = PARAMETERS, ranges: dict | None = None
    ) -> Path:
        import nbformat
        from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

        knobs = new_code_cell(parameters, metadata={"tags": ["parameters"], "labkit": {"ranges": ranges or {}}})
        cells = [new_markdown_cell("# A small lesson"), knobs, new_markdown_cell("## Its work")]
        notebook = new_notebook(cells=cells + [new_code_cell(source) for source in code])
        path = folder / f"{name}.ipynb"
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write


@pytest.fixture
def empty_course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course without lessons and recorded runs, so that a test writes its own; nothing set in the environment."""
    from labkit import files

    (tmp_path / "notebooks").mkdir()
    shutil.copy(files.NOTEBOOKS / "claims.toml", tmp_path / "notebooks")  # the report asks for it
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    for variable in ("LABKIT_PRESET", "LABKIT_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory):
    """One tab of a headless browser (tests/browser.py); the test is skipped where there is none."""
    pytest.importorskip("websocket")
    import browser

    program = browser.find()
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(browser.NAMES)}")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"), program)
    yield opened
    opened.close()
