from pathlib import Path

import pytest
from refusals import check_refusal

from labkit import files
from labkit.files import replacing


def test_a_file_is_replaced_as_a_whole_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert path.exists() == (text == "second")
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_an_interruption_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("older")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_an_error_before_anything_is_written_is_the_one_that_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file.txt"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_cache_in_the_home_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_CACHE", "~nosuchuser/x")
    check_refusal("~nosuchuser/x ... , and there is no such user's home; set LABKIT_CACHE", files.cache_dir)


@pytest.mark.parametrize("relative", ["caches", "./caches", "~nosuchuser/x"])
def test_a_relative_xdg_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, relative: str):
    """As the XDG base directory specification asks; it would be a folder wherever a command happens to be called."""
    monkeypatch.delenv("LABKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    assert files.cache_dir() == Path.home() / ".cache" / "labkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert files.cache_dir() == Path("/caches/labkit")
