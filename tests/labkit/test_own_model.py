"""A reader's own model: found by name, checked before any work, and taken through cut, healing and integers."""

import pytest
import torch
from torch import nn

from labkit.deploy import export, own_model, pipeline
from labkit.errors import InputError

MODULE = """
import torch
from torch import nn

def data(n):
    inputs = torch.randn(n, 16, generator=torch.Generator().manual_seed(n))
    return inputs, (inputs[:, 0] > 0).long()

def load():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    return model, data(64), data(40)

def training_mode():
    model, train, test = load()
    return model.train(), train, test

def no_pair():
    model, train, test = load()
    return model, train[0], test

def float_labels():
    model, (inputs, labels), test = load()
    return model, (inputs, labels.float()), test

def images():
    model, train, test = load()
    return nn.Sequential(model, nn.Unflatten(1, (1, 2))).eval(), train, test

def two():
    return load()[:2]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a_readers_model.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.delitem(__import__("sys").modules, "a_readers_model", raising=False)
    return tmp_path


def test_a_model_is_found_by_module_and_function(folder):
    own = own_model.load("a_readers_model:load", folder)
    assert isinstance(own.model, nn.Sequential) and len(own.train[0]) == 64
    assert own.reference(16).scores.shape == (32, 2)  # the last, smaller batch is left out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a_readers_model", 'give "module:function"'),
        ("a_readers_model:", 'give "module:function"'),
        ("no_such_module:load", "no module 'no_such_module'"),
        ("a_readers_model:nothing", "has no nothing"),
        ("a_readers_model:two", "has to return"),
        ("a_readers_model:training_mode", "eval mode"),
        ("a_readers_model:no_pair", "training data has to be"),
        ("a_readers_model:float_labels", "labels int64"),
        ("a_readers_model:images", "scores"),
    ],
)
def test_what_the_pipeline_cannot_take_is_refused_in_a_sentence(folder, name: str, words: str):
    with pytest.raises(InputError, match=words):
        own_model.load(name, folder)


def test_the_steps_cut_heal_and_round_and_leave_the_readers_model_as_it_is(folder):
    own = own_model.load("a_readers_model:load", folder)
    before = own.model(own.test[0])
    steps = own_model.steps(own, ratio=0.5, heal_steps=3)
    examples = {"batch 8": own.test[0][:8]}
    options = {"folder": folder / "stages", "budget_s": 0.05}
    order = {"usual": [steps["cut"], steps["heal"]]}
    whole, cut, healed = pipeline.execute(own.model, order, examples, own.reference(8), **options)["usual"]
    assert cut.bytes == healed.bytes < whole.bytes and not healed.error
    assert export.is_quantized(steps["int8"].apply(own.model))
    assert torch.equal(own.model(own.test[0]), before)
