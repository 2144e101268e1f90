"""The README shows what the notebooks and the records say, and nothing else."""

import pytest

from labkit import paths, readme
from labkit.errors import DataError

TEXT = (paths.ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_shows_what_is_recorded():
    assert TEXT.split(readme.BEGIN)[1].split(readme.END)[0].strip() == readme.generated().strip()


def test_update_keeps_everything_outside_its_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.update(page)
    assert page.read_text() == f"before\n{readme.BEGIN}\n{readme.generated()}\n{readme.END}\nafter\n"


def test_lost_markers_are_said(tmp_path):
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(DataError, match="put <!-- lessons"):
        readme.update(tmp_path / "README.md")


def test_first_screen_names_the_two_commands_and_what_is_not_needed():
    screen = "\n".join(TEXT.splitlines()[:45])
    for words in ("./lab run", "./lab test", "No GPU and no network needed", "| lesson | question | minutes |"):
        assert words in screen
