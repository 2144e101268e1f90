"""A cache in pages: every sequence has a table of pages of one pool, and sequences that begin alike share pages.

PagedAttention (Kwon et al. 2023, arXiv:2309.06180, section 4). A page is an indirection and nothing more: what is
read is what a cache in one piece would hold, so that no token changes.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention.cache import Layout, attend, grouped, ungrouped
from labkit.errors import InputError, check_whole


class PagesExhausted(InputError):
    """No page is free; the sequence that asked for one has what it had before."""


class PageTable:
    """A sequence in a pool: its `ids`, stored or to come, its `pages` in order, and how many tokens they hold."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        self.clear()

    def clear(self) -> None:
        self.pages: list[int] = []
        self.digests: list[bytes] = []  # of the pages that are full
        self.length = 0


class PagePool:
    """Pages of `page_size` tokens, and who holds them.

    references[page]: how many tables hold it. A page that nobody holds is free, and keeps what it has until it is
        taken for something else: prefixes outlive their requests.
    """

    def __init__(self, layout: Layout, pages: int, page_size: int) -> None:
        """Memory for pages x page_size tokens is taken at once, `layout.token_bytes` each."""
        check_whole(pages, "pages")
        check_whole(page_size, "page_size")
        shape = (layout.layers, pages, page_size, layout.heads, layout.width)
        self.keys, self.values = (torch.zeros(shape, dtype=layout.dtype, device=layout.device) for _ in "kv")
        self.page_size, self.references = page_size, [0] * pages
        self.free = dict.fromkeys(range(pages))  # in the order in which they were given back
        self.page_of: dict[bytes, int] = {}  # by the digest of all tokens up to the page's end
        self.digest_of: dict[int, bytes] = {}

    def share(self, table: PageTable) -> None:
        """Give an empty table the pages of the longest stored prefix of its ids.

        Whole pages are shared. At least the last token stays to be computed, because its logits are wanted; where that
        is the last of a shared page, writing it makes a copy of the page.
        """
        for i in range(len(table.ids) // self.page_size):
            digest = self._digest(table, i)
            if digest not in self.page_of:
                break
            self._hold(self.page_of[digest])
            table.pages.append(self.page_of[digest])
            table.digests.append(digest)
        table.length = min(len(table.pages) * self.page_size, len(table.ids) - 1)
        del table.digests[table.length // self.page_size :]

    def reserve(self, table: PageTable, new: int) -> None:
        """Pages of its own for the next `new` tokens of a table. Raises PagesExhausted, and then changes nothing.

        A page that is written and that others hold too is copied first (copy on write).
        """
        first, end = table.length // self.page_size, -(-(table.length + new) // self.page_size)
        shared = [i for i in range(first, len(table.pages)) if self.references[table.pages[i]] > 1]
        if len(shared) + max(end - len(table.pages), 0) > len(self.free):
            raise PagesExhausted(
                f"The pool of {len(self.references)} pages of {self.page_size} tokens has {len(self.free)} free, too "
                f"few for {new} more tokens: release a sequence, or make the pool larger."
            )
        for i in shared:
            page = self._take()
            self.keys[:, page], self.values[:, page] = self.keys[:, table.pages[i]], self.values[:, table.pages[i]]
            self.references[table.pages[i]] -= 1
            table.pages[i] = page
        for page in table.pages[first:]:
            self._forget(page)  # it will hold something else than its digest says
        table.pages += [self._take() for _ in range(end - len(table.pages))]

    def publish(self, table: PageTable) -> None:
        """Let others share the pages of a table that are full."""
        for i in range(len(table.digests), table.length // self.page_size):
            table.digests.append(self._digest(table, i))
            if table.digests[i] not in self.page_of:
                self.page_of[table.digests[i]], self.digest_of[table.pages[i]] = table.pages[i], table.digests[i]

    def release(self, table: PageTable) -> None:
        """Give a table's pages back, the last ones to be taken again first, for beginnings are shared more often."""
        for page in reversed(table.pages):
            self.references[page] -= 1
            if not self.references[page]:
                self.free[page] = None
        table.clear()

    def _digest(self, table: PageTable, i: int) -> bytes:
        """Of page i, which is full, and of the digest before it: equal only for equal beginnings."""
        ids = table.ids[i * self.page_size : (i + 1) * self.page_size]
        parent = table.digests[i - 1] if i else b""
        return hashlib.sha256(parent + b"".join(token.to_bytes(4, "little") for token in ids)).digest()

    def _hold(self, page: int) -> None:
        self.free.pop(page, None)
        self.references[page] += 1

    def _take(self) -> int:
        page = next(iter(self.free))
        self._forget(page)
        self._hold(page)
        return page

    def _forget(self, page: int) -> None:
        if page in self.digest_of:
            del self.page_of[self.digest_of.pop(page)]


class PagedBatch:
    """Several tables as the cache of a step: table i gets the next counts[i] of its ids, all in one row of tokens.

    A decoder is called with `ids` [1, N], N = sum(counts), so that sequences of any length, and prompts beside single
    tokens, go through its matrices together; each attends to its own pages.
    """

    def __init__(self, pool: PagePool, tables: Sequence[PageTable], counts: Sequence[int]) -> None:
        """Takes the pages that the step needs. Raises PagesExhausted; tables before that one keep their new pages."""
        for table, new in zip(tables, counts, strict=True):
            pool.reserve(table, new)
        self.pool, self.tables, self.counts = pool, tables, counts
        self.device = pool.keys.device
        spans = [(table, table.length, table.length + new) for table, new in zip(tables, counts, strict=True)]
        place = torch.cat([torch.arange(start, end) for _, start, end in spans])
        size = pool.page_size
        page = torch.tensor([table.pages[i // size] for table, start, end in spans for i in range(start, end)])
        self.ids = torch.tensor([[i for table, start, end in spans for i in table.ids[start:end]]], device=self.device)
        self.place = place[None].to(self.device)
        self.slots = (page * size + place % size).to(self.device)  # [N]
        ends = torch.tensor(counts).cumsum(0)
        self.last = (ends - 1).to(self.device)  # [tables]: each one's last token in the row
        self.single = [i for i, new in enumerate(counts) if new == 1]
        self.several = [(i, int(ends[i]) - new, int(ends[i])) for i, new in enumerate(counts) if new > 1]
        self._padded(spans)

    def _padded(self, spans: Sequence[tuple[PageTable, int, int]]) -> None:
        """Pages and mask of the tables with one new token, side by side: [n, pages] and [n, 1, 1, tokens]."""
        pool, longest = self.pool, max((len(spans[i][0].pages) for i in self.single), default=0)
        rows = [spans[i][0].pages + [0] * (longest - len(spans[i][0].pages)) for i in self.single]
        self.rows = torch.tensor(rows, device=self.device)
        ends = torch.tensor([spans[i][2] for i in self.single])
        self.mask = (torch.arange(longest * pool.page_size) < ends[:, None])[:, None, None].to(self.device)
        self.single_at = self.last[self.single]

    def positions(self, new: int) -> Tensor:
        """Of the N tokens, [1, N]."""
        return self.place

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, N, D], k and v [1, Hkv, N, D], to [1, H, N, D]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]  # [pages, page_size, Hkv, D]
        for pages, x in ((keys, k), (values, v)):
            pages.flatten(0, 1)[self.slots] = x[0].transpose(0, 1)
        result = torch.empty_like(q)
        if self.single:
            rows = q[0, :, self.single_at].transpose(0, 1)[:, :, None]  # [n, H, 1, D]
            k, v = (pages[self.rows].flatten(1, 2).transpose(1, 2) for pages in (keys, values))  # [n, Hkv, tokens, D]
            y = F.scaled_dot_product_attention(grouped(rows, k.shape[1]), k, v, self.mask)
            result[0, :, self.single_at] = ungrouped(y, 1)[:, :, 0].transpose(0, 1)
        for i, start, end in self.several:
            table = self.tables[i]
            tokens = table.length + end - start
            k, v = (x[table.pages].flatten(0, 1)[None, :tokens].transpose(1, 2) for x in (keys, values))
            result[:, :, start:end] = attend(q[:, :, start:end], k, v)
        return result

    def advance(self, new: int) -> None:
        for table, count in zip(self.tables, self.counts, strict=True):
            table.length += count
