"""A table of bad inputs: each is refused in a sentence that says what is wrong, what is allowed and what to do."""

from collections.abc import Callable

import pytest

from labkit.errors import InputError

Refusals = dict[str, Callable[[], object]]  # words of the sentence -> a call that cannot be right


def refused(table: Refusals) -> pytest.MarkDecorator:
    """Run a test with (words, call) for each row of the table."""
    return pytest.mark.parametrize(("words", "call"), table.items(), ids=table.keys())


def check_refusal(words: str, call: Callable[[], object]) -> None:
    """InputError with these words, in one sentence on one line that quotes no page of numbers."""
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert words in sentence
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 400
