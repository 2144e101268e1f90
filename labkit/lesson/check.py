"""Exercise checks: each takes the learner's function, tries it on many inputs and says everything that is wrong.

They test properties and independent computations rather than one stored answer, and never print the answer. A check is
a function of (fn, failures, **context); its id is like "01.1".
"""

import copy
import importlib.util
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import files
from labkit.errors import InputError

STUB_SAYS = "Your answer goes here"


@dataclass(frozen=True)
class CheckResult:
    """Whether an answer passed, what is wrong with it, and how many requirements were looked at.

    changed: settings of the process that the answer changed, and that were put back.
    """

    id: str
    passed: bool
    failures: tuple[str, ...]
    tried: int
    changed: tuple[str, ...] = ()


class Failures:
    """Collects all that is wrong with an answer; a check calls expect, need and close inside `with given(...)`."""

    def __init__(self) -> None:
        self.tried = 0
        self._input = ""
        self._first: dict[str, str] = {}  # what is wrong -> how it showed first
        self._more: dict[str, int] = {}  # what is wrong -> with how many further inputs

    @property
    def messages(self) -> tuple[str, ...]:
        """One sentence for each thing that is wrong, with the first input that showed it."""
        return tuple(first + _and_more(self._more[wrong]) for wrong, first in self._first.items())

    def expect(self, condition: Any, message: str, *, detail: str = "") -> bool:
        """Note `message` unless the condition holds; `detail` says how it showed. Returns whether it holds."""
        self.tried += 1
        if condition:
            return True
        if message in self._first:
            self._more[message] += 1
            return False
        sentence = f"{message} ({detail})" if detail else message
        self._first[message] = f"With {self._input}: {sentence}" if self._input else sentence
        self._more[message] = 0
        return False

    def need(self, condition: Any, message: str) -> None:
        """Like `expect`; where the condition does not hold, nothing more is looked at with the given input."""
        if not self.expect(condition, message):
            raise _EnoughSeen

    def close(self, got: Any, want: Any, message: str, *, rtol: float = 1e-6, atol: float = 0.0) -> bool:
        """Expect numbers, arrays or tensors to agree within atol + rtol * |want|, of one shape; NaN never agrees."""
        wrong = _difference(got, want, rtol, atol)
        return self.expect(wrong is None, message, detail=wrong or "")

    def call(self, fn: Callable, *arguments: Any, changed: str) -> Any:
        """What fn returns for copies of the arguments; where it changes them, `changed` is noted."""
        copies = copy.deepcopy(arguments)
        answer = fn(*copies)
        self.expect(alike(copies, arguments), changed)
        return answer

    @contextmanager
    def given(self, **inputs: Any) -> Iterator[None]:
        """Name the inputs under test, without empty dicts. An exception inside is a failure that names them.

        A stub's passes through.
        torch raises NotImplementedError as well, for types that an operator does not take; its text tells them apart.
        """
        self._input = ", ".join(f"{name}={_short(value)}" for name, value in inputs.items() if not _is_empty(value))
        try:
            yield
        except _EnoughSeen:
            pass
        except Exception as error:
            if isinstance(error, NotImplementedError) and (not str(error) or str(error).startswith(STUB_SAYS)):
                raise
            self.expect(False, f"it raised {type(error).__name__}: {_short(' '.join(str(error).split()), 160)}")
        finally:
            self._input = ""


class _EnoughSeen(Exception):
    """Ends a `given` block after a failure that leaves nothing to look at."""


def is_mask(value: Any, weight: Any) -> bool:
    """Whether an answer is a bool tensor of the shape of `weight`."""
    import torch

    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.shape == weight.shape


def alike(new: Any, old: Any) -> bool:
    """Whether modules, tensors, or containers of them agree in every setting and every number."""
    import torch

    if isinstance(old, torch.nn.Module):
        return repr(new) == repr(old) and alike(new.state_dict(), old.state_dict())
    if isinstance(old, Mapping):
        return new.keys() == old.keys() and all(alike(new[key], old[key]) for key in old)
    if isinstance(old, list | tuple):
        return len(new) == len(old) and all(map(alike, new, old))
    return torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old


def has_parts(value: Any, number: int) -> bool:
    """Whether an answer is a tuple or a list of so many values."""
    return isinstance(value, tuple | list) and len(value) == number


def diagnoses(fn: Callable, failures: Failures, faults: Sequence[str], written: Callable, message: str) -> None:
    """fn(*written(fault, style)) names the fault, for each of `faults` in three ways to write it, or says `message`."""
    for style in range(3):
        for fault in faults:
            with failures.given(way_of_writing=style + 1):
                name = fn(*written(fault, style))
                failures.need(name in faults, "return one of the names of the card, as a text")
                failures.expect(name == fault, message, detail=f"{fault!r} was called {name!r}")


def check(check_id: str, fn: Callable, **context: Any) -> CheckResult:
    """Run one exercise's check on the learner's `fn`. InputError for an unknown id or something that is no function.

    NotImplementedError of a stub passes through, so that a runner can tell "not done yet" from "wrong". Random states
    and settings of the process (`settings`) are put back, whatever the answer does to them.
    """
    __tracebackhide__ = True  # IPython and pytest then show the learner's own lines
    from labkit.lesson import settings  # with torch, which the command line need not import

    examine = _find(check_id)
    if not callable(fn):
        raise InputError(f"Check {check_id} takes your function itself, not {_short(fn)}; leave out the brackets.")
    failures = Failures()
    # an exception outside a check's own blocks is a failure too
    with settings.put_back() as changed, settings.silently_put_back(), failures.given():
        examine(fn, failures, **context)
    if not failures.tried:
        raise RuntimeError(f"The check {check_id} examined nothing, which is a bug of the check.")
    return CheckResult(check_id, not failures.messages, failures.messages, failures.tried, tuple(changed))


def ids() -> list[str]:
    """The ids of all checks, in order."""
    lessons = sorted(path.stem.removeprefix("lesson") for path in files.CHECKS.glob("lesson*.py"))
    return [check_id for lesson in lessons for check_id in load(lesson)]


def load(lesson: str) -> dict[str, Callable]:
    """Load the checks of a lesson, "03", from notebooks/checks/lesson03.py: {id: check}; {} where it has none."""
    name = f"lesson{lesson}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, files.CHECKS / f"{name}.py")
        if not Path(spec.origin).exists():
            return {}
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look for the module that they are defined in
        spec.loader.exec_module(module)
    return sys.modules[name].CHECKS


def _find(check_id: str) -> Callable:
    lesson_checks = load(str(check_id).partition(".")[0])
    if check_id not in lesson_checks:
        raise InputError(
            f"There is no check {check_id!r}; the checks are {', '.join(lesson_checks or ids()) or 'none yet'}."
        )
    return lesson_checks[check_id]


def _difference(got: Any, want: Any, rtol: float, atol: float) -> str | None:
    """None where they agree, else what came out, never what should have."""
    import torch

    if got is None:
        return "your function returned None: does it end in `return`?"
    try:
        if isinstance(got, bool):
            raise TypeError
        got, want = (
            torch.as_tensor(float(value) if isinstance(value, numbers.Real) else value, device="cpu")
            for value in (got, want)
        )
    except (TypeError, ValueError, RuntimeError):
        return f"your function returned a {type(got).__name__}, not a number or tensor"
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        what = f"has shape {tuple(got.shape)}" if got.ndim else "is a single number"
        return f"what your function returned {what}, which is not the shape asked for"
    if bool(torch.isclose(got, want, rtol=rtol, atol=atol).all()):
        return None
    if not bool(got.isfinite().all()):
        return "your result holds NaN or an infinity"
    return f"your result: {_short(got.item())}" if not got.ndim else "your result has the right shape, not the values"


def _and_more(count: int) -> str:
    return f"; the same with {count} other input{'s' * (count > 1)}" if count else ""


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _short(value: Any, most: int = 60) -> str:
    """A value for a message: numbers readable, tensors by shape, long texts cut."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        text = f"{value:.6g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
        if "e" in text and float(text) != value and float(value).is_integer():
            return f"{value:,.0f}"  # a count whose last digits matter
        return text if "e" in text or abs(value) < 100_000 else f"{value:,.6g}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
