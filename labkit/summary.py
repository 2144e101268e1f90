"""A finished run in a few lines: what was predicted and came out, the claims' verdicts, the exercises, what it cost.

The same as text for a terminal and as HTML for a notebook. Comparing several runs or machines is left to report.py.
"""

from html import escape
from typing import Any

from labkit import claims, plots
from labkit.record import RunRecord


def summary(done: RunRecord) -> tuple[str, str]:
    """The record as text and as HTML."""
    budget, known = done.budget, claims.load() if done.claims else {}
    tables = {
        "Predicted and measured": [
            {
                "quantity": p["name"],
                "predicted": plots.quantity(p["predicted"], p["unit"]),
                "measured": plots.quantity(p["measured"], p["unit"]) if p["measured"] is not None else "not measured",
                "prediction was": off_by(p["predicted"], p["measured"]),
            }
            for p in done.predictions
        ],
        "The guide's claims": [
            {
                "claim": f"{c['id']}  {known[c['id']].text}",
                "expected": claims.expected(known[c["id"]]),
                "here": plots.quantity(c["value"], known[c["id"]].unit),
                "verdict": c["verdict"],
            }
            for c in done.claims
        ],
        "Exercises": [
            {"exercise": c["id"], "result": "passed" if c["passed"] else "; ".join(c["failures"])} for c in done.checks
        ],
    }
    limit = f" of {plots.quantity(budget['memory'], 'B')}" if budget["memory"] else ""
    cost = (
        f"{done.seconds:.0f} s of {budget['seconds']:.0f} s, peak memory {plots.quantity(done.peak_memory, 'B')}"
        f"{limit}: "
        f"{'within' if budget['within'] else 'OVER'} the budget of preset {done.preset}."
    )
    kept = f"{len(done.measurements)} results are in {done.lesson}/record.json in the results folder."
    shown = {title: rows for title, rows in tables.items() if rows}
    title = f"Lesson {done.lesson} finished"
    text = "\n\n".join(
        [f"{title}: {cost}", *(f"{name}\n{plots.text_table(rows)}" for name, rows in shown.items()), kept]
    )
    html = f"<p><b>{title}.</b> {escape(cost)}</p>" + "".join(
        plots.html_table(rows, caption=name) for name, rows in shown.items()
    )
    return text, f"{html}<p>{escape(kept)}</p>"


def off_by(predicted: Any, measured: Any) -> str:
    """How far a prediction was off, as a factor: "1.80x too high"; "–" where no factor can be given."""
    if not all(isinstance(one, int | float) for one in (predicted, measured)) or predicted * measured <= 0:
        return "–"
    ratio = predicted / measured
    if abs(ratio - 1) < 0.05:
        return "right within 5 %"
    return f"{plots.quantity(ratio, 'x')} too high" if ratio > 1 else f"{plots.quantity(1 / ratio, 'x')} too low"
