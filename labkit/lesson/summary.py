"""Summary of a finished run: predictions, exercises, the challenge and the cost, in a few lines."""

from html import escape

from labkit import show
from labkit.lesson import challenge
from labkit.lesson.calibration import NONE, calibration, off_by
from labkit.lesson.parameters import SMOKE
from labkit.lesson.records import Challenge, CheckedExercise, Prediction, RunRecord

USED = {"learner": "yours", "worked": "the worked answer", None: NONE}
NOT_JUDGED = "not judged at smoke"
REACHED = {True: "reached", False: "not reached yet", None: "no plan yet"}


def summary(record: RunRecord) -> tuple[str, str]:
    """Return a run's summary as text and as HTML."""
    judges = record.preset != "smoke"
    tables = {
        "Predicted and measured": [_prediction_row(guess, judges) for guess in record.predictions],
        "Exercises": [_exercise_row(check) for check in record.checks],
        "Challenge": [_challenge_row(task, judges) for task in record.challenges],
    }
    tables = {title: rows for title, rows in tables.items() if rows}
    heading = f"Lesson {record.lesson} finished"
    cost = _cost(record)
    about_all = calibration(record.predictions) if judges else f"{SMOKE.capitalize()}."
    last = " ".join(filter(None, [about_all, f"All results: {record.lesson}/record.json in the results folder."]))

    text = [f"{heading}: {cost}"]
    text += [f"{title}\n{show.text_table(rows)}" for title, rows in tables.items()]
    text.append(last)
    html = [f"<p><b>{heading}.</b> {escape(cost)}</p>"]
    html += [show.html_table(rows, caption=title) for title, rows in tables.items()]
    html.append(f"<p>{escape(last)}</p>")
    return "\n\n".join(text), "".join(html)


def _prediction_row(guess: Prediction, judges: bool) -> dict[str, str]:
    predicted, measured = "no prediction", "not measured" if judges else NOT_JUDGED
    if guess.predicted is not None:
        predicted = _printed(guess.predicted, guess.unit)
    if guess.measured is not None:
        measured = _printed(guess.measured, guess.unit)
    return {
        "quantity": guess.name,
        "predicted": predicted,
        "measured": measured,
        "interval": f"{show.interval(guess.ci95, guess.unit, form=_form(guess.unit))} {guess.covers}".strip(),
        "the prediction was": off_by(guess),
    }


def _printed(value: float, unit: str) -> str:
    form = _form(unit)
    return f"{value:{form}} {unit}" if form else show.quantity(value, unit)


def _form(unit: str) -> str:
    """Return the format of a value and of its interval: per cent have one decimal, so both have the same digits."""
    return ".1f" if unit == "%" else ""


def _exercise_row(check: CheckedExercise) -> dict[str, str]:
    result = "passed" if check.passed else "; ".join(check.failures)
    return {"exercise": check.id, "result": result, "used below": USED[check.used]}


def _challenge_row(task: Challenge, judges: bool) -> dict[str, str]:
    result = REACHED[task.reached] if judges else NOT_JUDGED
    return {"challenge": task.name, "asked for": challenge.asked(task.goals), "result": result}


def _cost(record: RunRecord) -> str:
    budget = record.budget
    time = f"{record.seconds:.0f} s of {budget['seconds']:.0f} s"
    memory = show.quantity(record.peak_memory, "B")
    if budget["memory"]:
        memory += f" of {show.quantity(budget['memory'], 'B')}"
    within = "within" if budget["within"] else "OVER"
    return f"{time}, peak memory {memory}: {within} the budget of preset {record.preset}."
