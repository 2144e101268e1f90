"""Exercise checks: try a learner's function on many inputs, and say all that is wrong.

A check tests properties and independent computations rather than a stored answer. It is a function of
(fn, failures, **context), kept in notebooks/checks/lessonNN.py under an id such as "01.1". A few words beside it say
what it tries; the learner reads them beforehand:

    def check_area(fn: Callable, failures: Failures) -> None:
        for width, height in SIDES:
            with failures.given(width=width, height=height):
                failures.close(fn(width, height), width * height, "the area is off")

    CHECKS = {"01.1": check_area}
    TRIES = {"01.1": f"{len(SIDES)} rectangles"}
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from labkit import files
from labkit.errors import InputError


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check: passed or not, all failures, and the number of tried requirements.

    changed: settings of the process changed by the answer, and put back by the check.
    """

    id: str
    passed: bool
    failures: tuple[str, ...]
    tried: int
    changed: tuple[str, ...] = ()


def check(check_id: str, fn: Callable, **context: Any) -> CheckResult:
    """Run the check of an exercise on the learner's `fn`.

    context: further arguments of the check.
    Random states and settings of the process (`settings`) are put back afterwards.
    Raises InputError for an unknown id and for an `fn` that cannot be called. A stub's NotImplementedError passes
    through: a runner can tell "not done yet" from "wrong". An `fn` that computes for ten seconds is stopped
    (`time_limit`), which is a failure.
    """
    __tracebackhide__ = True  # IPython and pytest then show the learner's own lines
    from labkit.lesson import failures as failing
    from labkit.lesson import settings, time_limit  # with torch, which the command line need not import

    examine = _find(check_id)
    if not callable(fn):
        value = failing.short(fn)
        raise InputError(f"Check {check_id} takes your function itself, not {value}; leave out the brackets.")
    failures = failing.Failures()
    with (
        settings.put_back() as changed,
        settings.silently_put_back(),
        failures.until_stopped(),
        failures.given(),  # an exception outside a check's own blocks is a failure too
        time_limit.time_limit(fn) as limited,
    ):
        examine(limited, failures, **context)
    if not failures.tried:
        raise RuntimeError(f"The check {check_id} examined nothing, which is a bug of the check.")
    messages = failures.messages
    return CheckResult(check_id, not messages, messages, failures.tried, tuple(changed))


def ids() -> list[str]:
    """Return the ids of all checks, in order."""
    lessons = sorted(path.stem.removeprefix("lesson") for path in files.CHECKS.glob("lesson*.py"))
    return [check_id for lesson in lessons for check_id in load(lesson)]


def load(lesson: str) -> dict[str, Callable]:
    """Load the checks of a lesson, "03", from notebooks/checks/lesson03.py by id; {} for a lesson without checks."""
    module = _module(lesson)
    return module.CHECKS if module else {}


def tries(check_id: str) -> str:
    """Return what a check tries, in a few words: "7 graphs, among them a shortcut"; InputError for an unknown id."""
    _find(check_id)
    lesson, _, _ = check_id.partition(".")
    return _module(lesson).TRIES[check_id]


def _module(lesson: str) -> ModuleType | None:
    name = f"lesson{lesson}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, files.CHECKS / f"{name}.py")
        if not Path(spec.origin).exists():
            return None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look for the module that they are defined in
        spec.loader.exec_module(module)
    return sys.modules[name]


def _find(check_id: str) -> Callable:
    lesson, _, _ = str(check_id).partition(".")
    lesson_checks = load(lesson)
    if check_id not in lesson_checks:
        listed = ", ".join(lesson_checks or ids()) or "none yet"
        raise InputError(f"There is no check {check_id!r}; the checks are {listed}.")
    return lesson_checks[check_id]
