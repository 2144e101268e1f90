"""Each call of labkit gives on the device what it gives on the CPU, and leaves what it was given where it was."""

import pytest
import torch

from pretend import calls, device
from pretend.calls import CALLS, Call, Device

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

# What computes in float64, by its documentation or to prove that two models are equal, and what answers on the CPU.
IN_FLOAT64 = (
    "channels.prune", "permutation.permute", "ptq.quantize", "mixed_precision", "qat", "fold", "transformers.prune",
    "rotation", "sparsegpt", "weight_only gptq", "weight_only awq", "gptq.gptq", "head_importance",
    "layer_importance", "rounding.bias_correction", "affine.sqnr", "parity", "blockwise.prune (2, 4) sparsegpt",
    "blockwise.prune 0.5 sparsegpt",
)  # fmt: skip
ANSWERED_ON_CPU = ("head_importance", "layer_importance")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_answer_on_both_devices(name: str):
    assert complaint(name, CALLS[name]) == ""


def complaint(name: str, call: Call) -> str:
    """Say what is wrong with a call on the device; an empty text if nothing is."""
    answers = {}
    for place in ("cpu", "cuda"):
        on = Device(place)
        torch.manual_seed(0)
        before = device.calls_in_float64()
        answers[place] = call(on)
        if moved := on.moved():
            return f"on {place} the call moved or changed {', '.join(moved)}"
    if device.calls_in_float64() > before and not name.startswith(IN_FLOAT64):
        return "the device computed in float64"
    if "cpu" in calls.places(answers["cuda"]) and not name.startswith(ANSWERED_ON_CPU):
        return "the answer is on the CPU"
    return calls.difference(answers["cpu"], answers["cuda"])
