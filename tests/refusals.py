"""A table of bad inputs: each is refused in a sentence that says what is wrong, what is allowed and what to do."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from labkit.errors import InputError, LabError

Refusals = dict[str, Callable[..., object]]  # words of the sentence -> a call that cannot be right


def refused(table: Refusals) -> pytest.MarkDecorator:
    """Run a test with (words, call) for each row of the table."""
    return pytest.mark.parametrize(("words", "call"), table.items(), ids=table.keys())


def check_refusal(
    words: str,
    call: Callable[[], object],
    error: type[LabError] = InputError,
    leaves: nn.Module | None = None,
) -> None:
    """The error with these words, in one sentence on one line that quotes no page of numbers.

    " ... " in the words stands for any others; words that end with a full stop are the whole sentence.
    `leaves` is a model that the call was given: its modules, modes and values are what they were.
    """
    before = _state(leaves)
    with pytest.raises(error) as caught:
        call()
    sentence = str(caught.value)
    match = re.fullmatch if words.endswith(".") else re.search
    assert match(".*".join(map(re.escape, words.split(" ... "))), sentence), sentence
    assert sentence.endswith((".", "?")) and "\n" not in sentence and len(sentence) < 400
    kinds, values = _state(leaves)
    assert kinds == before[0]
    torch.testing.assert_close(values, before[1], rtol=0, atol=0, equal_nan=True)


def _state(model: nn.Module | None) -> tuple[list[object], dict[str, torch.Tensor]]:
    """The type and mode of every module, and a copy of every value that is not on the meta device."""
    if model is None:
        return [], {}
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    values = {name: value.clone() for name, value in model.state_dict().items() if value.device.type != "meta"}
    return kinds, values
