"""A next token with its cache passed in and out is the model's, in eager torch and in each engine, at any length."""

from functools import cache

import llamas
import pytest
import torch
from torch import nn

from labkit import roofline
from labkit.attention import speculative
from labkit.deploy import decoding, engines
from labkit.errors import InputError
from labkit.quantization import weight_only

READY = [name for name in ("onnxruntime", "openvino") if engines.available()[name] == "ready"]
MODEL = llamas.llama().requires_grad_(False)
IDS = torch.cat([llamas.text(12, seed) for seed in range(3)])  # [3, 12]
EPS = 1e-5  # of the largest: what engines may add up in another order


@cache
def rounded() -> nn.Module:
    return weight_only.quantize(MODEL, 8, group_size=None, symmetric=True)


@cache
def engine(name: str, int8: bool) -> engines.Engine:
    step = decoding.DecodeStep(rounded() if int8 else MODEL)
    return engines.prepare(name, step, decoding.example(MODEL, IDS), dynamic=decoding.SIZES)


def close(x, y, eps=EPS) -> bool:
    return float((x - y).abs().max()) <= eps * float(y.abs().max())


def test_token_after_token_is_the_text_at_once():
    assert close(decoding.logits(decoding.DecodeStep(MODEL), MODEL, IDS), MODEL(IDS).logits)


@pytest.mark.parametrize("name", READY)
def test_an_engine_of_any_length_and_number_of_texts_gives_what_the_model_gives(name: str):
    for ids in (IDS, IDS[:1, :7]):
        assert close(decoding.logits(engine(name, False), MODEL, ids), MODEL(ids).logits)


@pytest.mark.parametrize("name", ["torch", *READY])
def test_a_step_stores_its_token_and_is_the_same_every_time(name: str):
    call = decoding.DecodeStep(MODEL) if name == "torch" else engine(name, False)
    step, theirs = decoding.repeated(call, MODEL, IDS), roofline.decode_step(MODEL, IDS)
    with torch.inference_mode():
        expected = theirs()
    assert close(step(), expected) and torch.equal(step(), step())


def test_it_writes_what_transformers_writes_and_a_good_guess_saves_a_call():
    ids = llamas.text(9).repeat(1, 3)[0]
    for k in (0, 3):
        written = decoding.writing(decoding.DecodeStep(MODEL), MODEL, ids, 24, k)()
        assert torch.equal(written.ids[None], llamas.greedy(MODEL, ids[None], 24))
        theirs = speculative.generate(MODEL, ids, k=k, max_new_tokens=24)
        counted = written.proposed, written.accepted, written.calls
        assert counted == (theirs.proposed, theirs.accepted, theirs.calls)


@pytest.mark.parametrize("name", READY)
def test_an_engine_checks_guesses_and_writes_the_same_text(name: str):
    ids = llamas.text(9).repeat(1, 3)[0]
    three = engines.prepare(name, decoding.DecodeStep(MODEL), decoding.example(MODEL, IDS, 4), dynamic=decoding.SIZES)
    for call, k in ((engine(name, False), 0), (three, 3)):
        assert torch.equal(decoding.writing(call, MODEL, ids, 24, k)().ids[None], llamas.greedy(MODEL, ids[None], 24))


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_weights_are_multiplied_as_they_are(name: str, bias: bool):
    """ONNX Runtime's inputs stay float32; OpenVINO's are rounded, by at most half a step of their largest over 127."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, bias).requires_grad_(False), torch.randn(3, 5, 64)
    quantized = weight_only.quantize(layer, 8, group_size=None, symmetric=True)
    expected, weight = quantized(x), quantized.weight
    product = engines.prepare(name, nn.Sequential(quantized), x)
    bound = x.abs().amax(-1, keepdim=True) / 254 * weight.abs().sum(1)  # [3, 5, 32]
    bound = EPS * expected.abs().max() + (0 if name == "onnxruntime" else bound)
    assert bool(((product(x) - expected).abs() <= bound).all())
    assert not close(expected, layer(x), 10 * EPS), "the weights are the float ones, or this shows nothing"


@pytest.mark.parametrize("name", READY)
def test_a_model_with_int8_weights_decodes_and_is_smaller(name: str):
    expected = decoding.logits(decoding.DecodeStep(rounded()), MODEL, IDS)
    if name == "onnxruntime":
        assert close(decoding.logits(engine(name, True), MODEL, IDS), expected)
    assert engine(name, True).bytes < engine(name, False).bytes


@pytest.mark.parametrize("name", READY[-1:])
def test_other_forms_of_weights_are_refused(name: str):
    groups = decoding.DecodeStep(weight_only.quantize(MODEL, 4, group_size=32))
    with pytest.raises(InputError, match="cannot be exported: quantize them to 8 bits"):
        engines.prepare(name, groups, decoding.example(MODEL, IDS), dynamic=decoding.SIZES)


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(InputError, match="takes no KV cache"):
        decoding.DecodeStep(nn.Linear(2, 2))
