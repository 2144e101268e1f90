"""A decoder in OpenVINO with its cache passed in and out is the model, at any length and for any number of texts."""

from functools import cache

import hardware
import llamas
import pytest
import torch
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.attention import speculative
from labkit.deploy import decoding, engines
from labkit.errors import InputError
from labkit.quantization import weight_only

pytestmark = pytest.mark.skipif(engines.available()["openvino"] != "ready", reason="needs OpenVINO")
MODEL = llamas.llama().requires_grad_(False)
IDS = torch.cat([llamas.text(12, seed) for seed in range(3)])  # [3, 12]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
EPS = 1e-5  # of the largest: what engines may add up in another order


@cache
def engine() -> decoding.DecoderEngine:
    return decoding.prepare(MODEL)


def close(x, y, eps=EPS) -> bool:
    return float((x - y).abs().max()) <= eps * float(y.abs().max())


def test_token_after_token_and_at_once_it_gives_what_the_model_gives():
    for ids in (IDS, IDS[:1, :7]):
        expected = MODEL(ids).logits
        assert close(decoding.logits(engine(), MODEL, ids), expected)
        keys, values, _ = decoding.example(MODEL, ids[:, :4])
        assert close(engine()(keys, values, ids[:, 4:])[0], expected[:, 4:])


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"rms_norm_eps": 0.1, "num_key_value_heads": 4}])
def test_other_sizes_and_a_tied_embedding(options):
    model = llamas.llama(seed=1, **options).requires_grad_(False)
    assert close(decoding.logits(decoding.prepare(model), model, IDS), model(IDS).logits)


@pytest.mark.parametrize("k", [0, 3])
def test_it_writes_what_transformers_writes_and_a_good_guess_saves_a_call(k: int):
    ids = llamas.text(9).repeat(1, 3)[0]
    written = decoding.writing(engine(), MODEL, ids, 24, k)()
    assert torch.equal(written.ids[None], llamas.greedy(MODEL, ids[None], 24))
    theirs = speculative.generate(MODEL, ids, k=k, max_new_tokens=24)
    assert (written.proposed, written.accepted) == (theirs.proposed, theirs.accepted)
    assert written.calls == theirs.calls


@pytest.mark.parametrize("options", [{"bits": 8, "group_size": None, "symmetric": True}, {"bits": 4, "group_size": 32}])
def test_weights_in_few_bits_are_multiplied_as_they_are(options):
    """Inputs of these products are rounded, by at most half a step of their largest over 127: the bound of the head."""
    model = llamas.llama().requires_grad_(False)
    model.lm_head = weight_only.quantize(model.lm_head, **options)
    seen = []
    model.model.norm.register_forward_hook(lambda *args: seen.append(args[2]))
    expected, exact = (m(IDS).logits for m in (model, MODEL))
    (hidden,) = seen  # [3, 12, W]
    bound = hidden.abs().amax(-1, keepdim=True) / 254 * model.lm_head.weight.abs().sum(1) + EPS * expected.abs().max()
    try:
        rounded = decoding.prepare(model)
    except InputError as error:  # on a CPU whose AVX-512 is forbidden OpenVINO's results are empty
        assert "gives logits [0, 0, 61]" in str(error) and not hardware.has("avx512")
        return
    errors = (decoding.logits(rounded, MODEL, IDS) - expected).abs()[:, 1:]  # the first are those of MODEL
    assert bool((errors <= bound[:, 1:]).all())
    assert not close(expected, exact, 10 * EPS), "the weights are the float ones, or this shows nothing"
    assert rounded.bytes < engine().bytes - 2 * MODEL.lm_head.weight.numel()


REFUSALS: Refusals = {
    "mxfp4 has no kernel in this engine": lambda: decoding.prepare(weight_only.quantize(MODEL, method="mxfp4")),
    "no decoder of the Llama type": lambda: decoding.prepare(nn.Linear(2, 2)),
    "This Qwen2ForCausalLM has parts that are not drawn": lambda: decoding.prepare(llamas.kin("qwen2")),
    "give a LlamaForCausalLM without biases": lambda: decoding.prepare(llamas.llama(mlp_bias=True)),
    "with silu": lambda: decoding.prepare(llamas.llama(hidden_act="gelu_pytorch_tanh")),
    "without yarn": lambda: decoding.prepare(llamas.llama(rope_parameters=YARN)),
}


@refused(REFUSALS)
def test_what_it_cannot_take_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
