"""Requests that share a decoder, served for real: static and continuous batching, and prompts in chunks, on pages.

Continuous batching: Orca (Yu et al. 2022), scheduling by iteration. Prompts in chunks beside the tokens of running
requests: Sarathi-Serve (Agrawal et al. 2024, arXiv:2403.02310, section 4). Preemption with recomputation: vLLM (Kwon
et al. 2023, arXiv:2309.06180, section 4.5). The simulation of the same: `labkit.deploy.simulation`.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import check_tensor
from labkit.attention.decoder import Decoder, decoder
from labkit.attention.paged import PagedBatch, PagePool, PagesExhausted, PageTable
from labkit.deploy.simulation import Times
from labkit.errors import InputError, check_choice, check_whole

BATCHING = ("continuous", "static")


@dataclass(eq=False)
class Request:
    """A text on its way: `end` tokens when the text is done.

    token_s: seconds when each new token was ready.
    """

    table: PageTable
    end: int
    token_s: list[float] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen: 1 while decoding."""
        return len(self.table.ids) - self.table.length

    @property
    def is_done(self) -> bool:
        return len(self.table.ids) == self.end


@dataclass(frozen=True, eq=False)
class Service:
    """Served texts and their times, in seconds since all requests came together.

    ids: each prompt with its new tokens, [T + new].
    token_s: times of the new tokens, [new] for each request.
    steps: number of calls of the model.
    computed: number of tokens that went through the model; sharing pages saves tokens, preemption costs tokens.
    preemptions: number of requests that gave their pages back.
    """

    ids: list[Tensor]
    token_s: list[Times]
    steps: int
    computed: int
    preemptions: int

    @property
    def gaps_s(self) -> Times:
        """Seconds between a token of a request and the next, all requests together."""
        return np.concatenate([np.diff(times) for times in self.token_s])

    @property
    def first_s(self) -> Times:
        """Seconds until the first token of each request."""
        return np.array([times[0] for times in self.token_s])


def generate(
    model: nn.Module | Decoder,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int | Sequence[int],
    max_batch: int = 8,
    page_size: int = 16,
    share_prefixes: bool = True,
) -> list[Tensor]:
    """Continue each prompt [T] greedily, in continuous batches: texts [T + new], as from decoding prompt by prompt.

    The arguments are those of `serve`.
    """
    service = serve(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        max_batch=max_batch,
        page_size=page_size,
        share_prefixes=share_prefixes,
    )
    return service.ids


@torch.inference_mode()
def serve(
    model: nn.Module | Decoder,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int | Sequence[int],
    max_batch: int = 8,
    page_size: int = 16,
    share_prefixes: bool = True,
    batching: str = "continuous",
    chunk: int | None = None,
    pages: int | None = None,
) -> Service:
    """Serve prompts [T] (or [1, T]) that are all present at the start, greedily.

    model: a ForCausalLM of transformers that `Decoder` takes, or a `Decoder`.
    max_new_tokens: a number, or a number for each prompt.
    max_batch: most requests that run at a time.
    page_size: number of tokens in a page.
    share_prefixes: True to read pages that other requests wrote.
    batching: "continuous": a waiting request takes the place of a finished one, and a step is a token of each running
        request and one prompt. "static": a batch starts together and runs until the longest request is done, like rows
        of a tensor: all prompts are one step, and every further step is a token of all requests, finished requests
        included.
    chunk: tokens of a prompt that a step takes at most; None: the whole prompt.
    pages: number of the pool's pages; None: enough for max_batch of the longest requests. If a smaller pool has
        no free page, the youngest requests give their pages back, and are computed again later.
    The texts do not depend on these options, unless rounding decides between two logits.
    Raises InputError for prompts that are no text of the model and a request that the pool cannot hold.
    """
    net = decoder(model)
    check_choice(batching, BATCHING, "batching")
    check_whole(max_batch, "max_batch")
    if chunk is not None:
        check_whole(chunk, "chunk")
    new = new_tokens(max_new_tokens, prompts)
    is_static = batching == "static"
    requests = _requests(net, prompts, _with_padding(new, max_batch) if is_static else new)
    pool = _pool(net, requests, max_batch, page_size, pages)
    waiting, running = deque(requests), []
    steps = computed = preemptions = 0
    start = time.perf_counter()
    while waiting or running:
        if not (is_static and running):
            _admit(waiting, running, max_batch)
        step, preempted = _schedule(pool, running, is_static, chunk, share_prefixes)
        tables = [request.table for request, _ in step]
        batch = PagedBatch(pool, tables, [count for _, count in step])
        _compute(net, batch, [request for request, _ in step], start)
        for table in tables:
            if share_prefixes:
                pool.publish(table)
        for request in running:
            if request.is_done:
                pool.release(request.table)
        running = [request for request in running if not request.is_done]
        steps += 1
        computed += batch.ids.numel()
        preemptions += preempted
    ids = []
    for request, prompt, count in zip(requests, prompts, new, strict=True):
        text = request.table.ids[: prompt.numel() + count]
        ids.append(prompt.new_tensor(text))
    times = [np.array(request.token_s[:count]) for request, count in zip(requests, new, strict=True)]
    return Service(ids, times, steps, computed, preemptions)


def _with_padding(new: Sequence[int], max_batch: int) -> list[int]:
    """Return the new tokens of each request in static batches: as many as the longest of its batch."""
    padded = []
    for start in range(0, len(new), max_batch):
        batch = new[start : start + max_batch]
        padded += [max(batch)] * len(batch)
    return padded


def _requests(net: Decoder, prompts: Sequence[Tensor], new: Sequence[int]) -> list[Request]:
    requests = []
    for number, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
        check_tensor(prompt, f"prompt {number}")
        net.check(prompt, count)
        table = PageTable(prompt.flatten().tolist())
        requests.append(Request(table, prompt.numel() + count))
    return requests


def _admit(waiting: deque[Request], running: list[Request], max_batch: int) -> None:
    while waiting and len(running) < max_batch:
        running.append(waiting.popleft())


def _compute(net: Decoder, batch: PagedBatch, requests: Sequence[Request], start: float) -> None:
    """Run a step, and give the next token to each request whose prompt is complete.

    start: the clock's reading at the start.
    """
    hidden = net.hidden(batch.ids, batch)[0, batch.last]  # [requests of the step, W]
    complete = [place for place, request in enumerate(requests) if request.pending == 0]
    tokens = net.logits(hidden[complete]).argmax(-1).tolist()
    now = time.perf_counter() - start
    for place, token in zip(complete, tokens, strict=True):
        requests[place].table.ids.append(token)
        requests[place].token_s.append(now)


def _schedule(
    pool: PagePool, running: list[Request], is_static: bool, chunk: int | None, share: bool
) -> tuple[list[tuple[Request, int]], int]:
    """Choose the requests of a step, oldest first, and their numbers of tokens; reserve the pages.

    Returns the (request, tokens) of the step, and the number of requests that were preempted for the step.
    """
    prompts = [request for request in running if request.pending > 1]
    later_prompts = [] if is_static else prompts[1:]
    step: list[tuple[Request, int]] = []
    preempted = 0
    for place, request in enumerate(running):
        if request in later_prompts:
            continue
        if share and not request.table.pages:
            pool.share(request.table)
        count = min(request.pending, chunk or request.pending)
        is_ready, victims = _reserve(pool, request, count, running[place + 1 :])
        preempted += victims
        if is_ready:
            step.append((request, count))
    return step, preempted


def _reserve(pool: PagePool, request: Request, count: int, younger: list[Request]) -> tuple[bool, int]:
    """Reserve pages for `count` tokens, if need be pages of younger requests, the youngest first.

    Returns True if the request has its pages, and the number of preempted requests. A request that cannot be served
    gives back its own pages, so that older requests go on.
    """
    preempted = 0
    for victim in [*reversed(younger), request]:
        try:
            pool.reserve(request.table, count)
            return True, preempted
        except PagesExhausted:
            preempted += bool(victim.table.pages)
            pool.release(victim.table)
    return False, preempted


def _pool(net: Decoder, requests: list[Request], max_batch: int, page_size: int, pages: int | None) -> PagePool:
    """Make a pool of `pages`, by default for the max_batch longest requests.

    Raises InputError if a request alone does not fit.
    """
    check_whole(page_size, "page_size")
    stored = [request.end - 1 for request in requests]  # the last token is not stored
    needed = sorted((-(-tokens // page_size) for tokens in stored), reverse=True)
    if pages is None:
        return PagePool(net.layout, sum(needed[:max_batch]), page_size)
    check_whole(pages, "pages")
    if pages < needed[0]:
        raise InputError(
            f"The longest request needs {needed[0]} pages of {page_size} tokens, but the pool has {pages}: make it "
            "larger, or ask for fewer tokens."
        )
    return PagePool(net.layout, pages, page_size)


def new_tokens(max_new_tokens: int | Sequence[int], prompts: Sequence[Tensor]) -> list[int]:
    """Return a number of new tokens for each prompt.

    max_new_tokens: a number for all prompts, or a number for each.
    Raises InputError without prompts, for a wrong count of numbers, and for a number below 1.
    """
    if not isinstance(prompts, list | tuple | Tensor):
        raise InputError(f"prompts is a {type(prompts).__name__}, but it must be a list of tensors of token ids.")
    if isinstance(max_new_tokens, np.ndarray | Tensor):
        max_new_tokens = max_new_tokens.tolist()
    if isinstance(max_new_tokens, list | tuple):
        new = list(max_new_tokens)
    else:
        new = [max_new_tokens] * len(prompts)
    if not len(prompts) or len(new) != len(prompts):
        raise InputError(f"There are {len(prompts)} prompts and {len(new)} numbers of new tokens: give one for each.")
    for count in new:
        check_whole(count, "max_new_tokens")
    return new
