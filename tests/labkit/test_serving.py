"""Served together is served one by one: the same token ids under every kind of batching, page and pool."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import greedy, llama, text
from refusals import Refusals, check_refusal, refused

from labkit.attention.decoder import Decoder
from labkit.deploy.serving import generate, serve

MODEL = llama()
DECODER = Decoder(MODEL)
LENGTHS = [5, 1, 33, 12, 20, 7, 16]
PROMPTS = [text(n, seed)[0] for seed, n in enumerate(LENGTHS)]
NEW = [9, 3, 1, 24, 6, 17, 2]
ALONE = [greedy(MODEL, prompt[None], n)[0] for prompt, n in zip(PROMPTS, NEW, strict=True)]
BEGINNING = text(40, seed=9)[0]


def same(ids, expected) -> bool:
    return len(ids) == len(expected) and all(map(torch.equal, ids, expected))


def test_each_request_gets_the_tokens_that_transformers_gives_it_alone():
    assert same(generate(MODEL, PROMPTS, max_new_tokens=NEW), ALONE)


@given(
    st.sampled_from(["continuous", "static"]),
    st.integers(1, 8),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([None, 1, 5]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_no_way_of_batching_changes_a_token(batching, max_batch, page_size, chunk, share, scarce):
    options = {"max_batch": max_batch, "page_size": page_size, "chunk": chunk, "share_prefixes": share}
    longest = max(n + new for n, new in zip(LENGTHS, [24] * 7, strict=True)) - 1
    pages = -(-longest // page_size) if scarce else None
    service = serve(DECODER, PROMPTS, max_new_tokens=NEW, batching=batching, pages=pages, **options)
    assert same(service.ids, ALONE)
    assert [len(times) for times in service.token_s] == NEW
    assert (service.gaps_s > 0).all() and len(service.gaps_s) == sum(NEW) - len(NEW) and (service.first_s > 0).all()


def test_a_number_for_all_and_prompts_as_rows():
    ids = generate(DECODER, [prompt[None] for prompt in PROMPTS[:2]], max_new_tokens=4)
    assert same(ids, [greedy(MODEL, prompt[None], 4)[0] for prompt in PROMPTS[:2]])


def test_scarce_pages_preempt_and_cost_steps_and_change_nothing():
    scarce = serve(DECODER, PROMPTS, max_new_tokens=24, page_size=4, pages=14)
    ample = serve(DECODER, PROMPTS, max_new_tokens=24, page_size=4)
    assert scarce.preemptions > 0 == ample.preemptions
    assert scarce.steps > ample.steps and same(scarce.ids, ample.ids)


def test_static_batches_wait_for_their_longest_and_continuous_ones_do_not():
    options = {"max_new_tokens": NEW, "max_batch": 4, "share_prefixes": False}
    static = serve(DECODER, PROMPTS, batching="static", **options)
    continuous = serve(DECODER, PROMPTS, **options)
    assert static.steps == max(NEW[:4]) + max(NEW[4:])  # a step for the prompts gives the first tokens
    assert static.computed == sum(LENGTHS) + 4 * (max(NEW[:4]) - 1) + 3 * (max(NEW[4:]) - 1)
    assert continuous.steps < static.steps and continuous.computed == sum(LENGTHS) + sum(NEW) - len(NEW)


def test_what_prompts_share_is_computed_once():
    prompts = [torch.cat([BEGINNING, text(5, seed)[0]]) for seed in range(4)]
    options = {"max_new_tokens": 6, "page_size": 16}
    shared, separate = (serve(DECODER, prompts, share_prefixes=share, **options) for share in (True, False))
    assert same(shared.ids, separate.ids)
    assert separate.computed == 4 * 45 + 4 * 5 and shared.computed == separate.computed - 3 * 32


def test_the_same_prompt_again_computes_one_token_of_it():
    prompts = [BEGINNING[:32]] * 3
    shared, separate = (serve(DECODER, prompts, max_new_tokens=5, share_prefixes=share) for share in (True, False))
    assert same(shared.ids, separate.ids) and separate.computed - shared.computed == 2 * 31


def test_chunks_bound_what_a_step_computes():
    prompts = [text(90, seed)[0] for seed in range(3)]
    whole, pieces = (serve(DECODER, prompts, max_new_tokens=5, chunk=chunk) for chunk in (None, 8))
    assert same(whole.ids, pieces.ids) and whole.computed == pieces.computed
    assert pieces.steps >= 3 * 90 / 8 and whole.steps == 3 + 4


@pytest.mark.parametrize("number", [np.int64(5), np.array([5] * 7), torch.tensor([5] * 7), [np.int32(5)] * 7])
def test_numbers_of_new_tokens_may_be_of_numpy_or_torch(number):
    assert same(generate(DECODER, PROMPTS, max_new_tokens=number), generate(DECODER, PROMPTS, max_new_tokens=5))


def refusing(**options):
    return lambda: serve(DECODER, **{"prompts": PROMPTS, "max_new_tokens": 5, **options})


REFUSALS: Refusals = {
    "7 prompts and 2 numbers": refusing(max_new_tokens=[1, 2]),
    "max_new_tokens is 0": refusing(max_new_tokens=0),
    "more than the 256": refusing(max_new_tokens=300),
    "needs 4 pages of 16 tokens, but the pool has 2": refusing(max_new_tokens=20, pages=2),
    "no batching 'dynamic'": refusing(batching="dynamic"),
    "max_batch is 0": refusing(max_batch=0),
    "page_size is 0": refusing(page_size=0),
    "chunk is 0": refusing(chunk=0),
    "token ids from 0 to 60": refusing(prompts=[torch.tensor([99])]),
    "0 prompts": refusing(prompts=[]),
    "max_new_tokens is 2.5": refusing(max_new_tokens=2.5),
    "max_new_tokens is '5'": refusing(max_new_tokens="5"),
    "max_new_tokens is None": refusing(max_new_tokens=None),
    "max_new_tokens is True": refusing(max_new_tokens=True),
    "max_new_tokens is 1.5": refusing(max_new_tokens=np.array([1.5] * 7)),
    "7 prompts and 3 numbers": refusing(max_new_tokens=np.array([5, 5, 5])),
    "prompts is a str": refusing(prompts="once upon a time"),
    "prompts is a NoneType": refusing(prompts=None),
    "prompts is a generator": refusing(prompts=(p for p in PROMPTS)),
    "prompt 0 is a list": refusing(prompts=[[1, 2, 3]]),
    "prompt 1 is a str": refusing(prompts=[PROMPTS[0], "text"]),
    "prompt 0 is on the meta device": refusing(prompts=[PROMPTS[0].to("meta")]),
    "got torch.float32 [3]": refusing(prompts=[torch.ones(3)]),
    "got torch.int64 [2, 3]": refusing(prompts=[torch.ones(2, 3).long()]),
    "max_batch is '8'": refusing(max_batch="8"),
    "max_batch is 2.0": refusing(max_batch=2.0),
    "page_size is None": refusing(page_size=None),
    "pages is '9'": refusing(pages="9"),
    "pages is 2.5": refusing(pages=2.5),
    "chunk is 1.5": refusing(chunk=1.5),
    "no batching ['static']": refusing(batching=["static"]),
    "str is no decoder of the Llama type": lambda: generate("llama", PROMPTS, max_new_tokens=5),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
