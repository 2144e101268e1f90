"""A wrong plan of a challenge is told in a line that says what is allowed, and the page goes on without a point."""

import copy
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lesson_cells import executed, function
from llamas import llama, text
from torch import nn

from labkit import artifact, batches, models
from labkit.deploy import engines
from labkit.lesson import challenge
from labkit.pruning import nm
from labkit.quantization import affine, ptq, weight_only

NO_POINT = "Your plan failed, so it is not placed: "


class Page:
    """A session at the preset `class` that notes the point it is asked to show, and what it says of it."""

    judging = staticmethod(challenge.judging)
    device = torch.device("cpu")
    point: dict[str, Any] | None = None
    said = ""

    def challenge(self, _name: str, _goal: str, point: dict[str, Any] | None, **_: Any) -> None:
        self.point = point

    def say(self, _name: str, *sentences: Any) -> None:
        self.said = " ".join(filter(None, sentences))
        assert self.said

    def by_preset(self, _smoke: Any, class_: Any, _full: Any) -> Any:
        return class_


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return models.resnet20()


def layers(network: nn.Module) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def cut(plan: Any) -> dict[str, Any]:
    """Lesson 03: a plan of widths, whose network is not trained here."""
    units = {"conv.weight": 16, "stage1.0.conv1.weight": 16}
    names = {"final": False, "validation": None, "units": units, "judged": lambda left, _: {"left": left}}
    return executed("03", "challenge-measure", plan=plan, lab=Page(), **names)


@pytest.mark.parametrize("left", [0.5, 0, 17, -1, "8", None])
def test_lesson_03_takes_no_share_for_a_number_of_channels(left: Any, capsys: pytest.CaptureFixture):
    assert cut({"conv.weight": left, "stage1.0.conv1": 4})["point"] is None
    allowed = "A plan gives whole numbers of channels that stay, not shares: conv.weight 1 to 16.\n"
    assert capsys.readouterr().out == allowed


def test_lesson_03_takes_the_names_that_it_prints(capsys: pytest.CaptureFixture):
    points = [cut({name: 16})["point"] for name in ("conv", "conv.weight")]
    assert points == [{"plan": "your plan", "left": {"conv.weight": 16}}] * 2
    assert cut(None)["point"] is None and capsys.readouterr().out == ""
    assert cut({"conv9": 8, "conv": 4})["point"] is None
    groups = "The groups: conv.weight, stage1.0.conv1.weight."
    assert capsys.readouterr().out == f"There is no group conv9.weight. {groups}\n"
    assert cut([8])["point"] is None
    assert "has no attribute 'items'\nA plan is a dict of the channels that stay" in capsys.readouterr().out


def patterns(plan: Any, resnet: nn.Module) -> dict[str, Any]:
    """Lesson 05: a plan of patterns, on a network that gets 40 of 40 images right."""
    names = {"nn": nn, "copy": copy, "nm": nm, "artifact": artifact, "refreshed": lambda model: model, "held": None}
    names |= {"training": SimpleNamespace(correct=lambda model, _: torch.ones(40)), "references": []}
    names |= {"test": SimpleNamespace(labels=[]), "network": resnet, "lab": Page(), "plan": plan}
    tools = "exercise-1", "exercise-2", "challenge-measure"
    return executed("05", *tools, "challenge-show", **names)


def shares(plan: Any, resnet: nn.Module) -> dict[str, Any]:
    """Lesson 06: a plan of bits, groups and shares; how much its network loses is made up."""
    made = executed(
        "06",
        "on-grid",
        "exercise-2",
        "challenge-apply",
        resnet=resnet,
        nn=nn,
        copy=copy,
        affine=affine,
        names=layers(resnet),
    )
    weights = {name: resnet.get_submodule(name).weight.flatten(1) for name in layers(resnet)}

    def points_lost(plan: Any, _: str) -> tuple[float, float, float]:
        made["quantized_by"](plan)
        return 1.0, 0.5, 1.5

    made |= {"bits_of": function("06", "bits_of", matrices=weights, stored_bits=made["stored_bits"])}
    made |= {"points_lost": points_lost}
    made |= {"place": function("06", "place", **made), "references": []}
    return executed("06", "challenge-show", **made | {"lab": Page(), "plan": plan})


def widths(plan: Any, resnet: nn.Module, network: nn.Module | None = None) -> dict[str, Any]:
    """Lesson 07: a plan of bits, on 16 images of noise."""
    images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = torch.no_grad()(lambda model, x: model(x))
    names = {"images": images, "base": logits(resnet, images), "logits": logits, "flat": resnet}
    names |= {"names": layers(resnet), "affine": affine, "ptq": ptq, "hundred": [images], "OBSERVER": "minmax"}
    names["delivered"] = function("07", "delivered", **names)
    return executed("07", "challenge-measure", plan=plan, network=network or resnet, lab=Page(), **names)


def bits_of_parts(plan: Any, _: Any = None) -> dict[str, Any]:
    """Lesson 09: a plan of bits, on a small random decoder whose losses are made up."""
    names = {"smol": llama(), "tokens": {"calibration": text(512)[0]}, "batches": batches, "weight_only": weight_only}
    names |= {"linears": function("09", "linears", nn=nn), "losses_of": lambda model, *_: model, "exact": None}
    names |= {"perplexity": lambda _, over: (1.2, 1.1, 1.3), "other_windows": None}
    return executed("09", "planned", "challenge-run", plan=plan, lab=Page(), **names)


def jobs(plan: Any, _: Any = None, *, change: float = 0.0) -> dict[str, Any]:
    """Lesson 12: a plan of two jobs, whose times and accuracy are made up."""
    side = SimpleNamespace(process_median_s=0.5)
    names: dict[str, Any] = {"JOBS": (3_000, 100_000), "LAST": 1, "best": {1: "eager"}, "eagers": {1: {"eager": None}}}
    names |= {"FIRST": 1, "BATCHES": (1,), "ENGINE": "", "INT8": "", "MOST": 1.25, "entries": {}}
    names |= {"test": SimpleNamespace(images=torch.zeros(8, 2)), "simulated": None, "QUANTIZED": {}}
    names["over_eager"] = lambda *_: SimpleNamespace(baseline=side, process_speedup=1.0)
    names["soonest"] = dict.fromkeys(names["JOBS"], "eager")
    names |= {"eager": SimpleNamespace(LAYOUTS={}), "partial": partial, "in_all": lambda _, n: [n * 0.5]}
    names["bench"] = SimpleNamespace(compare=lambda *_, **__: SimpleNamespace(process_speedup=1.0))

    def prepared(row: str, batch: int) -> tuple:
        engine = engines.prepare(row.removesuffix(" int8"), nn.Linear(2, 2), torch.zeros(batch, 2))
        return engine, 0.0, SimpleNamespace(change=(change, ()))

    cells = "challenge-plan-run", "challenge-show", "challenge-say"
    return executed("12", *cells, plan=plan, prepared=prepared, lab=Page(), **names)


ONE = {"engine": "torch", "int8": False, "batch": 2}
FOR_BOTH = {3_000: ONE, 100_000: ONE}
ALLOWED = {  # what each lesson says of a plan
    patterns: "A plan gives layers of names a pattern (n, m): n <= m <= 16, m divides its inputs.",
    shares: "A plan gives layers of names (bits, group, share): 2 to 8 bits; a group that divides the row, or None; "
    "a share above 0 and at most 1.",
    widths: 'A plan gives layers of names 2 to 8 bits, such as {"stage3.2.conv1": 4}.',
    bits_of_parts: "A plan is a dict such as {'bits': 4, 'parts': {'k_proj': 3}, 'group_size': 192, 'method': 'rtn'}, "
    "with 2 to 8 bits.",
    jobs: "A plan is {3_000: choice, 100_000: choice}, with choice = {'engine': 'openvino', 'int8': True, 'batch': 8}.",
}


@pytest.mark.parametrize(
    ("lesson", "plan", "why"),
    [
        (patterns, {"conv9": (2, 4)}, "conv9 is not one of the layers in the table."),
        (patterns, {"fc": (3, 2)}, "fc: 1 <= n <= m <= 16, m divides its 64 inputs."),
        (patterns, {"fc": (2, 5)}, "fc: 1 <= n <= m <= 16, m divides its 64 inputs."),
        (patterns, {"fc": (4, 32)}, "fc: 1 <= n <= m <= 16, m divides its 64 inputs."),
        (patterns, {"fc": 0.5}, "cannot unpack"),
        (shares, {"conv9": (2, None, 1.0)}, "no layer 'conv9', or a share of 1.0"),
        (shares, {"fc": (1, None, 1.0)}, "bits is 1, but it must be a whole number from 2 to 8."),
        (shares, {"fc": (2, 7, 1.0)}, "Provided sizes [-1, 7]"),
        (shares, {"fc": (2, None, 0)}, "or a share of 0"),
        (shares, {"fc": (2, None, 1.5)}, "or a share of 1.5"),
        (shares, {"fc": (2, None)}, "not enough values to unpack"),
        (widths, {"conv9": 4}, "no layers: ['conv9']"),
        (widths, {"stage3": 4}, "no layers: ['stage3']"),  # would be quantized, and counted with 8 bits
        (widths, {"fc": 9}, "weights['fc'] is 9, but it must be a whole number from 2 to 8."),
        (widths, {"fc": "4"}, "TypeError"),
        (widths, ["fc"], "'list' object has no attribute 'keys'"),
        (bits_of_parts, {"parts": {"k_proj": 3}}, "missing 1 required positional argument: 'bits'"),
        (bits_of_parts, {"bits": 4, "parts": {"kproj": 3}}, "no layer's name contains 'kproj'"),
        (bits_of_parts, {"bits": 4, "parts": {"k_proj": 1}}, "bits are whole numbers from 2 to 8"),
        (bits_of_parts, {"bits": 4, "groups": 32}, "unexpected keyword argument 'groups'"),
        (bits_of_parts, {"bits": 4, "group_size": 100}, "100"),
        (bits_of_parts, {"bits": 4, "method": "obq"}, "There is no method 'obq'"),
        (bits_of_parts, 4, "argument after ** must be a mapping"),
        (jobs, ONE, "KeyError: 3000"),
        (jobs, {3_000: ONE}, "KeyError: 100000"),
        (jobs, FOR_BOTH | {3_000: {"engine": "torch", "batch": 2}}, "missing 1 required positional argument: 'int8'"),
        (jobs, FOR_BOTH | {3_000: ONE | {"threads": 2}}, "unexpected keyword argument 'threads'"),
        (jobs, FOR_BOTH | {100_000: ONE | {"engine": "tourch"}}, "There is no engine 'tourch'"),
        (jobs, FOR_BOTH | {100_000: ONE | {"batch": 0}}, "batch is 0; it may be 1 to 8"),
        (jobs, FOR_BOTH | {100_000: ONE | {"batch": -1}}, "batch is -1; it may be 1 to 8"),
    ],
)
def test_a_wrong_plan_is_told_and_not_placed(
    lesson: Any, plan: Any, why: str, resnet: nn.Module, capsys: pytest.CaptureFixture
):
    made = lesson(plan, resnet)
    failure, *allowed = capsys.readouterr().out.splitlines()
    assert failure.startswith(NO_POINT) and why in failure
    assert allowed == [ALLOWED[lesson]]
    assert made["point"] is None and made["lab"].point is None


def test_lesson_12_tells_no_times_of_a_plan_that_fails_at_its_second_job():
    assert jobs({3_000: ONE})["lab"].said == "Your plan failed, so it has no times."
    assert jobs(None)["lab"].said == "No plan yet."
    assert jobs(FOR_BOTH)["lab"].said.startswith("Yours, 3,000 images: ")


@pytest.mark.parametrize(
    ("lesson", "plan"),
    [
        (patterns, {"fc": (2, 4)}),
        (shares, {"stage3.2.conv1": (2, 144, 0.9), "fc": (3, None, 1)}),
        (widths, {"stage3.2.conv1": 4, "fc": 2}),
        (bits_of_parts, {"bits": 4, "parts": {"k_proj": 3}, "group_size": 32, "method": "rtn", "symmetric": "signed"}),
        (jobs, FOR_BOTH),
    ],
)
def test_a_right_plan_is_placed_and_none_is_not(
    lesson: Any, plan: Any, resnet: nn.Module, capsys: pytest.CaptureFixture
):
    assert lesson(plan, resnet)["point"] and lesson(None, resnet)["point"] is None
    assert capsys.readouterr().out == ""


def test_lesson_09_tells_the_bits_of_a_plan_that_is_tried():
    plan = {"bits": 4, "parts": {"k_proj": 3}, "group_size": 32}
    made = bits_of_parts(plan)
    bits = made["point"]["bits per weight"]
    assert made["tried"](plan) == {"bits per weight": bits, "ratio, low, high": (1.2, 1.1, 1.3)}


def test_lesson_07_takes_no_network_that_computes_something_else(resnet: nn.Module, capsys: pytest.CaptureFixture):
    other = copy.deepcopy(resnet)
    other.fc.weight.data.mul_(2)
    assert widths({"fc": 4}, resnet, other)["point"] is None
    assert "AssertionError: network computes something else" in capsys.readouterr().out


def test_lesson_12_names_each_row_that_loses_a_point():
    made = jobs({3_000: ONE, 100_000: ONE | {"engine": "torch-channels-last"}}, change=-1.5)
    assert "a point is lost by torch and torch-channels-last" in made["lab"].said and made["point"] is None
    assert "is lost" not in jobs(FOR_BOTH, change=-0.5)["lab"].said


@pytest.mark.parametrize(("right", "words"), [(9, "4 bits reaches the goal."), (7, "No point of section 7")])
def test_lesson_11_counts_needles_in_whole_numbers(right: int, words: str):
    """Nine of ten as a share of float32, times ten, are less than nine."""
    answers = torch.arange(10) < right
    scores = {"all tokens": {"found": torch.ones(10)}, "4 bits": {"found": answers}}
    row = {"bytes": 0.1, "unseen": float(answers.float().mean())}
    names = {"defaultdict": defaultdict, "texts": 10, "scores": scores, "of": {"all tokens": row, "4 bits": row}}
    names |= {"ends_of": lambda _: (0.5, 1.0), "point": None, "lab": Page()}
    made = executed("11", "challenge-show", **names)
    assert [type(place["needles"]) for place in made["references"]] == [int]
    assert words in made["lab"].said
