"""Exercise checks accept right answers however they are written, and reject each plausible wrong one in words."""

import importlib

import pytest

from labkit import checks

LESSONS = sorted({check_id.partition(".")[0] for check_id in checks.known()})
BANKS = {lesson: importlib.import_module(f"mutants.lesson{lesson}") for lesson in LESSONS}
RIGHT = [(check_id, answer) for bank in BANKS.values() for check_id, some in bank.RIGHT.items() for answer in some]
WRONG = [
    (check_id, name, answer)
    for bank in BANKS.values()
    for check_id, some in bank.WRONG.items()
    for name, answer in some.items()
]


@pytest.mark.parametrize(("check_id", "answer"), RIGHT)
def test_right_answer_is_accepted(check_id, answer):
    result = checks.check(check_id, answer)
    assert result.passed, result.failures


@pytest.mark.parametrize(("check_id", "name", "answer"), WRONG, ids=[f"{i}-{name}" for i, name, _ in WRONG])
def test_wrong_answer_is_rejected_with_a_sentence(check_id, name, answer):
    result = checks.check(check_id, answer)
    assert not result.passed
    assert all(len(sentence) > 25 for sentence in result.failures)


@pytest.mark.parametrize("check_id", checks.known())
def test_every_exercise_has_its_bank(check_id):
    bank = BANKS[check_id.partition(".")[0]]
    assert len(bank.RIGHT[check_id]) >= 2
    assert 4 <= len(bank.WRONG[check_id]) <= 8


@pytest.mark.parametrize("check_id", checks.known())
def test_stub_is_told_apart_from_wrong(check_id):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        checks.check(check_id, stub)
