"""Right answers to the exercises of lesson 12, written otherwise than the worked ones."""

import asyncio
import math

import numpy as np
import torch


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


def diagnose_by_table(model, candidate):
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


def tail_by_numpy(scheduled, done, q):
    latency = np.nan_to_num(np.array(done) - np.array(scheduled), nan=np.inf)
    if round(len(latency) * (1 - q / 100), 6) < 10:
        return None
    return float(np.quantile(latency, round(q / 100, 6), method="inverted_cdf"))


async def next_batch_by_tasks(queue, max_batch, delay_s):
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


def tail_by_torch(scheduled, done, q):
    latency = torch.tensor(done, dtype=torch.float64) - torch.tensor(scheduled, dtype=torch.float64)
    if len(latency) * (100 - q) < 1000:
        return None
    place = max(math.ceil(len(latency) * q / 100), 1)
    return latency.nan_to_num(math.inf).sort().values[place - 1]


def tail_in_float32(scheduled, done, q):
    latency = tail_by_torch(scheduled, done, q)
    return None if latency is None else latency.float()


RIGHT = {
    "12.1": diagnose_by_table,
    "12.2": tail_by_numpy,
    "12.3": next_batch_by_tasks,
}

MORE_RIGHT = {
    "12.2": [tail_by_torch, tail_in_float32],
}
