"""Failures of an answer: a list of all that is wrong, with the first input that shows each, for exercise checks.

with failures.given(width=2, height=3):
    failures.close(fn(2, 3), 6, "the area is off")
failures.messages  # ("With width=2, height=3: the area is off (expected 6, got 5)",)
"""

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from labkit import show
from labkit.lesson.time_limit import COMPUTING_S, TimeLimitReached

STUB_SAYS = "Your answer goes here"
LONGEST = 60  # characters of a value in a message
LONGEST_ERROR = 160  # characters of an exception's text
TOO_LONG = f"it was stopped after {COMPUTING_S:.0f} seconds of computing or a minute of waiting; does every loop end?"


class Failures:
    """A list of all that is wrong with an answer; a check calls expect, need and close inside `with given(...)`."""

    def __init__(self) -> None:
        self.tried = 0
        self._input = ""
        self._first: dict[str, str] = {}  # message -> the sentence for the first input that showed the failure
        self._more: dict[str, int] = {}  # message -> number of further inputs with the same failure

    @property
    def messages(self) -> tuple[str, ...]:
        """A sentence for each failure, with the first input that shows it."""
        return tuple(first + _and_more(self._more[message]) for message, first in self._first.items())

    def expect(self, condition: Any, message: str, *, detail: str = "") -> bool:
        """Note a failure unless the condition holds; return True if the condition holds.

        message: clause that says the failure.
        detail: the evidence, for the first input.
        """
        self.tried += 1
        if condition:
            return True
        if message in self._first:
            self._more[message] += 1
            return False
        sentence = f"{message} ({detail})" if detail else message
        if self._input:
            sentence = f"With {self._input}: {sentence}"
        self._first[message] = sentence
        self._more[message] = 0
        return False

    def need(self, condition: Any, message: str, *, detail: str = "") -> None:
        """Note a failure, and leave the block of `given`, unless the condition holds."""
        if not self.expect(condition, message, detail=detail):
            raise _EnoughSeen

    def close(self, got: Any, want: Any, message: str, *, rtol: float = 1e-6, atol: float = 0.0) -> bool:
        """Expect numbers, arrays or tensors of one shape to agree within atol + rtol * |want|; NaN never agrees."""
        difference = _difference(got, want, rtol, atol)
        return self.expect(difference is None, message, detail=difference or "")

    def call(self, fn: Callable, *arguments: Any, changed: str) -> Any:
        """Return the answer of `fn` to copies of the arguments; note the message `changed` if `fn` changes a copy."""
        copies = copy.deepcopy(arguments)
        answer = fn(*copies)
        self.expect(alike(copies, arguments), changed)
        return answer

    @contextmanager
    def given(self, **inputs: Any) -> Iterator[None]:
        """Name the inputs under test in all failures of the block; empty dicts are not named.

        An exception inside becomes a failure, except a stub's, which passes through. So does TimeLimitReached, after
        it became a failure: the other inputs are not tried.
        """
        named = {name: short(value) for name, value in inputs.items() if not _is_empty(value)}
        self._input = ", ".join(f"{name}={value}" for name, value in named.items())
        try:
            yield
        except _EnoughSeen:
            pass
        except TimeLimitReached:
            if TOO_LONG not in self._first:
                self.expect(False, TOO_LONG)
            raise
        except Exception as error:
            if _is_of_a_stub(error):
                raise
            text = " ".join(str(error).split())
            self.expect(False, f"it raised {type(error).__name__}: {short(text, LONGEST_ERROR)}")
        finally:
            self._input = ""

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """End the block at the time limit, whose failure `given` has noted."""
        with suppress(TimeLimitReached):
            yield


class _EnoughSeen(Exception):
    """The end of a `given` block after a failed `need`."""


def is_mask(value: Any, weight: Any) -> bool:
    """Return True if an answer is a bool tensor of the shape of `weight`."""
    import torch

    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.shape == weight.shape


def alike(new: Any, old: Any) -> bool:
    """Return True if modules, tensors, or containers with tensors agree in every setting and every number."""
    import torch

    if isinstance(old, torch.nn.Module):
        return repr(new) == repr(old) and alike(new.state_dict(), old.state_dict())
    if isinstance(old, Mapping):
        if new.keys() != old.keys():
            return False
        return all(alike(new[key], old[key]) for key in old)
    if isinstance(old, list | tuple):
        return len(new) == len(old) and all(map(alike, new, old))
    if isinstance(old, torch.Tensor):
        return torch.equal(new, old)
    return new == old


def has_parts(value: Any, number: int) -> bool:
    """Return True if an answer is a tuple or a list of `number` values."""
    return isinstance(value, tuple | list) and len(value) == number


def diagnoses(fn: Callable, failures: Failures, faults: Sequence[str], written: Callable, message: str) -> None:
    """Check that `fn` names each fault in a code, in three ways to write the code.

    written: written(fault, style) with style 0, 1 or 2 returns the arguments of `fn`.
    message: the failure if `fn` returns the name of a wrong fault.
    """
    for style in range(3):
        for fault in faults:
            with failures.given(way_of_writing=style + 1):
                name = fn(*written(fault, style))
                failures.need(name in faults, "return one of the names of the card, as a text")
                failures.expect(name == fault, message, detail=f"{fault!r} was called {name!r}")


def _difference(got: Any, want: Any, rtol: float, atol: float) -> str | None:
    """Describe how an answer differs, by the first entry that is off; None if the answer is right."""
    import torch

    if got is None:
        return "your function returned None: does it end in `return`?"
    if isinstance(got, bool):
        return "your function returned a bool, not a number or tensor"
    try:
        got_tensor = _as_tensor(got)
        want_tensor = _as_tensor(want)
    except (TypeError, ValueError, RuntimeError):
        return f"your function returned a {type(got).__name__}, not a number or tensor"
    if got_tensor.shape != want_tensor.shape:
        shape = f"has shape {tuple(got_tensor.shape)}" if got_tensor.ndim else "is a single number"
        return f"what your function returned {shape}, which is not the shape asked for"
    off = ~torch.isclose(got_tensor, want_tensor, rtol=rtol, atol=atol)
    if not off.any():
        return None
    place = tuple(off.nonzero()[0].tolist())
    where = f"at {list(place)} " if place else ""
    expected = short(want_tensor[place].item())
    came = short(got_tensor[place].item())
    return f"{where}expected {expected}, got {came}"


def _as_tensor(value: Any) -> Any:
    """Return a number, an array or a tensor as a float64 tensor on the CPU; TypeError and the like for the rest."""
    import torch

    if isinstance(value, numbers.Real):
        value = float(value)
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return torch.as_tensor(value, device="cpu", dtype=torch.float64)


def _is_of_a_stub(error: Exception) -> bool:
    """Return True for the exception of an exercise without an answer.

    torch raises NotImplementedError as well, for types that an operator does not take; only the text differs.
    """
    text = str(error)
    return isinstance(error, NotImplementedError) and (not text or text.startswith(STUB_SAYS))


def _and_more(count: int) -> str:
    return f"; the same with {show.counted(count, 'other input')}" if count else ""


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def short(value: Any, longest: int = LONGEST) -> str:
    """Return a value for a message: numbers readable, tensors by shape, texts cut to `longest` characters."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return _short_number(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _short_number(value: float) -> str:
    """Return six significant digits, "1e9" for 1e+09; all digits of a count whose last digits matter."""
    text = f"{value:.6g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    if "e" not in text:
        return text if abs(value) < 100_000 else f"{value:,.6g}"
    is_rounded_count = float(text) != value and float(value).is_integer()
    return f"{value:,.0f}" if is_rounded_count else text
