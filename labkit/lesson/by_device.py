"""Records apart by device: a session on a GPU may time the CPU too, and its numbers are then those of the CPU.

A record names the machine of its session. A result is placed by the device of its own clock instead: a timing knows
the device, and a recorded number, a table and a claim state any device other than the session's.
"""

from labkit.lesson.records import RecordedTable, RecordedValue, RunRecord, SettledClaim

Result = RecordedValue | RecordedTable | SettledClaim


def timed_on(result: Result) -> str | None:
    """Return the device of a result's clock, such as "cpu" or "cuda:0"; None if the result leaves it to the session."""
    detail = getattr(result, "detail", None) or {}
    timing = detail.get("baseline", detail)  # of a comparison, whose sides share a clock
    return result.device or timing.get("device")


def apart(record: RunRecord) -> list[RunRecord]:
    """Return a record apart by kind of device: the part of the session's device, then those of other devices, if any.

    Each part has the machine of its device, and the measurements and claims that belong to the device. A prediction
    goes with the number of its name. The exercises are the session's; the duration and the memory stand in every part.
    """
    session_kind = kind_of(record.device)
    kinds = {entry.name: _kind_of_result(entry, record) for entry in record.measurements}
    parts = []
    for kind in (session_kind, *_other_kinds(record)):
        names = record.machine["devices"][kind] if kind != session_kind else {}
        part = {
            "device": kind if names else record.device,
            "machine": record.machine | names | ({"device": kind} if names else {}),
            "measurements": [entry for entry in record.measurements if _kind_of_result(entry, record) == kind],
            "claims": [claim for claim in record.claims if _kind_of_result(claim, record) == kind],
            "predictions": [guess for guess in record.predictions if kinds.get(guess.name, session_kind) == kind],
            "checks": record.checks if kind == session_kind else [],
        }
        parts.append(record.model_copy(update=part))
    return parts


def _other_kinds(record: RunRecord) -> list[str]:
    """Return the kinds of device beside the session's that timed a result."""
    kinds = {_kind_of_result(result, record) for result in (*record.measurements, *record.claims)}
    return sorted(kinds - {kind_of(record.device)})


def _kind_of_result(result: Result, record: RunRecord) -> str:
    """Return the kind of a result's device; the session's where an older record names the session's machine alone."""
    kind = kind_of(timed_on(result) or record.device)
    return kind if kind in record.machine.get("devices", {}) else kind_of(record.device)


def kind_of(device: str) -> str:
    """Return the kind of a device: "cuda" for "cuda:0"."""
    return device.partition(":")[0]
