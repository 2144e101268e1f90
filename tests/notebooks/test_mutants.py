"""Exercise checks accept right answers however they are written, and reject each plausible wrong one in words."""

from pathlib import Path

import mutants
import nbformat
import pytest

from course import notebooks
from labkit.lesson import check as checks

LESSONS = sorted({check_id.partition(".")[0] for check_id in checks.ids()})
BANKS = {lesson: mutants.bank(lesson) for lesson in LESSONS}
RIGHT = [
    (exercise, answer) for bank in BANKS.values() for exercise, answers in bank.right.items() for answer in answers
]
WRONG = [
    (exercise, name, answer)
    for bank in BANKS.values()
    for exercise, answers in bank.wrong.items()
    for name, answer in answers.items()
]


@pytest.mark.parametrize(("check_id", "answer"), RIGHT)
def test_right_answer_is_accepted(check_id, answer):
    result = checks.check(check_id, answer)
    assert result.passed, result.failures


@pytest.mark.parametrize(("check_id", "name", "answer"), WRONG, ids=[f"{i}-{name}" for i, name, _ in WRONG])
def test_wrong_answer_is_rejected_with_a_sentence(check_id, name, answer):
    result = checks.check(check_id, answer)
    assert not result.passed
    assert all(len(sentence.split()) >= 5 for sentence in result.failures)


@pytest.mark.nightly
@pytest.mark.parametrize("lesson", mutants.FURTHER)
def test_further_answers_are_judged_rightly(lesson):
    bank = mutants.further(lesson)
    refused, accepted = [], []
    for exercise, answers in bank.right.items():
        results = [checks.check(exercise, answer) for answer in answers]
        refused += [result.failures for result in results if not result.passed]
    for exercise, named in bank.wrong.items():
        accepted += [f"{exercise} {name}" for name, answer in named.items() if checks.check(exercise, answer).passed]
    assert (refused, accepted) == ([], [])


@pytest.mark.parametrize("check_id", checks.ids())
def test_every_exercise_has_its_bank(check_id):
    bank = BANKS[check_id.partition(".")[0]]
    assert len(bank.right[check_id]) >= 2
    assert len(bank.wrong[check_id]) >= 4


@pytest.mark.parametrize("lesson", notebooks.all_lessons(), ids=lambda path: path.stem)
def test_every_exercise_has_its_card_and_its_check(lesson: Path):
    """notebooks.exercises refuses an exercise without card or check; here is what it cannot know."""
    tasks = notebooks.exercises(nbformat.read(lesson, as_version=4))
    assert [task.id for task in tasks] == [f"{lesson.stem[:2]}.{k}" for k in range(1, len(tasks) + 1)]
    assert {task.id for task in tasks} == {one for one in checks.ids() if one.startswith(lesson.stem[:2])}
    for task in tasks:
        assert 1 <= task.points <= 5 and 5 <= task.minutes <= 30
        assert task.hints >= 1, f"{task.id} has no hint"
        assert '"""' in task.stub, f"{task.id}: the stub's docstring is the contract"
        assert "NotImplementedError" in task.stub and task.stub != task.source


@pytest.mark.parametrize("check_id", checks.ids())
def test_stub_is_told_apart_from_wrong(check_id):
    def stub(*args, **kwargs):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        checks.check(check_id, stub)


MESSAGES = [
    ("03.2", "a bias for each convolution", "dimensions are listed that the network does not have"),
    ("07.3", "the plain sigmoid", "h is the plain sigmoid"),
    ("07.3", "clipped before h", "the codes are clipped before h is added"),
    ("07.3", "codes, not weights", "the scale has to multiply them"),
]


@pytest.mark.parametrize(("check_id", "name", "words"), MESSAGES)
def test_each_kind_of_fault_has_a_message_of_its_own(check_id, name, words):
    answer = BANKS[check_id[:2]].wrong[check_id][name]
    assert words in checks.check(check_id, answer).failures[0]


def test_a_message_of_a_number_tells_the_first_input_what_was_expected_and_what_came():
    sentence, *_ = checks.check("00.2", lambda n: n // 3).failures
    assert sentence.startswith("With n=3: too bold") and "(expected 0, got 1)" in sentence
