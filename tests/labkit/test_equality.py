"""The proof of a cut in models that name their types, draw numbers, give NaN, or are written into by hooks."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Perceptron
from random_networks import digest
from refusals import check_refusal

from labkit.errors import EqualityError
from labkit.graph import surgery
from labkit.graph.equality import Report, difference
from labkit.graph.groups import trace
from labkit.pruning.channels import apply, plan, prune


def halved(model, x, **options):
    pruned = prune(model, x, ratio=0.5, scope="layer", **options)
    assert (pruned.model.a.out_features, pruned.model.b.out_features) == (8, 6)
    assert pruned.report.equal and pruned.report.scale > 0 and not pruned.report.noisy
    return pruned


def assert_a_wrong_cut_is_refused(model, x):
    chosen = plan(model, x, ratio=0.5, scope="layer")
    wrong = {**chosen.kept, "b.weight": {**chosen.kept["b.weight"], 1: torch.arange(8)}}
    check_refusal("NOT equal", lambda: apply(model, dataclasses.replace(chosen, kept=wrong), x), EqualityError)


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        ("a", "1 statistic runs over pruned channels (a):"),
        ("abc", "3 statistics run over pruned channels (a, b, c):"),
        ("abcd", "4 statistics run over pruned channels (a, b, c, ...):"),
    ],
)
def test_a_report_names_three_statistics_at_most(statistics, words):
    assert words in str(Report(0.0, 1.0, 1e-6, "float64", restricted=tuple(statistics)))


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pass_that_names_its_half_precision_is_proved_in_a_wider_type(dtype):
    model, x = Perceptron(lambda x: x.to(dtype)).to(dtype), torch.randn(4, 8)
    pruned = halved(model, x)
    assert pruned.report.dtype == "float64" and pruned.report.tolerance < 1e-12
    assert pruned.model.a.weight.dtype is dtype and pruned.model(x).dtype is dtype
    assert_a_wrong_cut_is_refused(model, x)


def test_autocast_on_the_device_of_the_input_is_followed():
    class Switching(Perceptron):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                y = F.relu(self.a(x.float()))
            with torch.autocast(device_type=x.device.type, enabled=torch.is_autocast_enabled(x.device.type)):
                return self.out(F.relu(self.b(y)))

    halved(Switching(), torch.randn(4, 8))
    with pytest.raises(RuntimeError):
        torch.autocast("meta", enabled=False)  # as before, outside


def test_a_model_whose_output_has_nan_in_one_type_is_proved_in_another():
    model = Perceptron(lambda x: x * torch.nan if x.dtype is torch.float64 else x)
    assert halved(model, torch.randn(4, 8)).report.dtype == "float32"
    words = "own output has NaN on the example input: give another input"
    poisoned = Perceptron(lambda x: x * torch.nan)
    check_refusal(words, lambda: prune(poisoned, torch.randn(4, 8), ratio=0.5), EqualityError)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_what_a_mask_writes_into_the_output_hides_no_wrong_cut(value):
    """The largest number of the output says how much rounding is allowed, if it is one that was computed."""
    model = Perceptron(lambda x: x.float(), lambda x: torch.cat([x, torch.full_like(x, value)], 1))
    x = torch.randn(4, 8)
    halved(model, x)
    assert_a_wrong_cut_is_refused(model, x)


def test_whole_numbers_are_equal_or_not_and_do_not_widen_the_tolerance():
    x, codes = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([50_000, 7])
    assert difference((x, codes), (x + 1e-9, codes))[1] == 1
    assert difference((x, codes), (x, codes + torch.tensor([0, 1])))[0] == torch.inf
    assert difference(codes, codes) == (0, 50_000)
    assert difference((x, 3), (x, 4))[0] == difference(x, x[:1])[0] == difference((x, x), (x,))[0] == torch.inf
    assert difference((x, torch.tensor([-1e9])), (x + 1e-9, torch.tensor([-1e9])))[1] == 1
    z = torch.complex(x, x)
    assert difference(z, z.conj())[0] == 2


def test_nan_in_the_dense_output_is_told_as_such_and_not_as_a_difference():
    x = torch.tensor([1.0, torch.nan])
    with pytest.raises(EqualityError, match="dense model's own output has NaN"):
        difference(x, x.clone())


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_random_numbers_of_numpy_and_python_go_on_as_if_nothing_had_been_pruned():
    model, x = Perceptron(lambda x: x * np.random.rand() + random.random()), torch.randn(4, 8)
    states = random.getstate(), np.random.get_state()[1].tolist()
    halved(model, x)
    halved(model, x, criterion="taylor", batches=[(x, torch.zeros(4, dtype=torch.int64))])
    trace(model, x)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_a_hook_that_closes_over_the_model_leaves_nothing_in_it():
    model, x = Perceptron(), torch.randn(4, 8)
    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.register_buffer("mean", torch.zeros(16))
    model.features, model.last, model.by_name, model.counts = [], None, {}, {"n": [0]}

    def hook(module, args, out):
        model.last, module.new = out, 1
        model.features.append(out)
        model.by_name["a"] = out
        model.counts["n"][0] += 1
        model.calls.add_(1)
        model.mean.copy_(out.mean(0))

    model.a.register_forward_hook(hook)
    before = digest(model)
    trace(model, x)
    assert digest(model) == before
    prune(model, x, ratio=0.5)
    assert digest(model) == before


# --- sparse buffers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul])
def test_a_graph_network_with_a_sparse_buffer_is_pruned(product, tmp_path):
    class Graph(Perceptron):
        def __init__(self):
            super().__init__()
            self.register_buffer("edges", (torch.rand(4, 4) > 0.5).float().to_sparse())

        def forward(self, x):
            return self.out(F.relu(self.b(product(self.edges, F.relu(self.a(x))))))

    model, x = Graph(), torch.randn(4, 8)
    pruned = halved(model, x)
    assert pruned.model.edges.is_sparse and torch.equal(pruned.model.edges.to_dense(), model.edges.to_dense())
    check_refusal("'edges' is sparse", lambda: surgery.save(pruned.model, [pruned.plan], tmp_path / "model"))
