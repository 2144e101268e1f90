"""What cannot be used is told in one sentence before work starts, whatever its type; numbers of numpy are numbers."""

import functools

import numpy as np
import pytest
import torch
from families import family
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.deploy import export
from labkit.errors import InputError
from labkit.graph import groups, surgery
from labkit.pruning import (
    channels,
    depth,
    heads,
    nm,
    permutation,
    select,
    semi_structured,
    sensitivity,
    sparse,
    sparsegpt,
    sr_ste,
    transformers,
    unstructured,
)

NET, X = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval(), torch.randn(4, 8)
WEIGHT = torch.randn(8, 16)
REFUSALS = r"must be a tensor|must be dense|on the meta device|must be of real numbers|has no N:M pattern"
llama = functools.cache(lambda: family("llama"))
NO_TENSORS = [None, [[1.0] * 16] * 8, np.ones((8, 16)), WEIGHT.to_sparse(), WEIGHT.to("meta"), WEIGHT * 1j]


@pytest.mark.parametrize("x", NO_TENSORS, ids=["None", "list", "numpy", "sparse", "meta", "complex"])
@pytest.mark.parametrize(
    "call",
    [
        nm.mask,
        nm.is_nm,
        nm.compress,
        lambda x: nm.kept_energy(x, WEIGHT > 0),
        lambda x: nm.kept_energy(WEIGHT, x),
        permutation.search,
        lambda x: select.lowest_k(x, 1),
        lambda x: sparsegpt.sparsegpt(x, torch.eye(16), 0.5),
        lambda x: sparsegpt.sparsegpt(WEIGHT, x, 0.5),
        lambda x: heads.lowest_heads(x, 1),
        lambda x: heads.gated(llama(), x).__enter__(),
        lambda x: unstructured.with_masks(NET, {"0.weight": x}),
        lambda x: channels.plan(NET, X, ratio=0.5, criterion={"0.weight": x}),
        lambda x: channels.plan(NET, X, ratio=0.5, criterion=lambda group: 3 if x is None else x),
    ],
)
def test_what_is_no_dense_tensor_of_real_numbers_is_told(call, x):
    with pytest.raises(
        InputError,
        match=r"must be a tensor|must be dense|on the meta device|must be of real numbers|has no N:M pattern",
    ):
        call(x)


@pytest.mark.parametrize("model", [None, "net", [NET], nn.Linear])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: channels.prune(model, X, ratio=0.5),
        lambda model: channels.apply(model, channels.plan(NET, X, ratio=0.5), X),
        lambda model: transformers.prune_heads(model, {0: [0]}),
        lambda model: transformers.prune_ffn(model, 0.5),
        lambda model: depth.prune_layers(model, [0]),
        lambda model: depth.layer_importance(model, [X]),
        lambda model: heads.head_importance(model, [X]),
        lambda model: unstructured.prune(model, 0.5),
        lambda model: surgery.save(model, [], "nowhere"),
        lambda model: surgery.load(model, "nowhere"),
        unstructured.sparsity,
        unstructured.masks,
        unstructured.make_permanent,
        nm.prune,
        permutation.permute,
        sr_ste.prepare,
        sr_ste.finish,
        semi_structured.plan,
    ],
)
def test_what_is_no_module_is_told(call, model):
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        call(model)


def test_numbers_of_numpy_are_numbers():
    one = np.int64(1)
    same = {"criterion": "random", "ratio": np.float64(0.5)}
    kept = [channels.plan(NET, X, seed=seed, **same).kept["0.weight"][0] for seed in (1, one)]
    assert torch.equal(*kept)
    units = channels.plan_units(NET, groups.Coupling.of(NET, X), {"0.weight": np.array([1])})
    assert units.kept["0.weight"][0].tolist() == [0, *range(2, 16)]
    assert heads.lowest_heads(torch.ones(2, 3), one) == {0: [0]}
    assert sparse.costs(8, 16, 20, np.int64(2)) == sparse.costs(8, 16, 20, 2)


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS: Refusals = {
    "kwargs is a list, but it must be {name: value}": lambda: groups.trace(NET, X, [1]),
    "kwargs is a str": lambda: transformers.prune_ffn(llama(), 0.5, kwargs="a"),
    "remove['0'] is 3, but it must be a list": lambda: channels.prune(NET, X, remove={"0": 3}),
    "remove['0'] is tensor(1), but": lambda: channels.prune(NET, X, remove={"0": torch.tensor(1)}),
    "plan is a NoneType, but it must be a Plan": lambda: channels.apply(NET, None, X),
    "model is a int, but it must be a torch.nn.Module": lambda: channels.prune(3, X, ratio=0.5),
    "model is None, but it must be a torch.nn.Module": lambda: groups.trace(None, X),
    "model is a str, but it must be a torch.nn.Module": lambda: export.program("net", {"x": X}),
    "units is a list": lambda: channels.plan_units(NET, groups.Coupling.of(NET, X), [1]),
    "no scope": lambda: channels.Choice(criterion="random", scope=["layer"]),
    "seed is 'a', but": lambda: channels.plan(NET, X, ratio=0.5, criterion="random", seed="a"),
    "heads[0] is 1, but": lambda: transformers.prune_heads(llama(), {0: 1}),
    "no layer 0's head [0]": lambda: transformers.prune_heads(llama(), {0: [[0]]}),
    "layers is 1, but": lambda: depth.prune_layers(llama(), 1),
    "no layer [1]": lambda: depth.prune_layers(llama(), [[1]]),
    "[layers, heads], [3, 4] here": lambda: heads.gated(llama(), torch.ones(9, 9)).__enter__(),
    "masks is a list": lambda: unstructured.with_masks(NET, [1]),
    "meta device": lambda: unstructured.sparsity(nn.Linear(2, 2, device="meta")),
    "no criterion": lambda: unstructured.prune(NET, 0.5, criterion=["magnitude"]),
    "evaluate is None, but": lambda: sensitivity.scan(NET, X, None),
    "ratios is 0.5, but": lambda: sensitivity.scan(NET, X, print, 0.5),
    "dim is 5": lambda: select.lowest_k(WEIGHT, 1, dim=5),
    "n is 1.5": lambda: select.count_to_prune(1.5, 0.5),
    "plans has a int": lambda: surgery.save(NET, [3], "nowhere"),
    "nonzeros is -1": lambda: sparse.costs(8, 16, -1, 1),
    "out_features is 'a'": lambda: sparse.random_weight("a", 16, 0.5),
    "compress makes a Compressed": lambda: nm.decompress(WEIGHT),
    "weight is a list": lambda: semi_structured.refusal([1.0]),
}


@refused(REFUSALS)
def test_an_argument_of_another_type_is_named(words, call):
    check_refusal(words, call)
