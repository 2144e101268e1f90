"""The decoder of few operators against transformers' model, and latent attention against its expanded form."""

import pytest
import torch
from llamas import llama, text
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.attention import mla
from labkit.attention.decoder import Decoder
from labkit.data import models

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "heads of another width": {"head_dim": 24},
    "one head of keys": {"num_key_value_heads": 1},
    "llama3 positions": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (17, 1, 22), (39, 1)])
@torch.inference_mode()
def test_its_logits_are_transformers_in_pieces_of_any_size(kind, pieces):
    model = llama(**KINDS[kind])
    decoder, ids = Decoder(model), text(40)
    cache = decoder.cache(40)
    hidden = torch.cat([decoder.hidden(piece, cache) for piece in ids.split(pieces, 1)], 1)
    expected = model(ids).logits
    # eps times the longest sum (96) for each of the 9 products on the way
    assert (decoder.logits(hidden) - expected).abs().max() <= 9 * 96 * 2**-23 * expected.abs().max()


@torch.inference_mode()
def test_sequences_of_a_batch_do_not_meet():
    decoder, ids = Decoder(llama()), torch.cat([text(12, seed) for seed in range(3)])
    together = decoder.hidden(ids, decoder.cache(12, batch=3))
    alone = torch.cat([decoder.hidden(row[None], decoder.cache(12)) for row in ids])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.inference_mode()
def test_a_cropped_cache_is_that_of_the_shorter_text():
    decoder, ids = Decoder(llama()), text(20)
    cache = decoder.cache(20)
    decoder.hidden(ids[:, :9], cache)
    decoder.hidden(text(6, seed=1), cache)  # guesses that turn out wrong
    cache.crop(9)
    again = decoder.hidden(ids[:, 9:], cache)
    assert torch.equal(again, _continued(decoder, ids, 9)) and cache.length == 20


def _continued(decoder, ids, split):
    cache = decoder.cache(ids.shape[1])
    decoder.hidden(ids[:, :split], cache)
    return decoder.hidden(ids[:, split:], cache)


@torch.inference_mode()
def test_it_reads_the_weights_as_they_are_when_it_is_made():
    model = llama(seed=3)
    decoder, before = Decoder(model), {name: x.clone() for name, x in model.state_dict().items()}
    decoder.hidden(text(5), decoder.cache(5))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_writes_what_transformers_generates():
    model = models.smollm2()
    ids = models.tokenizer("smollm2")("The kernel is the part of the system that", return_tensors="pt").input_ids
    decoder, written = Decoder(model), ids
    cache = decoder.cache(64)
    for _ in range(16):
        hidden = decoder.hidden(written[:, cache.length :], cache)
        written = torch.cat([written, decoder.logits(hidden[:, -1:]).argmax(-1)], 1)
    assert torch.equal(written, model.generate(ids, max_new_tokens=16, do_sample=False))


@pytest.mark.parametrize("queries", [1, 3, 17])
def test_absorbed_latent_attention_is_the_expanded_one(queries):
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, 4, queries, 6), (2, 17, 12), (2, 17, 6), (4, 8, 12), (4, 10, 12))
    parts = [torch.randn(shape, generator=draw, dtype=torch.double) for shape in shapes]
    expanded, absorbed = mla.expanded(*parts), mla.absorbed(*parts)
    assert expanded.shape == (2, 4, queries, 10)
    assert (expanded - absorbed).abs().max() <= 1e-14 * parts[2].abs().max() * parts[5].abs().sum(-1).max()


def test_expanded_latent_attention_is_attention_over_the_keys_and_values_written_out():
    draw = torch.Generator().manual_seed(1)
    q, q_rope, latent, k_rope, up_k, up_v = (
        torch.randn(shape, generator=draw, dtype=torch.double)
        for shape in ((1, 2, 4, 3), (1, 2, 4, 2), (1, 4, 5), (1, 4, 2), (2, 3, 5), (2, 6, 5))
    )
    for head in range(2):
        for i in range(4):
            scores = [
                (q[0, head, i] @ (up_k[head] @ latent[0, j]) + q_rope[0, head, i] @ k_rope[0, j]) / 5**0.5
                for j in range(i + 1)
            ]
            values = torch.stack([up_v[head] @ latent[0, j] for j in range(i + 1)])
            expected = torch.stack(scores).softmax(0) @ values
            assert torch.allclose(mla.expanded(q, q_rope, latent, k_rope, up_k, up_v)[0, head, i], expected)


def hidden(tokens: int, capacity: int) -> torch.Tensor:
    decoder = Decoder(llama())
    return decoder.hidden(text(tokens), decoder.cache(capacity))


REFUSALS: Refusals = {
    "This model has the activation 'gelu'": lambda: Decoder(llama(hidden_act="gelu")),
    "Linear is no decoder of the Llama type": lambda: Decoder(nn.Linear(2, 2)),
    "room for 4 tokens and holds 0, so 5 more": lambda: hidden(5, capacity=4),
    "257 tokens are more than the 256": lambda: hidden(257, capacity=300),
    "NoneType is no decoder of the Llama type": lambda: Decoder(None),
    "LlamaModel is no decoder of the Llama type": lambda: Decoder(llama().model),
    "The model is on the meta device": lambda: Decoder(llama().to("meta")),
    "ids is a list": lambda: Decoder(llama()).check([1, 2], 3),
    "ids is on the meta device": lambda: Decoder(llama()).check(text(4).to("meta"), 3),
    "batch is 0": lambda: Decoder(llama()).cache(8, 0),
    "capacity is '8'": lambda: Decoder(llama()).cache("8"),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
