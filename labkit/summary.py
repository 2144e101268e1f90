"""A finished run in a few lines: what was predicted and came out, the claims' verdicts, the exercises, what it cost.

The same as text for a terminal and as HTML for a notebook. Comparing several runs or machines is left to report.py.
"""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from labkit import claims, plots
from labkit.record import RunRecord

NO_FACTOR = "–"


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
    kept = " ".join(filter(None, [calibration(done.predictions), kept]))
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
        return NO_FACTOR
    ratio = predicted / measured
    if abs(ratio - 1) < 0.05:
        return "right within 5 %"
    return f"{plots.quantity(ratio, 'x')} too high" if ratio > 1 else f"{plots.quantity(1 / ratio, 'x')} too low"


def calibration(predictions: Sequence[Mapping[str, Any]]) -> str:
    """How good several guesses were together, in a sentence; "" where fewer than two were measured.

    Guesses are off by factors, so the middle one is the median of max(predicted / measured, measured / predicted).
    """
    pairs = [(one["predicted"], one["measured"]) for one in predictions]
    ratios = [guess / found for guess, found in pairs if off_by(guess, found) != NO_FACTOR]
    if len(ratios) < 2:
        return ""
    factors = [max(ratio, 1 / ratio) for ratio in ratios]
    high, low = (sum(one > 1.05 for one in side) for side in (ratios, [1 / ratio for ratio in ratios]))
    return (
        f"Of {len(ratios)} predictions half were off by a factor of {plots.quantity(statistics.median(factors), '')} "
        f"or less, {sum(factor <= 2 for factor in factors)} by no more than 2; {high} were too high, {low} too low."
    )
