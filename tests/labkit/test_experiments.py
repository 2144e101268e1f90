"""Long experiments: saved once by a script of benchmarks/, shown by name on a page."""

import json
import re
from pathlib import Path

import pytest

import labkit
from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import experiments
from labkit.lesson.session import Lab
from labkit.records import quality

ROWS = [{"seed": 0, "accuracy": 0.91}, {"seed": 1, "accuracy": 0.93}]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Lab:
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    lab = labkit.start("03", preset="smoke", device="cpu", results_dir=tmp_path / "runs")
    capsys.readouterr()
    return lab


def save(name: str = "longer_training", rows: list[dict] = ROWS) -> Path:
    columns = {"accuracy": quality("fraction")}
    options = {"by": ("seed",), "columns": columns, "settings": {"steps": 600}, "seconds": 754.3}
    return experiments.save(name, "does longer training help?", rows, **options)


def test_a_page_shows_an_experiment_by_name_with_machine_date_and_commit(lab, capsys):
    save()
    experiment = lab.recorded("longer_training")
    out = capsys.readouterr().out
    assert experiment.rows == ROWS and experiment.settings == {"steps": 600}
    assert out.startswith("Recorded: does longer training help?\nbenchmarks/longer_training.py, 13 min on ")
    assert lab.machine.label in out
    assert re.search(r", \d{1,2} [A-Z][a-z]{2} 20\d\d, commit [0-9a-f]{9}( with changes)?;", out)
    assert out.endswith("; samples: data/recorded/experiments/longer_training.json\n")


def test_an_unknown_name_is_refused_with_the_names_that_there_are(lab):
    with pytest.raises(InputError, match="no recorded experiment 'tickets'; give the name of a recorded one: none yet"):
        lab.recorded("tickets")
    save("longer_training")
    save("wider_networks")
    with pytest.raises(InputError, match=r"'\.\./03'; give .* one: longer_training, wider_networks"):
        lab.recorded("../03")


def test_a_record_that_cannot_be_written_whole_is_not_written(lab):
    path = save()
    before = path.read_text()
    with pytest.raises(InputError, match="does not tell the rows"):
        save(rows=[*ROWS, ROWS[0]])
    assert path.read_text() == before and [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_damaged_record_is_told_with_the_cure(lab):
    path = save()
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "machine": None}))
    with pytest.raises(DataError, match=r"longer_training\.json is damaged; get the file back with `git checkout"):
        lab.recorded("longer_training")


def test_every_recorded_experiment_is_of_a_script_that_is_there():
    records = sorted((files.RECORDED / "experiments").glob("*.json"))
    assert records
    for path in records:
        experiment = experiments.read(path.stem)
        assert experiment.name == path.stem and (files.ROOT / "benchmarks" / f"{path.stem}.py").exists()
        assert experiment.git is not None and not experiment.git["dirty"], "record it from a clean commit"
