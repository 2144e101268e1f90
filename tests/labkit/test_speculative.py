"""Guessing ahead: the same text at temperature 0, the same law above, by enumeration; four wrong rules fail it."""

import itertools
from collections.abc import Callable

import pytest
import torch
from families import family
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import greedy, llama, text
from refusals import Refusals, check_refusal, refused
from torch import Tensor

from labkit.attention.decoder import Decoder
from labkit.attention.speculative import generate, lookup, probabilities, verify

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[int, Tensor]]

# --- the law ----------------------------------------------------------------------------------------------------------

# Drafts draw from q; p / q are multiples of 1 / 16, so that 16 uniform numbers, one in each sixteenth, weigh exactly.
Q = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.double)
UNIFORM = (torch.arange(16, dtype=torch.double) + 0.5) / 16
P = {
    (): [3, 5, 16, 8],
    (0,): [8, 8, 8, 8],
    (1,): [0, 30, 1, 1],
    (2,): [4, 4, 8, 16],
    (3,): [1, 1, 10, 20],
}


def target(prefix: tuple[int, ...]) -> Tensor:
    """The model's law of the next token: it depends on what was written, as far as P says."""
    return torch.tensor(P.get(prefix, [13, 2, 7, 10]), dtype=torch.double) / 32


def law(rule: Rule, guesses_made: int = 2) -> Tensor:
    """Probabilities [4, 4] of the first two tokens that come out, by going through every case.

    A text that ends early is continued by the model itself.
    """
    out = torch.zeros(4, 4, dtype=torch.double)
    for guesses in itertools.product(range(4), repeat=guesses_made):
        weight = Q[list(guesses)].prod()
        rows = torch.stack([target(guesses[:i]) for i in range(guesses_made + 1)])
        for uniform in itertools.product(UNIFORM, repeat=guesses_made):
            share = weight / len(UNIFORM) ** guesses_made
            n, following = rule(rows, Q.expand(guesses_made, 4), torch.tensor(guesses), torch.stack(uniform))
            for token, chance in enumerate(following.tolist()):
                written = (*guesses[:n], token)
                if len(written) > 1:
                    out[written[:2]] += share * chance
                else:
                    out[token] += share * chance * target(written)
    return out


def exact() -> Tensor:
    return torch.stack([target(())[i] * target((i,)) for i in range(4)])


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation."""
    return float((a - b).abs().sum() / 2)


@pytest.mark.parametrize("guesses", [1, 2])
def test_the_law_of_the_text_is_the_models(guesses):
    assert distance(law(verify, guesses), exact()) < 1e-14


def wrong(accept: Callable, residual: Callable) -> Rule:
    def rule(rows: Tensor, draft: Tensor, guesses: Tensor, uniform: Tensor) -> tuple[int, Tensor]:
        for i, guess in enumerate(guesses.tolist()):
            if not accept(rows[i], draft[i], guess, uniform[i]):
                rest = residual(rows[i], draft[i])
                return i, rest / rest.sum()
        return len(guesses), rows[-1]

    return rule


def ratio(p: Tensor, q: Tensor, guess: int, u: Tensor) -> bool:
    return bool(u < p[guess] / q[guess])


def difference(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


WRONG = {
    "after a rejection the token is drawn from p": wrong(ratio, lambda p, q: p),
    "after a rejection the token is drawn from q": wrong(ratio, lambda p, q: q),
    "accepted with probability p": wrong(lambda p, q, guess, u: bool(u < p[guess]), difference),
    "accepted with probability q / p": wrong(lambda p, q, guess, u: bool(u < q[guess] / p[guess]), difference),
}


def test_the_enumeration_accepts_the_right_rule_written_anew():
    assert distance(law(wrong(ratio, difference)), exact()) < 1e-14


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_in_circulation_has_another_law(rule):
    assert distance(law(WRONG[rule]), exact()) > 0.02


def test_a_likeliest_token_with_the_probabilities_of_a_drawn_one_has_another_law():
    """The mistake of a candidate generator in circulation: q does not say where the guess comes from."""
    out = torch.zeros(4, dtype=torch.double)
    for u in UNIFORM:
        n, following = verify(torch.stack([target(()), target((0,))]), Q[None], torch.tensor([0]), u[None])
        out += (torch.eye(4, dtype=torch.double)[0] if n else following) / len(UNIFORM)
    assert distance(out, target(())) > 0.02


@pytest.mark.slow
@torch.inference_mode()
def test_sampled_texts_have_the_models_law_with_a_draft_and_without():
    """A chi-square of 800 first pairs over a vocabulary of 5 against the law computed from the logits."""
    sizes = {"vocab_size": 5, "num_hidden_layers": 1, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2}
    model, draft = Decoder(llama(**sizes)), Decoder(llama(seed=1, **sizes))
    prompt = torch.tensor([[1, 3, 1, 3]])
    first = probabilities(_logits(model, prompt), 1.0)
    pairs = torch.stack(
        [first[i] * probabilities(_logits(model, torch.cat([prompt, torch.tensor([[i]])], 1)), 1.0) for i in range(5)]
    )
    for source in (draft, "lookup"):
        options = {"draft": source, "k": 2, "max_new_tokens": 2, "temperature": 1.0}
        counts = torch.zeros(5, 5)
        for seed in range(800):
            counts[tuple(generate(model, prompt, seed=seed, **options).ids[0, 4:])] += 1
        expected = 800 * pairs
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < 51.2, source  # the 99.9th percentile of chi-square with 24 degrees of freedom


def _logits(model: Decoder, ids: Tensor) -> Tensor:
    return model.logits(model.hidden(ids, model.cache(ids.shape[1]))[0, -1])


# --- the text ---------------------------------------------------------------------------------------------------------


def repeating(tokens: int) -> Tensor:
    """A text in which lookup finds something."""
    return text(7).repeat(1, -(-tokens // 7))[:, :tokens]


@pytest.mark.parametrize("k", [0, 1, 4, 9])
@pytest.mark.parametrize("draft", ["lookup", "another model", "itself"])
def test_greedy_text_is_transformers_whoever_guesses(draft, k):
    model, prompt = llama(), repeating(20)
    guesser = {"lookup": "lookup", "another model": llama(seed=1), "itself": model}[draft]
    result = generate(model, prompt, draft=guesser, k=k, max_new_tokens=40)
    assert torch.equal(result.ids, greedy(model, prompt, 40))
    assert result.calls + result.accepted == 40  # each call gives one token more than it accepts
    if draft == "itself":
        assert result.accepted == result.proposed and result.calls == -(-40 // (k + 1))
    if k == 0:
        assert result.proposed == 0


@given(st.integers(1, 30), st.integers(0, 6), st.integers(1, 25), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_any_prompt_any_k_any_length(tokens, k, new, seed):
    model, prompt = Decoder(MODEL), text(tokens, seed)
    plain = generate(model, prompt, k=0, max_new_tokens=new).ids
    assert torch.equal(generate(model, prompt, k=k, max_new_tokens=new).ids, plain)
    assert torch.equal(generate(model, prompt[0], draft=DRAFT, k=k, max_new_tokens=new).ids, plain[0])


MODEL, DRAFT = llama(), llama(seed=1)


def test_a_text_that_repeats_itself_takes_fewer_calls():
    """Without attention the next token depends on the last alone, so that a text of 61 tokens has to go in a circle."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    result = generate(model, text(4), k=8, max_new_tokens=200)
    assert torch.equal(result.ids, generate(model, text(4), k=0, max_new_tokens=200).ids)
    assert result.calls < 100


def test_a_seed_gives_its_text_again():
    options = {"draft": DRAFT, "max_new_tokens": 20, "temperature": 1.0}
    a, b, c = (generate(MODEL, text(6), seed=seed, **options).ids for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("ids", "k", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),  # three tokens agree
        ([9, 2, 3, 7, 7, 7, 8, 2, 3], 2, [7, 7]),  # two
        ([5, 1, 2, 7, 7, 3, 1, 2, 8, 8, 1, 2], 2, [8, 8]),  # the latest place
        ([5, 5, 5, 5, 5, 5], 2, [5, 5]),  # the latest with k tokens after it
        ([1, 2, 3, 1, 2], 4, [3, 1, 2]),  # as many as there are
        ([1, 2, 3, 4, 2], 2, []),  # one token is too few
        ([1], 2, []),
        ([1, 2, 3, 1, 2, 3], 0, []),
    ],
)
def test_lookup_gives_what_followed_before(ids, k, expected):
    assert lookup(torch.tensor(ids), k).tolist() == expected


LAW = torch.full((3, 5), 0.2)
REFUSALS: Refusals = {
    "temperature is -0.5, but it must be a finite number from 0": lambda: generate(MODEL, text(4), temperature=-0.5),
    "temperature is nan": lambda: generate(MODEL, text(4), temperature=float("nan")),
    "k is -1, ": lambda: generate(MODEL, text(4), k=-1),
    "no draft 'medusa'": lambda: generate(MODEL, text(4), draft="medusa"),
    "give a draft with the same tokenizer": lambda: generate(MODEL, text(4), draft=llama(vocab_size=62)),
    "a draft with the same tokenizer": lambda: generate(MODEL, text(4), draft=llama(eos_token_id=5)),
    "max_new_tokens is 0": lambda: generate(MODEL, text(4), max_new_tokens=0),
    "304 tokens are more than the 256": lambda: generate(MODEL, text(4), max_new_tokens=300),
    "token ids from 0 to 60": lambda: generate(MODEL, torch.tensor([[61]])),
    "[tokens] or [1, tokens]": lambda: generate(MODEL, torch.zeros(2, 3, dtype=torch.long)),
    "token ids from 0 to 60 ... torch.float32 [1, 3]": lambda: generate(MODEL, torch.zeros(1, 3)),
    "ids is a list": lambda: generate(MODEL, [1, 2, 3]),
    "ids is None": lambda: generate(MODEL, None),
    "ids is a str": lambda: generate(MODEL, "once"),
    "got torch.int64 []": lambda: generate(MODEL, torch.tensor(3)),
    "got torch.bool [1, 4]": lambda: generate(MODEL, text(4) > 3),
    "got torch.complex64 [1, 4]": lambda: generate(MODEL, text(4).to(torch.complex64)),
    "ids is on the meta device": lambda: generate(MODEL, text(4).to("meta")),
    "ids is a tensor of layout sparse_coo": lambda: generate(MODEL, text(4).to_sparse()),
    "got torch.int64 [1, 0]": lambda: generate(MODEL, text(4)[:, :0]),
    "k is '4'": lambda: generate(MODEL, text(4), k="4"),
    "k is 4.0": lambda: generate(MODEL, text(4), k=4.0),
    "max_new_tokens is 2.5": lambda: generate(MODEL, text(4), max_new_tokens=2.5),
    "max_new_tokens is None": lambda: generate(MODEL, text(4), max_new_tokens=None),
    "temperature is '1'": lambda: generate(MODEL, text(4), temperature="1"),
    "temperature is inf": lambda: generate(MODEL, text(4), temperature=float("inf")),
    "seed is None": lambda: generate(MODEL, text(4), seed=None),
    "seed is -1": lambda: generate(MODEL, text(4), seed=-1),
    "list is no decoder of the Llama type": lambda: generate([MODEL], text(4)),
    "int is no decoder of the Llama type": lambda: generate(MODEL, text(4), draft=3),
    "GPT2LMHeadModel is no decoder of the Llama type": lambda: generate(family("gpt2"), text(4)),
    "generate() of transformers, which has prompt_lookup": lambda: generate(MODEL, text(4), draft=family("gemma")),
    "The model is on the meta device": lambda: generate(llama().to("meta"), text(4)),
    "2 guesses do not belong to laws [3, 5] and [3, 5]": lambda: verify(LAW, LAW, torch.tensor([0, 1]), LAW[0, :2]),
    "1 guesses do not belong": lambda: verify(LAW, LAW[:1], torch.tensor([0]), LAW[0, :1]),
    "text is a list": lambda: lookup([1, 2, 3], 2),
    "text has shape [1, 9]": lambda: lookup(text(9), 2),
    "k is -1": lambda: lookup(text(9)[0], -1),
    "logits is a list": lambda: probabilities([0.0, 1.0], 1.0),
    "temperature is -1": lambda: probabilities(LAW, -1),
    "temperature is None": lambda: probabilities(LAW, None),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
