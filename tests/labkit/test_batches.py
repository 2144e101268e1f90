"""What a batch means, and a model that is left as it was."""

from types import SimpleNamespace

import pytest
import torch
from families import batches, family
from refusals import Refusals, check_refusal, refused
from torch import nn
from torch.nn import functional as F

from labkit.modules.batches import (
    check_batches,
    evaluating,
    inputs,
    labelled,
    not_empty,
    segments,
    split,
    valid_tokens,
)
from labkit.modules.hooks import watching
from labkit.modules.losses import batch_loss, summed_loss

IDS = torch.randint(3, 61, (3, 8), generator=torch.Generator().manual_seed(2))


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
        (Labels(), ("a", "y"), (("a",), {"labels": "y"}, "y")),
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


# --- refusals ---------------------------------------------------------------------------------------------------------

X, TOKENS = torch.randn(6, 2), torch.arange(100)
REFUSALS: Refusals = {
    "1 pieces of 101 tokens cannot be cut": lambda: segments(TOKENS, 1, 101),
    "may be the labels or the attention_mask of LlamaForCausalLM": lambda: split(family("llama"), (IDS, IDS)),
    "may be the labels or the position_ids of LlamaForCausalLM": lambda: split(family("llama"), (IDS, IDS, IDS)),
    "may be the labels or the attention_mask of BertForSequenceClass": lambda: inputs(family("bert"), [IDS, IDS]),
    "3 inputs and its labels, more than Linear takes": lambda: inputs(nn.Linear(2, 2), (X, X, X, X)),
    "but the batches have no labels": lambda: batch_loss(nn.Linear(2, 2), X),
    "Cross-entropy takes scores [B, classes]": lambda: batch_loss(nn.Linear(2, 2), (X, torch.zeros(6, 3))),
    "not float32 [6, 2] and int64 [5]": lambda: batch_loss(nn.Linear(2, 2), (X, torch.zeros(5).long())),
    "Target 9 is out of bounds": lambda: batch_loss(nn.Linear(2, 2), (X, torch.full((6,), 9))),
    "not float32 [6, 2] and a list": lambda: batch_loss(nn.Linear(2, 2), (X, [0, 1, 0, 1, 0, 1])),
    "return one number for a batch": lambda: batch_loss(nn.Linear(2, 2), X, lambda y, _: y),
    "Linear has no module 'head'": lambda: watching(nn.Linear(2, 2), ["head"], print).__enter__(),
    "tokens is a list": lambda: segments(list(range(50)), 2, 8),
    "n is 0": lambda: segments(TOKENS, 0, 8),
    "n is 1.5": lambda: segments(TOKENS, 1.5, 8),
    "length is '8'": lambda: segments(TOKENS, 2, "8"),
    "seed is -1": lambda: segments(TOKENS, 2, 8, seed=-1),
    "cannot be cut from tokens of shape [4, 25]": lambda: segments(TOKENS.view(4, 25), 2, 8),
    "tokens is on the meta device": lambda: segments(TOKENS.to("meta"), 2, 8),
    "batches is one Tensor": lambda: check_batches(X, "taylor"),
    "batches is one int": lambda: check_batches(3, "taylor"),
    "give batches": lambda: check_batches(None, "taylor"),
    "batches is empty": lambda: list(not_empty([])),
}


def test_labels_of_tokens_are_the_terms_of_a_model_that_predicts_no_next_token():
    class Tagger(nn.Module):
        def forward(self, x, labels):
            scores = F.one_hot(x, 4).float()
            return SimpleNamespace(loss=F.cross_entropy(scores.flatten(0, 1), labels.flatten()), logits=scores)

    labels = torch.tensor([[1, 0, -100], [2, -100, -100]])
    loss, terms = summed_loss(Tagger(), {"x": torch.tensor([[1, 2, 3], [2, 0, 1]]), "labels": labels})
    each = F.cross_entropy(torch.eye(4)[[1, 2, 2]], torch.tensor([1, 0, 2]), reduction="sum")
    assert terms == 3 and float(loss) == pytest.approx(float(each))


@refused(REFUSALS)
def test_bad_batches_are_refused_in_a_sentence(words, call):
    check_refusal(words, call)


# --- labels in a tuple ------------------------------------------------------------------------------------------------


def test_one_label_an_example_is_bound_to_labels_where_the_model_takes_them():
    bert, classes = family("bert"), torch.tensor([0, 1, 1])
    for batch, masks in (((IDS, classes), {}), ((IDS, IDS != 0, classes), {"attention_mask": IDS != 0})):
        with torch.no_grad():
            by_name = bert(input_ids=IDS, labels=classes, **masks).loss
            assert torch.equal(batch_loss(bert, batch), by_name)
            assert float(summed_loss(bert, batch)[0]) == pytest.approx(3 * float(by_name), rel=1e-6)
    assert split(bert, (IDS, classes))[2] is classes


def test_a_model_with_labels_at_their_place_of_forward_takes_a_tuple_of_any_shape():
    vit, images = family("vit"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        losses = [batch_loss(vit, (images, torch.tensor(labels))) for labels in ([0, 0], [1, 1])]
    assert losses[0] != losses[1] and set(inputs(vit, (images, torch.tensor([0, 1])))) == {"pixel_values"}


def test_zeros_and_ones_at_the_place_of_a_mask_are_the_mask():
    llama, mask = family("llama"), (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
    with torch.no_grad():
        losses = [summed_loss(llama, batch) for batch in ((IDS, mask), {"input_ids": IDS, "attention_mask": mask})]
    assert losses[0][1] == losses[1][1] == 13 and torch.equal(losses[0][0], losses[1][0])


class Required(nn.Module):
    def forward(self, x, labels):
        return x


def test_labels_that_forward_needs_are_labels_too():
    assert split(Required(), ("x", "y")) == (("x",), {"labels": "y"}, "y")
    assert labelled(Required(), ("x", "y")) == {"x": "x", "labels": "y"}
