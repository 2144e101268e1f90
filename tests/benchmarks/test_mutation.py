"""Mutants: the draw is the same for a seed, annotations are no faults, and a verdict names the test that failed."""

import itertools
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")
pytest.importorskip("pytest_timeout")
import mutation

from labkit.files import ROOT

ERRORS = ROOT / "labkit" / "errors.py"
ANNOTATED = "def half(x: int | None) -> float | None:\n    return x / 2\n"


def test_a_seed_gives_the_same_mutants_and_another_seed_gives_others():
    drawn = mutation.draw([ERRORS], 5, seed=1)
    assert len(drawn) == 5 and drawn == mutation.draw([ERRORS], 5, seed=1)
    assert drawn != mutation.draw([ERRORS], 5, seed=2)


def test_a_mutant_is_the_file_with_one_fault():
    source = ERRORS.read_text(encoding="utf-8")
    for site, _, mutated in mutation.draw([ERRORS], 5, seed=1):
        lines = list(zip(source.splitlines(), mutated.splitlines(), strict=True))
        changed = [number for number, (before, after) in enumerate(lines, 1) if before != after]
        assert changed == [site.line]


@pytest.mark.parametrize(
    ("mutated", "runs_otherwise"),
    [
        (ANNOTATED.replace("int | None", "int + None"), False),
        (ANNOTATED.replace("/ 2", "* 2"), True),
        (ANNOTATED.replace("x /", "x /,"), False),  # no program
    ],
)
def test_only_what_runs_otherwise_is_a_fault(mutated: str, runs_otherwise: bool):
    assert mutation.changes_what_runs(ANNOTATED, mutated) == runs_otherwise


def flat(groups: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(groups))


def test_the_tests_of_a_module_begin_with_those_that_import_it():
    first, *others = mutation.tests_of("labkit/deploy/serving.py")
    assert first == ["tests/labkit/test_serving.py"] and any(others)
    assert "tests/labkit/test_coupling.py" in flat(mutation.tests_of("labkit/graph/rules_shapes.py"))


def test_a_module_whose_names_another_one_offers_on_first_use_has_its_tests():
    assert "tests/labkit/test_stats.py" in flat(mutation.tests_of("labkit/timing/paired.py"))


def test_every_module_has_tests():
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "labkit").rglob("*.py")]
    assert [path for path in modules if not mutation.tests_of(path)] == []


def test_a_harmless_mutant_is_known_by_its_lines_and_still_in_the_code():
    diff = "-\n-    @staticmethod"
    verdict = mutation.Verdict("labkit/pruning/sr_ste.py", 114, "core/RemoveDecorator", diff, "")
    assert mutation.lines_of(verdict) in mutation.harmless()
    for path, removed, _ in mutation.harmless():
        assert removed in [line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "killed_by"), [("1 == 1", ""), ("1 == 2", "test_sums.py::test_sum[a - small one]")])
def test_a_verdict_names_the_test_that_failed(tmp_path: Path, claim: str, killed_by: str):
    (tmp_path / "test_sums.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('name', ['a - small one'])\n"
        f"def test_sum(name):\n    assert {claim}, name + ' - wrong'\n"
    )
    assert mutation.run_tests(tmp_path, ["test_sums.py"]) == killed_by
