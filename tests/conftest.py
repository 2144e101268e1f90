"""What several test files need: small lessons, an environment without a network, and GPU tests that skip themselves."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import course  # noqa: F401  (before the first import of nbformat, which it makes faster)

PARAMETERS = 'PRESET = "class"\nDEVICE = "auto"\nSEED = 0\nRATIO: float = 0.5\nRESULTS_DIR = "runs"'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fix", action="store_true", help="rewrite lessons that are not in canonical form")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole lessons first: what takes a minute must not be what the other worker waits for at the end."""
    items.sort(key=lambda item: item.get_closest_marker("lesson") is None)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
