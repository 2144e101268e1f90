"""The table of goals: ratios of a part's processes, misses and empty cells."""

import json
from pathlib import Path

import pytest
import speed_goals


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records with two machines, of which lessons were recorded and no goal."""
    for chip in ("amd-epyc-2c", "intel-xeon-2c"):
        (tmp_path / chip).mkdir()
        (tmp_path / chip / "00.json").touch()
    monkeypatch.setattr(speed_goals.files, "RECORDED", tmp_path)
    return tmp_path


def write_rows(folder: Path, rows: list[dict]) -> None:
    text = json.dumps({"machine": "a chip", "torch": "2.9", "created": "2026-12-01T08:00:00", "rows": rows})
    (folder / "amd-epyc-2c" / speed_goals.RECORD).write_text(text)


def test_a_peer_is_compared_with_the_kernel_by_way_of_the_dense_product(tmp_path: Path) -> None:
    case = {"batch": 64, "sparsity": 0.9}
    engines = {"labkit kernel": 10.0, "DeepSparse 1.8": 8.0}
    rows = [case | {"engine": engine, "speed-up": speedup} for engine, speedup in engines.items()]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    row = "batch 64, 90% zeros"
    assert speed_goals.sparse_ratios(path) == {(row, "dense torch"): 10.0, (row, "DeepSparse 1.8"): 1.25}
    assert speed_goals.sparse_least(row, "dense torch") == 8.0
    assert speed_goals.sparse_least(row, "DeepSparse 1.8") == 1.0
    assert speed_goals.sparse_least("batch 16, 90% zeros", "dense torch") is None


def test_a_record_has_the_median_and_the_range_of_the_processes() -> None:
    row = speed_goals.recorded_row("integers", "timm/x", "float32", [1.3, 0.9, 1.1])
    assert (row["ratio"], row["low"], row["high"], row["processes"]) == (1.1, 0.9, 1.3, 3)
    assert row["least"] == speed_goals.INTEGERS


def test_a_network_that_the_peer_fails_on_has_no_ratio() -> None:
    assert "ratio" not in speed_goals.recorded_row("pruning", "timm/x", "Torch-Pruning", [1.0, None])


def test_the_table_names_misses_and_leaves_a_chip_without_a_record_empty(recorded: Path) -> None:
    reached = speed_goals.recorded_row("integers", "timm/a", "float32", [1.5] * 5)
    missed = speed_goals.recorded_row("integers", "timm/b", "float32", [0.9] * 5)
    failed = speed_goals.recorded_row("pruning", "timm/c", "Torch-Pruning", [None] * 5)
    once = speed_goals.recorded_row("pruning", "timm/d", "Torch-Pruning", [1.2])
    write_rows(recorded, [reached, missed, failed, once])
    text = speed_goals.readme()
    assert "| timm/a | float32 | 0.98 | 1.50 (1.50 to 1.50) |  |" in text
    assert "| timm/b | float32 | 0.98 | 0.90 (0.90 to 0.90) (missed) |  |" in text
    assert "| timm/c | Torch-Pruning | 1 | no model that runs within a minute |  |" in text
    assert "| timm/d | Torch-Pruning | 1 | 1.20, one process |  |" in text
    assert "`intel-xeon-2c`: not measured yet" in text
    assert "Not recorded yet." in text  # the sparse part


def test_recording_a_part_leaves_the_rows_of_all_other_parts(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = speed_goals.recorded_row("sparse", "batch 1, 90% zeros", "dense torch", [9.0] * 5)
    before = speed_goals.recorded_row("integers", "timm/a", "float32", [1.0] * 5)
    write_rows(recorded, [old, before])
    after = speed_goals.recorded_row("integers", "timm/a", "float32", [1.2] * 5)
    here = speed_goals.machine.fingerprint("cpu").slug
    (recorded / here).mkdir(exist_ok=True)
    speed_goals.record([after], ["integers"])
    rows = json.loads((recorded / here / speed_goals.RECORD).read_text())["rows"]
    assert after in rows
    assert before not in rows
    assert (old in rows) == (here == "amd-epyc-2c")


def test_the_committed_table_is_that_of_the_committed_records() -> None:
    assert speed_goals.README.read_text(encoding="utf-8") == speed_goals.readme()
