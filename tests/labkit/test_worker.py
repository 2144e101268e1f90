"""A worker in a process of its own: the model's answers, a core that the sender leaves, no long pause, and an end."""

import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from labkit.data import models
from labkit.deploy import worker

affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell its cores")


def test_a_worker_gives_the_model_s_answers_and_ends():
    x = torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        expected = models.resnet20()(x).numpy()
    with worker.Worker(models.resnet20) as compute:
        np.testing.assert_allclose(compute(x.numpy()), expected, atol=1e-4)
        assert compute(x[:1].numpy()).shape == (1, 10)
        process = compute._process
    process.join(10)
    assert not process.is_alive()


@affinity
def test_the_sender_leaves_the_worker_its_core_and_other_threads_keep_theirs():
    before = os.sched_getaffinity(0)

    def seen():
        worker.leave_the_worker_its_core()
        return os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as thread:
        left = thread.submit(seen).result()
    assert os.sched_getaffinity(0) == before
    assert left == (before - {max(before)} if len(before) > 1 else before)


def looked_through() -> int:
    """The objects that a full garbage collection looks through."""
    return len(gc.get_objects())


@pytest.mark.parametrize("block", [lambda: worker.Worker(models.resnet20), worker.objects_set_aside])
def test_no_collection_looks_through_a_notebook_s_objects_while_a_load_runs(block):
    kept = [[] for _ in range(100_000)]  # as many engines in a notebook have, and more
    before = looked_through()
    with block():
        assert looked_through() < before / 10
    assert looked_through() >= len(kept)
    assert gc.get_freeze_count() == 0


def test_objects_stay_aside_until_the_outermost_block_ends():
    with worker.objects_set_aside():
        with worker.objects_set_aside():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_garbage_of_the_block_itself_is_collected():
    with worker.objects_set_aside():
        ring = Ring()
        gone = weakref.ref(ring)
        del ring
        gc.collect()
        assert gone() is None


class Ring:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self
