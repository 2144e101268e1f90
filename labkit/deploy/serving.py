"""Requests that share a decoder, served for real: static and continuous batching, and prompts in chunks, on pages.

Continuous batching: Orca (Yu et al. 2022), scheduling by iteration. Prompts in chunks beside the tokens of others:
Sarathi-Serve (Agrawal et al. 2024, arXiv:2403.02310, section 4). Preemption by computing anew: vLLM (Kwon et al. 2023,
arXiv:2309.06180, section 4.5). The simulation of the same: `labkit.deploy.simulation`.
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
    """A text on its way: `end` tokens in all when it is done, and when each new one was there, seconds."""

    table: PageTable
    end: int
    token_s: list[float] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen: 1 while decoding."""
        return len(self.table.ids) - self.table.length


@dataclass(frozen=True, eq=False)
class Service:
    """What was served, and when, in seconds since all requests came together.

    ids: each prompt with its new tokens, [T + new]. token_s: when each new token was there, [new] a request.
    steps: calls of the model. computed: tokens that went through it; sharing saves some, preemption costs some.
    """

    ids: list[Tensor]
    token_s: list[Times]
    steps: int
    computed: int
    preemptions: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all requests over the time until the last."""
        return sum(map(len, self.token_s)) / max(times[-1] for times in self.token_s)

    @property
    def gaps_s(self) -> Times:
        """Between a token of a request and its next, all requests together."""
        return np.concatenate([np.diff(times) for times in self.token_s])

    @property
    def first_s(self) -> Times:
        """Until the first token of each request."""
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
    """Each prompt [T] with its new tokens [T + new], greedily: what decoding one by one gives, in continuous batches.

    The arguments are those of `serve`.
    """
    options = {"max_batch": max_batch, "page_size": page_size, "share_prefixes": share_prefixes}
    return serve(model, prompts, max_new_tokens=max_new_tokens, **options).ids


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
    """Serve prompts [T] (or [1, T]) that are all there at the start, greedily; see `Service`.

    model: a LlamaForCausalLM of transformers, or a `Decoder`. max_new_tokens: a number, or one for each prompt.
    max_batch: requests that run at a time. page_size: tokens. share_prefixes: read pages that other requests wrote.
    batching: "continuous": a request takes the place of one that is done, and a step is a token of each running
        request and one prompt. "static": a batch starts together and runs until its longest is done, as rows of a
        tensor do: all prompts are one step, and then each step is a token of all, also of those that are done.
    chunk: tokens of a prompt that a step takes at most; None: the whole prompt.
    pages: of the pool; None: enough for max_batch of the longest requests. With fewer the youngest requests give theirs
        back when there are no more, and are computed anew later.
    Token ids do not depend on any of this, but where rounding decides between logits that are equal but for that.
    Raises InputError for prompts that are no text of the model and a request that the pool cannot hold.
    """
    net = decoder(model)
    check_choice(batching, BATCHING, "batching")
    check_whole(max_batch, "max_batch")
    if chunk is not None:
        check_whole(chunk, "chunk")
    new = new_tokens(max_new_tokens, prompts)
    requests = []
    for i, prompt in enumerate(prompts):
        check_tensor(prompt, f"prompt {i}")
        first = i // max_batch * max_batch
        end = prompt.numel() + (max(new[first : first + max_batch]) if batching == "static" else new[i])
        net.check(prompt, end - prompt.numel())
        requests.append(Request(PageTable(prompt.flatten().tolist()), end))
    pool = _pool(net, requests, max_batch, page_size, pages)
    waiting, running = deque(requests), []
    steps = computed = preemptions = 0
    start = time.perf_counter()
    while waiting or running:
        if batching == "continuous" or not running:
            while waiting and len(running) < max_batch:
                running.append(waiting.popleft())
        step, preempted = _schedule(pool, running, batching, chunk, share_prefixes)
        batch = PagedBatch(pool, [request.table for request, _ in step], [count for _, count in step])
        hidden = net.hidden(batch.ids, batch)[0, batch.last]  # [requests of the step, W]
        through = [i for i, (request, _) in enumerate(step) if not request.pending]
        tokens = net.logits(hidden[through]).argmax(-1).tolist()
        now = time.perf_counter() - start
        for i, token in zip(through, tokens, strict=True):
            step[i][0].table.ids.append(token)
            step[i][0].token_s.append(now)
        for request, _ in step:
            if share_prefixes:
                pool.publish(request.table)
            if len(request.table.ids) == request.end:
                pool.release(request.table)
        running = [request for request in running if len(request.table.ids) < request.end]
        steps, computed, preemptions = steps + 1, computed + batch.ids.numel(), preemptions + preempted
    ids = [p.new_tensor(r.table.ids[: p.numel() + n]) for r, p, n in zip(requests, prompts, new, strict=True)]
    times = [np.array(request.token_s[:count]) for request, count in zip(requests, new, strict=True)]
    return Service(ids, times, steps, computed, preemptions)


def _schedule(
    pool: PagePool, running: list[Request], batching: str, chunk: int | None, share: bool
) -> tuple[list[tuple[Request, int]], int]:
    """The requests of a step, oldest first, with how many tokens each, and how many others were preempted for them."""
    prompts = [request for request in running if request.pending > 1]
    step: list[tuple[Request, int]] = []
    preempted = 0
    for i, request in enumerate(running):
        if batching == "continuous" and request in prompts[1:]:
            continue
        if share and not request.table.pages:
            pool.share(request.table)
        count = min(request.pending, chunk or request.pending)
        ready, victims = _reserve(pool, request, count, running[i + 1 :])
        preempted += victims
        if ready:
            step.append((request, count))
    return step, preempted


def _reserve(pool: PagePool, request: Request, count: int, younger: list[Request]) -> tuple[bool, int]:
    """Take pages for `count` tokens, at need those of younger requests, the youngest first: (got them, preempted).

    A request that gets none gives back what it has, so that older ones go on.
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
    """A pool that holds the max_batch longest requests, or `pages`. InputError if a request alone does not fit."""
    check_whole(page_size, "page_size")
    needed = sorted(
        (-(-(request.end - 1) // page_size) for request in requests), reverse=True
    )  # the last is not stored
    if pages is not None:
        check_whole(pages, "pages")
    if pages is not None and pages < needed[0]:
        raise InputError(
            f"The longest request needs {needed[0]} pages of {page_size} tokens, but the pool has {pages}: make it "
            "larger, or ask for fewer tokens."
        )
    return PagePool(net.layout, sum(needed[:max_batch]) if pages is None else pages, page_size)


def new_tokens(max_new_tokens: int | Sequence[int], prompts: Sequence[Tensor]) -> list[int]:
    """One number for each prompt. InputError without prompts, for other counts, and for a number below 1."""
    if not isinstance(prompts, list | tuple | Tensor):
        raise InputError(f"prompts is a {type(prompts).__name__}, but it must be a list of tensors of token ids.")
    if isinstance(max_new_tokens, np.ndarray | Tensor):
        max_new_tokens = max_new_tokens.tolist()
    several = isinstance(max_new_tokens, list | tuple)
    new = list(max_new_tokens) if several else [max_new_tokens] * len(prompts)
    if not len(prompts) or len(new) != len(prompts):
        raise InputError(f"There are {len(prompts)} prompts and {len(new)} numbers of new tokens: give one for each.")
    for count in new:
        check_whole(count, "max_new_tokens")
    return new
