"""A sample of the zoo is pruned and equal, and the check that says so finds what is wrong."""

import copy
import types

import pytest
import torch
import zoo
from torch import nn

from labkit.pruning import channels

# Each for another mechanism that a trace has to go through.
TIMM = (
    "test_vit",  # heads
    "test_nfnet",  # weight standardisation
    "test_byobnet",
    "test_mambaout",  # gates, splits of unequal parts
    "convnext_zepto_rms",
    "efficientvit_m0",  # cascaded heads
    "ghostnet_050",  # cheap channels concatenated
    "mnasnet_small",
    "resnet10t",
    "repghostnet_050",
    "regnety_002",  # grouped convolutions, squeeze and excitation
    "test_vit_relpos",  # position biases by head
)
TRANSFORMERS = (
    "bert",
    "gpt2",  # Conv1D
    "llama",  # key-value heads
    "gpt_neox",  # query, key and value of a head side by side
    "modernbert",  # the three in one matrix
    "olmo2",  # norms over all heads
    "qwen3_moe",  # experts
    "t5",  # shared position biases
    "bart",
    "vit",
    "whisper",
    "deberta-v2",  # heads folded into the batch
)


# a mechanism of which another model of the sample, or tests of labkit, stay by day
NIGHTLY = ("convnext_zepto_rms", "mnasnet_small", "repghostnet_050", "regnety_002", "bart", "vit", "whisper")


def sample(library: str, names: tuple[str, ...]) -> list:
    return [pytest.param(f"{library}/{name}", marks=pytest.mark.nightly if name in NIGHTLY else ()) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sample("timm", TIMM), *sample("transformers", TRANSFORMERS)])
@pytest.mark.filterwarnings("ignore")
def test_a_sample_is_pruned_and_equal(name):
    pytest.importorskip(name.split("/")[0])
    torch.manual_seed(0)
    row = zoo.row("labkit", name)
    assert (row["outcome"], row["reason"]) == ("equal", "")
    assert row["left"] < 0.67
    if name.startswith("transformers"):
        assert row["heads"] == ""
        assert row["neurons"] == "" or name == "transformers/qwen3_moe"


def test_the_sample_is_of_the_zoo():
    names = {f"timm/{name}" for name in zoo.ZOO["timm"]["names"]}
    names |= {f"transformers/{name}" for name in zoo.ZOO["transformers"]["names"]}
    assert names >= {*(f"timm/{name}" for name in TIMM), *(f"transformers/{name}" for name in TRANSFORMERS)}
    assert len(zoo.ZOO["timm"]["names"]) >= 100 and len(zoo.ZOO["transformers"]["names"]) >= 60
    assert names.isdisjoint(zoo.ZOO["held_out"]["names"])


# --- the check --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, a: int = 6, b: int = 4):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, a, 3), nn.GroupNorm(1, a), nn.Conv2d(a, b, 1)
        self.tied = nn.Linear(b, 5)

    def forward(self, x):
        return self.tied(self.second(self.norm(self.first(x)).sigmoid()).mean((2, 3)))


def cut(dense: Net, made: list[int], read: list[int]) -> Net:
    """The channels `made` of the first layer stay, the second one reads `read`."""
    small = Net(len(made))
    with torch.no_grad():
        for name, x in small.named_parameters():
            indices = made if name.startswith(("first", "norm")) else ...
            x.copy_(
                dense.get_parameter(name)[:, read] if name == "second.weight" else dense.get_parameter(name)[indices]
            )
    return small


@pytest.fixture
def dense():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for name, x in net.named_parameters():
            zoo.spread_(x, name, torch.Generator().manual_seed(1))
    return net


X = (torch.randn(1, 3, 8, 8),)


def test_the_right_cut_is_equal_and_every_wrong_one_is_not(dense):
    """Of a norm over pruned channels too, and after an activation that is not zero at zero."""
    stays = [0, 2, 3, 5]
    assert zoo.difference(dense, cut(dense, stays, stays), X, {}) < 0.01
    for other in ([0, 2, 3, 4], [2, 0, 3, 5], [1, 2, 3, 5]):
        assert zoo.difference(dense, cut(dense, stays, other), X, {}) > 100
    for change in ("first.bias", "second.weight", "norm.weight"):
        wrong = cut(dense, stays, stays)
        wrong.get_parameter(change).data.flatten()[0] *= 1.001
        assert zoo.difference(dense, wrong, X, {}) > 1, change


def test_what_labkit_cuts_passes_and_a_scale_that_it_forgot_would_not(dense):
    small = channels.prune(dense, X, ratio=0.5, scope="layer").model
    assert zoo.difference(dense, small, X, {}) < 0.01
    small.tied.forward = lambda x: nn.Linear.forward(small.tied, 2 * x)
    assert zoo.difference(dense, small, X, {}) > 100


def test_a_weight_that_the_tool_has_untied_is_whole_in_its_other_place():
    embedding, reader = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    reader.weight = embedding.weight
    dense = nn.ModuleDict({"embedding": embedding, "reader": reader})
    small = nn.ModuleDict({"embedding": nn.Embedding(9, 2), "reader": nn.Linear(4, 9, bias=False)})
    small["embedding"].weight.data = embedding.weight.data[:, [1, 3]]
    small["reader"].weight.data = embedding.weight.data.clone()
    masked = zoo.masked(dense, small)
    assert torch.equal(masked["reader"].weight, embedding.weight)
    assert torch.equal(masked["embedding"].weight[:, [0, 2]], torch.zeros(9, 2))


def test_a_model_that_was_changed_is_seen(dense):
    before = copy.deepcopy(dense)
    assert zoo.same(dense, before)
    dense.norm.bias.data[0] += 1
    assert not zoo.same(dense, before)


class Holding(nn.Module):
    """Gives what it computes in an object of no known kind, beside a cache that a later call would read."""

    def __init__(self, layer: nn.Module, factor: float = 1.0):
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x):
        result = types.SimpleNamespace(first=self.layer(x) * self.factor, rest=iter([x.sum()]))
        result.again = result
        result.state = type("DynamicCache", (), {"keys": x})
        return result


def test_what_stands_in_a_plain_object_is_compared_too():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert [len(y.shape) for y in zoo.run(Holding(layer), (x,), {})] == [2, 0]
    assert zoo.difference(Holding(layer), Holding(layer), (x,), {}) == 0
    assert zoo.difference(Holding(layer), Holding(layer, 1.001), (x,), {}) > 100


def test_a_model_that_writes_into_its_input_is_given_the_same_one_again():
    class Writing(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(255))

    net, x = Writing(3, 2), torch.randn(4, 3)
    assert torch.equal(zoo.run(net, (x,), {})[0], zoo.run(net, (x,), {})[0])
    assert zoo.difference(net, net, (x,), {}) == 0


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_outputs_that_say_nothing_are_no_agreement(factor):
    net = nn.Sequential(Holding(nn.Linear(3, 2), factor), First())
    with pytest.raises(ValueError, match="no numbers"):
        zoo.difference(net, net, (torch.randn(4, 3),), {})


class First(nn.Module):
    def forward(self, result):
        return result.first


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older one is deprecated
def test_a_weight_norm_along_any_dimension_is_judged(norm, dim):
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Conv1d(3, 6, 3), nn.Sigmoid(), norm(nn.Conv1d(6, 8, 3), dim=dim), nn.Sigmoid(), nn.Conv1d(8, 2, 1)
        return zoo.spread(nn.Sequential(*layers))

    args = (torch.randn(1, 3, 9),)
    small = channels.prune(make(), args, ratio=0.5, scope="layer").model
    assert zoo.size(small) < zoo.size(make())
    assert zoo.difference(make(), small, args, {}) < 0.01
    with torch.no_grad():
        next(p for name, p in small.named_parameters() if name.endswith(("weight_g", "original0"))).mul_(1.001)
    assert zoo.difference(make(), small, args, {}) > 1


def test_the_other_input_leaves_alone_what_is_no_tensor():
    args, kwargs = zoo.other(
        (torch.randn(1, 3), 7), {"flag": True, "steps": torch.tensor([1, 2]), "pair": [torch.ones(1, 2)]}
    )
    assert args[0].shape == (2, 3) and args[1] == 7 and kwargs["flag"] is True
    assert kwargs["steps"].tolist() == [1, 2] and kwargs["pair"][0].shape == (2, 2)


def test_a_process_that_ends_or_does_not_end_is_a_row():
    assert zoo.process("labkit", "timm/no_such_model", 60)["outcome"] == "failed"
    row = zoo.process("labkit", "transformers/bert", 0.01)
    assert row == {"outcome": "failed", "reason": "no end in 0 s"}


def test_the_summary_counts_outcomes_and_families():
    equal = {"outcome": "equal", "reason": "", "seconds": 1.0, "left": 0.3, "heads": "", "neurons": ""}
    table = {
        "transformers/a": {"labkit": equal, "torch_pruning": {"outcome": "failed", "reason": "x"}},
        "transformers/b": {"labkit": equal | {"neurons": "none"}},
    }
    text = "\n".join(zoo.summary(table))
    assert "heads and neurons are units in 1 of 2 families" in text and "heads are units in 2 of 2" in text
    counts = {tuple(line.split()) for line in text.splitlines()}
    assert ("transformers", "labkit", "2", "2", "0", "0", "0", "0") in counts
    assert ("transformers", "torch_pruning", "1", "0", "0", "1", "0", "0") in counts
