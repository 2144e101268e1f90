"""Rotated models against the model itself, in float64 where its norms compute in float64 too, and Hadamard matrices."""

import copy

import families
import pytest
import scipy.linalg
import torch
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import models
from labkit.errors import EqualityError
from labkit.modules import hooks
from labkit.quantization import ptq, rotation
from labkit.storage import artifact

ROTATED = ("llama", "mistral", "qwen2", "qwen3")  # qwen2: biases that read; qwen3: norms of queries and keys


def widened(model: nn.Module) -> nn.Module:
    """In float64, norms included, which transformers computes in float32 whatever they get."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon).double()
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


@torch.no_grad()
def logits(model: nn.Module, seed: int = 1) -> torch.Tensor:
    return model(**families.inputs("llama", seed)).logits


def difference(model: nn.Module, new: nn.Module) -> float:
    expected = logits(model)
    return float((expected - logits(new)).abs().max() / expected.abs().max())


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 12, 20, 24, 28, 36, 64, 96, 576, 896, 960, 1536, 2560, 304])
def test_a_hadamard_matrix_has_two_values_and_orthogonal_rows(n):
    h = rotation.hadamard(n)
    some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:256]  # n^3 products would take seconds
    assert torch.allclose(h.abs() * n**0.5, torch.ones(n, n, dtype=torch.double), rtol=1e-12)
    assert float((h[some] @ h.t() - torch.eye(n)[some]).abs().max()) < 1e-13


def test_a_power_of_two_is_sylvesters():
    assert torch.equal((rotation.hadamard(64) * 8).round(), torch.from_numpy(scipy.linalg.hadamard(64)).double())


@pytest.mark.parametrize("n", [3, 18, 92])
def test_where_no_hadamard_matrix_is_at_hand_it_is_still_orthogonal(n):
    h = rotation.hadamard(n, seed=1)
    assert float((h @ h.t() - torch.eye(n)).abs().max()) < 1e-13
    assert h.abs().std() > 0.01


def test_signs_are_of_rows_and_seeded():
    plain, a, b = rotation.hadamard(16), rotation.hadamard(16, 0), rotation.hadamard(16, 1)
    assert torch.equal(a, rotation.hadamard(16, 0)) and not torch.equal(a, b)
    assert set((a / plain).mean(1).tolist()) == {-1.0, 1.0}


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_model_is_the_model(name, online):
    model = widened(families.family(name))
    new = rotation.rotate(model, online=online)
    assert difference(model, new) < 1e-12
    assert all(torch.equal(x, torch.ones_like(x)) for n, x in new.named_parameters() if n.endswith("layernorm.weight"))


def test_biases_that_write_are_rotated():
    model = widened(families.family("llama", attention_bias=True, mlp_bias=True))
    assert difference(model, rotation.rotate(model)) < 1e-12


def test_in_float32_it_is_the_model_up_to_roundings():
    model = families.family("llama")
    assert difference(model, rotation.rotate(model)) < 1e-5


def test_the_model_is_left_as_it_was_and_shares_nothing():
    model = families.family("llama", tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    new = rotation.rotate(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert not {x.data_ptr() for x in model.parameters()} & {x.data_ptr() for x in new.parameters()}


def test_what_the_untied_head_costs_is_counted():
    model = families.family("llama", tie_word_embeddings=True)
    new = rotation.rotate(model)
    assert new.lm_head.weight is not new.model.embed_tokens.weight and not new.config.tie_word_embeddings
    cost = artifact.size(new) - artifact.size(model)
    assert 0 <= cost - families.VOCABULARY * 32 * 4 < 128  # the header's line
    assert difference(model, new) < 1e-5


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x.model.embed_tokens.weight.sub_(x.model.embed_tokens.weight.mean(1, keepdim=True)),  # QuaRot's code
        lambda x: x.model.norm.weight.mul_(torch.linspace(0.9, 1.1, 32)),  # a gain that is folded and stays
        lambda x: x.lm_head.weight.copy_(x.model.embed_tokens.weight),  # still tied
    ],
    ids=["mean removed", "gain twice", "tied"],
)
def test_the_usual_mistakes_change_the_function(mistake):
    model = families.family("llama", tie_word_embeddings=True)
    new = rotation.rotate(model)
    with torch.no_grad():
        mistake(new)
    assert difference(model, new) > 1e-2


# --- what it is for ---------------------------------------------------------------------------------------------------


def peak(model: nn.Module, name: str) -> float:
    """max |x| over the root mean square of what a layer is called with."""
    values = []
    with hooks.watching(model, [name], lambda _, x, __: values.append(x)):
        logits(model)
    return float(values[0].abs().max() / values[0].square().mean().sqrt())


def test_an_outlier_channel_is_spread():
    model = families.family("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] += 30
        model.model.layers[1].mlp.up_proj.weight[5] *= 30  # and a neuron
    new, online = rotation.rotate(model), rotation.rotate(model, online=True)
    name = "model.layers.1.self_attn.q_proj"
    assert peak(new, name) < peak(model, name) / 1.5
    neurons = "model.layers.1.mlp.down_proj"
    assert peak(new, neurons) == pytest.approx(peak(model, neurons), rel=1e-3)  # no weight can turn it
    assert peak(online, f"{neurons}.layer") < peak(model, neurons) / 1.5


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(families.FAMILIES.keys() - set(ROTATED)))
def test_a_model_of_another_build_is_refused(name):
    model = families.family(name)
    check_refusal("cannot be rotated", lambda: rotation.rotate(model), leaves=model)


def quantized() -> nn.Module:
    ids = families.inputs("llama")["input_ids"]
    return ptq.quantize(families.family("llama"), [{"input_ids": ids}], ignore=["lm_head"]).model


REASONS: Refusals = {
    "model.norm is not x / sqrt": lambda: families.family("gemma"),
    "call .float() first": lambda: families.family("llama").half(),
    "is missing": lambda: families.family("gpt2"),
    "cannot be rotated": quantized,
}


@refused(REASONS)
def test_the_reason_is_given(words, call):
    model = call()
    check_refusal(words, lambda: rotation.rotate(model), leaves=model)


def test_a_forward_pass_that_does_more_than_its_weights_is_no_equality():
    model = families.family("llama")
    model.model.layers[1].register_forward_hook(lambda _, __, y: y.relu())
    check_refusal("does something to the residual stream", lambda: rotation.rotate(model), EqualityError, leaves=model)


@pytest.mark.slow
@pytest.mark.nightly
def test_smollm2_is_rotated_and_its_size_told():
    model = models.smollm2()
    new = rotation.rotate(model)
    ids = models.tokenizer("smollm2")("The heat of the sun warms the", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, y = model(ids).logits, new(ids).logits
    assert float((expected - y).abs().max()) < 1e-4 * float(expected.abs().max())
    assert 0 <= artifact.size(new) - artifact.size(model) - 49152 * 576 * 4 < 128
