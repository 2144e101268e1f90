"""Pages: what a table reads is what its tokens wrote, whatever was shared, copied, given back and taken again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import llama, text
from refusals import check_refusal

from labkit.attention.cache import Layout
from labkit.attention.decoder import Decoder
from labkit.attention.paged import PagedBatch, PagePool, PagesExhausted, PageTable

LAYOUT = Layout(1, 1, 1, torch.double, torch.device("cpu"))


def entry(ids: list[int], place: int) -> float:
    """A number that stands for the key of a token: it depends on all tokens up to it, as a key does."""
    return float(hash(tuple(ids[: place + 1])) % 2**40)


def write(pool: PagePool, table: PageTable, new: int) -> None:
    pool.reserve(table, new)
    for i in range(table.length, table.length + new):
        pool.keys[0, table.pages[i // pool.page_size], i % pool.page_size] = entry(table.ids, i)
    table.length += new
    pool.publish(table)


def check(pool: PagePool, tables: list[PageTable]) -> None:
    held = [page for table in tables for page in table.pages]
    assert pool.references == [held.count(page) for page in range(len(pool.references))]
    assert set(pool.free) == set(range(len(pool.references))) - set(held)
    for table in tables:
        stored = pool.keys[0, table.pages].flatten()[: table.length].tolist()
        assert stored == [entry(table.ids, i) for i in range(table.length)]


ALIKE = [1, 2, 3, 1, 2, 3, 1, 2, 3, 9]
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["begin", "write", "write", "release"]), st.integers(0, 9), st.integers(1, 9)),
    max_size=40,
)


@given(OPERATIONS, st.integers(1, 4), st.integers(4, 12))
@settings(max_examples=150, deadline=None)
def test_every_table_reads_its_own_tokens_and_no_page_is_lost(operations, page_size, pages):
    pool, tables = PagePool(LAYOUT, pages, page_size), []
    for operation, which, size in operations:
        if operation == "begin":
            table = PageTable([*ALIKE[: 10 - which], which % 2, size % 2])
            pool.share(table)
            assert table.length < len(table.ids)
            tables.append(table)
        elif tables:
            table = tables[which % len(tables)]
            if operation == "release":
                pool.release(table)
                tables.remove(table)
            else:
                new = min(size, len(table.ids) - table.length)
                before = (list(table.pages), pool.references.copy(), list(pool.free))
                try:
                    write(pool, table, new)
                except PagesExhausted:
                    assert before == (table.pages, pool.references, list(pool.free))
        check(pool, tables)
    for table in tables:
        pool.release(table)
    check(pool, [])


def stored(pool: PagePool, ids: list[int]) -> PageTable:
    table = PageTable(ids)
    pool.share(table)
    write(pool, table, len(ids) - table.length)
    return table


def test_whole_pages_of_a_common_beginning_are_shared_also_after_their_request():
    pool = PagePool(LAYOUT, 8, 4)
    first = stored(pool, [*range(10)])
    second = PageTable([*range(9), 77, 78])
    pool.share(second)
    assert second.pages == first.pages[:2] and second.length == 8
    pages = first.pages[:2]
    for table in (first, second):
        pool.release(table)
    third = PageTable([*range(8), 5])
    pool.share(third)
    assert third.pages == pages and pool.references == [int(page in pages) for page in range(8)]


def test_a_page_is_shared_only_if_all_before_it_is_alike():
    pool = PagePool(LAYOUT, 8, 2)
    stored(pool, [1, 2, 5, 6])
    other = PageTable([3, 4, 5, 6, 7])
    pool.share(other)
    assert other.pages == []


def test_tokens_that_agree_in_their_last_byte_are_not_alike():
    pool = PagePool(LAYOUT, 4, 2)
    stored(pool, [1, 2, 3])
    other = PageTable([257, 258, 3])
    pool.share(other)
    assert other.pages == []


def test_a_prompt_that_is_stored_altogether_computes_its_last_token_in_a_copy():
    pool = PagePool(LAYOUT, 5, 4)
    first = stored(pool, [*range(8)])
    second = PageTable([*range(8)])
    pool.share(second)
    assert second.pages == first.pages and second.length == 7
    write(pool, second, 1)
    assert second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1]
    check(pool, [first, second])


def test_an_exhausted_pool_says_what_to_do_in_a_sentence():
    pool = PagePool(LAYOUT, 2, 4)
    table = PageTable(range(12))
    words = "The pool of 2 pages of 4 tokens has 2 free, too few for 12 more"
    check_refusal(words, lambda: pool.reserve(table, 12), PagesExhausted)
    assert table.pages == [] and len(pool.free) == 2


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4), st.sampled_from([1, 3, 8]))
@settings(max_examples=15, deadline=None)
@torch.inference_mode()
def test_paged_is_contiguous(sequences, page_size):
    """Sequences of several lengths in one row of tokens, a prompt's piece beside single tokens."""
    pool = PagePool(DECODER.layout, 56, page_size)  # room for four sequences of 9 + 5 tokens
    texts = [text(old + new, seed) for seed, (old, new) in enumerate(sequences)]
    tables = [PageTable(ids[0].tolist()) for ids in texts]
    for counts in zip(*sequences, strict=True):
        batch = PagedBatch(pool, tables, counts)
        hidden = DECODER.hidden(batch.ids, batch)
    assert torch.equal(batch.last, torch.tensor(counts).cumsum(0) - 1)
    for row, ids, (old, new) in zip(hidden[0].split(counts), texts, sequences, strict=True):
        cache = DECODER.cache(old + new)
        DECODER.hidden(ids[:, :old], cache)
        assert torch.allclose(row, DECODER.hidden(ids[:, old:], cache)[0], atol=1e-5)


DECODER = Decoder(llama())
