"""Hooks that last as long as their `with` block, and modules that take another's place."""

import pytest
import torch
from networks import WithForward
from torch import nn

from labkit.modules.hooks import first_tensor, forward_hooks, reading, watching
from labkit.modules.replacing import replace_

X = torch.ones(2, 3)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_hook_sees_every_call_and_is_gone_afterwards():
    model, calls = net(), []
    with forward_hooks([model[2], model[0]], lambda number, args, kwargs, output: calls.append((number, output))):
        y = model(X)
    assert [number for number, _ in calls] == [1, 0] and calls[1][1] is y
    assert count_hooks(model) == 0


def test_hooks_are_gone_after_an_error():
    model = net()
    with pytest.raises(OSError), forward_hooks(list(model), print), forward_hooks(list(model), print, before=True):
        assert count_hooks(model) == 6
        raise OSError("the disk is full")
    assert count_hooks(model) == 0


def test_hooks_change_arguments_and_outputs():
    model = net()
    with forward_hooks([model[1]], lambda number, args, kwargs, output: output + 1):
        assert torch.equal(model(X), model[2](torch.relu(model[0](X)) + 1))
    with forward_hooks([model[2]], lambda number, args, kwargs: ((args[0] * 0,), kwargs), before=True):
        assert torch.equal(model(X), model[2].bias.expand(2, 3))


def test_a_module_listed_twice_has_two_hooks():
    model, numbers = net(), []
    with forward_hooks([model[0], model[0]], lambda number, args, kwargs: numbers.append(number), before=True):
        model(X)
    assert numbers == [0, 1]


def test_inputs_and_results_by_name():
    model, seen = WithForward(lambda m, x: m.layer(input=x), layer=nn.Linear(3, 3)), []
    with watching(model, ["layer"], lambda *values: seen.append(values)):
        y = model(X)
    ((name, x, result),) = seen
    assert name == "layer" and x is X and result is y


def test_an_input_is_read_and_replaced():
    model = net()
    with reading(model, ["0", "2"], lambda number, x: x * 0 if number else None):
        assert torch.equal(model(X), model[2].bias.expand(2, 3))


def test_the_first_tensor_of_a_call():
    assert first_tensor((None, X), {}) is X and first_tensor((), {"hidden_states": X}) is X
    assert first_tensor((1,), {"use_cache": True}) is None


def test_a_module_is_replaced_wherever_it_is():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    wrapper = nn.Sequential(shared)
    assert replace_(model, "1.0", wrapper) is model
    assert model[0] is wrapper and model[1][0] is wrapper and wrapper[0] is shared
    assert replace_(model, "1.0", shared) is model and model[0] is shared and model[1][0] is shared
    assert replace_(model, "", shared) is shared and model[0] is shared
