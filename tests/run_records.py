"""The record of a small run, and others that differ from it in some fields."""

from labkit.lesson import records
from labkit.lesson.records import RunRecord, cost

MACHINE = {"slug": "test-cpu-2c", "label": "Test CPU, 2 cores", "memory": 8 * 2**30, "threads": 2}
RECORD = RunRecord(
    version=records.VERSION,
    lesson="01",
    title="A small lesson",
    preset="class",
    device="cpu",
    parameters={"PRESET": "class"},
    machine=MACHINE,
    measurements=[
        {"kind": "comparison", "name": "sparse", "value": 1.5, "unit": "x", "ci95": [1.4, 1.6], "verdict": "faster"},
        {"kind": "value", "name": "p99", "value": 0.0125, "unit": "s", "simulated": True},
        records.table("sweep", [{"batch": 1, "ms": 2.5}], by="batch", columns={"ms": cost("ms", clock=True)}),
    ],
    predictions=[{"name": "ridge", "question": "Where is the ridge?", "unit": "", "predicted": 20.0, "measured": 10.0}],
    claims=[{"id": "1.6", "value": 1.25, "ci95": [1.2, 1.3], "verdict": "confirmed"}],
    checks=[
        {"id": "1.count", "passed": True, "failures": []},
        {"id": "1.ridge", "passed": False, "failures": ["zero bytes"]},
    ],
    seconds=12.5,
    peak_memory=10**9,
    peak_device_memory=None,
    budget={"seconds": 90, "memory": 4 * 10**9, "within": True},
    created="2025-01-02T03:04:05+00:00",
    labkit="0",
    git=None,
)


def changed(record: RunRecord = RECORD, **fields: object) -> RunRecord:
    return RunRecord.model_validate(dict(record) | fields)
