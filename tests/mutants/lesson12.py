"""Answers to the exercises of lesson 12: right ones, written differently, and plausible wrong ones."""

import asyncio
import math
from collections import Counter

import numpy as np
import torch

# -------------------------------------------------------------------------------------------------------------- fusion


def _fuse(ops, *, elementwise_only=True, single_reader=True, by_use=False, first_input=False, weights=False):
    """Right, unless an option takes a part of the answer away."""
    readers = Counter(x for _, _, inputs in ops for x in (inputs if by_use else set(inputs)))
    kernels, of = [], {}
    order = [name for name, *_ in ops]
    for name, kind, inputs in ops:
        free = [x for x in inputs if (x in of or weights) and (readers[x] == 1 or not single_reader)]
        if free and (kind == "elementwise" or not elementwise_only):
            head = free[0] if first_input else max(free, key=lambda x: order.index(x) if x in order else -1)
            of[name] = of.get(head, [head])
        else:
            of[name] = []
            kernels.append(of[name])
        of[name].append(name)
    return kernels


def _fuse_by_merging(ops):
    """A kernel for each operator first, then unions."""
    names = [name for name, *_ in ops]
    head = {name: name for name in names}
    for name, kind, inputs in ops:
        for x in reversed(names[: names.index(name)]):
            alone = all(x not in other for reader, _, other in ops if reader != name)
            if kind == "elementwise" and x in inputs and alone:
                head[name] = head[x]
                break
    return [[name for name in names if head[name] == first] for first in dict.fromkeys(head.values())]


def _fuse_neighbours(ops):
    """Joins what ran just before, whether it is an input or not."""
    kernels = []
    for name, kind, _ in ops:
        if kind == "elementwise" and kernels:
            kernels[-1].append(name)
        else:
            kernels.append([name])
    return kernels


# ------------------------------------------------------------------------------------------------------ what was frozen


def _probes():
    torch.manual_seed(5)
    x, ones = 0.1 + torch.rand(2, 8, 4), torch.ones(2, 8)
    one, other = ones.clone(), ones.clone()
    one[:, 5:] = 0
    other[1, 2:] = 0
    return {
        "half precision": (x, ones),
        "branch frozen": (-x, ones),
        "length frozen": (x.repeat(1, 2, 1)[:, :11], torch.ones(2, 11)),
        "mask ignored": (x, one),
        "first mask for all": (x, other),
    }


def _diagnose(model, candidate, *, rtol=1e-3, atol=1e-5, skip=(), raises=True):
    """Right, unless an option takes a part of the answer away."""
    for name, (x, mask) in _probes().items():
        if name in skip:
            continue
        try:
            scores = candidate(x, mask)
        except RuntimeError:
            if raises:
                return name
            raise
        if not torch.allclose(model(x, mask), scores, rtol=rtol, atol=atol):
            return name
    return "same"


def _diagnose_by_table(model, candidate):
    """All probes first, then the name by which of them differ."""

    def error(x, mask):
        try:
            right = model(x, mask).double()
            return float((candidate(x, mask).double() - right).norm() / right.norm())
        except RuntimeError:
            return math.inf

    errors = {name: error(*probe) for name, probe in _probes().items()}
    if errors["half precision"] > 1e-5:
        return "half precision"
    if errors["mask ignored"] > 1e-5:
        return "mask ignored"
    worst = max(errors, key=errors.get)
    return worst if errors[worst] > 1e-5 else "same"


def _diagnose_one_row(model, candidate):
    """A batch of one cannot tell the masks of rows apart."""
    for name, (x, mask) in _probes().items():
        x, mask = x[1:], mask[1:]
        try:
            if not torch.allclose(model(x, mask), candidate(x, mask), rtol=1e-3, atol=1e-5):
                return name
        except RuntimeError:
            return name
    return "same"


# --------------------------------------------------------------------------------------------------------------- tails


def _tail(scheduled, done, q, *, lost="late", least=10, interpolate=False, shift=0):
    """Right, unless an option takes a part of the answer away."""
    latency = [y - x for x, y in zip(scheduled, done, strict=True)]
    if lost == "dropped":
        latency = [x for x in latency if not math.isnan(x)]
    if lost == "zero":
        latency = [0.0 if math.isnan(x) else x for x in latency]
    latency = sorted(math.inf if math.isnan(x) else x for x in latency)
    n = len(latency)
    if round(n * (100 - q)) < 100 * least:
        return None
    if interpolate:
        return float(np.percentile(latency, q))
    return latency[math.ceil(round(n * q / 100, 6)) - 1 + shift]


def _tail_by_numpy(scheduled, done, q):
    latency = np.nan_to_num(np.array(done) - np.array(scheduled), nan=np.inf)
    if round(len(latency) * (1 - q / 100), 6) < 10:
        return None
    return float(np.quantile(latency, round(q / 100, 6), method="inverted_cdf"))


def _tail_from_the_first(scheduled, done, q):
    return _tail([scheduled[0]] * len(scheduled), done, q)


# ------------------------------------------------------------------------------------------------------------- batcher


async def _next_batch(queue, max_batch, delay_s, *, from_taking=False, renew=False, wait_full=False, greedy_late=True):
    """Right, unless an option takes a part of the answer away."""
    clock = asyncio.get_running_loop().time
    batch = [await queue.get()]
    end = (clock() if from_taking else batch[0][0]) + delay_s
    while len(batch) < max_batch:
        if clock() >= end and (queue.empty() or not greedy_late):
            break
        try:
            batch.append(queue.get_nowait())
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout_at(end):
                    batch.append(await queue.get())
            except TimeoutError:
                break
        if renew:
            end = clock() + delay_s
    if wait_full:
        await asyncio.sleep(max(0.0, end - clock()))
    return batch


async def _next_batch_by_tasks(queue, max_batch, delay_s):
    """One task takes requests until it is full; it is stopped at the end of the delay."""
    batch = [await queue.get()]
    end = batch[0][0] + delay_s

    async def fill():
        while len(batch) < max_batch:
            batch.append(await queue.get())

    while len(batch) < max_batch and not queue.empty():
        batch.append(queue.get_nowait())
    left = end - asyncio.get_running_loop().time()
    if len(batch) < max_batch and left > 0:
        await asyncio.wait([filling := asyncio.ensure_future(fill())], timeout=left)
        filling.cancel()
    return batch


def _with(**options):
    async def next_batch(queue, max_batch, delay_s):
        return await _next_batch(queue, max_batch, delay_s, **options)

    return next_batch


async def _no_limit(queue, max_batch, delay_s):
    return await _next_batch(queue, 10**6, delay_s)


async def _waits_until_full(queue, max_batch, delay_s):
    return [await queue.get() for _ in range(max_batch)]


async def _out_of_order(queue, max_batch, delay_s):
    return (await _next_batch(queue, max_batch, delay_s))[::-1]


async def _drops_what_is_too_much(queue, max_batch, delay_s):
    return (await _next_batch(queue, max_batch + 1, delay_s))[:max_batch]


RIGHT = {
    "12.1": (_fuse, _fuse_by_merging),
    "12.2": (_diagnose, _diagnose_by_table),
    "12.3": (_tail, _tail_by_numpy),
    "12.4": (_next_batch, _next_batch_by_tasks),
}

WRONG = {
    "12.1": {
        "everything joins": lambda ops: _fuse(ops, elementwise_only=False),
        "other readers do not matter": lambda ops: _fuse(ops, single_reader=False),
        "uses are counted, not readers": lambda ops: _fuse(ops, by_use=True),
        "the first input that is free": lambda ops: _fuse(ops, first_input=True),
        "weights are operators": lambda ops: _fuse(ops, weights=True),
        "joins its neighbour": _fuse_neighbours,
    },
    "12.2": {
        "too strict for float32": lambda *x: _diagnose(*x, rtol=0.0, atol=0.0),
        "too lax for bfloat16": lambda *x: _diagnose(*x, rtol=0.5, atol=0.1),
        "an error is passed on": lambda *x: _diagnose(*x, raises=False),
        "positive inputs only": lambda *x: _diagnose(*x, skip=("branch frozen",)),
        "one length": lambda *x: _diagnose(*x, skip=("length frozen",)),
        "one mask for all rows": lambda *x: _diagnose(*x, skip=("first mask for all",)),
        "a batch of one": _diagnose_one_row,
    },
    "12.3": {
        "unanswered requests dropped": lambda *x: _tail(*x, lost="dropped"),
        "unanswered requests at once": lambda *x: _tail(*x, lost="zero"),
        "no rule of ten": lambda *x: _tail(*x, least=0),
        "rule of one hundred": lambda *x: _tail(*x, least=100),
        "interpolated": lambda *x: _tail(*x, interpolate=True),
        "one place too far": lambda *x: _tail(*x, shift=1),
        "from the first moment": _tail_from_the_first,
    },
    "12.4": {
        "the delay counts from taking": _with(from_taking=True),
        "each request renews the delay": _with(renew=True),
        "a full batch waits": _with(wait_full=True),
        "takes nothing more when the delay is over": _with(greedy_late=False),
        "no largest batch": _no_limit,
        "waits until it is full": _waits_until_full,
        "out of order": _out_of_order,
        "drops what is too much": _drops_what_is_too_much,
    },
}
