"""What an answer does to the process is undone after its check, so that the lesson goes on as it was."""

import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import matplotlib
import numpy as np
import pytest
import torch

from labkit.lesson import check as checks
from labkit.lesson import settings
from labkit.lesson.failures import Failures

CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {  # setting -> a change of it, how to read it
    "torch's gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "torch's number of threads": (
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        torch.get_num_threads,
    ),
    "torch's default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "torch's default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "torch's deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "torch's precision of products": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "numpy's errors": (lambda: np.seterr(all="raise"), np.geterr),
    "matplotlib's style": (
        lambda: matplotlib.rcParams.update({"font.size": 99}),
        lambda: matplotlib.rcParams["font.size"],
    ),
    "the working folder": (lambda: os.chdir("/"), os.getcwd),
}
DRAWS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {  # who draws -> a new seed, a draw
    "Python": (lambda: random.seed(1), random.random),
    "numpy": (lambda: np.random.seed(1), np.random.rand),
    "torch": (lambda: torch.manual_seed(1), lambda: torch.rand(1).item()),
}


@pytest.fixture(autouse=True)
def lesson(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lesson whose only check wants 1."""

    def one(fn: Callable, failures: Failures) -> None:
        failures.close(fn(), 1, "that is not 1")

    module = types.ModuleType("lesson98")
    module.CHECKS = {"98.1": one}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


def answer(*steps: Callable[[], object], raises: bool = False) -> Callable[[], int]:
    """A function that does all that, and then gives the right answer, or raises."""

    def fn() -> int:
        for step in steps:
            step()
        if raises:
            raise ValueError
        return 1

    return fn


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("setting", CHANGES)
def test_a_check_puts_back_what_an_answer_changes_and_names_it(setting: str, raises: bool):
    change, read = CHANGES[setting]
    before = read()
    result = checks.check("98.1", answer(change, raises=raises))
    assert read() == before
    assert result.passed is not raises and result.changed == (setting,)


def test_every_setting_is_tried():
    assert CHANGES.keys() == settings._SETTINGS.keys()


def test_all_at_once_are_put_back():
    before = [read() for _, read in CHANGES.values()]
    checks.check("98.1", answer(*(change for change, _ in CHANGES.values())))
    assert [read() for _, read in CHANGES.values()] == before


@pytest.mark.parametrize("who", DRAWS)
def test_the_lesson_draws_what_it_would_have_drawn_without_the_check(who: str):
    seed, draw = DRAWS[who]
    seed()
    wanted = [draw(), draw()]
    seed()
    first = draw()
    checks.check("98.1", answer(seed, draw))
    assert [first, draw()] == wanted


@pytest.mark.parametrize("change", [lambda: warnings.simplefilter("error"), warnings.resetwarnings])
def test_warnings_are_shown_as_before(change: Callable[[], object]):
    def shown() -> list[str]:
        with warnings.catch_warnings(record=True) as messages:
            warnings.warn("a thing of the lesson", UserWarning, stacklevel=1)
        return [str(entry.message) for entry in messages]

    before = shown()
    checks.check("98.1", answer(change))
    assert shown() == before


def test_what_a_library_does_when_it_is_imported_is_no_change():
    def imports() -> None:
        warnings.filterwarnings("ignore", message="of a library")

    assert checks.check("98.1", answer(imports, lambda: torch.rand(3))).changed == ()
    assert any(entry[1] and entry[1].pattern == "of a library" for entry in warnings.filters)


def test_a_guarded_function_is_called_as_before():
    def pair(a: int, *, b: int) -> tuple[int, int]:
        """A pair."""
        torch.set_default_dtype(torch.float64)
        return a, b

    guarded = settings.putting_back(pair)
    assert guarded(1, b=2) == (1, 2) and guarded.__doc__ == "A pair." and guarded.__name__ == "pair"
    assert torch.get_default_dtype() == torch.float32


def test_classes_and_coroutines_stay_as_they_are():
    async def later() -> None: ...

    assert settings.putting_back(later) is later and settings.putting_back(dict) is dict
