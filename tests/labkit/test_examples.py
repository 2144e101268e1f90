"""The examples in labkit's docstrings run and print what they say; every room has one, for who opens it first."""

import doctest
import importlib
from pathlib import Path

import pytest

from labkit.files import ROOT

LABKIT = ROOT / "labkit"
FILES = [path for path in sorted(LABKIT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
ROOMS = sorted(path.parent.name for path in LABKIT.glob("*/__init__.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LABKIT).as_posix())
def test_examples_print_what_they_say(path: Path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_an_example(room: str):
    assert any(path.parent.name == room for path in FILES)
