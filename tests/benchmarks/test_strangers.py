"""The candidates of strangers.toml are strangers, and a draw of them is fair and the same again."""

import ast
from collections import Counter

import pytest
import strangers
import torch
import zoo

ALL = [f"{package}/{network}" for package, table in strangers.CANDIDATES.items() for network in table["networks"]]
SEEN = ("transformers/canine", "transformers/stablelm", "diffusers/autoencoder-kl")  # looked at before


def test_there_are_many_candidates_of_many_packages_and_none_is_of_the_zoo():
    listed = {f"{library}/{name}" for library in ("timm", "transformers") for name in zoo.ZOO[library]["names"]}
    assert len(ALL) >= 200 and len(strangers.CANDIDATES) >= 8
    assert not {*ALL} & ({*zoo.ZOO["held_out"]["names"]} | listed | {*SEEN})


def test_the_held_out_are_those_that_labkit_was_not_mended_with():
    assert {*strangers.DEVELOPMENT} <= {*ALL}
    assert {*strangers.names(held_out=True)} == {*strangers.names()} - {*strangers.DEVELOPMENT}


@pytest.mark.parametrize("package", strangers.CANDIDATES)
def test_a_candidate_is_an_expression_and_its_input(package):
    table = strangers.CANDIDATES[package]
    ast.parse(table["setup"])
    for entry in table["networks"].values():
        source, *example = [entry] if isinstance(entry, str) else entry
        ast.parse(source, mode="eval")
        assert len(example) <= 1
        for text in example:
            ast.parse(text, mode="eval")


def test_a_draw_is_the_same_again_and_spread_over_the_packages():
    drawn = strangers.draw(ALL, 1)
    assert drawn == strangers.draw(ALL[::-1], 1) and drawn != strangers.draw(ALL, 2)
    assert len(set(drawn)) == strangers.DRAWN
    counts = Counter(name.partition("/")[0] for name in drawn)
    exhausted = {package for package, n in counts.items() if n == len(strangers.CANDIDATES[package]["networks"])}
    rest = [n for package, n in counts.items() if package not in exhausted]
    assert counts.keys() == strangers.CANDIDATES.keys() and max(rest) - min(rest) <= 1


def test_an_input_is_taken_as_arguments_or_by_name():
    assert strangers.tokens(60, 2, 12).unique().numel() == 24
    table = {"setup": "", "module": "torch", "input": "randn(2, 3)"}
    networks = {
        "tensor": "nn.Linear(3, 2)",
        "tuple": ["nn.Bilinear(3, 3, 2)", "(randn(2, 3), randn(2, 3))"],
        "names": ["nn.Linear(3, 2)", "{'input': randn(2, 3)}"],
        "itself": "(nn.Linear(3, 2), (randn(4, 3),), {})",
    }
    strangers.CANDIDATES["here"] = table | {"networks": networks}
    try:
        made = {name: strangers.build(f"here/{name}") for name in networks}
    finally:
        del strangers.CANDIDATES["here"]
    for model, args, kwargs in made.values():
        assert model(*args, **kwargs).shape[1] == 2 and not model.training
    assert [(len(args), len(kwargs)) for _, args, kwargs in made.values()] == [(1, 0), (2, 0), (0, 1), (1, 0)]
    assert [len(args[0]) for args in (made["tensor"][1], made["itself"][1])] == [2, 4]


def test_what_only_a_proof_of_labkits_own_says_is_not_judged():
    equal = {"outcome": "equal", "reason": ""}
    rows = {"labkit": {"outcome": "equal", "reason": f"{zoo.OWN}: mean in body"}, "torch_pruning": equal}
    assert strangers.judged(rows)["labkit"]["outcome"] == "unjudged"
    assert strangers.judged({"labkit": equal}) == {"labkit": equal}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision/squeezenet", "torchvision/vit", "timm/test_vit2", "transformers/vit_msn"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_is_pruned_and_equal(name):
    pytest.importorskip(name.partition("/")[0])
    torch.manual_seed(0)
    row = zoo.row("labkit", name, strangers.build)
    assert (row["outcome"], row["reason"]) == ("equal", "")
