"""Scores of weights and of units against float64 references written out from the papers."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import family
from networks import GroupedStrided, Plain, Residual, example
from refusals import Refusals, check_refusal, refused
from torch import nn
from torch.testing import assert_close

from labkit.graph.groups import Group, Member, trace
from labkit.pruning.scores import CRITERIA, input_taylor, saliency, unit_scores

NEED_DATA = [name for name, criterion in CRITERIA.items() if criterion.needs_data]
NEED_LOSS = [name for name, criterion in CRITERIA.items() if criterion.gradient]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return GroupedStrided()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 4, 8, 8, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(3)
    ]


def reference_gradients(net, batches):
    """One float64 gradient a batch and weight, by backward()."""
    net = net.double().eval()
    found = {name: [] for name in ("conv.weight", "hidden.weight", "out.weight")}
    for x, y in batches:
        net.zero_grad()
        F.cross_entropy(net(x.double()), y).backward()
        for name in found:
            found[name].append(net.get_parameter(name).grad.clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def reference_inputs(net, batches):
    """The input vectors of each layer in float64, [groups, N, in]; F.unfold is the oracle for the convolution."""
    net = net.double().eval()
    x = torch.cat([x for x, _ in batches]).double()
    columns = F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2).reshape(-1, 2, 2 * 9).transpose(0, 1)
    hidden = net.norm(net.conv(x)).relu().flatten(1)
    return {
        "conv.weight": columns,
        "hidden.weight": hidden[None],
        "out.weight": net.hidden(hidden).tanh()[None],
    }


def per_row(weight, statistic):
    """[groups, in] for each of the weight's rows, in the weight's shape."""
    group = torch.arange(len(weight)) * len(statistic) // len(weight)
    return statistic[group].reshape(weight.shape)


def close(scores, reference):
    assert scores.keys() == reference.keys()
    for name, score in scores.items():
        assert_close(score.double(), reference[name].double(), rtol=2e-4, atol=1e-9, msg=name)


def weights(net):
    return {name: net.get_parameter(name).detach().double() for name in ("conv.weight", "hidden.weight", "out.weight")}


# --- each criterion ---------------------------------------------------------------------------------------------------


def test_magnitude_is_the_absolute_weight(net):
    close(saliency(net, "magnitude"), {name: w.abs() for name, w in weights(net).items()})


def inverse_diagonal(x):
    """Of the Hessian of inputs [N, in], with the damping of the paper."""
    hessian = 2 * x.t() @ x
    return torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).diagonal()


OF_GRADIENTS = {  # of a weight and its gradients [batches, ...]
    "taylor": lambda w, g: (g * w).square().mean(0),
    "taylor_abs": lambda w, g: (g.mean(0) * w).abs(),
    "obd": lambda w, g: w**2 * (g**2).mean(0) / 2,
}
OF_INPUTS = {  # of a weight and its inputs [groups, N, in]
    "wanda": lambda w, x: w.abs() * per_row(w, x.norm(dim=1)),
    "activation": lambda w, x: per_row(w, x.abs().mean(1)),
    "obs": lambda w, x: w**2 / (2 * per_row(w, torch.stack([inverse_diagonal(rows) for rows in x]))),
}


@pytest.mark.parametrize("criterion", [*OF_GRADIENTS, *OF_INPUTS])
def test_a_criterion_is_its_formula_in_float64(net, batches, criterion):
    scores, w = saliency(net, criterion, batches), weights(net)
    statistics = reference_gradients(net, batches) if criterion in OF_GRADIENTS else reference_inputs(net, batches)
    formula = (OF_GRADIENTS | OF_INPUTS)[criterion]
    close(scores, {name: formula(w[name], x) for name, x in statistics.items()})


def test_random_depends_on_the_seed_alone(net):
    first, again, other = (saliency(net, "random", seed=seed)["out.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() < 1


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_wanda_covers_convolutions_of_other_dimensions(dims, padding_mode):
    torch.manual_seed(0)
    layer = (nn.Conv1d if dims == 1 else nn.Conv3d)(4, 6, 3, padding="same", groups=2, padding_mode=padding_mode)
    x = torch.randn(2, 4, *[5] * dims)
    squares = layer.weight.new_zeros(layer.weight.shape).requires_grad_()  # sum of x^2 under each weight, by autograd
    output = layer._conv_forward(x.square(), squares, None)
    norms = torch.autograd.grad(output.sum(), squares)[0].sqrt()
    assert_close(saliency(layer, "wanda", [x])["weight"], layer.weight.detach().abs() * norms)


def test_an_input_that_changes_in_place_between_two_layers_is_two_inputs():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            same = self.one(x) + self.two(x)
            return same + self.three(x.mul_(2))

    model, x = Changing(), torch.randn(5, 4)
    scores = saliency(model, "wanda", [x])
    for layer, norms in (("one", x.norm(dim=0)), ("two", x.norm(dim=0)), ("three", 2 * x.norm(dim=0))):
        assert_close(scores[f"{layer}.weight"], model.get_submodule(layer).weight.detach().abs() * norms)


def test_wanda_covers_the_transposed_linear_of_transformers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, x = Conv1D(5, 4), torch.randn(3, 2, 4)  # weight [in 4, out 5]
    norms = x.reshape(-1, 4).norm(dim=0)
    assert_close(saliency(layer, "wanda", [x])["weight"], layer.weight.detach().abs() * norms[:, None])


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain():
    model, x = example(Plain)
    return model, x, [(x, torch.tensor([1, 2]))]


def named_scores(model, x, criterion, batches=None):
    groups = trace(model, x)
    return {groups[i].name: values for i, values in unit_scores(model, groups, criterion, batches).items()}


def test_l1_and_l2_are_the_norms_of_what_makes_the_unit(plain):
    model, x, _ = plain
    w = model.conv1.weight.detach()
    assert_close(named_scores(model, x, "l1")["conv1.weight"], w.abs().sum((1, 2, 3)))
    assert_close(named_scores(model, x, "l2")["conv1.weight"], w.square().sum((1, 2, 3)).sqrt())
    model, x = example(Residual)
    both = sum(layer.weight.detach().abs().sum((1, 2, 3)) for layer in (model.stem, model.conv2))
    assert_close(named_scores(model, x, "l1")["stem.weight"], both)


def test_taylor_is_the_mean_squared_slope_of_a_gate_on_the_unit(plain):
    """Gates written into the network by hand, and autograd's derivative by them, over two batches."""
    model, x, _ = plain
    model.requires_grad_(False)
    batches, squares = [(x, torch.tensor([1, 2])), (-x, torch.tensor([0, 2]))], []
    for x, y in batches:
        gate = torch.ones(8, requires_grad=True)
        hidden = F.max_pool2d(F.relu(model.bn1(model.conv1(x))), 2) * gate[:, None, None]
        hidden = F.relu(model.bn2(model.conv2(hidden)))
        F.cross_entropy(model.fc2(torch.tanh(model.fc1(hidden.flatten(1)))), y).backward()
        squares.append(gate.grad.square())
    scores = named_scores(model, x, "taylor", batches)["conv1.weight"]
    assert_close(scores, torch.stack(squares).mean(0), rtol=1e-4, atol=1e-12)
    assert not any(p.requires_grad for p in model.parameters())


def test_activation_is_the_mean_of_what_the_readers_get(plain):
    model, x, batches = plain
    found = named_scores(model, x, "activation", batches)["fc1.weight"]
    with torch.no_grad():
        hidden = F.relu(model.bn2(model.conv2(F.max_pool2d(F.relu(model.bn1(model.conv1(x))), 2))))
        assert_close(found, torch.tanh(model.fc1(hidden.flatten(1))).abs().mean(0))


class Scaled(nn.Module):
    """Units of two channels: a vector makes them, and a layer of which they are every second column reads them."""

    def __init__(self):
        super().__init__()
        self.scale, self.read = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.read(x * self.scale)


UNITS = torch.tensor([0, 1, 2, 0, 1, 2])


def units_of(model, criterion, batches=None, units=UNITS):
    members = (Member("scale", 0, units, "makes"), Member("read.weight", 1, units, "reads"))
    return unit_scores(model, [Group("scale", 3, members)], criterion, batches)[0]


def test_a_unit_is_scored_by_all_that_belongs_to_it_and_nothing_else():
    model, batches = Scaled(), [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(2)]
    scale, read = model.scale.detach(), model.read.weight.detach()
    assert_close(units_of(model, "l1"), read.abs().sum(0).view(2, 3).sum(0))  # no matrix makes them: one reads them
    read = saliency(model, "wanda", batches)["read.weight"]
    assert_close(units_of(model, "wanda", batches), read.sum(0).view(2, 3).sum(0))
    some = torch.where(torch.arange(6) < 3, UNITS, -1)  # the other channels are in no unit
    assert_close(units_of(model, "wanda", batches, some), read.sum(0)[:3])
    only = [Group("scale", 3, (Member("scale", 0, UNITS, "makes"),))]
    assert_close(unit_scores(model, only, "l2")[0], scale.view(2, 3).norm(dim=0))
    assert unit_scores(model, only, "wanda", batches) == unit_scores(model, only, "bn_scale") == {}


def test_bn_scale_is_the_mean_over_norms_and_channels():
    model = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.LayerNorm(6)])
    for module in model:
        nn.init.normal_(module.weight)
    members = tuple(Member(f"{i}.weight", 0, UNITS, "makes") for i in range(3))
    scales = torch.stack([model[i].weight.detach().abs() for i in range(2)])  # a layer norm has none
    assert_close(unit_scores(model, [Group("0.weight", 3, members)], "bn_scale")[0], scales.view(2, 2, 3).mean((0, 1)))


def test_fpgm_measures_where_units_have_the_same_size():
    model = nn.ModuleList([nn.Linear(2, 6), nn.Linear(2, 5)])
    members = Member("0.weight", 0, UNITS, "makes"), Member("1.weight", 0, UNITS[:5], "makes")
    rows = model[0].weight.detach().view(2, 3, 2).transpose(0, 1).flatten(1)  # [units, 4]
    distances = (rows[:, None] - rows[None]).norm(dim=2).sum(1)
    assert_close(unit_scores(model, [Group("0.weight", 3, members)], "fpgm")[0], distances, rtol=1e-4, atol=1e-4)


def test_taylor_of_what_a_module_reads_is_the_slope_of_each_example():
    """Units of two channels of a hidden layer; one reader plays no part in the loss."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model.idle = nn.Linear(6, 1).double()
    model.forward = lambda x: (model.idle(x.new_ones(len(x), 6)), model[2](model[1](model[0](x))))[1]
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    gates = torch.ones(7, 3, dtype=torch.float64, requires_grad=True)
    hidden = model[1](model[0](x)) * gates.repeat_interleave(2, 1)
    F.cross_entropy(model[2](hidden), y, reduction="sum").backward()
    scores, idle = input_taylor(model, {"2": 3, "idle": 6}, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert_close(scores, gates.grad.abs().mean(0))
    assert not idle.any()


# --- batches, and a model left as it was ------------------------------------------------------------------------------


def state(net):
    return (
        {name: value.clone() for name, value in net.state_dict().items()},
        [module.training for module in net.modules()],
        [parameter.requires_grad for parameter in net.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules()],
        torch.get_rng_state(),
    )


def same(before, after):
    for old, new in zip(before, after, strict=True):
        assert_close(old, new, rtol=0, atol=0)


def prepared(net, batches):
    """In train mode with gradients, one layer frozen, one module in eval: all of it must be found again."""
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    net.norm.eval()
    net.hidden.weight.requires_grad_(False)
    return net


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_left_as_it_was_by_an_error_too(net, batches, criterion):
    before = state(prepared(net, batches))
    scores = saliency(net, criterion, torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True))
    assert set(scores) == {"conv.weight", "hidden.weight", "out.weight"}  # the frozen one has its score
    same(before, state(net))

    def broken():
        yield batches[0]
        torch.rand(1)
        raise OSError("the disk is gone")

    if criterion in NEED_DATA:
        with pytest.raises(OSError):
            saliency(net, criterion, broken())
    same(before, state(net))


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_batches_are_let_go_one_by_one(net, criterion):
    alive = []

    def stream():
        for _ in range(4):
            assert sum(reference() is not None for reference in alive) <= 1
            x = torch.randn(2, 4, 8, 8)
            alive.append(weakref.ref(x))
            yield x, torch.tensor([0, 1])
            del x

    saliency(net, criterion, stream())


@pytest.mark.parametrize("criterion", NEED_LOSS)
def test_dicts_with_labels_use_the_loss_of_the_model(criterion):
    bert = family("bert")
    batch = {"input_ids": torch.randint(50, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    by_labels = saliency(bert, criterion, [batch])
    by_loss_fn = saliency(bert, criterion, [batch], loss_fn=lambda out, y: F.cross_entropy(out.logits, y))
    assert "bert.encoder.layer.0.attention.self.query.weight" in by_labels
    close(by_labels, by_loss_fn)
    unlabelled = [{"input_ids": batch["input_ids"]}]
    check_refusal("the batches have no labels", lambda: saliency(bert, criterion, unlabelled), leaves=bert)


def test_a_weight_that_no_batch_reaches_has_no_score(net, batches):
    net.spare = nn.Linear(3, 3)
    for criterion in NEED_DATA:
        assert "spare.weight" not in saliency(net, criterion, batches)


def test_a_shared_weight_has_one_score():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    assert list(saliency(model, "taylor", [(torch.randn(3, 4), torch.tensor([0, 1, 2]))])) == ["0.weight"]


def test_scores_of_bfloat16_weights_are_float32():
    model = nn.Linear(4, 3).bfloat16()
    batch = (torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2]))
    for criterion in CRITERIA:
        assert saliency(model, criterion, [batch])["weight"].dtype == torch.float32


def test_without_labels_loss_fn_gets_the_batch(net, batches):
    seen = []
    saliency(net, "obd", [batches[0][0]], loss_fn=lambda out, target: seen.append(target) or out.sum())
    assert seen[0] is batches[0][0]


# --- refusals ---------------------------------------------------------------------------------------------------------

WEIGHT = torch.randn(3, 8)
BATCHES: Refusals = {
    "looks at data: give batches": lambda net, criterion: saliency(net, criterion),
    "must be an iterable of batches: put it in a list": lambda net, criterion: saliency(net, criterion, WEIGHT),
    "batches is empty": lambda net, criterion: saliency(net, criterion, []),
}


@pytest.mark.parametrize("criterion", NEED_DATA)
@refused(BATCHES)
def test_a_criterion_that_looks_at_data_wants_batches(net, criterion, words, call):
    check_refusal(words, lambda: call(net, criterion), leaves=net)


def test_a_loss_must_be_one_number(net, batches):
    call = partial(saliency, net, "taylor", batches, loss_fn=lambda out, y: out)
    check_refusal("must return one number", call, leaves=net)
