from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from course import references, run
from labkit.errors import InputError


def finished(folder: Path, write_lesson: Callable[..., Path], bound: dict, error: run.Failure | None = None) -> run.Run:
    """A result folder as a run leaves it."""
    write_lesson(folder, "1")
    (folder / "record.json").write_text('{"lesson": "01", "machine": {"slug": "test-cpu-2c"}}')
    return run.Run("01_small", folder, {"RESULTS_DIR": ".", **bound}, 1.0, 1, error)


def test_a_reference_at_the_lesson_s_own_values_is_kept_with_its_outputs(tmp_path: Path, write_lesson):
    result = finished(tmp_path / "result", write_lesson, {"PRESET": "class"})
    kept = references.keep(result, tmp_path / "01_small.ipynb", tmp_path / "recorded")
    assert kept == [tmp_path / "recorded" / "test-cpu-2c" / "01.json", tmp_path / "01_small.ipynb"]
    assert kept[0].read_text() == result.record.read_text()
    assert nbformat.read(kept[1], as_version=4).cells[0].source == "# A small lesson"


@pytest.mark.parametrize("bound", [{"PRESET": "full"}, {"PRESET": "class", "DEVICE": "cuda"}])
def test_a_reference_at_other_values_leaves_the_lesson_as_it_is(tmp_path: Path, write_lesson, bound: dict):
    result = finished(tmp_path / "result", write_lesson, bound)
    kept = references.keep(result, tmp_path / "01_small.ipynb", tmp_path / "recorded")
    assert kept == [tmp_path / "recorded" / "test-cpu-2c" / "01.json"]


@pytest.mark.parametrize(
    ("bound", "error", "sentence"),
    [
        ({"PRESET": "smoke"}, None, "too small to be a reference"),
        ({"PRESET": "class", "RATIO": 0.25}, None, "keeps the lesson's own values; leave out -p RATIO"),
        ({"PRESET": "class"}, run.Failure("ValueError", "x", 1, "y"), "did not finish, so there is nothing to record"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path: Path, write_lesson, bound: dict, error, sentence: str):
    result = finished(tmp_path / "result", write_lesson, bound, error)
    with pytest.raises(InputError, match=sentence):
        references.keep(result, tmp_path / "01_small.ipynb", tmp_path / "recorded")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
