"""Each call of labkit gives on the device what it gives on the CPU, and leaves what it was given where it was."""

import pytest
import torch

import pretend.calls
from pretend.calls import CALLS, Call, Device

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

IN_FLOAT64 = ("head_importance", "layer_importance")  # by their documentation


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_answer_on_both_devices(name: str):
    assert complaint(name, CALLS[name]) == ""


def complaint(name: str, call: Call) -> str:
    """Say what is wrong with a call on the device; an empty text if nothing is."""
    answers = {}
    for place in ("cpu", "cuda"):
        device = Device(place)
        torch.manual_seed(0)
        answers[place] = call(device)
        if moved := device.moved():
            return f"on {place} the call moved or changed {', '.join(moved)}"
    dtypes = {number.dtype for number in pretend.calls.numbers(answers["cuda"])}
    if torch.float64 in dtypes and not name.startswith(IN_FLOAT64):
        return "the answer is in float64"
    return pretend.calls.difference(answers["cpu"], answers["cuda"])
