"""Pruning through a model: each layer sees what the layers pruned before it give, and the pattern outlasts training."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from families import family
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.modules.batches import segments, split
from labkit.modules.blocks import walk
from labkit.modules.stacks import blocks_of
from labkit.modules.weights import prunable
from labkit.pruning import blockwise, nm, unstructured
from labkit.pruning.pattern import mask
from labkit.pruning.select import count_to_prune, lowest_k
from labkit.pruning.sparsegpt import sparsegpt


def llama():
    return family("llama", neurons=48).double()


def bert():
    return family("minilm").double()


def gpt2():
    return family("gpt2").double()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    ).double()


@pytest.fixture
def tokens():
    return segments(torch.randint(50, (400,), generator=torch.Generator().manual_seed(1)), 4, 24)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


def inputs_of(model, names, batches):
    """{name of a Linear: its inputs [tokens, in]} in a run of the whole model."""
    found = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def one_layer(weight, x, pattern, method):
    """The method's definition for one weight [out, in] and its inputs [tokens, in]."""
    if method == "sparsegpt":
        return sparsegpt(weight, x.t() @ x, pattern)[0]
    scores = weight.abs() * x.norm(dim=0)
    if isinstance(pattern, tuple):
        return weight * mask(scores, *pattern)
    return weight * ~lowest_k(scores, count_to_prune(weight.shape[1], pattern), dim=1)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [(2, 4), 0.5])
def test_it_is_whole_runs_of_the_model_a_block_at_a_time(method, pattern, tokens):
    """The oracle runs the whole model, its earlier blocks pruned, once for every block."""
    model = llama()
    found = blockwise.prune(model, pattern, method=method, batches=tokens)
    expected = copy.deepcopy(model)
    for number in range(3):
        block = f"model.layers.{number}"
        names = [f"{block}.{name}" for name, module in expected.get_submodule(block).named_modules() if "proj" in name]
        inputs = inputs_of(expected, names, tokens)
        for name in names:
            weight = expected.get_submodule(name).weight
            weight.data = one_layer(weight.data, inputs[name], pattern, method)
            torch.testing.assert_close(found.get_submodule(name).weight, weight, rtol=1e-8, atol=1e-9)
    assert (found(tokens[0]).logits - model(tokens[0]).logits).abs().max() > 1e-3


def test_magnitude_is_the_mask_of_every_weight(tokens):
    model = llama()
    pruned = nm.prune(model, 1, 4)
    for name, weight in blockwise.weights_of(model).items():
        kept = mask(weight.parameter, 1, 4)
        assert torch.equal(pruned.get_parameter(name), weight.parameter * kept)
        assert torch.equal(unstructured.masks(pruned)[name], kept)
    by_layer = unstructured.prune(cnn(), 0.3, scope="layer")
    for a, b in zip(blockwise.prune(cnn(), 0.3, method="magnitude").parameters(), by_layer.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", blockwise.METHODS)
def test_every_kind_of_layer_gets_the_pattern(method, images, tokens):
    for model, batches in ((cnn(), images), (gpt2(), tokens), (bert(), tokens)):
        before = copy.deepcopy(model)
        pruned = nm.prune(model, method=method, batches=batches)
        for name, weight in blockwise.weights_of(pruned).items():
            matrix = weight.parameter.t() if weight.transposed else weight.parameter
            assert nm.is_nm(matrix), name
            assert unstructured.masks(pruned)[name].double().mean() == 0.5, name
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert not unstructured.masks(model) and model.training == before.training


def test_a_convolution_is_the_linear_layer_of_its_patches(images):
    """SparseGPT of a convolution, its columns in the order (kernel position, input channel)."""
    conv = cnn()[0]
    found = nm.prune(nn.Sequential(conv), method="sparsegpt", batches=images)[0].weight
    patches = torch.cat([F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1) for x in images])  # [N, C 9]
    order = torch.arange(36).view(4, 9).t().flatten()
    rows, _ = sparsegpt(conv.weight.detach().flatten(1)[:, order], (patches.t() @ patches)[order][:, order])
    torch.testing.assert_close(found.detach().flatten(1)[:, order], rows, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_in_ignore_stay_and_change_nothing_before_them(method, tokens):
    every = nm.prune(llama(), method=method, batches=tokens)
    some = nm.prune(llama(), method=method, batches=tokens, ignore=["model.layers.1", "model.layers.2"])
    dense = llama()
    for name, weight in some.named_parameters():
        expected = every if ".layers.0." in name else dense
        assert torch.equal(weight, expected.get_parameter(name)), name


def test_padding_and_other_arguments_reach_every_block(tokens):
    """A run of recorded blocks is the model's own, attention masks and positions included, for every batch."""
    padded = []
    for batch, length in zip(tokens, (15, 9, 24, 20), strict=True):
        attention = torch.ones_like(batch)
        attention[:, length:] = 0
        padded.append({"input_ids": batch, "attention_mask": attention, "labels": batch})
    for model, batches, norm in ((bert(), padded, "none"), (llama(), padded, "norm"), (gpt2(), tokens, "ln_f")):
        blocks = blocks_of(model)
        before = [set(vars(block)) for block in blocks]
        with torch.no_grad():
            *_, (last, run) = walk(model, blocks, batches)
            assert last is blocks[-1]
            for output, batch in zip(run(), batches, strict=True):
                args, kwargs, _ = split(model, batch)
                states = model(*args, **kwargs, output_hidden_states=True).hidden_states
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                assert torch.equal(getattr(model.base_model, norm, nn.Identity())(hidden), states[-1])
        assert before == [set(vars(block)) for block in blocks]


def test_the_hessians_of_one_block_are_in_memory_at_a_time(tokens):
    """Only the Hessian of down_proj is 48 x 48; no weight is."""
    model, alive = llama(), []

    def count(*_):
        alive.append(sum(1 for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-2:] == (48, 48)))

    for layer in model.model.layers:
        layer.register_forward_hook(count)
    gc.freeze()  # what was there before is not looked at again and again
    nm.prune(model, method="sparsegpt", batches=tokens)
    # On the way through a block: its own sum, and the term that the last Linear added to it.
    assert len(alive) > 3 * len(tokens) and max(alive) <= 2


class Branches(nn.Module):
    """A ModuleList that is no stack: the blocks get the same input, or sums with what the one before them gives."""

    def __init__(self, summed):
        super().__init__()
        self.branches, self.summed = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), summed

    def forward(self, x):
        for branch in self.branches:
            y = branch(x)
            x = x + y if self.summed else x
        return x + y


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("summed", [False, True])
def test_branches_are_not_taken_for_a_stack(method, summed):
    torch.manual_seed(0)
    model, x = Branches(summed).double(), torch.randn(30, 8, dtype=torch.float64)
    pruned, inputs = nm.prune(model, method=method, batches=iter([x[:10], x[10:]])), x
    for dense, branch in zip(model.branches, pruned.branches, strict=True):
        expected = one_layer(dense.weight.detach(), inputs.detach(), (2, 4), method)
        torch.testing.assert_close(branch.weight.detach(), expected)
        inputs = inputs + dense(inputs) if summed else inputs


def test_which_weights_are_pruned():
    """The blocks of a language model even where its head is larger; of an encoder-decoder, all."""
    wide = family("llama", vocabulary=900)
    assert wide.lm_head.weight.numel() > sum(w.parameter.numel() for w in blockwise.weights_of(wide).values())
    assert len(blockwise.weights_of(wide, ignore=iter(["model.layers.0"]))) == 14
    both = nn.Transformer(16, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=16, batch_first=True)
    assert blockwise.weights_of(both).keys() == prunable(both).keys()


def test_what_was_pruned_before_does_not_come_back(tokens):
    first = unstructured.prune(llama(), 0.7, scope="layer")
    for method in blockwise.METHODS:
        again = nm.prune(first, method=method, batches=tokens)
        for name, weight in blockwise.weights_of(again).items():
            assert nm.is_nm(weight.parameter)
            assert not (weight.parameter[~unstructured.masks(first)[name]]).any(), name
        head = unstructured.masks(again)["lm_head.weight"]  # outside the blocks, and held as before
        assert torch.equal(head, unstructured.masks(first)["lm_head.weight"])


def test_random_layers_are_off_and_modes_stay(tokens):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    batches = [torch.randn(20, 8)]
    one, other = (nm.prune(model, method="sparsegpt", batches=batches) for _ in range(2))
    assert torch.equal(one[2].weight, other[2].weight)
    assert one.training and one[1].training


# --- refusals ---------------------------------------------------------------------------------------------------------

MODEL = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
ODD_WIDTHS = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
BYPASSED = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
BYPASSED[0].forward = lambda x: (x, x, x)
BYPASSED[1].forward = lambda qkv: qkv[0]
ONES = torch.ones(2, 8)
REFUSALS: Refusals = {
    "no method 'obs': choose one of magnitude, wanda, sparsegpt": lambda: nm.prune(MODEL, method="obs"),
    "'wanda' looks at data: give batches": lambda: nm.prune(MODEL, method="wanda"),
    "put it in a list": lambda: nm.prune(MODEL, method="wanda", batches=ONES),
    "batches is empty": lambda: nm.prune(MODEL, method="sparsegpt", batches=[]),
    "pattern 5:4 is none": lambda: nm.prune(MODEL, 5),
    "ignore names '2'": lambda: nm.prune(MODEL, ignore="2"),
    "no weights to prune": lambda: nm.prune(MODEL, ignore=["0", "1"]),
    "NaN": lambda: nm.prune(MODEL, method="sparsegpt", batches=[ONES * torch.nan]),
    "0.weight (3), 2.weight (6) is no multiple of 4: name such weights": lambda: nm.prune(ODD_WIDTHS),
    "did not reach 1.in_proj_weight, 1.out_proj.weight as a layer's weight: name": lambda: nm.prune(
        BYPASSED, method="wanda", batches=[ONES]
    ),
}


@refused(REFUSALS)
def test_bad_input_is_refused_before_the_model_is_touched(words, call):
    check_refusal(words, call, leaves=MODEL)
