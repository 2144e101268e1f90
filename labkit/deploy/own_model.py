"""A reader's own classifier in the pipeline of lesson 13: named as "module:function", checked, cut, healed and rounded.

The function takes nothing and returns (model, train, test): a float model in eval mode, and twice (inputs, labels),
tensors with a row for each example. The first output of the model is its scores [N, classes]:

    # my_model.py
    def load():
        model = ...                      # with trained weights
        return model, (train_inputs, train_labels), (test_inputs, test_labels)
"""

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit import distillation
from labkit.data import training
from labkit.deploy.parity import Reference
from labkit.deploy.pipeline import Step
from labkit.errors import InputError
from labkit.files import ROOT
from labkit.pruning import channels
from labkit.quantization import ptq

FEW = 512  # training examples that score channels and give the ranges of activations
BATCH = 128  # examples of a step of healing
MAX_LR = 1e-3  # of healing, by AdamW
SOFT = {"alpha": 0.9, "temperature": 4.0}


@dataclass(frozen=True, eq=False)
class OwnModel:
    """A float classifier with its data.

    name: "module:function" that gave the model.
    train, test: inputs [N, ...] and class numbers [N].
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def few(self) -> tuple[Tensor, Tensor]:
        """The first FEW training examples."""
        inputs, labels = self.train
        return inputs[:FEW], labels[:FEW]

    def reference(self, size: int) -> Reference:
        """Return the model's answers to the test examples, in batches of `size`; a smaller last batch is left out."""
        inputs, labels = self.test
        whole = len(inputs) // size * size
        parts = inputs[:whole].split(size), labels[:whole].split(size)
        return Reference(self.model, list(zip(*parts, strict=True)))


def load(name: str, folder: str | Path = ".") -> OwnModel:
    """Call the function that `name` names, and check what it gives.

    name: "module:function"; the module lies in `folder` or in the repository, or is installed.
    Raises InputError for a name that leads nowhere, and for a model or data that the pipeline cannot take.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InputError(f'MODEL is {name!r}: give "module:function", as "my_model:load" for load() in my_model.py.')
    places = [str(Path(folder).resolve()), str(ROOT)]
    try:
        with _on_the_path(places):
            call = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise InputError(
            f"There is no module {error.name!r} in {' or '.join(places)}, and none is installed: put {module}.py there."
        ) from None
    except AttributeError:
        raise InputError(f"The module {module} has no {function}: define a function of this name in it.") from None
    returned = call()
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise InputError(f"{name} has to return (model, (inputs, labels), (inputs, labels)), for training and test.")
    classifier = OwnModel(name, *returned)
    _check(classifier)
    return classifier


@contextmanager
def _on_the_path(places: list[str]) -> Iterator[None]:
    """Let Python find modules in further folders, for the length of a block."""
    before = list(sys.path)
    sys.path[:0] = places
    try:
        yield
    finally:
        sys.path[:] = before


def _is_labelled(data: object) -> bool:
    """Return True for inputs [N, ...] and labels int64 [N]."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    inputs, labels = data
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
        return False
    return len(inputs) == len(labels) and labels.dtype is torch.int64


def _check(own: OwnModel) -> None:
    if not isinstance(own.model, nn.Module) or own.model.training:
        raise InputError(f"{own.name} has to return an nn.Module in eval mode: call model.eval() before.")
    for part, data in {"training": own.train, "test": own.test}.items():
        if not _is_labelled(data):
            raise InputError(f"The {part} data has to be (inputs, labels): tensors of equal length, labels int64 [N].")
    with torch.no_grad():
        scores = own.model(own.test[0][:2])
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise InputError(f"The model of {own.name} has to return scores [N, classes].")


def steps(own: OwnModel, *, ratio: float, heal_steps: int, seed: int = 0) -> dict[str, Step]:
    """Return the steps "cut", "heal" and "int8" of a pipeline, by name.

    ratio: share of the channels that the cut removes, by Taylor's score and in multiples of 8.
    heal_steps: steps of AdamW on BATCH training examples, on the model's stored answers and their labels.
    seed: draws the order of the examples.
    """
    inputs, labels = own.train

    def cut(model: nn.Module) -> nn.Module:
        options = {"criterion": "taylor", "round_to": 8, "batches": [own.few]}
        return channels.prune(model, (inputs[:2],), ratio=ratio, **options).model

    def heal(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            answers = torch.cat([own.model(part) for part in inputs.split(BATCH)])
        batches = training.Batches((inputs, labels, answers), BATCH, seed)
        recipe = {"epochs": heal_steps, "steps": heal_steps, "optimizer": "adamw", "max_lr": MAX_LR}
        model = copy.deepcopy(model).requires_grad_(True)
        torch.manual_seed(seed)  # of dropout
        training.train_(model, batches, loss_fn=distillation.distilling(None, **SOFT), **recipe)
        return model.requires_grad_(False)

    table = [
        Step("cut", cut),
        Step("heal", heal, trains=True),
        Step("int8", lambda model: ptq.quantize(model, [own.few[0]]).model),
    ]
    return {step.name: step for step in table}
