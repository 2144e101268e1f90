"""Run a model in eval mode, and leave it and the random states as before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from labkit.arguments import check_module


@contextmanager
def evaluating(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put every submodule of `model` into eval mode for the `with` block.

    Afterwards the training flags and the random states of torch, numpy and Python are as before, errors or not.

    seed: set torch's generators to the seed inside; None leaves the generators where they are.
    """
    check_module(model)
    modes = [(module, module.training) for module in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for module, training in modes:
                module.training = training
