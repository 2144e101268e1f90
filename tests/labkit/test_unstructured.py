"""Pruning of single weights: the sparsity asked for is the one the forward pass sees, whatever happens to the model."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from families import family
from networks import Plain, TiedEmbedding
from refusals import Refusals, check_refusal, refused
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from labkit.modules.masks import make_permanent, masks
from labkit.modules.weights import prunable
from labkit.pruning import nm
from labkit.pruning.scores import CRITERIA
from labkit.pruning.unstructured import prune, sparsity, with_masks


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Plain()


N = sum(weight.parameter.numel() for weight in prunable(Plain()).values())


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)


def seen(net, x):
    """The weights that the forward pass multiplies with, by watching torch's functions being called."""
    found = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (F.linear, F.conv2d):
                found.append(args[1].detach().clone())
            return func(*args, **(kwargs or {}))

    with Watch():
        net(x)
    return torch.cat([weight.flatten() for weight in found])


def train(net, batch, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- what is reached --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 0.0, 0.1, 1 / 3, 0.9, 0.999, 1, 1.0])
def test_the_forward_pass_sees_the_sparsity_asked_for(net, batch, asked):
    pruned = prune(net, asked)
    zeros = int((seen(pruned, batch[0]) == 0).sum())
    assert abs(zeros - asked * N) <= 0.5
    assert sparsity(pruned) == zeros / N


def test_global_magnitude_keeps_the_largest_of_all(net):
    pruned = prune(net, 0.6)
    before = torch.cat([weight.parameter.detach().flatten() for weight in prunable(net).values()])
    after = torch.cat([weight.parameter.detach().flatten() for weight in prunable(pruned).values()])
    assert before.abs()[after == 0].max() <= before.abs()[after != 0].min()
    assert torch.equal(before[after != 0], after[after != 0])


def test_layer_magnitude_equals_torch(net):
    pruned = prune(net, 0.6, scope="layer")
    for name, weight in prunable(net).items():
        oracle = copy.deepcopy(weight.module)
        torch_prune.l1_unstructured(oracle, "weight", amount=0.6)
        assert torch.equal(pruned.get_parameter(name), oracle.weight), name


def test_row_prunes_every_output_unit_alike(net, batch):
    pruned = prune(net, 0.5, scope="row", criterion="wanda", batches=[batch])
    for name, weight in prunable(pruned).items():
        zeros = (weight.parameter.flatten(1) == 0).sum(1)
        assert (zeros == (weight.parameter[0].numel() + 1) // 2).all(), name


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_in_every_scope(net, batch, criterion, scope):
    before = copy.deepcopy(net)
    pruned = prune(net, 0.75, criterion=criterion, scope=scope, batches=[batch])
    assert sparsity(pruned) == pytest.approx(0.75, abs=0.01)
    assert equal_states(net, before) and sparsity(net) == 0 and not net._forward_pre_hooks


def test_excluded_weights_are_left_alone_and_not_counted(net):
    pruned = prune(net, 0.5, ignore=["fc2", "conv2", "conv1.weight"])
    assert torch.equal(pruned.fc2.weight, net.fc2.weight) and torch.equal(pruned.conv1.weight, net.conv1.weight)
    assert sparsity(pruned, ignore=["fc2", "conv1", "conv2"]) == 0.5
    assert sparsity(pruned) == 0.5 * net.fc1.weight.numel() / N
    assert equal_states(pruned, prune(net, 0.5, ignore=("conv1", "conv2", "fc2")))


def test_zeros_go_first_whatever_the_criterion(net):
    net.fc1.weight.data[:4] = 0
    pruned = prune(net, 0.5, criterion="random")
    assert not masks(pruned)["fc1.weight"][:4].any()
    assert sparsity(pruned) == 0.5


@pytest.mark.parametrize("criterion", CRITERIA)
def test_pruned_weights_stay_pruned_however_low_the_scores(net, batch, criterion):
    for parameter in net.parameters():
        parameter.data *= 100
    once = prune(net, 0.3)
    twice = prune(once, 0.4, criterion=criterion, batches=[batch])
    for name, kept in masks(once).items():
        assert not masks(twice)[name][~kept].any(), f"{name}: a weight pruned before came back"


def test_untrained_zero_layers_do_not_stop_layer_pruning(net):
    net.fc2.weight.data.zero_()
    assert (prune(net, 0.5, scope="layer").fc1.weight == 0).sum() == net.fc1.weight.numel() / 2


# --- masks hold -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adam_l2": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_survive_training(net, batch, optimizer):
    pruned = prune(net, 0.8)
    kept = masks(pruned)
    train(pruned, batch, OPTIMIZERS[optimizer](pruned.parameters()))
    for name, weight in prunable(pruned).items():  # in the stored weight, before any further forward pass
        assert torch.equal(weight.parameter != 0, kept[name]), name
        assert not weight.parameter.grad[~kept[name]].any()
    assert not torch.equal(pruned.fc1.weight, prune(net, 0.8).fc1.weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_survive_an_optimizer_from_before_the_pruning(net, batch, optimizer):
    """Its momentum moves pruned weights: the worst that an optimizer can do to a mask."""
    pruned = prune(net, 0)
    running = OPTIMIZERS[optimizer](pruned.parameters())
    train(pruned, batch, running)
    harder = prune(pruned, 0.8)
    for old, new in zip(pruned.parameters(), harder.parameters(), strict=True):
        running.state[new] = running.state.pop(old)
    running.param_groups[0]["params"] = list(harder.parameters())
    train(harder, batch, running, steps=1)
    assert (harder.fc1.weight[~masks(harder)["fc1.weight"]] != 0).any()  # so there is something to hold
    expected = 1 - int(sum(mask.sum() for mask in masks(harder).values())) / N
    assert sparsity(harder) == expected
    assert sparsity(make_permanent(harder)) == expected
    saved = harder.state_dict()
    assert sum(int((saved[name] == 0).sum()) for name in prunable(harder)) / N == expected
    train(harder, batch, running, steps=1)
    assert (seen(harder, batch[0]) == 0).sum() / N == pytest.approx(expected)


def test_the_gradient_is_that_of_the_masked_product(net, batch):
    """Oracle: torch.func on weight * mask, with nothing of ours in it."""
    pruned = prune(net, 0.7)
    F.cross_entropy(pruned(batch[0]), batch[1]).backward()
    plain, kept = make_permanent(net), masks(pruned)
    raw = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    masked = {name: value * kept[name] if name in kept else value for name, value in raw.items()}
    F.cross_entropy(torch.func.functional_call(plain, masked, batch[0]), batch[1]).backward()
    for name, parameter in pruned.named_parameters():
        torch.testing.assert_close(parameter.grad, raw[name].grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_copy_works_and_its_masks_hold(net, batch, copied, steps):
    pruned = prune(net, 0.8)
    train(pruned, batch, OPTIMIZERS["sgd"](pruned.parameters()), steps)
    twin = copied(pruned)
    before = copy.deepcopy(pruned.state_dict())
    train(twin, batch, OPTIMIZERS["sgd"](twin.parameters()))
    assert torch.equal(twin.fc1.weight != 0, masks(pruned)["fc1.weight"])
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_two_forward_passes_share_one_backward(net, batch):
    pruned = prune(net, 0.5)
    (pruned(batch[0]).sum() + pruned(batch[0] * 2).sum()).backward()
    assert pruned.fc1.weight.grad is not None


def test_a_mask_holds_in_inference_mode_and_against_writes(net, batch):
    pruned = prune(net, 0.8)
    pruned.fc1.weight.data.fill_(1.0)
    pruned.fc2.load_state_dict({"weight": torch.ones(5, 20), "bias": torch.zeros(5)})
    assert torch.equal(pruned.fc2.weight == 1, masks(pruned)["fc2.weight"])  # at once, without a forward pass
    with torch.inference_mode():
        assert (seen(pruned, batch[0]) == 0).sum() / N == pytest.approx(sparsity(pruned))


def test_a_mask_holds_where_the_layer_itself_is_never_called():
    attention = prune(nn.MultiheadAttention(8, 2, batch_first=True), 0.5)
    assert set(masks(attention)) == {"in_proj_weight", "out_proj.weight"}
    attention.out_proj.weight.data.fill_(1.0)
    attention(*[torch.randn(1, 3, 8)] * 3)
    assert torch.equal(attention.out_proj.weight != 0, masks(attention)["out_proj.weight"])


def test_the_masks_follow_the_model_to_another_dtype(net, batch):
    pruned = prune(net, 0.8).bfloat16()
    assert masks(pruned)["fc1.weight"].dtype == torch.bool
    pruned.fc1.weight.data.fill_(1.0)
    pruned(batch[0].bfloat16())
    assert sparsity(pruned) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.gpu
def test_masks_hold_on_a_gpu(net, batch):
    pruned = prune(net, 0.8).cuda()
    batch = [item.cuda() for item in batch]
    train(pruned, batch, OPTIMIZERS["sgd"](pruned.parameters()))
    assert torch.equal(prune(net.cuda(), 0.8).cpu().fc1.weight != 0, pruned.cpu().fc1.weight != 0)
    assert sparsity(prune(net, 0.5, criterion="wanda", batches=[batch])) == 0.5


# --- pruning again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_pruning_again_keeps_the_mask_and_reaches_the_total(net, batch, scope, criterion):
    once = prune(net, 0.5, scope=scope)
    train(once, batch, OPTIMIZERS["sgd"](once.parameters()))
    twice = prune(once, 0.8, scope=scope, criterion=criterion)
    for name, mask in masks(twice).items():
        assert not (mask & ~masks(once)[name]).any()
    assert equal_states(make_permanent(once), once) and sparsity(once) == sparsity(prune(net, 0.5, scope=scope))
    assert sparsity(twice) == sparsity(prune(net, 0.8, scope=scope)) == pytest.approx(0.8, abs=0.01)


def test_the_mask_comes_before_zeros_that_are_not_masked(net):
    once = prune(net, 0.25, scope="layer")
    kept = masks(once)["fc2.weight"]
    once.fc2.weight.data[kept] = 0.0  # more zeros than the next round may mask
    assert not (masks(prune(once, 0.5, scope="layer"))["fc2.weight"] & ~kept).any()


def test_a_model_with_more_zeros_than_asked_is_not_silently_left_as_it_was(net, recwarn):
    """A pruned model that was loaded, or zeros by nature: no mask says which."""
    loaded = Plain()
    loaded.load_state_dict(prune(net, 0.5).state_dict())
    with pytest.warns(UserWarning, match=r"50\.00% of the weights are zero already, more than the 20\.00% asked for"):
        pruned = prune(loaded, 0.2)
    assert sum(int((~mask).sum()) for mask in masks(pruned).values()) == round(0.2 * N)
    assert equal_states(pruned, loaded)
    recwarn.clear()
    prune(loaded, 0)
    assert not recwarn


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_loaded_model_gets_its_masks_back(net, batch):
    pruned = prune(net, 0.9)
    loaded = Plain()
    loaded.load_state_dict(pruned.state_dict())
    again = prune(loaded, sparsity(loaded))
    assert all(torch.equal(mask, masks(pruned)[name]) for name, mask in masks(again).items())


def test_permanent_is_the_same_function_without_a_trace(net, batch):
    pruned = prune(net, 0.9).eval()
    plain = make_permanent(pruned)
    assert torch.equal(plain(batch[0]), pruned(batch[0]))
    assert [name for name, _ in plain.named_buffers()] == [name for name, _ in net.named_buffers()]
    hooks = ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    assert not any(getattr(module, kind) for module in plain.modules() for kind in hooks)
    assert masks(plain) == {} and masks(pruned) and sparsity(plain) == sparsity(pruned)
    train(plain, batch, OPTIMIZERS["sgd"](plain.parameters()))
    assert sparsity(plain) < 0.5  # nothing holds it any more


def test_torch_export_and_trace_take_the_masked_function(net, batch):
    model = prune(net, 0.9).eval()
    exported = torch.export.export(model, (batch[0],))
    for program in (exported, exported.run_decompositions()):
        assert torch.equal(program.module()(batch[0]), model(batch[0]))
    assert torch.equal(torch.jit.trace(model, batch[0])(batch[0]), model(batch[0]))


@pytest.mark.slow
def test_torch_compile_sees_the_same_function(net, batch):
    model = prune(net, 0.9).eval()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(batch[0]), model(batch[0]))


# --- what counts as a weight ------------------------------------------------------------------------------------------


def test_a_frozen_weight_is_pruned_stays_frozen_and_holds_its_mask_when_thawed(net, batch):
    expected = prune(net, 0.8)
    net.fc1.weight.requires_grad_(False)
    pruned = prune(net, 0.8)
    assert equal_states(pruned, expected) and not pruned.fc1.weight.requires_grad
    pruned.fc1.weight.requires_grad_(True)
    train(pruned, batch, OPTIMIZERS["sgd"](pruned.parameters()))
    assert torch.equal(pruned.fc1.weight != 0, masks(pruned)["fc1.weight"])


def test_a_shared_weight_is_pruned_and_counted_once():
    torch.manual_seed(0)
    pruned = prune(TiedEmbedding(), 0.5)
    assert pruned.head.weight is pruned.embed.weight
    assert list(masks(pruned)) == ["head.weight", "inner.weight"]
    assert sparsity(pruned) == 0.5
    optimizer = OPTIMIZERS["adamw"](pruned.parameters())
    for _ in range(2):
        pruned(torch.arange(20)).square().sum().backward()
        optimizer.step()
    assert torch.equal(pruned.embed.weight != 0, masks(pruned)["head.weight"])
    pruned.embed.weight.data.fill_(1.0)
    assert (pruned.embed(torch.arange(20)) == 0).any()  # the embedding alone holds the mask too


@pytest.mark.parametrize("name", ["embed", "head", "head.weight"])
def test_a_shared_weight_is_excluded_by_any_of_its_names(name):
    assert list(masks(prune(TiedEmbedding(), 0.5, ignore=name))) == ["inner.weight"]


def test_transformers_conv1d_is_pruned():
    model, batch = family("gpt2"), {"input_ids": torch.arange(8)[None]}
    for criterion in ("magnitude", "wanda", "obs"):
        for scope in ("global", "row"):
            pruned = prune(model, 0.5, criterion=criterion, scope=scope, batches=[batch])
            assert sparsity(pruned) == 0.5
    rows = pruned.transformer.h[0].mlp.c_fc.weight == 0  # [in 32, out 24]
    assert (rows.sum(0) == 16).all()


def test_sparsity_reads_masks_of_torch(net):
    for module in (net.conv1, net.conv2, net.fc1, net.fc2):
        torch_prune.l1_unstructured(module, "weight", amount=0.75)
    assert sparsity(net) == 0.75
    assert sparsity(net, ignore=["fc1"]) == 0.75
    words = "conv1.weight has masks of torch.nn.utils.prune ... make it permanent first"
    check_refusal(words, lambda: prune(net, 0.9), leaves=net)


def test_sparsity_reads_parametrizations(net):
    parametrizations.weight_norm(net.fc1)
    net.fc1.parametrizations.weight.original0.data[:10] = 0
    assert sparsity(net) == 0.5 * net.fc1.weight.numel() / N
    check_refusal("fc1.weight has a parametrization", lambda: prune(net, 0.5), leaves=net)


def test_with_masks_holds_any_mask(net):
    mask = torch.rand(5, 20) > 0.5
    assert torch.equal(with_masks(net, {"fc2.weight": mask}).fc2.weight, net.fc2.weight * mask)


class Experts(nn.Module):
    """Two experts of a mixture in one parameter, in a form that is not transformers' own."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 2), nn.Parameter(torch.randn(2, 8, 8))
        self.position = nn.Parameter(torch.randn(1, 4, 8))  # no stack of matrices


@pytest.mark.parametrize("call", [lambda m, **o: prune(m, 0.5, **o), lambda m, **o: nm.prune(m, **o)])
def test_stacked_experts_stay_dense_and_this_is_said(call, recwarn):
    said = r"89% of the weights are in stacks of matrices such as experts, of which labkit does not know the dimensions"
    with pytest.warns(UserWarning, match=said):
        pruned = call(Experts())
    with pytest.warns(UserWarning, match=said):
        assert sparsity(pruned) == 0.5
    assert pruned.experts.all() and pruned.position.all()
    recwarn.clear()
    call(Experts(), ignore="experts")
    call(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3)))
    assert not recwarn


# --- refusals ---------------------------------------------------------------------------------------------------------


def asked(**options):
    return lambda net: prune(net, **{"sparsity": 0.5, **options})


def masked(name, mask):
    return lambda net: with_masks(net, {name: mask})


REFUSALS: Refusals = {
    "sparsity is 90, but it must be a number from 0 to 1": asked(sparsity=90),
    "There is no criterion 'L1': choose one of magnitude": asked(criterion="L1"),
    "There is no scope 'local': choose one of global, layer, row": asked(scope="local"),
    "ignore names 'fc9', but the model has no such module": asked(ignore=["fc9"]),
    "no weights to prune": asked(ignore=["conv1", "conv2", "fc1", "fc2"]),
    "looks at data: give batches": asked(criterion="wanda"),
    "for 'fc9.weight', but ... a prunable weight: ... for 'conv1.weight'": masked("fc9.weight", torch.ones(5, 20) > 0),
    "torch.float32 ... but a mask is torch.bool": masked("fc2.weight", torch.ones(5, 20)),
    "[20, 5] for 'fc2.weight', but ... weight: [5, 20] for 'fc2.weight'": masked("fc2.weight", torch.ones(20, 5) > 0),
}


@refused(REFUSALS)
def test_wrong_arguments_are_refused_and_the_model_left(net, words, call):
    check_refusal(words, lambda: call(net), leaves=net)


@pytest.mark.parametrize(("scope", "share"), [("global", "50.00%"), ("layer", "50.00%"), ("row", "51.85%")])
def test_asking_for_less_than_there_is_is_refused(net, scope, share):
    pruned = prune(net, 0.5, scope=scope)
    words = f"is already {share} pruned ... more than the 20.00% asked for"
    check_refusal(words, lambda: prune(pruned, 0.2, scope=scope), leaves=pruned)


UNRANKED: Refusals = {  # words -> the model
    "weight is torch.float32 on meta, where weights can neither be ranked nor ... .": lambda: nn.Linear(
        8, 8, device="meta"
    ),
    "weight is torch.float8_e4m3fn on cpu, where weights can neither be ranked nor ... .": lambda: nn.Linear(8, 8).to(
        torch.float8_e4m3fn
    ),
}


@pytest.mark.parametrize("act", [asked(), nm.prune], ids=["unstructured", "nm"])
@refused(UNRANKED)
def test_weights_that_cannot_be_ranked_are_named(act, words, call):
    model = call()
    check_refusal(words, lambda: act(model), leaves=model)


@pytest.mark.parametrize("act", [asked(), nm.prune, sparsity], ids=["unstructured", "nm", "sparsity"])
@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))], ids=["relu", "norm"])
def test_a_model_without_weights_is_refused(act, model):
    check_refusal("no weights to prune", lambda: act(model), leaves=model)


def test_weights_without_a_score_are_named(net, batch):
    net.spare, call = nn.Linear(3, 3), asked(criterion="wanda", batches=[batch])
    check_refusal("'wanda' has no score for spare.weight", lambda: call(net), leaves=net)
    assert sparsity(prune(net, 0.5, criterion="wanda", batches=[batch], ignore="spare"), ignore="spare") == 0.5


def test_nan_weights_are_named(net):
    net.fc2.weight.data[0, 0] = torch.nan
    check_refusal("'magnitude' is NaN for 'fc2.weight'", lambda: prune(net, 0.5), leaves=net)
