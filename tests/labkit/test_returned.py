"""What a model returns is proved whatever stands around it, and refused where it cannot be compared."""

import collections
import dataclasses
import types

import pytest
import torch
from networks import Returning
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.errors import EqualityError
from labkit.graph.groups import trace
from labkit.modules.returned import numbers, outputs
from labkit.pruning import depth
from labkit.pruning.channels import prune


class Plain:
    """Its tensor is a property, and it holds itself."""

    def __init__(self, x):
        self._x, self.itself, self.calls = x, [self], 3

    @property
    def x(self):
        return self._x


class Slots:
    __slots__ = ("__hidden",)

    def __init__(self, x):
        self.__hidden = x


@dataclasses.dataclass(slots=True)
class Sealed:
    logits: torch.Tensor


class Named(dict):
    pass


def named(x):
    result = Named(width=5)
    result.logits = x
    return result


def circle(x):
    items = [x]
    items.append(items)
    return items


FORMS = {
    "namespace": lambda x: types.SimpleNamespace(logits=x),
    "object": Plain,
    "object in objects": lambda x: {"o": [types.SimpleNamespace(deep=(Slots(x),))]},
    "slots": Slots,
    "sealed dataclass": Sealed,
    "distribution": lambda x: torch.distributions.Normal(x, x.exp()),
    "categorical": lambda x: torch.distributions.Categorical(logits=x),
    "attribute of a dictionary": named,
    "deque": lambda x: collections.deque([x]),
    "values": lambda x: {"logits": x}.values(),
    "circle": circle,
    "complex": lambda x: torch.complex(x.sum(1, keepdim=True), x),
    "among others": lambda x: (None, "name", torch.float32, print, {"a", 1}, Plain(x)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_classes_of_an_output_stay_whatever_holds_them(form):
    model, x = Returning(FORMS[form]), torch.randn(2, 8)
    pruned = prune(model, x, ratio=0.5)
    assert pruned.model.out.out_features == 5 and pruned.model.a.out_features == 8
    assert pruned.report.equal and pruned.report.scale > 0


HIDDEN: Refusals = {  # words -> what the network makes of its tensor
    "(NoneType) holds no tensor with a number": lambda x: None,
    "(int) holds no tensor with a number": lambda x: x.shape[1],
    "(Tensor) holds no tensor with a number": lambda x: x[:0],
    "holds a set, whose numbers cannot be compared": lambda x: {x},
    "holds a frozenset, whose": lambda x: (x, frozenset([Plain(x)])),
    "holds a list_iterator, whose": lambda x: iter([x]),
    "holds a generator, whose": lambda x: (y for y in [x]),
    "holds a function, whose": lambda x: (x.mean(), lambda: x),
}


@refused(HIDDEN)
def test_an_output_that_cannot_be_compared_is_refused(words, call):
    model = Returning(call)
    check_refusal(words, lambda: prune(model, torch.randn(2, 8), ratio=0.5), leaves=model)


def test_an_empty_batch_proves_nothing():
    model, x = Returning(lambda x: x), torch.randn(2, 8)
    check_refusal("an example input that is not empty", lambda: trace(model, x[:0]))
    check_refusal("no finite number to compare", lambda: prune(model, x, ratio=0.5, check=x[:0]), EqualityError)


def test_a_width_in_the_output_is_compared_too():
    class Wide(Returning):
        def forward(self, x):
            hidden = self.a(x)
            return self.out(hidden), hidden.shape[1]

    check_refusal("NOT equal", lambda: prune(Wide(None), torch.randn(2, 8), ratio=0.5), EqualityError)


def test_what_is_returned_twice_is_there_twice_and_a_cache_of_transformers_is_no_output():
    from transformers import DynamicCache, EncoderDecoderCache

    class Kept(DynamicCache):
        pass

    x, cache = torch.ones(2), Kept()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    both = EncoderDecoderCache(cache, DynamicCache())
    assert [y is x for y in outputs({"a": x, "b": (x, [x]), "cache": cache, "both": both})] == [True] * 3
    assert numbers({"a": (2, x), "b": Plain(1)}) == [2]


class Layers(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3)]
        self.layers, self.form = nn.ModuleList(blocks), form

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.form(x)


def test_layers_are_proved_in_objects_too():
    x = {"x": torch.randn(2, 8)}
    report = depth.prune_layers(Layers(Plain), [1], kwargs=x).report
    assert report.equal and report.scale > 0
    silent = Layers(lambda x: None)
    check_refusal("holds no tensor with a number", lambda: depth.prune_layers(silent, [1], kwargs=x), leaves=silent)
