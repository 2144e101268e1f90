"""The recorded experiment on layers of lesson 04: what its rules choose, and that the record has every rule."""

import layers_removed
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.lesson import experiments
from labkit.pruning import depth

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "vocab_size": 40}


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def texts():
    return list(torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(1)))


def test_angles_of_all_tokens_are_labkits_and_the_last_tokens_differ(decoder, texts):
    found = layers_removed.angles(decoder, texts)
    batches = layers_removed.batches_of(texts)
    for count in layers_removed.COUNTS:
        expected = depth.layer_importance(decoder, batches, "angular", n=count)
        torch.testing.assert_close(found[count][layers_removed.ANGLE], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[count][layers_removed.LAST], expected, atol=1e-3)


def test_squared_differences_are_those_of_the_hidden_states(decoder, texts):
    states = torch.stack([layers_removed.states_of(decoder, ids) for ids in texts]).detach()
    expected = (states[:, 1:] - states[:, :-1]).square().mean((0, 2, 3)).double()
    found = layers_removed.squared_differences(decoder, layers_removed.batches_of(texts))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_layers_removed_one_by_one_begin_with_the_cheapest_and_are_measured_anew(decoder, texts):
    batches = layers_removed.batches_of(texts)
    alone = depth.layer_importance(decoder, batches, "loss")
    removed = layers_removed.removed_one_by_one(decoder, batches, alone)
    assert len(set(removed)) == max(layers_removed.COUNTS)
    first, second = removed[:2]
    assert first == int(alone.argmin())
    shorter = depth.prune_layers(decoder, [first], check=False).model
    remaining = [layer for layer in range(SIZES["num_hidden_layers"]) if layer != first]
    assert second == remaining[int(depth.layer_importance(shorter, batches, "loss").argmin())]


def test_the_record_has_every_rule_at_every_count():
    record = experiments.read("layers_removed")
    rules = {row["rule"] for row in record.rows} - {layers_removed.WHOLE}
    expected = {(rule, count) for rule in rules for count in layers_removed.COUNTS}
    expected.add((layers_removed.WHOLE, 0))
    assert len(rules) == 7
    assert {(row["rule"], row["layers removed"]) for row in record.rows} == expected
