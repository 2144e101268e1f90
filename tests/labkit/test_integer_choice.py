"""Integers where they pay: the choice against all others, the chosen layers against the integers' and the floats'."""

import copy
import itertools

import pytest
import torch
from hardware import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mobile, Terms, WithForward, by_sign, untraceable
from refusals import check_refusal
from test_integer import weight_only
from torch import fx, nn

from labkit.quantization import affine, integer, integer_choice, ptq, qat
from labkit.quantization.integer_choice import MARGIN, cheapest, partly_float
from labkit.quantization.integer_graph import lower_
from labkit.quantization.integer_seconds import LayerSeconds, SharedQuantize, _GraphSeconds, layer_seconds
from labkit.quantization.ptq_graph import compute_constants

vnni = needs("vnni")
NETWORKS = [(Mobile, (6, 3, 16, 16)), (Terms, (8, 3, 12, 12)), (untraceable, (6, 1, 8, 8))]
networks = pytest.mark.parametrize("build, shape", NETWORKS)


def simulated(build, shape):
    """(float model, simulated model, input)."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    return model, ptq.quantize(model, [x]).model, x


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ptq.FakeQuantized)]


# --- the choice -------------------------------------------------------------------------------------------------------

NAMES = "abcdef"
nanoseconds = st.integers(0, 1000).map(lambda number: number * 1e-9)


@st.composite
def timings(draw):
    names = NAMES[: draw(st.integers(2, len(NAMES)))]
    of_names = st.fixed_dictionaries(dict.fromkeys(names, nanoseconds))
    some = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple)
    steps = draw(st.lists(st.builds(SharedQuantize, nanoseconds, some), max_size=4))
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names)).filter(lambda pair: pair[0] < pair[1])
    conversions = draw(st.dictionaries(pairs, nanoseconds, max_size=8))
    return LayerSeconds(draw(of_names), {"float32": draw(of_names), "bfloat16": draw(of_names)}, steps, conversions)


def total(seconds: LayerSeconds, integers: set[str]) -> float:
    """The seconds of a choice, as `cheapest` counts them."""
    result = sum(seconds.integer[name] for name in integers)
    for name in seconds.integer.keys() - integers:
        result += MARGIN * min(of_names[name] for of_names in seconds.floats.values())
    result += sum(step.seconds for step in seconds.quantizes if integers & set(step.readers))
    return result + sum(s for (a, b), s in seconds.conversions.items() if (a in integers) != (b in integers))


@given(timings())
@settings(max_examples=200, deadline=None)
def test_no_other_choice_takes_less_time(seconds):
    names = list(seconds.integer)
    chosen = cheapest(seconds)
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    least = min(total(seconds, set(subset)) for subset in subsets)
    assert chosen <= set(names)
    assert total(seconds, chosen) <= least + 1e-9 * len(names)  # capacities are whole nanoseconds


def test_a_layer_that_loses_alone_stays_among_integers_and_one_that_wins_alone_among_floats():
    """Pitfall: to decide each layer by its own seconds."""
    chain = {("a", "b"): 3e-3, ("b", "c"): 3e-3}
    integers = {"a": 1e-3, "b": 3e-3, "c": 1e-3}
    floats = {"a": 5e-3, "b": 2e-3, "c": 5e-3}
    assert cheapest(LayerSeconds(integers, {"float32": floats}, (), chain)) == {"a", "b", "c"}
    assert cheapest(LayerSeconds(integers, {"float32": floats})) == {"a", "c"}
    assert cheapest(LayerSeconds(floats, {"float32": integers}, (), chain)) == set()
    assert cheapest(LayerSeconds(floats, {"float32": integers})) == {"b"}


def test_quantizing_is_paid_once_by_all_layers_that_read_it():
    integers = {"query": 1e-3, "key": 1e-3}
    floats = {"float32": {"query": 3e-3, "key": 3e-3}}
    for quantize_s, expected in ((3e-3, {"query", "key"}), (5e-3, set())):
        step = SharedQuantize(quantize_s, ("key", "query"))
        seconds = LayerSeconds(integers, floats, (step,))
        assert cheapest(seconds) == expected
        assert seconds.of_layer("key") == {"int8": 1e-3 + quantize_s / 2, "float32": 3e-3}


def test_a_tie_stays_integers_and_the_faster_type_of_floats_counts():
    tie = LayerSeconds({"a": 1.02e-3}, {"float32": {"a": 1e-3}})
    assert cheapest(tie) == {"a"}
    other = LayerSeconds({"a": 1.02e-3}, {"float32": {"a": 1e-3}, "bfloat16": {"a": 0.5e-3}})
    assert cheapest(other) == set() and other.fastest_float("a") == "bfloat16"


def test_the_report_says_which_and_why():
    integers = {"a": 1e-3, "b": 3e-3, "c": 1.5e-3}
    floats = {"float32": {"a": 2e-3, "b": 2e-3, "c": 1e-3}}
    choices = {"a": "int8", "b": "int8", "c": "float32", "d": "int8"}
    seconds = LayerSeconds(integers, floats, (SharedQuantize(0.5e-3, ("c",)),))
    rows = integer_choice.report(seconds, choices, {"int8": 6e-3, "mixed": 5e-3, "float32": 7e-3}, "mixed")
    assert [(row["layer"], row["choice"]) for row in rows] == [("", "mixed"), *choices.items()]
    assert rows[0]["mixed_s"] == 5e-3 and rows[0]["bfloat16_s"] is None and rows[1]["int8_s"] == 1e-3
    reasons = [row["reason"] for row in rows[1:]]
    assert reasons[0] == "int8 takes 0.50 of the time of float32"
    assert reasons[1].startswith("int8 takes 1.50") and "leaving the codes of its neighbours" in reasons[1]
    assert reasons[2] == "int8 takes 2.00 of the time of float32"
    assert reasons[3] == "the example does not call it"
    rows = integer_choice.report(seconds, choices, {"int8": 6e-3, "mixed": 5e-3, "bfloat16": 4e-3}, "bfloat16")
    assert {row["choice"] for row in rows} == {"bfloat16"}
    assert all("rounded to 8 significant bits" in row["reason"] for row in rows)


# --- models of integers and floats ------------------------------------------------------------------------------------


@networks
@torch.no_grad()
def test_all_layers_in_floats_are_the_float_model(build, shape):
    model, sim, x = simulated(build, shape)
    choices = dict.fromkeys(layers_of(sim), "float32")
    in_floats = partly_float(sim, choices)
    assert affine.sqnr(model(x), in_floats(x)) > 100  # but for a folded batch norm
    assert not any(isinstance(m, (ptq.FakeQuantized, ptq.QuantizationPoint)) for m in in_floats.modules())
    assert layers_of(sim) == list(choices)


@vnni
@networks
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_each_layer_is_the_integers_or_the_floats(build, shape, seed):
    """Whatever the choice: integer layers are those of `convert`, and proved; floats are the float model's."""
    model, sim, x = simulated(build, shape)
    before = {name: value.clone() for name, value in sim.state_dict().items()}
    draw = torch.Generator().manual_seed(seed)
    names = layers_of(sim)
    kinds = ["int8", "float32", "bfloat16"]
    choices = {name: kinds[int(torch.randint(3, (), generator=draw))] for name in names}
    choices[names[0]], choices[names[-1]] = "int8", "float32"
    mixed = lower_(partly_float(sim, choices))
    everywhere = integer.convert(sim)
    for name, choice in choices.items():
        new, old = mixed.get_submodule(name), sim.get_submodule(name).layer
        if choice == "int8":
            codes = everywhere.get_submodule(name)
            assert type(new) is type(codes)
            assert all(torch.equal(getattr(new, each), getattr(codes, each)) for each in ("codes", "scale", "bias"))
            assert new.numbers("input") == codes.numbers("input")
        elif choice == "float32":
            assert type(new) is type(old) and torch.equal(new.weight, old.weight)
        else:
            assert torch.equal(new.weight, old.weight.bfloat16())
    rows = integer.prove(mixed, x)
    assert {row["layer"].split("_")[0] for row in rows} >= {name for name, kind in choices.items() if kind == "int8"}
    assert not any(row["wrong"] for row in rows)
    assert affine.sqnr(model(x), mixed(x)) > 25
    assert affine.sqnr(model(x), mixed(x)) > affine.sqnr(model(x), everywhere(x)) - 3
    after = sim.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@vnni
@torch.no_grad()
def test_a_layer_in_bfloat16_rounds_its_arguments_and_gives_float32():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)).eval(), torch.randn(5, 32)
    sim = ptq.quantize(model, [x]).model
    new = lower_(partly_float(sim, {"0": "bfloat16", "1": "int8"}))
    expected = copy.deepcopy(model[0]).bfloat16()(x.bfloat16()).float()
    result = new.get_submodule("0")(x)
    assert result.dtype == torch.float32 and torch.equal(result, expected)
    assert torch.equal(new(x), integer.convert(sim).get_submodule("1")(expected))


@pytest.mark.parametrize("traced", [True, False])
@torch.no_grad()
def test_a_copy_of_a_whole_model_in_bfloat16_computes_the_same(traced: bool):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(5, 32)
    expected = copy.deepcopy(model).bfloat16()(x.bfloat16()).float()
    whole = integer_choice._in_bfloat16_(fx.symbolic_trace(model) if traced else model)
    for each in (whole, copy.deepcopy(whole)):
        result = each(x)
        assert result.dtype == torch.float32 and torch.equal(result, expected)


@vnni
@torch.no_grad()
def test_a_point_goes_with_the_kernel_that_did_its_sum():
    """Otherwise a value is rounded, and turned into codes and back, for nobody."""
    _, sim, _ = simulated(Terms, (8, 3, 12, 12))

    def points(choices: dict[str, str]) -> int:
        return sum(isinstance(module, ptq.QuantizationPoint) for module in partly_float(sim, choices).modules())

    assert points({}) == 2
    assert points({"add": "float32"}) == points({"again": "float32"}) < 2
    assert points({"add": "float32", "relu": "float32", "again": "float32"}) == 0


@vnni
@torch.no_grad()
def test_after_training_under_rounding_floats_have_the_weight_that_was_trained():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(16, 8)
    trained = qat.prepare(model, [x], weights=4, activations=8)
    fake = trained.get_submodule("0")
    new = partly_float(trained, {"0": "float32"}).get_submodule("0")
    assert torch.equal(new.weight, fake.fake_weight()) and not torch.equal(new.weight, fake.layer.weight)


class Biased(nn.Module):
    """Biases gathered from a table, which depend on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.table = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("index", torch.tensor([2, 0, 1, 1]))

    def forward(self, x):
        biases = self.table[self.index].mul(2)
        return self.layer(x) + biases + torch.zeros_like(x[:, :5])


@torch.no_grad()
def test_what_depends_on_no_input_is_computed_once():
    torch.manual_seed(0)
    model, x = Biased().eval(), torch.randn(4, 6)
    sim = ptq.quantize(model, [x]).model
    expected = sim(x)
    compute_constants(sim)
    assert torch.equal(sim(x), expected)
    operations = [node.name for node in sim.graph.nodes if node.op == "call_method"]
    assert operations == [] and torch.equal(sim.mul_constant, model.table[model.index] * 2)
    assert torch.equal(partly_float(sim, {"layer": "float32"})(x), model(x))


# --- by the clock -----------------------------------------------------------------------------------------------------


@vnni
@networks
@torch.no_grad()
def test_every_layer_that_is_called_is_timed_in_each_type(build, shape):
    _, sim, x = simulated(build, shape)
    names = layers_of(sim)
    in_floats = {"float32": partly_float(sim, dict.fromkeys(names, "float32"))}
    argument = "relu" if build is Terms else "x"
    seconds = layer_seconds(sim, in_floats, names, {argument: x})
    for of_layers in (seconds.integer, seconds.floats["float32"]):
        assert of_layers.keys() == set(names) and min(of_layers.values()) > 0
    readers = {name for step in seconds.quantizes for name in step.readers}
    pairs = [name for pair in seconds.conversions for name in pair]
    if isinstance(sim, fx.GraphModule):
        assert readers | set(pairs) == set(names) and min(step.seconds for step in seconds.quantizes) > 0
    else:
        assert not readers and not pairs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in "abc")

    def forward(self, x):
        y = self.a(x).relu()
        y = (self.b(y) + y).relu()
        return self.c(y).mean((2, 3))


@vnni
@torch.no_grad()
def test_operations_that_integers_are_spared_count_for_the_layer_before():
    """ReLU and the sum of a block, which a kernel does on its way; each operation takes a power of two here."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    sim = ptq.quantize(Block().eval(), [x]).model
    timed = _GraphSeconds(sim, {"float32": partly_float(sim, dict.fromkeys("abc", "float32"))}, {"x": x})
    for of_nodes in timed.of_nodes.values():
        of_nodes.update({name: 2.0**place for place, name in enumerate(of_nodes)})
    seconds = timed.layer_seconds()
    in_floats = timed.of_nodes["float32"]
    assert list(in_floats) == ["x", "a", "relu", "b", "add", "relu_1", "c", "mean", "output"]
    expected = {"a": ("a", "relu"), "b": ("b", "add", "relu_1"), "c": ("c",)}
    assert seconds.floats["float32"] == {name: sum(map(in_floats.get, nodes)) for name, nodes in expected.items()}
    in_integers = timed.of_nodes["int8"]
    assert seconds.integer == {name: in_integers[name] for name in "abc"}
    assert seconds.quantizes == (SharedQuantize(in_integers["x_quantize_0"], ("a",)),)
    assert seconds.conversions.keys() == {("a", "b"), ("b", "c")}


@vnni
@torch.no_grad()
def test_a_depthwise_convolution_stays_floats():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(512, 512, 3, groups=512)).eval(), torch.randn(1, 512, 14, 14)
    sim = ptq.quantize(model, [x]).model
    real = integer.convert(sim, where="pays", example=x)
    whole, layer = real.integer_report
    assert (whole["layer"], layer["layer"]) == ("", "0")
    assert whole["choice"] == layer["choice"] != "int8"
    assert not any(isinstance(module, integer.IntegerLayer) for module in real.modules())
    assert affine.sqnr(model(x), real(x)) > 45


@vnni
@torch.no_grad()
def test_a_large_linear_layer_becomes_integers_and_a_small_one_beside_it_does_not(monkeypatch: pytest.MonkeyPatch):
    """Beside float32 alone: a CPU with AMX multiplies bfloat16 about as fast as integers."""
    monkeypatch.setattr(integer_choice, "float_types", lambda: ["float32"])
    torch.manual_seed(0)
    model = WithForward(small_behind_large, large=nn.Linear(1024, 1024), small=nn.Linear(4, 4)).eval()
    x = torch.randn(256, 1024)
    sim = ptq.quantize(model, [x]).model
    real = integer.convert(sim, where="pays", example=x)
    choice = {row["layer"]: row["choice"] for row in real.integer_report}
    assert choice == {"": "mixed", "large": "int8", "small": "float32"}
    assert torch.equal(real.large(x), integer.convert(sim).large(x))
    assert torch.equal(real.small.weight, model.small.weight)
    rows = integer.prove(real, x)
    assert [row["layer"] for row in rows] == ["large"] and not rows[0]["wrong"]


def small_behind_large(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = by_sign(model.large(x))[:1, :4]  # without a graph
    for _ in range(100):
        y = model.small(y)
    return y


# --- refusals ---------------------------------------------------------------------------------------------------------

X = torch.randn(4, 64)
SIMULATED = ptq.quantize(nn.Sequential(nn.Linear(64, 16)), [X], weights=7).model
REFUSED = {
    "There is no where 'somewhere': choose one of everywhere, pays": {"where": "somewhere"},
    "times the layers on an example: give": {"where": "pays"},
    'times the layers on an example: give where="pays"': {"example": X},
    "The model does not run on a batch": {"where": "pays", "example": torch.randn(4, 63)},
}


@vnni
@pytest.mark.parametrize("sentence", REFUSED)
def test_a_call_that_cannot_be_timed_is_refused(sentence):
    check_refusal(sentence, lambda: integer.convert(SIMULATED, **REFUSED[sentence]))


@needs("vectors")
def test_weights_only_have_no_floats_to_race_against():
    model = weight_only(16, 64, 4, 64)
    check_refusal("which a model of weight_only no longer has", lambda: integer.convert(model, where="pays", example=X))
