"""Which channels hang together: what is found in small networks, and what is said where nothing can be."""

import operator

import pytest
import torch
import torch.nn.functional as F
from networks import (
    Around,
    Attention,
    Bare,
    Dense,
    Depthwise,
    Plain,
    Residual,
    Shuffle,
    Tied,
    WithForward,
    by_sign,
    difference,
    example,
    odd,
)
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.graph.groups import Coupling, trace
from labkit.graph.labels import Labels
from labkit.graph.rules import RULES
from labkit.pruning.channels import prune


def by_name(model, x):
    return {group.name: group for group in trace(model, x)}


def dimensions(group):
    return {(member.name, member.dim): member.role for member in group.members}


class Shared(nn.Module):
    """Heads that all read the one key and value; their scores are added to zeros [heads, 1, 1] (T5, multi-query)."""

    def __init__(self):
        super().__init__()
        self.groups = 4
        self.q, self.kv, self.out = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(12, 2)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (-1, 3)).transpose(1, 2)  # [B, heads, T, 3]
        kv = self.kv(x)[:, None].expand(-1, self.groups, -1, -1)
        scores = q @ kv.mT + torch.zeros(self.groups, 1, 1, device=x.device)
        return self.out((scores.softmax(-1) @ kv).transpose(1, 2).flatten(2))


HALF, MASK = (slice(None), slice(4)), torch.tensor([True] * 3 + [False] * 5)


def _written(x, part, value):
    x[part] = value
    return x


class Beside(Around):
    """`fn` on a width of 8, beside another width that can shrink."""

    def __init__(self, fn):
        super().__init__(fn)
        self.spare1, self.spare2 = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x):
        return super().forward(x) + self.spare2(self.spare1(x))


def reasons(fn):
    """What is said about the width that `fn` is put on."""
    return dict(Coupling.of(Beside(fn), torch.randn(2, 6)).unprunable).get("first.weight dimension 0", "")


# --- what hangs together ----------------------------------------------------------------------------------------------


def test_a_plain_network_takes_bias_norm_statistics_and_reader():
    groups = by_name(*example(Plain))
    assert dimensions(groups["conv1.weight"]) == {
        ("conv1.weight", 0): "makes",
        ("conv1.bias", 0): "makes",
        ("bn1.weight", 0): "makes",
        ("bn1.bias", 0): "makes",
        ("bn1.running_mean", 0): "makes",
        ("bn1.running_var", 0): "makes",
        ("conv2.weight", 1): "reads",
    }
    assert [groups[name].units for name in ("conv1.weight", "conv2.weight", "fc1.weight")] == [8, 12, 20]


def test_a_flattened_channel_owns_its_positions():
    (member,) = [m for m in by_name(*example(Plain))["conv2.weight"].members if m.name == "fc1.weight"]
    assert member.role == "reads"
    assert member.indices(3).tolist() == list(range(3 * 16, 4 * 16))


def test_a_residual_sum_ties_both_summands():
    groups = by_name(*example(Residual))
    assert {("stem.weight", 0), ("conv2.weight", 0), ("conv1.weight", 1), ("fc.weight", 1)} <= set(
        dimensions(groups["stem.weight"])
    )
    assert set(groups) == {"stem.weight", "conv1.weight"}


def test_concatenated_parts_stay_apart_in_their_readers():
    groups = by_name(*example(Dense))
    assert {name: g.units for name, g in groups.items()} == {"a.weight": 6, "b.weight": 4, "c.weight": 4}
    (reader,) = [m for m in groups["b.weight"].members if m.name == "fc.weight"]
    assert reader.units.tolist() == [-1] * 6 + [0, 1, 2, 3] + [-1] * 4


def test_whole_groups_of_a_grouped_convolution():
    group = by_name(*example(Depthwise))["expand.weight"]
    members = {m.name: m for m in group.members if m.dim == 0}
    assert group.units == 6
    assert members["depthwise.weight"].indices(1).tolist() == [2, 3]  # 12 channels in 6 groups of 2
    assert members["grouped.weight"].indices(1).tolist() == [3, 4, 5]  # 18 outputs in 6 groups of 3


def test_a_shuffle_and_a_chunk_keep_both_halves_even():
    model, x = example(Shuffle)
    coupling = Coupling.of(model, x)
    group = next(g for g in coupling.groups if g.name == "a.weight")
    for unit in range(group.units):
        counts = [len(m.indices(unit)) for m in group.members if m.name in ("a.weight", "b.weight")]
        assert counts[0] == counts[1]


def test_a_tied_weight_is_there_once_and_a_layer_used_twice_ties_its_two_sides():
    groups = by_name(*example(Tied))
    assert {("twice.weight", 0), ("twice.weight", 1)} <= set(dimensions(groups["stem.weight"]))
    names = [m.name for m in groups["a.weight"].members]
    assert "a.weight" in names and "b.weight" not in names and "b.bias" in names


def test_bare_parameters_belong_to_the_width_they_meet():
    groups = by_name(*example(Bare))
    assert {("token", 2), ("positions", 2), ("gamma", 0), ("matrix", 0)} <= set(dimensions(groups["embed.weight"]))
    assert dimensions(groups["matrix"]) == {("matrix", 1): "makes", ("out.weight", 1): "reads"}


def test_heads_are_the_units_of_attention():
    def reads(m, x, memory):
        return m.out(m.attention(m.embed(x), memory, memory, need_weights=False)[0])

    attention = nn.MultiheadAttention(16, 4, batch_first=True, vdim=12, kdim=12)
    model = WithForward(reads, embed=nn.Linear(6, 16), attention=attention, out=nn.Linear(16, 5))
    groups = trace(model, (torch.randn(3, 5, 6), torch.randn(3, 7, 12)))
    heads = next(g for g in groups if ("attention.out_proj.weight", 1) in dimensions(g))
    assert heads.units == 4
    (out,) = [m for m in heads.members if m.name == "attention.out_proj.weight"]
    assert out.indices(2).tolist() == [8, 9, 10, 11]


def test_a_head_that_is_only_run_in_training_is_coupled_too():
    def both_in_training(m, x):
        x = m.stem(x)
        return (m.main(x), m.aux(x)) if m.training else m.main(x)

    model = WithForward(both_in_training, stem=nn.Linear(6, 8), main=nn.Linear(8, 5), aux=nn.Linear(8, 5))
    assert ("aux.weight", 1) in dimensions(by_name(model, torch.randn(2, 6))["stem.weight"])


ROWS, COLUMNS = torch.tensor([[0, 1]]), torch.tensor([0, 2])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:, None, :, None].squeeze(),
        lambda x: x[:, None, :, None].squeeze(1).squeeze(0).squeeze(-1),
        lambda x: x[:, None, :, None].squeeze((1, 2, 3)),
        lambda x: x[:, None, None].expand(-1, 3, 3, -1)[:, ROWS[0], COLUMNS].mean(1),  # indexed side by side
        lambda x: x[:, :, None].expand(-1, -1, 3)[ROWS, :, COLUMNS][0],  # and apart: indexed dimensions come first
        lambda x: F.pixel_shuffle(x.view(2, -1, 1, 1), 2).flatten(1),
        lambda x: F.pixel_unshuffle(x.view(2, -1, 1, 1).expand(-1, -1, 2, 2), 2).view(2, -1, 4).mean(2),
        lambda x: F.fold(F.unfold(x.view(2, -1, 1, 1).expand(-1, -1, 4, 4), 3) * 2, 4, 3).mean((2, 3)),
        lambda x: F.fold(x.view(2, -1, 1), 2, 2).flatten(1),  # four positions of two channels
    ],
)
def test_a_width_can_shrink_through_views_and_indices_of_other_dimensions(fn):
    pruned = prune(Beside(fn).eval(), torch.randn(2, 6), ratio=0.5, scope="layer")
    assert pruned.model.first.out_features == 4 and pruned.report.equal


def test_a_channel_goes_with_all_the_channels_that_an_unshuffle_makes_of_it():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(24, 2, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    units = {m.name: m.indices(1).tolist() for m in by_name(model, x)["0.weight"].members}
    assert units == {"0.weight": [1], "0.bias": [1], "2.weight": [4, 5, 6, 7]}
    pruned = prune(model, x, ratio=0.5)
    assert pruned.model[2].in_channels == 12 and pruned.report.equal


def test_heads_that_are_joined_with_a_part_without_them_keep_what_both_have():
    def joined(m, x):
        heads = m.first(x).view(len(x), 2, -1)
        return m.last(torch.cat([heads, m.token.expand(len(x), -1, -1)], 1).flatten(1))

    token = nn.Parameter(torch.randn(1, 1, 4))
    model = WithForward(joined, first=nn.Linear(6, 8), token=token, last=nn.Linear(12, 5))
    group = by_name(model, torch.randn(3, 6))["first.weight"]
    units = {m.name: m.indices(1).tolist() for m in group.members}
    assert units == {"first.weight": [1, 5], "first.bias": [1, 5], "token": [1], "last.weight": [1, 5, 9]}


def test_experts_in_one_product_share_their_width():
    def experts(m, x):
        return m.last(torch.baddbmm(m.bias, m.first(x).expand(3, -1, -1), m.weight).relu().sum(0))

    parameters = {"weight": nn.Parameter(torch.randn(3, 8, 10)), "bias": nn.Parameter(torch.randn(3, 1, 10))}
    model = WithForward(experts, first=nn.Linear(6, 8), last=nn.Linear(10, 5), **parameters)
    groups = by_name(model, torch.randn(2, 6))
    assert dimensions(groups["first.weight"])["weight", 1] == "reads"
    assert dimensions(groups["weight#2"]) == {("weight", 2): "makes", ("bias", 2): "makes", ("last.weight", 1): "reads"}
    pruned = prune(model, torch.randn(2, 6), ratio=0.5, scope="layer")
    assert pruned.report.equal and pruned.model.weight.shape == (3, 4, 5)


# --- what is not, and why ---------------------------------------------------------------------------------------------


def test_what_is_one_unit_is_listed_and_kernel_positions_are_not():
    upscaled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1))
    why = dict(Coupling.of(upscaled, torch.randn(1, 3, 8, 8)).unprunable)
    assert why["1.weight dimension 0"] == "all of it hangs together as one unit"
    assert not any(what.endswith(("dimension 2", "dimension 3")) for what in why)


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: torch.fft.fft(x, dim=1).real, "entries mixed"),
        (lambda x: x + torch.cdist(x, x).sum(1, keepdim=True), "no rule for the operator _cdist_forward"),
        (lambda x: x + torch.ones(8), "the forward pass needs this size"),
        (lambda x: x.cumsum(1), "mixed"),
        (lambda x: F.pad(x[:, 1:6:2], (2, 3)), "fixed position"),
        (lambda x: x[:, 2:5].repeat(1, 3)[:, :8], "the forward pass needs this size"),
        (lambda x: F.pad(x, (1, 1))[:, 1:-1], "padded with constants"),
        (lambda x: x[:, torch.randperm(8)], "indexed by a tensor"),
        (lambda x: x[:, MASK].repeat(1, 3)[:, :8], "indexed by a tensor"),
        (lambda x: x.index_put_((x > 0,), torch.zeros(())), "index_put"),  # torch 2.15 fills x[x > 0] = 0
        (lambda x: x.roll(1, 1), "rolled"),
        (lambda x: x.view(2, 8), "the forward pass needs this size"),
        # written in place at fixed positions
        (lambda x: _written(x, HALF, torch.ones(4)), "the forward pass needs this size"),
        (lambda x: _written(x, HALF, 1.0), "the forward pass needs this size"),
        (lambda x: _written(x, (slice(None), 3), 0.0), "indexed at a fixed position"),
        (lambda x: _written(x, (slice(None), MASK), 0.0), "index_put"),
        (lambda x: torch.ones(2, 8).copy_(x), "the forward pass needs this size"),
        (lambda x: torch.ones(2, 8).mul_(x), "the forward pass needs this size"),
        (lambda x: torch.zeros(2, 8).add_(x), "the forward pass needs this size"),
        (lambda x: x.index_copy_(1, torch.tensor([0, 7]), x[:, :2]), "index_copy"),
        (lambda x: x.fill_diagonal_(0), "no rule for the operator as_strided"),
        (lambda x: _written(x, HALF, x[:, 4:] * 2), "the forward pass needs this size"),  # 4 is a number
    ],
)
def test_what_cannot_shrink_is_listed_with_its_reason(fn, what):
    assert what in reasons(fn)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.relu_().mul_(2).add_(x),
        lambda x: torch.cat([half := x.chunk(2, 1)[0].mul_(2), half + x.chunk(2, 1)[1].copy_(half)], 1),
        lambda x: torch.zeros_like(x).copy_(x),
        lambda x: torch.add(x, 1, out=torch.empty(2, 8, dtype=x.dtype)),  # torch makes it the size that it has to be
        lambda x: torch.empty_like(x).normal_().zero_() + x,
    ],
)
def test_what_is_written_in_place_channel_by_channel_can_go(fn):
    model, x = Beside(fn).eval(), torch.randn(2, 6)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.model.first.out_features == 4 and pruned.report.equal
    assert difference(pruned, model, x) < 1e-12


def test_an_activation_that_is_moved_to_the_device_of_a_constant_can_go():
    model, x = Beside(lambda x: x.to(MASK.device) * 2).eval(), torch.randn(2, 6)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.model.first.out_features == 4 and pruned.report.equal
    assert difference(pruned, model, x) < 1e-12


def test_of_what_is_cut_at_a_number_in_the_code_the_part_behind_it_can_go():
    model, x = Beside(lambda x: torch.cat([x[:, :2] * 2, x[:, 2:]], 1)).eval(), torch.randn(2, 6)
    pruned = prune(model, x, ratio=0.5, scope="layer")
    assert pruned.plan.kept["first.weight"][0][:2].tolist() == [0, 1] and pruned.model.first.out_features == 5
    assert difference(pruned, model, x) < 1e-12


@pytest.mark.parametrize(
    "fn",
    [
        by_sign,
        lambda x: x + x[x > 0].sum(),
        lambda x: x + x.masked_select(x > 0).sum(),
        lambda x: x if torch.ones(2, 8).copy_(x)[0].sum() > 0 else -x,
        lambda x: x.repeat_interleave((x > 0).long()[:, 0], dim=0).mean(0) + x,
    ],
)
def test_a_pass_that_looks_at_the_values_of_activations_is_refused(fn):
    check_refusal("depends on the values of its activations", lambda: trace(Beside(fn), torch.randn(2, 6)))


X = torch.randn(2, 6)
DOES_NOT_RUN = "does not run on the example input ( ... {} ... ): give args"
REFUSALS: Refusals = {
    "Nothing in this model can be pruned ... the model's output": lambda: trace(nn.Linear(6, 3), X),
    "no parameters": lambda: trace(nn.ReLU(), X),
    "The operator ... cannot run without data": lambda: trace(
        Beside(lambda x: x + (x > 0).long().flatten().bincount(minlength=8)), X
    ),
    DOES_NOT_RUN.format("missing 1 required positional argument"): lambda: trace(Around(torch.relu), ()),
    DOES_NOT_RUN.format("mat1 and mat2 shapes cannot be multiplied"): lambda: trace(Around(torch.relu), X[:, 1:]),
    DOES_NOT_RUN.format("takes 2 positional arguments but 3 were given"): lambda: trace(Around(torch.relu), (X, X[0])),
    # wrapped or lazy models, with what to do instead
    "give model.module": lambda: trace(nn.DataParallel(Around(torch.relu)), X),
    "give the eager module": lambda: trace(torch.jit.trace(Around(torch.relu), X), X),
    "The model is scripted or traced": lambda: trace(
        nn.Sequential(torch.jit.script(nn.Linear(6, 6)), Around(torch.relu)), X
    ),
    "lazy": lambda: trace(nn.Sequential(nn.LazyLinear(6), Around(torch.relu)), X),
}


@refused(REFUSALS)
def test_what_cannot_be_traced_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_the_width_of_a_single_head_stays_for_its_scale():
    why = dict(Coupling.of(odd("one head"), torch.randn(3, 6)).unprunable)
    assert "which the scale depends on" in why["parts.q.weight dimension 0"]
    assert "parts.v.weight dimension 0" not in why


def test_an_unused_parameter_is_listed():
    model, x = example(Residual)
    model.spare = nn.Linear(3, 3)
    assert ("spare.weight", "is not used by the forward pass") in Coupling.of(model, x).unprunable


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Depthwise, Attention])
def test_every_operator_that_an_export_sees_has_a_rule(kind):
    """torch.export finds the operators by another way."""
    model, x = example(kind)
    graph = torch.export.export(model, (x,), strict=False).run_decompositions().graph
    targets = {node.target for node in graph.nodes if node.op == "call_function"} - {operator.getitem}
    names = {target._schema.name.removeprefix("aten::") for target in targets}
    assert names and names - {"slice_scatter"} <= set(RULES)  # export's form of a copy_ into a slice


# --- labels -----------------------------------------------------------------------------------------------------------


def test_pieces_that_cannot_be_even_are_pinned():
    labels = Labels()
    x = labels.fresh(4)
    labels.pin(x[:1], "fixed")
    labels.keep_cut(x, 0, 2, "cut")
    classes, pinned = labels.resolve()
    free = [i for i in range(4) if classes[i] not in pinned]  # one of each half may go, and only together
    assert len(free) == 2 and classes[free[0]] == classes[free[1]] and free[0] == 1
    assert "cut" in pinned.values()


def test_what_is_repeated_or_made_in_the_pass_follows_what_it_meets():
    groups = by_name(Shared(), torch.randn(2, 5, 6))
    assert groups["q.weight"].units == 4 and groups["q.weight"].width == 3
    assert dimensions(groups["q.weight"]) == {
        ("q.weight", 0): "makes",
        ("q.bias", 0): "makes",
        ("out.weight", 1): "reads",
    }
    pruned = prune(Shared(), torch.randn(2, 5, 6), ratio={"q.weight": 0.5})
    assert pruned.report.equal and pruned.model.groups == 2


# --- what graph networks do -------------------------------------------------------------------------------------------

SOURCES, TARGETS = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([1, 2, 3, 4, 0, 1])


def spread(h):
    """The target of each edge, for each channel: [edges, channels], of integers that have no labels."""
    return TARGETS.view(-1, 1).expand(-1, h.shape[-1])


@pytest.mark.parametrize(
    "fn",
    [
        lambda h: h.new_zeros(h.shape).scatter_add_(0, spread(h), h[SOURCES]),
        lambda h: torch.zeros_like(h).scatter_reduce(0, spread(h), h[SOURCES], "amax", include_self=False),
        lambda h: torch.zeros_like(h).scatter_reduce(0, spread(h), h[SOURCES], "mean"),
        lambda h: h.scatter(0, spread(h), 2.0),
        lambda h: torch.zeros_like(h).index_add(0, TARGETS, h[SOURCES]),
        lambda h: torch.zeros_like(h).index_reduce(0, TARGETS, h[SOURCES], "amax"),
        lambda h: torch.zeros_like(h).index_copy(0, TARGETS[:4], h[:4]),
        lambda h: h.gather(0, spread(h)),
        lambda h: h.gather(0, h.argsort(0)),
        lambda h: h[h.sum(1).topk(3).indices.cpu()],
    ],
)
def test_channels_go_through_sums_over_edges(fn):
    torch.manual_seed(0)
    model, x = Around(lambda h: fn(h).relu()), torch.randn(5, 6)
    pruned = prune(model, x, ratio=0.5)
    assert pruned.model.first.out_features == 4 and pruned.report.equal and pruned.report.scale > 0
    if not pruned.report.restricted:
        assert difference(pruned, model, x) < 1e-12


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (lambda h: torch.zeros_like(h).scatter_add(0, TARGETS.view(-1, 1).expand(-1, 8), h[SOURCES]), "needs this"),
        (lambda h: torch.zeros_like(h).scatter_add(0, spread(h)[:, :3], h[SOURCES]), "no rule for the operator"),
        (lambda h: torch.zeros_like(h).scatter_add(1, torch.zeros(2, 8, dtype=torch.int64), h), "indexed by a tensor"),
    ],
)
def test_an_index_that_is_as_wide_as_the_channels_keeps_them(fn, what):
    assert what in reasons(fn)
