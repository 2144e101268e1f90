"""A cache in pages: every sequence has a table of pages of a pool, and sequences that begin alike share pages.

PagedAttention (Kwon et al. 2023, arXiv:2309.06180, section 4). A page adds an indirection and changes no number: a
sequence reads the same keys and values as in a contiguous cache.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.attention.cache import PLAIN, Layout, Scoring, attend, grouped, read, ungrouped
from labkit.errors import InputError, check_whole


class PagesExhausted(InputError):
    """No page is free; the sequence that asked for a page has the pages it had before."""


class PageTable:
    """A sequence in a pool.

    ids: token ids, stored or to come.
    pages: page numbers of the stored tokens, in order.
    length: number of stored tokens.
    digests: hashes of the full pages, see `PagePool`.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        self.ids = list(ids)
        self.clear()

    def clear(self) -> None:
        """Forget all pages, but not the token ids."""
        self.pages: list[int] = []
        self.digests: list[bytes] = []
        self.length = 0


class PagePool:
    """Pages of `page_size` tokens, and how many tables hold each page.

    A page without a holder is free, and keeps its tokens until the page is taken again: prefixes outlive their
    requests. Memory for pages x page_size tokens, `layout.token_bytes` each, is allocated at once.

    references: number of tables that hold a page, page by page.
    free: the free pages, in the order in which they were given back.
    page_of, digest_of: full pages by the digest of all tokens up to the page's end, and back.
    """

    def __init__(self, layout: Layout, pages: int, page_size: int) -> None:
        check_whole(pages, "pages")
        check_whole(page_size, "page_size")
        shape = (layout.layers, pages, page_size, layout.heads, layout.width)
        self.keys = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        self.values = torch.zeros_like(self.keys)
        self.scorings = layout.scorings
        self.page_size = page_size
        self.references = [0] * pages
        self.free = dict.fromkeys(range(pages))  # an ordered set
        self.page_of: dict[bytes, int] = {}
        self.digest_of: dict[int, bytes] = {}

    def share(self, table: PageTable) -> None:
        """Give an empty table the pages of the longest stored prefix of its ids.

        Whole pages are shared. The last token stays to be computed, because its logits are wanted; if the last token
        ends a shared page, writing the token makes a copy of the page.
        """
        full_pages = len(table.ids) // self.page_size
        for number in range(full_pages):
            digest = self._digest(table, number)
            if digest not in self.page_of:
                break
            page = self.page_of[digest]
            self._hold(page)
            table.pages.append(page)
            table.digests.append(digest)
        stored = len(table.pages) * self.page_size
        table.length = min(stored, len(table.ids) - 1)
        full_pages = table.length // self.page_size
        del table.digests[full_pages:]

    def reserve(self, table: PageTable, new: int) -> None:
        """Give a table pages for its next `new` tokens, which no other table holds.

        A shared page that will be written is copied first (copy on write).
        Raises PagesExhausted if the pool has too few free pages, and then changes nothing.
        """
        first = table.length // self.page_size  # the page of the first new token
        written = range(first, len(table.pages))
        shared = [number for number in written if self.references[table.pages[number]] > 1]
        needed = self.pages_for(table.length + new)
        missing = max(needed - len(table.pages), 0)
        free = len(self.free)
        if len(shared) + missing > free:
            raise PagesExhausted(
                f"The pool of {len(self.references)} pages of {self.page_size} tokens has {free} free, too "
                f"few for {new} more tokens: release a sequence, or make the pool larger."
            )
        for number in shared:
            table.pages[number] = self._copied(table.pages[number])
        for page in table.pages[first:]:
            self._forget(page)  # its tokens will no longer be those of its digest
        for _ in range(missing):
            table.pages.append(self._take())

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def publish(self, table: PageTable) -> None:
        """Let other tables share the full pages of a table."""
        full_pages = table.length // self.page_size
        for number in range(len(table.digests), full_pages):
            digest = self._digest(table, number)
            table.digests.append(digest)
            if digest not in self.page_of:
                page = table.pages[number]
                self.page_of[digest] = page
                self.digest_of[page] = digest

    def release(self, table: PageTable) -> None:
        """Give a table's pages back, the last pages to be taken again first: beginnings are shared more often."""
        for page in reversed(table.pages):
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free[page] = None
        table.clear()

    def _digest(self, table: PageTable, number: int) -> bytes:
        """Digest the tokens of the full page `number` and the digest of the page before: equal for equal beginnings."""
        start = number * self.page_size
        ids = table.ids[start : start + self.page_size]
        parent = table.digests[number - 1] if number else b""
        tokens = b"".join(token.to_bytes(4, "little") for token in ids)
        return hashlib.sha256(parent + tokens).digest()

    def _copied(self, page: int) -> int:
        """Take a free page for the tokens of a shared `page`, and let go of `page`."""
        copy = self._take()
        self.keys[:, copy] = self.keys[:, page]
        self.values[:, copy] = self.values[:, page]
        self.references[page] -= 1
        return copy

    def _hold(self, page: int) -> None:
        self.free.pop(page, None)
        self.references[page] += 1

    def _take(self) -> int:
        page = next(iter(self.free))
        self._forget(page)
        self._hold(page)
        return page

    def _forget(self, page: int) -> None:
        """Share `page` with no further table."""
        if page in self.digest_of:
            digest = self.digest_of.pop(page)
            del self.page_of[digest]


class _Span(NamedTuple):
    """A table's new tokens: positions `start` to `end` of its text, and `row` of the first in the row of all tokens."""

    table: PageTable
    start: int
    end: int
    row: int

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.tokens)


class PagedBatch:
    """Several page tables as the cache of a step, with all new tokens in a single row.

    A decoder is called with `ids` [1, N], N = sum(counts): sequences of any length, and prompts beside single tokens,
    go through the decoder's matrices together, and each sequence attends to its own pages.

    tables: page tables of the sequences.
    counts: number of new tokens of each; table i gets the next counts[i] of its ids.
    last: row of the last new token of each table.
    Making a batch reserves the pages for the step. Raises PagesExhausted; tables before the failing table keep the new
    pages.
    """

    def __init__(self, pool: PagePool, tables: Sequence[PageTable], counts: Sequence[int]) -> None:
        for table, new in zip(tables, counts, strict=True):
            pool.reserve(table, new)
        self.pool = pool
        self.device = pool.keys.device
        self.spans = _spans(tables, counts)
        ids, positions, slots = [], [], []
        for span in self.spans:
            ids += span.table.ids[span.start : span.end]
            for position in range(span.start, span.end):
                number, place = divmod(position, pool.page_size)
                page = span.table.pages[number]
                positions.append(position)
                slots.append(page * pool.page_size + place)
        self.ids = self._tensor(ids)[None]
        self.place = self._tensor(positions)[None]
        self.slots = self._tensor(slots)  # [N]: where a token lies among all tokens of the pool
        self.last = self._tensor([span.rows.stop - 1 for span in self.spans])  # [tables]
        self._pad_single_tokens()

    def _tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, device=self.device)

    def _pad_single_tokens(self) -> None:
        """Lay the pages of the tables with a single new token side by side: [n, pages], with masks [n, 1, 1, tokens].

        Shorter tables are padded with page 0, which the masks hide. There is a mask for each window of a layer.
        """
        single = [span for span in self.spans if span.tokens == 1]
        longest = max((len(span.table.pages) for span in single), default=0)
        padded = []
        for span in single:
            pages = span.table.pages
            padding = longest - len(pages)
            padded.append(pages + [0] * padding)
        ends = torch.tensor([span.end for span in single])
        places = torch.arange(longest * self.pool.page_size)
        stored = places < ends[:, None]
        self.single_masks = {None: self._mask(stored)}
        for scoring in self.pool.scorings.values():
            if scoring.window not in self.single_masks:
                is_near = places >= ends[:, None] - scoring.window
                self.single_masks[scoring.window] = self._mask(stored & is_near)
        self.single_pages = self._tensor(padded)
        self.single_rows = self._tensor([span.row for span in single])  # [n]

    def _mask(self, readable: Tensor) -> Tensor:
        return readable[:, None, None].to(self.device)

    def positions(self, new: int) -> Tensor:
        """Return the positions of the N tokens, [1, N]."""
        return self.place

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [1, Hkv, N, D], and attend: q [1, H, N, D] to [1, H, N, D]."""
        keys = self.pool.keys[layer]  # [pages, page_size, Hkv, D]
        values = self.pool.values[layer]
        scoring = self.pool.scorings.get(layer, PLAIN)
        for pages, new in ((keys, k), (values, v)):
            tokens = pages.flatten(0, 1)
            tokens[self.slots] = new[0].transpose(0, 1)
        result = torch.empty_like(q)
        if len(self.single_rows):
            queries = q[0, :, self.single_rows]  # [H, n, D]
            result[0, :, self.single_rows] = self._attend_single_tokens(queries, keys, values, scoring)
        for span in self.spans:
            if span.tokens > 1:
                queries = q[:, :, span.rows]
                table_keys = _contiguous(keys, span)
                table_values = _contiguous(values, span)
                result[:, :, span.rows] = attend(queries, table_keys, table_values, scoring)
        return result

    def _attend_single_tokens(self, queries: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        """Attend from a single query of each of n tables to the table's padded pages: [H, n, D] to [H, n, D]."""
        k = keys[self.single_pages].flatten(1, 2)  # [n, tokens, Hkv, D]
        v = values[self.single_pages].flatten(1, 2)
        k = k.transpose(1, 2)  # [n, Hkv, tokens, D]
        v = v.transpose(1, 2)
        by_table = queries.transpose(0, 1)[:, :, None]  # [n, H, 1, D]
        rows = grouped(by_table, k.shape[1])
        y = read(rows, k, v, self.single_masks[scoring.window], scoring)
        by_table = ungrouped(y, 1)[:, :, 0]  # [n, H, D]
        return by_table.transpose(0, 1)

    def advance(self, new: int) -> None:
        for span in self.spans:
            span.table.length += span.tokens


def _spans(tables: Sequence[PageTable], counts: Sequence[int]) -> list[_Span]:
    spans = []
    row = 0
    for table, new in zip(tables, counts, strict=True):
        start = table.length
        spans.append(_Span(table, start, start + new, row))
        row += new
    return spans


def _contiguous(pages: Tensor, span: _Span) -> Tensor:
    """Gather the tokens of a table up to the span's end: [pages, page_size, Hkv, D] to [1, Hkv, tokens, D]."""
    tokens = pages[span.table.pages].flatten(0, 1)
    stored = tokens[None, : span.end]
    return stored.transpose(1, 2)
