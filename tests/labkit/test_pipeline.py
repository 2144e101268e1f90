"""A pipeline's rows are those of its models, an interrupted one goes on, and a step that cannot be ends it."""

import copy

import pytest
import torch
from refusals import check_refusal
from torch import nn

from labkit.deploy import engines, parity, pipeline
from labkit.deploy.pipeline import Step
from labkit.errors import LabError
from labkit.quantization import integer, ptq
from labkit.storage import artifact

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval().requires_grad_(False)
X = torch.randn(64, 16)
EXAMPLES = {"batch 1": X[:1], "batch 16": X[:16]}
REFERENCE = parity.Reference(MODEL, [(x, x[:, :4].argmax(1)) for x in X.split(16)])


def narrowed(model: nn.Module) -> nn.Module:
    """Without half of the inner features."""
    first, second = nn.Linear(16, 16), nn.Linear(16, 4)
    first.weight.data, first.bias.data = model[0].weight[:16].clone(), model[0].bias[:16].clone()
    second.weight.data, second.bias.data = model[2].weight[:, :16].clone(), model[2].bias.clone()
    return nn.Sequential(first, nn.ReLU(), second).eval().requires_grad_(False)


class Healing:
    """Adds to a weight, and counts how often it ran."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module) -> nn.Module:
        self.calls += 1
        model = copy.deepcopy(model)
        model[2].weight += 0.5
        return model


def quantized(model: nn.Module) -> nn.Module:
    return ptq.quantize(model, [X], weights=7).model  # which every CPU multiplies exactly


def execute(steps, folder):
    return pipeline.execute(MODEL, {"one": steps}, EXAMPLES, REFERENCE, folder=folder, budget_s=0.05)["one"]


def test_rows_are_those_of_the_models(tmp_path):
    steps = [Step("prune", narrowed), Step("heal", Healing(), trains=True), Step("int8", quantized)]
    eager, pruned, healed, int8 = execute(steps, tmp_path)
    assert eager.parity.change == (0, 0, 0), "the model against itself is known"
    assert eager.parity.max_abs == 0 and eager.bytes == artifact.size(MODEL) and not eager.speedups
    narrow = narrowed(MODEL)
    assert pruned.steps == ("eager", "prune") and pruned.bytes == artifact.size(narrow)
    assert pruned.parity == REFERENCE.judge(narrow)
    again = Healing()(narrow)
    assert healed.parity == REFERENCE.judge(again)
    assert int8.parity == REFERENCE.judge(integer.convert(quantized(again))), "what is timed are integers"
    assert set(int8.speedups) == set(EXAMPLES) and all(low <= x <= high for x, low, high in int8.speedups.values())


@pytest.mark.skipif(engines.available()["onnxruntime"] != "ready", reason="needs ONNX Runtime")
def test_what_an_engine_takes_to_prepare_is_paid_once(tmp_path):
    _, engine = execute([Step("engine", engine="onnxruntime")], tmp_path)
    again = engines.prepare("onnxruntime", MODEL, EXAMPLES["batch 16"])
    assert engine.seconds > again.load_seconds and engine.bytes == again.bytes
    assert engine.seconds > again.prepare_seconds / 10, "the export is in it"


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    healing = Healing()

    def interrupts(model):
        raise KeyboardInterrupt

    steps = [Step("prune", narrowed), Step("heal", healing, trains=True)]
    with pytest.raises(KeyboardInterrupt):
        execute([*steps, Step("int8", interrupts)], tmp_path)
    rows = execute([*steps, Step("int8", quantized)], tmp_path)
    assert healing.calls == 1 and len(rows) == 4
    assert rows[3].parity == REFERENCE.judge(integer.convert(quantized(Healing()(narrowed(MODEL)))))
    assert execute([*steps, Step("int8", quantized)], tmp_path) == rows


def test_orders_share_their_first_steps_and_are_timed_in_the_same_rounds(tmp_path, monkeypatch):
    races, race = [], pipeline.bench.race
    monkeypatch.setattr(
        pipeline.bench, "race", lambda calls, **options: races.append([*calls]) or race(calls, **options)
    )
    prune, int8 = Step("prune", narrowed), Step("int8", quantized)
    orders = {"prune first": [prune, int8], "prune": [prune], "int8 first": [int8]}
    rows = pipeline.execute(MODEL, orders, EXAMPLES, REFERENCE, folder=tmp_path, budget_s=0.05)
    assert rows["prune"] == rows["prune first"][:2]
    assert races == 2 * [["eager", "eager>prune", "eager>prune>int8", "eager>int8"]], "one race for each example"
    assert pipeline.execute(MODEL, orders, EXAMPLES, REFERENCE, folder=tmp_path, budget_s=0.05) == rows
    assert len(races) == 2, "nothing is timed twice"


def test_another_order_is_another_result_and_a_step_that_cannot_be_ends_it(tmp_path):
    def refuses(model):
        raise LabError("a quantized model cannot be cut")

    assert execute([Step("heal", Healing(), trains=True), Step("prune", narrowed)], tmp_path)[2].steps[1] == "heal"
    rows = execute([Step("int8", quantized), Step("prune", refuses), Step("heal", Healing())], tmp_path)
    assert [row.error for row in rows] == ["", "", "a quantized model cannot be cut"]
    twice = [Step("prune", narrowed), Step("prune", narrowed)]
    check_refusal("Two steps are called prune", lambda: execute(twice, tmp_path))
