"""Cutting and its proof: pruned networks equal the dense ones with blind readers, and stay what they were otherwise."""

import copy
import dataclasses
import threading
from types import SimpleNamespace

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import (
    NETWORKS,
    ODD,
    Around,
    Attention,
    Bare,
    Depthwise,
    Normed,
    Plain,
    Residual,
    Shuffle,
    Tied,
    UpDown,
    chain,
    difference,
    example,
    odd,
    randomise_,
    zeroed,
)
from random_networks import HABITS, TOKENS, Network, Stateful, TokenNetwork, digest, programs, token_programs
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.errors import DataError, EqualityError, InputError
from labkit.graph import surgery
from labkit.graph.groups import trace
from labkit.pruning import sensitivity, transformers, unstructured
from labkit.pruning.channels import apply, plan, prune

EXACT = 1e-12  # relative, in float64: rounding of sums of at most 192 terms through few layers is a thousandth of it


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind is not Bare])
def test_a_pruned_network_equals_the_dense_one_with_blind_readers(kind, ratio, scope):
    model, x = example(kind)
    pruned = prune(model, x, ratio=ratio, scope=scope)
    assert difference(pruned, model, x) < EXACT
    assert pruned.report.equal and pruned.report.error < EXACT
    assert sum(p.numel() for p in pruned.model.parameters()) == pruned.plan.parameters[1] < pruned.plan.parameters[0]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_over_any_number_of_positions(dims):
    torch.manual_seed(0)
    model, x = randomise_(chain(dims)), torch.randn(2, 3, *[8] * dims)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.report.equal and difference(pruned, model, x) < EXACT
    assert [row.left / row.units for row in pruned.plan.units] == [
        0.5
    ] * 3  # 2 groups of convolutions, 6 and 10 channels


def test_bare_parameters_are_cut_with_their_width():
    model, x = example(Bare)
    pruned = prune(model, x, ratio=0.5)
    kept = pruned.plan.kept["token"][2]
    assert torch.equal(pruned.model.token, model.token[..., kept])
    assert torch.equal(pruned.model.matrix, model.matrix[kept][:, pruned.plan.kept["matrix"][1]])
    assert pruned.report.equal


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(programs(), st.floats(0, 0.95), st.sampled_from(["l1", "random"]), st.integers(0, 5))
def test_random_networks_stay_equal_after_random_plans(program, ratio, criterion, seed):
    model = randomise_(Network(program), seed)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    pruned = prune(model, x, ratio=ratio, criterion=criterion, seed=seed)
    if not pruned.report.restricted:
        assert difference(pruned, model, x) < 1e-9
    assert pruned.report.equal


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(token_programs(), st.floats(0.1, 0.9), st.sampled_from(["global", "layer"]), st.integers(0, 5))
def test_random_networks_of_many_operators_stay_equal_and_leave_the_dense_one_alone(program, ratio, scope, seed):
    with torch.no_grad():  # a weight that the older weight norm has made can be copied then
        model = randomise_(TokenNetwork(program), seed)
    x = torch.randn(2, TOKENS, 6, generator=torch.Generator().manual_seed(seed))
    before = digest(model)
    pruned = prune(model, x, ratio=ratio, scope=scope, seed=seed)
    assert digest(model) == before
    assert pruned.report.equal
    if not pruned.report.restricted:
        assert difference(pruned, model, x, zeroed) < 1e-9


@pytest.mark.parametrize("name", ODD)
def test_odd_networks_are_pruned_and_equal(name):
    model, x = odd(name), torch.randn(3, 6)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.report.equal and pruned.report.scale > 0
    assert pruned.plan.parameters[1] < 0.7 * pruned.plan.parameters[0]
    assert pruned.model(torch.cat([x, x])).shape == (6, 5)


def test_a_group_without_which_the_proof_fails_stays_whole_and_says_so():
    """Attention written by hand that scales by the root of its width: a cut of that width is another function."""

    def scaled(x, a, b):
        return x + b(torch.relu(a(x)) * a.weight.shape[0] ** -0.5)

    model, x = randomise_(Around(scaled, a=nn.Linear(8, 12), b=nn.Linear(12, 8))), torch.randn(3, 6)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    rows = {row.name: (row.left, row.reason) for row in pruned.plan.units}
    assert rows == {"first.weight": (4, ""), "parts.a.weight": (12, "the proof fails without some of it")}
    assert pruned.report.equal and difference(pruned, model, x) < EXACT
    whole = plan(model, x, ratio=0.5, scope="layer")
    check_refusal("NOT equal", lambda: apply(model, whole, x), EqualityError, leaves=model)


def test_a_masked_model_keeps_its_masks_in_step():
    model, x = example(Plain)
    masked = unstructured.prune(model, 0.5)
    pruned = prune(masked, x, ratio=0.5, scope="layer")
    assert pruned.report.equal
    kept = pruned.plan.kept["conv2.weight"]
    mask = unstructured.masks(masked)["conv2.weight"]
    assert torch.equal(unstructured.masks(pruned.model)["conv2.weight"], mask[kept[0]][:, kept[1]])


def test_repeated_blocks_that_fail_alike_stay_together_and_one_that_fails_alone_stays_alone():
    class Block(nn.Module):
        def __init__(self, root):
            super().__init__()
            self.a, self.b, self.root = nn.Linear(8, 12), nn.Linear(12, 8), root

        def forward(self, x):
            y = torch.relu(self.a(x))
            return x + self.b(y * y.shape[1] ** -0.5 if self.root else y)

    x = torch.randn(3, 8)
    for roots in ([True] * 5 + [False], [False] * 4 + [True] + [False]):
        torch.manual_seed(0)
        pruned = prune(nn.Sequential(*map(Block, roots), nn.Linear(8, 5)).eval(), x, ratio=0.5, scope="layer")
        left = [row.left for row in pruned.plan.units if row.name.endswith(".a.weight")]
        assert left == [12 if root else 6 for root in roots] and pruned.report.equal


def test_the_proof_may_run_on_another_input_than_the_trace():
    model, x = example(Plain)
    assert prune(model, x, ratio=0.5, check=x[:1]).report.scale != prune(model, x, ratio=0.5, check=x[1:]).report.scale
    assert prune(model, x, ratio=0.5, check={"x": x[:1]}).report.equal
    check_refusal("does not run", lambda: prune(model, x, ratio=0.5, check=x[:, :2]), EqualityError, leaves=model)
    assert prune(model, x, ratio=0.5, check=False).report is None


@pytest.mark.parametrize("name", ["bn1.running_mean", "bn1.weight", "conv1.weight", "conv2.weight"])
def test_a_wrong_cut_is_refused(name):
    """Every kept index is moved by one in one parameter: shapes fit, and the function is another."""
    model, x = example(Plain)
    chosen = plan(model, x, ratio=0.4, scope="layer")
    dim, indices = next(iter(chosen.kept[name].items()))
    size = model.state_dict()[name].shape[dim]
    wrong = {**chosen.kept, name: {**chosen.kept[name], dim: (indices + 1) % size}}
    moved = dataclasses.replace(chosen, kept=wrong)
    check_refusal("NOT equal ... not returned", lambda: apply(model, moved, x), EqualityError, leaves=model)


def test_a_cut_that_does_not_run_is_refused():
    model, x = example(Plain)
    chosen = plan(model, x, ratio=0.4, scope="layer")
    kept = {name: dims for name, dims in chosen.kept.items() if name != "bn1.weight"}
    forgetful = dataclasses.replace(chosen, kept=kept)
    check_refusal("does not run ... ignore", lambda: apply(model, forgetful, x), EqualityError, leaves=model)


def test_a_pass_that_draws_random_numbers_is_compared_on_the_same_ones():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.b(F.relu(self.a(x * torch.rand_like(x))))

    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(4, 6)
    state = torch.get_rng_state()
    assert prune(model, x, ratio=0.5).report.equal
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_output_is_zero_is_checked_with_noise():
    model, x = example(Plain)
    nn.init.zeros_(model.fc2.weight)
    nn.init.zeros_(model.fc2.bias)
    report = prune(model, x, ratio=0.5).report
    assert report.equal and report.noisy and report.scale > 0 and "noise" in str(report)


def test_a_norm_over_pruned_channels_is_said_and_taken_over_the_kept():
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(4, 6)
    pruned = prune(model, x, ratio=0.5)
    assert pruned.report.restricted == ("native_layer_norm in norm",) and "cannot be equal" in str(pruned.report)
    assert pruned.model.norm.normalized_shape == (4,)
    kept = pruned.plan.kept["a.weight"][0]
    with torch.no_grad():
        hidden = nn.functional.layer_norm(model.a(x)[:, kept], (4,), model.norm.weight[kept], model.norm.bias[kept])
        torch.testing.assert_close(pruned.model(x), hidden @ model.b.weight[:, kept].T + model.b.bias)


def test_half_precision_is_kept_and_checked_in_a_wider_type():
    model, x = example(Residual)
    pruned = prune(model.bfloat16(), x.bfloat16(), ratio=0.5)
    assert {p.dtype for p in pruned.model.parameters()} == {torch.bfloat16}
    assert pruned.report.equal and pruned.report.dtype == "float64"


# --- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(programs(), st.sets(st.sampled_from(HABITS), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_the_callers_model_is_left_as_it_was_whatever_its_forward_pass_writes_down(program, habits, ran, trains):
    model = randomise_(Stateful(program, habits), 1).train(trains)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    if ran:
        model(x)
    before, example_input, state = digest(model), x.clone(), torch.get_rng_state()
    for act in (trace, lambda model, x: prune(model, x, ratio=0.5)):
        try:
            act(model, x)
        except (InputError, EqualityError):  # refused is left as it was too
            assert habits & {"branches", "root", "fused"}
        assert digest(model) == before
    assert torch.equal(x, example_input) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_argument_is_untouched_and_shares_no_memory(kind):
    model, x = example(kind)
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, x, ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for value in [*pruned.model.parameters(), *pruned.model.buffers()]:
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pass_that_writes_to_its_input_and_buffers_leaves_both_as_they_were():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scale", torch.ones(6))

        def forward(self, x):
            self.calls += 1
            x *= self.scale.mul_(2)
            return self.b(F.relu(self.a(x), inplace=True).add_(1))

    torch.manual_seed(0)
    model, x = Writes().double(), torch.randn(2, 6, dtype=torch.float64)
    before = x.clone()
    pruned = prune(model, x, ratio=0.5)
    assert pruned.report.equal and torch.equal(x, before)
    for net in (model, pruned.model):
        assert int(net.calls) == 0 and (net.scale == 1).all()


@pytest.mark.parametrize("first", [[], [0]], ids=["empty", "filled"])
def test_a_hook_that_holds_the_model_itself_writes_into_none_of_its_containers(first):
    """Passes run on copies, but a hook is copied with what it holds."""
    model, x = example(Plain)
    model.seen, model.places, model.log = set(first), dict.fromkeys(first), list(first)

    def write(*_):
        model.seen.add(1)
        model.places[1] = "here"
        model.log.append(1)

    model.register_forward_hook(write)
    prune(model, x, ratio=0.5)
    assert (model.seen, model.places, model.log) == (set(first), dict.fromkeys(first), first)


@pytest.mark.parametrize("kind", [Plain, Attention])
def test_inside_inference_mode_the_new_model_is_an_ordinary_one(kind):
    """Parameters and input from within too: torch allows no gradient through them."""
    with torch.inference_mode():
        model, x = example(kind)
        pruned = prune(model, x, ratio=0.5, batches=[x], criterion="activation")
        chosen = plan(model, x, ratio=0.5)
        again = apply(model, chosen, x)
        assert trace(model, x)
        scanned = sensitivity.scan(model, x, lambda net: float(net(x).mean()), [0.5], criterion="l2", progress=False)
    assert len(scanned.rows) == len(chosen.units)
    assert pruned.report.equal and again.report.equal
    x = x.clone()
    for net in (pruned.model.train(), again.model.train()):
        net(x).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    weight = torch.ones(model.fc2.weight.shape if kind is Plain else model.out.weight.shape, requires_grad=True)
    (indices,) = (dims[1] for name, dims in chosen.kept.items() if name in ("fc2.weight", "out.weight"))
    weight[:, indices].sum().backward()  # the indices are ordinary tensors as well


def test_training_flags_frozen_parameters_hooks_and_names_stay():
    model, x = example(Plain)
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    calls = []
    model.conv2.register_forward_hook(lambda *_: calls.append(1))
    pruned = prune(model, x, ratio=0.5)
    assert [m.training for m in pruned.model.modules()] == [m.training for m in model.modules()]
    assert not pruned.model.conv1.weight.requires_grad and pruned.model.conv2.weight.requires_grad
    assert pruned.model.conv1.weight.shape[0] < model.conv1.weight.shape[0], "frozen parameters are pruned too"
    calls.clear()
    pruned.model(x)
    assert calls == [1]
    assert list(pruned.model.state_dict()) == list(model.state_dict())


def assert_exported(model, x):
    """By torch.export, for batches of any size: no size of the example is left in the cut model."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    twice = torch.cat([x, x])
    torch.testing.assert_close(program.module()(twice), model(twice))


def test_attributes_say_what_the_parameters_are():
    model, x = example(Depthwise)
    small = prune(model, x, ratio=0.5, scope="layer").model
    for layer in small.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert (small.depthwise.groups, small.grouped.groups) == (6, 3)
    model, x = example(UpDown)
    small = prune(model, x, ratio=0.5, scope="layer").model
    assert (small.norm.num_groups, small.norm.num_channels, small.act.num_parameters) == (2, 4, 4)
    assert small.up.weight.shape[:2] == (small.up.in_channels, small.up.out_channels)


def test_a_subclass_of_a_layer_is_cut_as_the_layer():
    class Own(nn.LayerNorm):
        pass

    model = nn.Sequential(nn.Linear(6, 8), Own(8), nn.Linear(8, 5))
    pruned = prune(model, torch.randn(4, 6), ratio=0.5)
    assert pruned.report.equal and pruned.model[1].normalized_shape == (4,)


def test_a_module_that_is_not_called_follows_the_one_that_it_is_in_and_a_tuple_its_shape():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.shape = 2, (4, 4, 2)
            self.table = nn.Linear(3, 2)

        def bias(self, x):  # [4 * 4, 3] -> [heads, 4, 4]
            return self.table(x).view(-1, self.heads).view(self.shape).permute(2, 0, 1)

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.heads, self.size = Heads(), 2, 4
            self.q, self.k, self.v, self.out = (nn.Linear(a, b) for a, b in [(6, 8), (6, 8), (6, 8), (8, 5)])

        def forward(self, x):  # [N, 4, 6]
            q, k, v = (f(x).view(len(x), -1, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
            bias = self.bias.bias(torch.linspace(-1, 1, 48).view(16, 3).to(x))
            return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    pruned = prune(Biased().eval(), torch.randn(3, 4, 6), ratio=0.5)
    assert pruned.report.equal and (pruned.model.bias.heads, pruned.model.bias.shape) == (1, (4, 4, 1))


def test_multihead_attention_keeps_heads_and_width_in_step():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 6, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 24), layer, nn.Linear(24, 3)).eval()
    x = torch.randn(3, 4, 5)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    attention = pruned.model[1].self_attn
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (12, 3, 4)
    assert pruned.model(x).shape == (3, 4, 3) and pruned.report.equal
    assert_exported(pruned.model, x)
    pruned.model.train()(x).sum().backward()


def test_the_memory_format_stays():
    model, x = example(Residual)
    small = prune(model.to(memory_format=torch.channels_last), x, ratio=0.5, scope="layer").model
    for layer in (small.stem, small.conv1, small.conv2):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.conv1.weight.is_contiguous()


def test_shared_weights_stay_shared():
    model, x = example(Tied)
    small = prune(model, x, ratio=0.5).model
    assert small.a.weight is small.b.weight


def test_a_pruned_model_trains_exports_and_is_pruned_again():
    model, x = example(Shuffle)
    once = prune(model, x, ratio=0.3)
    once.model(x).sum().backward()
    assert all(p.grad is not None for p in once.model.parameters())
    again = prune(once.model, x, ratio=0.5)
    assert again.plan.parameters[1] < once.plan.parameters[1]
    assert_exported(again.model, x)


# --- on the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_saved_is_loaded_whatever_weights_the_dense_model_has(kind, tmp_path):
    model, x = example(kind)
    once = prune(model, x, ratio=0.3)
    twice = prune(once.model, x, ratio=0.4, criterion="random")
    with torch.no_grad():
        for parameter in twice.model.parameters():
            parameter.add_(1)  # trained since
    surgery.save(twice.model, [once.plan, twice.plan], tmp_path / "net.safetensors")
    torch.manual_seed(7)
    dense = kind().eval()
    before = digest(dense)
    loaded = surgery.load(dense, tmp_path / "net.safetensors")
    assert torch.equal(loaded(x), twice.model(x)) and digest(dense) == before
    assert str(loaded) == str(twice.model) and list(loaded.state_dict()) == list(twice.model.state_dict())


def test_buffers_outside_the_state_dict_and_numbers_of_the_config_are_saved(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 5)
            self.register_buffer("table", torch.arange(24.0).view(3, 8), persistent=False)

        def forward(self, x):  # [N, 3, 6]
            return self.out(self.embed(x) + self.table)

    model, x = Positions(), torch.randn(2, 3, 6)
    pruned = prune(model, x, remove={"embed": [0, 3]})
    surgery.save(pruned.model, [pruned.plan], tmp_path / "net")
    loaded = surgery.load(Positions(), tmp_path / "net")
    assert loaded.table[0].tolist() == [1, 2, 4, 5, 6, 7] and torch.equal(loaded(x), pruned.model(x))
    llama = families.family("llama")
    pruned = transformers.prune_heads(llama, {layer: [0, 1] for layer in range(3)})
    surgery.save(pruned.model, [pruned.plan], tmp_path / "llama")
    loaded = surgery.load(families.family("llama"), tmp_path / "llama")
    assert loaded.config.num_attention_heads == pruned.model.config.num_attention_heads == 2
    ids = families.inputs("llama")["input_ids"][:1]
    assert torch.equal(loaded.generate(ids, do_sample=False), pruned.model.generate(ids, do_sample=False))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, x = example(Plain)
    pruned, folder = prune(model, x, ratio=0.5), tmp_path_factory.mktemp("saved")
    surgery.save(pruned.model, [pruned.plan], folder / "net")
    (folder / "damaged").write_bytes((folder / "net").read_bytes()[:-8])
    return SimpleNamespace(model=model, pruned=pruned, folder=folder)


ON_THE_DISK: Refusals = {
    "not what the last plan left of it": lambda saved: surgery.save(
        saved.model, [saved.pruned.plan], saved.folder / "x"
    ),
    "of another architecture than Residual": lambda saved: surgery.load(example(Residual)[0], saved.folder / "net"),
    "of another model: ... is ... float32 ... there and ... float64 ... here": lambda saved: surgery.load(
        copy.deepcopy(saved.model).double(), saved.folder / "net"
    ),
    "holds no pruned model ... save it again": lambda saved: surgery.load(saved.model, saved.folder / "x"),
    "save it again": lambda saved: surgery.load(saved.model, saved.folder / "damaged"),
}


@refused(ON_THE_DISK)
def test_what_cannot_be_saved_or_loaded_is_refused(saved, words, call):
    error = DataError if "save it again" in words else InputError
    check_refusal(words, lambda: call(saved), error, leaves=saved.model)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["damaged", "net"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_copied_says_so():
    model, x = example(Residual)
    model.last = model(x)  # has a graph, which deepcopy refuses
    assert prune(model, x, ratio=0.5).report.equal
    model.lock = threading.Lock()
    check_refusal("cannot be copied", lambda: prune(model, x, ratio=0.5), leaves=model)


def test_a_plan_prints_the_channels_of_each_group_and_the_units_that_go_together():
    pairs = nn.GroupNorm(4, 8)  # two channels a group
    model = nn.Sequential(nn.Conv2d(3, 8, 1), pairs, nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    lines = str(plan(model.eval(), torch.randn(1, 3, 4, 4), ratio=0.3, scope="layer")).splitlines()
    assert lines[1].split() == ["0.weight", "8", "2", "6", "in", "units", "of", "2"]
    assert lines[2].split() == ["3.weight", "6", "2", "4"]


def test_a_plan_of_another_model_is_refused():
    model, x = example(Residual)
    chosen = plan(model, x, ratio=0.5)
    other, y = example(Attention)
    check_refusal("another model", lambda: apply(other, chosen, y), leaves=other)


class Functional(nn.Module):
    """A norm over `dim` numbers, which no parameter tells."""

    def __init__(self, norm):
        super().__init__()
        self.dim, self.norm = 16, norm

    def forward(self, x):
        return self.norm(x, (self.dim,))


@pytest.mark.parametrize(
    ("norm", "sizes"),
    [
        (nn.LayerNorm(16, elementwise_affine=False), {"normalized_shape": (8,)}),
        (nn.RMSNorm(16, elementwise_affine=False), {"normalized_shape": (8,)}),
        (nn.RMSNorm(16), {"normalized_shape": (8,)}),
        (nn.GroupNorm(1, 16, affine=False), {"num_channels": 8, "num_groups": 1}),
        (nn.GroupNorm(4, 16, affine=False), {"num_channels": 8, "num_groups": 2}),
        (Functional(F.layer_norm), {"dim": 8}),
        (Functional(F.rms_norm), {"dim": 8}),
    ],
)
def test_norms_that_no_parameter_tells_the_size_of_are_cut_too(norm, sizes):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), norm, nn.Linear(16, 3)).eval(), torch.randn(4, 6)
    pruned = prune(model, x, ratio=0.5)
    assert pruned.report.equal and {key: getattr(pruned.model[1], key) for key in sizes} == sizes
    kept = pruned.plan.kept["2.weight"][1]
    with torch.no_grad():
        hidden = pruned.model[1](model[0](x)[:, kept])
        torch.testing.assert_close(pruned.model(x), hidden @ model[2].weight[:, kept].T + model[2].bias)
