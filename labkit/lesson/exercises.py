"""Exercises of a session: the learner's answers, the checks, and the functions for the rest of the lesson."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from labkit import show
from labkit.lesson import check as checks
from labkit.lesson import settings, worked
from labkit.lesson.records import CheckedExercise

NOT_DONE = "not done yet"


@dataclass(frozen=True)
class _Examined:
    """A learner's function and the outcome of the latest check.

    changed_settings: names of the process's settings (`settings`) changed by the function.
    requirements: number of requirements tried by the check.
    """

    function: Callable
    outcome: CheckedExercise
    changed_settings: tuple[str, ...]
    requirements: int


class Exercises:
    """The exercises of a session by id: "01.2"."""

    def __init__(self) -> None:
        self._examined: dict[str, _Examined] = {}
        self._worked: dict[str, Callable] = {}  # worked answers in use for the rest of the lesson

    @property
    def outcomes(self) -> list[CheckedExercise]:
        """The outcomes of all checks, in the order of the first check of each exercise."""
        return [answer.outcome for answer in self._examined.values()]

    def check(self, exercise: str, function: Callable, **context: Any) -> None:
        """Say what the check tries, check a learner's function and show every failure.

        context: further arguments of the exercise's check.
        Raises InputError for an unknown exercise and for a `function` that cannot be called.
        """
        if exercise in self._worked and function is self._worked[exercise]:
            show.emit(f"exercise {exercise}: this is the worked answer; run the cell with yours, then this one.")
            return
        show.emit(f"exercise {exercise}: the check tries {checks.tries(exercise)}.")
        answer = self._examine(exercise, function, **context)
        if answer.outcome.passed:
            _show_passed(exercise, answer)
        elif answer.outcome.failures == [NOT_DONE]:
            show.emit(
                f"exercise {exercise}: {NOT_DONE}. Replace the `raise NotImplementedError` line with your answer."
            )
        else:
            _show_failures(exercise, answer.outcome.failures)

    def answer(self, exercise: str, function: Callable) -> Callable:
        """Return the function for the rest of the lesson, and print the choice.

        The choice is `function` if the check passed, otherwise the worked answer; `function` again if no worked answer
        lies beside labkit. An unchecked function is checked first, in silence. A function with side effects on settings
        of the process comes back wrapped: the settings are put back after each call.
        Raises InputError as `check` does.
        """
        if exercise in self._worked and function is self._worked[exercise]:
            self._note_use(exercise, "worked", "the worked answer is used from here on")
            return function
        answer = self._examined.get(exercise)
        if answer is None or answer.function is not function:
            answer = self._examine(exercise, function)
        name = getattr(function, "__name__", "answer")
        if answer.outcome.passed:
            self._note_use(exercise, "learner", f"your {name} is used from here on")
            return settings.putting_back(function) if answer.changed_settings else function
        worked_answer = worked.answer(exercise, function)
        if worked_answer is None:
            self._note_use(exercise, None, f"your {name} has not passed yet, and no worked answer is here to stand in")
            return function
        self._worked[exercise] = worked_answer
        self._note_use(exercise, "worked", f"your {name} has not passed yet; the worked answer is used from here on")
        return worked_answer

    def _examine(self, exercise: str, function: Callable, **context: Any) -> _Examined:
        try:
            result = checks.check(exercise, function, **context)
        except NotImplementedError:
            result = checks.CheckResult(exercise, passed=False, failures=(NOT_DONE,), tried=0)
        earlier = self._examined.get(exercise)
        outcome = CheckedExercise(
            id=exercise,
            passed=result.passed,
            failures=list(result.failures),
            used=earlier.outcome.used if earlier else None,
        )
        self._examined[exercise] = _Examined(function, outcome, result.changed, result.tried)
        return self._examined[exercise]

    def _note_use(self, exercise: str, whose: str | None, sentence: str) -> None:
        self._examined[exercise].outcome.used = whose
        show.emit(f"{exercise}: {sentence}.")


def _show_passed(exercise: str, answer: _Examined) -> None:
    text = f"exercise {exercise}: passed, {answer.requirements} requirements met."
    if answer.changed_settings:
        text += f" It changed {', '.join(answer.changed_settings)}: put back."
    show.emit(text)


def _show_failures(exercise: str, failures: list[str]) -> None:
    count = f"{show.counted(len(failures), 'thing')} to look at"
    text = "\n  - ".join([f"exercise {exercise}: {count}", *failures])
    items = "".join(f"<li>{escape(failure)}</li>" for failure in failures)
    show.emit(text, f"<b>Exercise {escape(exercise)}: {count}</b><ul>{items}</ul>")
