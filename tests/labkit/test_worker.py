"""A worker in a process of its own: the model's answers, a core that the sender leaves, and an end."""

import os
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


@pytest.mark.parametrize("without_pause", [True, False])
def test_a_worker_that_looks_without_pause_gives_the_same_answers_and_ends(without_pause):
    x = np.zeros((1, 1, 28, 28), dtype="float32")
    with worker.Worker(models.resnet20) as compute:
        before = compute(x)
        compute.look_without_pause(True)
        compute.look_without_pause(without_pause)
        np.testing.assert_array_equal(compute(x), before)
        process = compute._process
    process.join(10)
    assert not process.is_alive()
