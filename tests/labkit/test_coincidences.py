"""Numbers that happen to be equal (heads and head size, neurons and width) are told apart: pruned and equal.

By the zoo's check, which knows nothing of how labkit works.
"""

import pytest
import zoo
from families import FAMILIES, MORE, family

from labkit.graph import anatomy
from labkit.pruning import channels, depth, transformers

ALL = "one width for all"
CASES = {
    "heads as wide as they are many": {"width": 16, "heads": 4, "head_size": 4, "kv_heads": 2},
    ALL: {"width": 16, "heads": 4, "head_size": 4, "kv_heads": 4, "neurons": 16, "vocabulary": 16},
    "as many heads as layers and examples": {"width": 24, "heads": 3, "head_size": 8, "kv_heads": 3},
}
IN_FOUR_BLOCKS = ("codegen",)  # which three heads do not make


def halves(model) -> dict[int, range]:
    """Half of the key-value heads of each attention, with all query heads that read them."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    heads = {}
    for layer, part in enumerate(anatomy.attentions(model)):
        groups = kv_heads if kv_heads and part.heads % kv_heads == 0 else part.heads
        heads[layer] = range(max(groups // 2, 1) * part.heads // groups)
    return heads


KINDS = {
    "heads": lambda model, example: transformers.prune_heads(model, halves(model)),
    "neurons": lambda model, example: transformers.prune_ffn(model, 0.5),
    "channels": lambda model, example: channels.prune(model, (), example, ratio=0.5, criterion="l2", scope="layer"),
}


# by day in neurons and channels too; the heads of every family are
ALL_KINDS = ("bert", "gpt2", "t5", "neox", "codegen", "phi3", "vit")


def cases() -> list:
    """Every family, size and kind; those that only a night has are marked."""
    parameters = []
    for name in (*FAMILIES, *MORE):
        for case, kind in (*((ALL, kind) for kind in KINDS), *((case, "heads") for case in CASES if case != ALL)):
            by_day = case == ALL and (kind == "heads" or name in ALL_KINDS)
            parameters.append(pytest.param(name, case, kind, marks=() if by_day else pytest.mark.nightly))
    return parameters


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case", "kind"), cases())
def test_sizes_that_coincide_are_told_apart(name, case, kind):
    if name in IN_FOUR_BLOCKS and CASES[case]["heads"] % 4:
        pytest.skip("the family has no such size")
    model = family(name, **CASES[case])
    example = anatomy.example(model)
    pruned = KINDS[kind](model, example)
    assert pruned.report.equal and pruned.plan.parameters[1] < pruned.plan.parameters[0]
    assert zoo.difference(model, pruned.model, (), example) <= 1


def test_as_many_layers_as_heads():
    model = family("llama", heads=3, width=24, kv_heads=3)
    pruned = depth.prune_layers(model, [1]).model
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    assert pruned.config.num_attention_heads == 3 and pruned.config.num_hidden_layers == 2
