"""The language models of lesson 10: what a student writes, which predictions count, and how two are compared."""

import distilled_language_model
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distilled_language_model import NEW, PROMPT
from llamas import greedy, llama, text

from labkit import stats


def likeliest(probabilities: torch.Tensor, number: int, *, generator: torch.Generator) -> torch.Tensor:
    return probabilities.argmax(-1, keepdim=True)


def test_the_likeliest_tokens_are_those_of_greedy_decoding(monkeypatch):
    model, prompt = llama(), text(PROMPT)
    monkeypatch.setattr(torch, "multinomial", likeliest)
    written = distilled_language_model.continued(model, prompt, 5, torch.Generator())
    assert torch.equal(written, greedy(model, prompt, 5))


def test_a_text_is_sampled_from_the_generator():
    model, prompt = llama(), text(PROMPT).repeat(3, 1)
    first, again, other = (
        distilled_language_model.continued(model, prompt, 6, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (3, PROMPT + 6) and torch.equal(first[:, :PROMPT], prompt)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_only_the_tokens_after_the_prompt_are_learned():
    model, ids = llama(), text(PROMPT + NEW).repeat(2, 1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        loss = distilled_language_model.from_labels(model, {"input_ids": ids})
    expected = [F.cross_entropy(logits[0, t - 1], ids[0, t]) for t in range(PROMPT, PROMPT + NEW)]
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert distilled_language_model.losses_of(model, ids) == pytest.approx([float(loss)] * 2, rel=1e-5)


def test_a_difference_has_the_interval_over_texts_and_seeds():
    draws = np.random.default_rng(0)
    before = draws.normal(2, 0.3, (3, 40))
    after = before + 0.1 + draws.normal(0, 0.05, (3, 40))
    found = distilled_language_model.difference(after, before)
    value, low, high = stats.paired_difference(after.mean(0).tolist(), before.mean(0).tolist())
    middle, least, most = stats.mean_ci((after - before).mean(1).tolist())
    assert found["difference"] == pytest.approx(value) == pytest.approx(middle)
    assert value - found["low"] == pytest.approx(np.hypot(value - low, middle - least))
    assert found["high"] - value == pytest.approx(np.hypot(high - value, most - middle))
