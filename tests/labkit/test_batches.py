"""What a batch means, and a model that is left as it was."""

import pytest
import torch
from families import batches, family
from torch import nn

from labkit.batches import evaluating, inputs, labelled, segments, split, summed_loss, valid_tokens
from labkit.errors import InputError


class Two(nn.Module):
    def forward(self, a, b, scale=1.0):
        return (a + b) * scale


class Labels(nn.Module):
    def forward(self, a, labels=None):
        return a


@pytest.mark.parametrize(
    ("model", "batch", "parts"),
    [
        (Two(), "a", (("a",), {}, None)),
        (Two(), ("a", "b"), (("a", "b"), {}, None)),
        (Two(), ["a", "b", "y"], (("a", "b"), {}, "y")),
        (Two(), {"a": "a", "b": "b", "labels": "y"}, ((), {"a": "a", "b": "b"}, "y")),
        (Labels(), ("a", "y"), (("a", "y"), {}, None)),
        (Labels(), {"a": "a", "labels": "y"}, ((), {"a": "a", "labels": "y"}, "y")),
    ],
)
def test_arguments_then_keywords_then_the_target(model, batch, parts):
    assert split(model, batch) == parts


def test_inputs_have_names_and_no_labels():
    assert inputs(Labels(), ("a", "y")) == {"a": "a"}
    assert inputs(Two(), ("a", "b", "y")) == {"a": "a", "b": "b"}


@pytest.mark.parametrize("seed", [None, 3])
def test_a_model_is_afterwards_as_it_was(seed):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    model[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with pytest.raises(OSError), evaluating(model, seed):
            assert not any(module.training for module in model.modules())
            drawn.append(torch.rand(3).tolist())
            raise OSError("the disk is gone")
        assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] == (torch.rand(3) if seed is None else torch.rand(3, generator=seeded(seed))).tolist()


@pytest.mark.gpu
def test_random_numbers_of_the_gpu_are_seeded_and_come_back():
    before, drawn = torch.cuda.get_rng_state(), []
    for _ in range(2):
        with evaluating(nn.Identity(), seed=3):
            drawn.append(torch.rand(3, device="cuda"))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(*drawn)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_decoder_is_scored_on_what_is_no_padding():
    model = family("gpt2").double()
    whole, padded = batches("gpt2", 6)[0], batches("gpt2", 6, pad=5)[0]
    with torch.no_grad():
        loss, terms = summed_loss(model, whole)
        same, count = summed_loss(model, padded)
        assert terms == count == int((labelled(model, padded)["labels"][:, 1:] != -100).sum())
        torch.testing.assert_close(loss, same)
        expected = model(**{**whole, "labels": labelled(model, whole)["labels"]}).loss
    torch.testing.assert_close(loss / terms, expected.to(loss.dtype))


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)])
def test_valid_tokens_are_those_of_the_mask_that_belongs_to_the_module(shape):
    two = nn.Module()
    two.config = type("Config", (), {"is_encoder_decoder": True})()
    mask, decoder = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    named, x = {"attention_mask": mask, "decoder_attention_mask": decoder}, torch.zeros(shape)
    assert torch.equal(valid_tokens(two, named, "encoder.layer.0", x), mask.bool())
    assert torch.equal(valid_tokens(two, named, "decoder.layer.0", x), decoder.bool())
    assert torch.equal(valid_tokens(nn.Module(), {"input_ids": mask}, "layer", x), torch.ones(2, 3, dtype=torch.bool))


def test_segments_are_pieces_of_the_text():
    tokens = torch.arange(100)
    pieces = segments(tokens, 5, 20, seed=3)
    assert all(piece.shape == (1, 20) and (piece.diff() == 1).all() for piece in pieces)
    assert all(torch.equal(a, b) for a, b in zip(pieces, segments(tokens, 9, 20, seed=3), strict=False))
    assert segments(tokens, 1, 100)[0][0, 0] == 0
    with pytest.raises(InputError, match="1 pieces of 101 tokens cannot be cut"):
        segments(tokens, 1, 101)
