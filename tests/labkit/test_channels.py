"""Plans: what each criterion measures, how many channels go, what a plan says, iterative rounds and the scan."""

import copy
from functools import partial

import pytest
import torch
from networks import Attention, Depthwise, Normed, Plain, Residual, Statics, difference, example
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.graph.groups import Coupling
from labkit.pruning import sensitivity
from labkit.pruning.channels import apply, plan, plan_units, prune
from labkit.pruning.scores import UNIT_CRITERIA
from labkit.timing import roofline


def left(chosen):
    return {row.name: row.left for row in chosen.units}


@pytest.fixture
def plain():
    model, x = example(Plain)
    return model, x, [(x, torch.tensor([1, 2]))]


# --- importance -------------------------------------------------------------------------------------------------------


def test_groups_that_a_criterion_has_no_score_for_stay_whole_and_say_so(plain):
    model, x, _ = plain
    rows = {row.name: (row.left, row.reason) for row in plan(model, x, ratio=0.5, criterion="bn_scale").units}
    assert rows.pop("fc1.weight") == (20, "bn_scale has no score for it")
    assert all(left < 20 and not reason for left, reason in rows.values())


@pytest.mark.parametrize("criterion", UNIT_CRITERIA)
def test_every_criterion_prunes_and_leaves_the_model_alone(plain, criterion):
    model, x, batches = plain
    before = copy.deepcopy(model.state_dict())
    chosen = plan(model, x, ratio=0.5, criterion=criterion, batches=batches)
    assert chosen.parameters[1] < chosen.parameters[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- how many go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.0, 1e-4, 0.1, 0.5, 0.9, 1, 1.0])
def test_exactly_the_asked_fraction_goes(plain, ratio):
    model, x, _ = plain
    chosen = plan(model, x, ratio=ratio)  # 8 + 12 + 20 channels
    removed = sum(row.removed for row in chosen.units)
    assert removed == min(int(40 * ratio + 0.5), 40 - 3)  # one stays in each group
    layer = plan(model, x, ratio=ratio, scope="layer")
    assert [row.removed for row in layer.units] == [min(int(n * ratio + 0.5), n - 1) for n in (8, 12, 20)]


def test_ties_go_evenly_over_the_groups(plain):
    model, x, _ = plain
    for norm in (model.bn1, model.bn2):
        nn.init.ones_(norm.weight)
    assert left(plan(model, x, ratio=0.5, criterion="bn_scale")) == {
        "conv1.weight": 4,
        "conv2.weight": 6,
        "fc1.weight": 20,
    }


def test_a_global_ranking_does_not_depend_on_the_size_of_a_layers_weights(plain):
    model, x, _ = plain
    before = left(plan(model, x, ratio=0.5))
    with torch.no_grad():
        model.conv1.weight.mul_(0.001)
    assert left(plan(model, x, ratio=0.5)) == before


def test_a_global_ranking_does_not_depend_on_the_size_of_a_layers_scores_below_zero(plain):
    model, x, _ = plain
    scores = {name: -torch.rand(n) for name, n in (("conv1.weight", 8), ("conv2.weight", 12), ("fc1.weight", 20))}
    before = left(plan(model, x, ratio=0.5, criterion=scores))
    scores["conv1.weight"] = scores["conv1.weight"] * 1000
    assert left(plan(model, x, ratio=0.5, criterion=scores)) == before


def test_the_least_important_go(plain):
    model, x, _ = plain
    kept = plan(model, x, ratio=0.25, scope="layer").kept["conv1.weight"][0]
    norms = model.conv1.weight.detach().abs().sum((1, 2, 3))
    assert sorted(kept.tolist()) == sorted(norms.topk(6).indices.tolist())


def test_min_channels_and_round_to(plain):
    model, x, _ = plain
    assert min(left(plan(model, x, ratio=0.9, min_channels=5)).values()) == 5
    assert left(plan(model, x, ratio=0.6, scope="layer", round_to=4)) == {
        "conv1.weight": 4,
        "conv2.weight": 4,
        "fc1.weight": 8,
    }
    model, x = example(Attention)  # heads of 12 channels of qkv
    assert left(plan(model, x, ratio=0.5, scope="layer", round_to=16))["qkv.weight"] == 4


@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_channels_of_every_group_of_a_grouped_convolution(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 1), nn.ReLU(), kind(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 5, 1))
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 8, 8)
    pruned = prune(model, x, ratio=0.5, scope="layer", within_groups=True)
    assert left(pruned.plan) == {"0.weight": 2, "2.weight": 3} and pruned.report.equal
    conv = pruned.model[2]
    assert (conv.groups, conv.in_channels, conv.out_channels) == (4, 8, 12)
    assert 2 * pruned.plan.macs[1] == roofline.count(pruned.model, x).flops
    assert difference(pruned, model, x) < 1e-12
    whole = prune(model, x, ratio=0.5, scope="layer")
    assert whole.model[2].groups == 2 and left(whole.plan) == {"0.weight": 2}
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1))
    assert prune(depthwise, x, ratio=0.5, within_groups=True).model[1].groups == 4


def test_a_ratio_for_each_group(plain):
    model, x, _ = plain
    assert left(plan(model, x, ratio={"conv1.weight": 0.5, "fc1.bias": 0.25})) == {
        "conv1.weight": 4,
        "conv2.weight": 12,
        "fc1.weight": 15,
    }


def test_a_ratio_for_a_module_is_for_all_that_is_made_in_it_and_the_innermost_decides():
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12))
    net = nn.Sequential(inner, nn.Linear(12, 20), nn.Linear(20, 3))
    x = torch.randn(2, 6)
    ratio = {"0": 0.5, net[0][2]: 0.25}
    assert left(plan(net, x, ratio=ratio)) == {"0.0.weight": 4, "0.2.weight": 9, "1.weight": 20}
    assert left(plan(net, x, ratio=dict(reversed(ratio.items())))) == left(plan(net, x, ratio=ratio))


def test_scores_of_ones_own(plain):
    model, x, _ = plain
    own = torch.arange(8.0, 0, -1)  # the last channel is the least important
    chosen = plan(model, x, ratio=0.5, scope="layer", criterion={"conv1.weight": own})
    assert left(chosen) == {"conv1.weight": 4, "conv2.weight": 12, "fc1.weight": 20}
    assert chosen.kept["conv1.weight"][0].tolist() == [0, 1, 2, 3]
    again = plan(model, x, ratio=0.5, scope="layer", criterion=lambda g: own if g.name == "conv1.weight" else None)
    assert torch.equal(again.kept["conv1.weight"][0], chosen.kept["conv1.weight"][0]) and left(again) == left(chosen)


def test_ignored_modules_keep_their_channels(plain):
    model, x, _ = plain
    chosen = plan(model, x, ratio=0.5, ignore="conv1")
    assert left(chosen)["conv1.weight"] == 8 and "ignored" in str(chosen)
    model, x = example(Residual)
    assert left(plan(model, x, ratio=0.5, ignore=model.conv2))["stem.weight"] == 8  # it makes the same channels


def test_linked_groups_keep_the_same_fraction():
    torch.manual_seed(0)
    chosen = plan(Statics(), torch.randn(3, 7, 6), ratio=0.5)
    assert {row.name: (row.left, row.units) for row in chosen.units} == {"a.weight": (2, 4)}
    layer = nn.TransformerEncoderLayer(24, 6, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 24), layer, nn.Linear(24, 3)).eval()
    for seed in range(3):
        chosen = plan(model, torch.randn(3, 4, 5), ratio=0.4, criterion="random", seed=seed)
        fractions = {row.name: row.left / row.units for row in chosen.units}
        assert fractions["0.weight"] == fractions["1.self_attn.in_proj_weight"]


# --- what a plan says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plain, Residual, Depthwise, Attention, Normed])
def test_a_plan_predicts_parameters_macs_and_bytes(kind):
    if kind is Normed:
        torch.manual_seed(0)
        model, x = Normed(), torch.randn(4, 6)
    else:
        model, x = example(kind)
    chosen = plan(model, x, ratio=0.5)
    small = apply(model, chosen, x).model
    for side, net in enumerate((model, small)):
        assert chosen.parameters[side] == sum(p.numel() for p in net.parameters())
        assert chosen.bytes[side] == sum(t.nbytes for t in [*net.parameters(), *net.buffers()])
        assert 2 * chosen.macs[side] == roofline.count(net, x).flops


def test_a_target_of_multiply_adds_is_reached(plain):
    model, x, _ = plain
    before, after = plan(model, x, macs=0.5).macs
    assert 1 - after / before == pytest.approx(0.5, abs=0.05)


# --- exactly these units ----------------------------------------------------------------------------------------------


def test_exactly_the_named_units_go(plain):
    model, x, _ = plain
    chosen = plan_units(model, Coupling.of(model, x), {"conv1.weight": [2, 6, 7], "fc1.bias": [0]})
    assert left(chosen) == {"conv1.weight": 5, "conv2.weight": 12, "fc1.weight": 19}
    assert chosen.kept["conv2.weight"][1].tolist() == chosen.kept["bn1.weight"][0].tolist() == [0, 1, 3, 4, 5]
    assert chosen.kept["fc2.weight"][1].tolist() == list(range(1, 20))
    assert apply(model, chosen, x).report.equal


def test_exactly_the_named_channels_of_a_layer_go(plain):
    model, x, _ = plain
    pruned = prune(model, x, remove={"conv1": [2, 6, 7], model.fc1: [0], "conv2.weight": [1]})
    assert left(pruned.plan) == {"conv1.weight": 5, "conv2.weight": 11, "fc1.weight": 19}
    assert pruned.plan.kept["conv2.weight"][1].tolist() == [0, 1, 3, 4, 5] and pruned.report.equal
    model, x = example(Attention)
    pruned = prune(model, x, remove={"qkv": [5]})  # of the second head, which goes as a whole
    assert pruned.plan.kept["proj.weight"][1].tolist() == [0, 1, 2, 3, *range(8, 16)] and pruned.report.equal


def test_a_head_is_one_unit():
    model, x = example(Attention)
    chosen = plan_units(model, Coupling.of(model, x), {"qkv.weight": [1]})
    assert chosen.kept["proj.weight"][1].tolist() == [0, 1, 2, 3, *range(8, 16)]
    assert apply(model, chosen, x).report.equal


def test_units_of_linked_groups_go_together():
    layer = nn.TransformerEncoderLayer(24, 6, 32, batch_first=True)
    model, x = nn.Sequential(nn.Linear(5, 24), layer, nn.Linear(24, 3)).eval(), torch.randn(3, 4, 5)
    heads = {"1.self_attn.in_proj_weight": [1, 4]}
    check_refusal("same fraction of their units", partial(plan_units, model, Coupling.of(model, x), heads))
    chosen = plan_units(model, Coupling.of(model, x), heads | {"0.weight": range(8)})
    assert apply(model, chosen, x).report.equal


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_the_scan_really_removes_channels(plain):
    model, x, _ = plain
    calls = []

    def evaluate(net):
        calls.append(net)
        with torch.no_grad():
            return float(net(x).square().mean())

    scanned = sensitivity.scan(model, x, evaluate, ratios=(0.5, 0.25), progress=False)
    assert len(calls) == 1 + 3 * 2  # baseline, three groups at two ratios
    assert scanned.baseline == float(model(x).square().mean())
    assert [(row.group, row.ratio) for row in scanned.rows[:2]] == [("conv1.weight", 0.25), ("conv1.weight", 0.5)]
    assert calls[1].conv1.out_channels == 6 and calls[1].conv2.out_channels == 12


def test_an_allocation_takes_the_largest_ratio_within_the_tolerance():
    rows = [
        sensitivity.Trial(group, ratio, metric)
        for group, metrics in {"a": (0.9, 0.85, 0.5), "b": (0.2, 0.9, 0.9)}.items()
        for ratio, metric in zip((0.25, 0.5, 0.75), metrics, strict=True)
    ]
    assert sensitivity.Sensitivity(0.9, tuple(rows)).allocation(0.1) == {"a": 0.5, "b": 0.0}


# --- refusals ---------------------------------------------------------------------------------------------------------

MODEL, X = example(Plain)


def half(**options):
    return plan(MODEL, X, ratio=0.5, **options)


def without(units):
    return plan_units(MODEL, Coupling.of(MODEL, X), units)


REFUSALS: Refusals = {
    "ratio is 1.2, ... from 0 to 1": lambda: plan(MODEL, X, ratio=1.2),
    "ratio is True, ... from 0 to 1": lambda: plan(MODEL, X, ratio=True),
    "ratio of 'conv1.weight'": lambda: plan(MODEL, X, ratio={"conv1.weight": -1}),
    "no prunable group": lambda: plan(MODEL, X, ratio={"conv9.weight": 0.5}),
    "ratio names 'ReLU', but the model has no such": lambda: plan(MODEL, X, ratio={nn.ReLU(): 0.5}),
    "'conv1' hangs together with 'bn1'": lambda: plan(MODEL, X, ratio={"conv1": 0.5, "bn1": 0.2}),
    "seed has no meaning": lambda: plan(MODEL, X, remove={"conv1": [1]}, seed=1),
    "a channel of 'conv1' is 8, but it must be a whole number from 0 to 7": lambda: plan(
        MODEL, X, remove={"conv1": [8]}
    ),
    "'fc2', which makes no channels that can go (is the model's output): labkit.pruning.coupling.trace(model": (
        lambda: plan(MODEL, X, remove={"fc2": [1]})
    ),
    "all 8 units of 'conv1.weight', but one has to stay": lambda: plan(MODEL, X, remove={"conv1": range(8)}),
    "8 scores for 'conv1.weight'": lambda: half(criterion={"conv1.weight": torch.ones(7)}),
    "'fc2.weight', which makes no channels": lambda: half(criterion={"fc2.weight": torch.ones(5)}),
    "'conv1.weight' must be a tensor of shape [8]": lambda: half(criterion=lambda group: torch.ones(3)),
    "the caller is NaN": lambda: half(criterion=lambda group: torch.full((group.units,), torch.nan)),
    "no scope 'local'": lambda: half(scope="local"),
    "round_to is 0": lambda: half(round_to=0),
    "min_channels is 1.5": lambda: half(min_channels=1.5),
    "ignore names 'conv9'": lambda: half(ignore=["conv9"]),
    "ignore names 'Conv2d', but the model has no such": lambda: half(ignore=nn.Conv2d(3, 8, 3)),
    "No group is left": lambda: half(ignore=["conv1", "conv2", "fc1"]),
    "meta device": lambda: plan(copy.deepcopy(MODEL).to("meta"), X, ratio=0.5),
    "units names 'conv9.weight', which is no prunable group": lambda: without({"conv9.weight": [0]}),
    "has 8 for 'conv1.weight', whose units are numbered 0 to 7": lambda: without({"conv1.weight": [8]}),
    "has -1 for 'conv1.weight', whose units are numbered 0 to 7": lambda: without({"conv1.weight": [-1]}),
    "units has all 8 units of 'conv1.weight', but one has to stay.": lambda: without({"conv1.weight": range(8)}),
    "names 'conv1.weight' twice": lambda: without({"conv1.weight": [1], "conv1.bias": [2]}),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call, leaves=MODEL)


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 0.5, "macs": 0.5}, {"ratio": 0.5, "remove": {"conv1": [1]}}], ids=str
)
def test_a_plan_takes_exactly_one_of_a_ratio_a_target_and_channels(options):
    check_refusal("exactly one", partial(plan, MODEL, X, **options), leaves=MODEL)
