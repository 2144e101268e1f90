"""Rewrites against the model itself, in float64 on other inputs than it was traced on, and against torch's fusion."""

import copy
from functools import partial

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Depthwise, Plain, Residual, WithForward, chain, randomise_
from random_networks import HABITS, Network, Stateful, digest, programs
from refusals import Refusals, check_refusal, refused
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from labkit.data import models
from labkit.errors import DataError, EqualityError, InputError
from labkit.graph.dataflow import Dataflow
from labkit.modules import batches
from labkit.quantization import fold

EXACT = 1e-9


def difference(model, new, *args, **kwargs) -> float:
    """Largest difference of the outputs relative to the largest output, in eval mode and in the inputs' precision."""
    with torch.no_grad(), batches.evaluating(model), batches.evaluating(new):
        expected, got = model(*args, **kwargs), new(*args, **kwargs)
    if not isinstance(expected, torch.Tensor):
        expected, got = expected[0], got[0]
    return float((expected - got).abs().max() / expected.abs().max())


def norms(model) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def stored(model) -> set[int]:
    return {x.data_ptr() for x in [*model.parameters(), *model.buffers()] if x.numel()}


# --- batch norm -------------------------------------------------------------------------------------------------------


@given(programs(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_folding_any_network_leaves_its_function_and_the_network(program, seed):
    model = randomise_(Network(program), seed).double()
    before = digest(model)
    new = fold.fold_batch_norm(model, torch.randn(2, 3, 8, 8, dtype=torch.double))
    assert digest(model) == before and not stored(model) & stored(new)
    assert difference(model, new, torch.randn(3, 3, 8, 8, dtype=torch.double) * 3) < EXACT
    assert norms(new) == sum(kind == "dense" for kind, _, _ in program[1])  # behind a concatenation


@given(programs(), st.sets(st.sampled_from(HABITS[:6])))
@settings(max_examples=15, deadline=None)
def test_a_forward_pass_that_writes_things_down_is_folded_in_a_copy(program, habits):
    model = randomise_(Stateful(program, habits)).double()
    before = digest(model)
    new = fold.fold_batch_norm(model, torch.randn(2, 3, 8, 8, dtype=torch.double))
    assert digest(model) == before
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    assert difference(copy.deepcopy(model), new, x) < EXACT


LAYERS = {
    "bias": (lambda: nn.Conv2d(4, 6, 3), nn.BatchNorm2d),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=False), nn.BatchNorm2d),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d),
    "1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d),
    "3d": (lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d),
    "linear, no bias": (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d),
}
INPUTS = {"1d": (3, 4, 7), "3d": (3, 4, 4, 4, 4), "linear": (3, 4), "linear, no bias": (3, 4)}


@pytest.mark.parametrize("options", [{}, {"eps": 0.3}, {"affine": False}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_folded_layer_is_that_of_torch(kind, options):
    layer, norm = LAYERS[kind]
    layer = layer()
    model = randomise_(nn.Sequential(layer, norm(layer.weight.shape[0], **options), nn.ReLU())).double()
    x = torch.randn(INPUTS.get(kind, (3, 4, 6, 6)), dtype=torch.double)
    new = fold.fold_batch_norm(model, x)
    assert isinstance(new[1], nn.Identity) and difference(model, new, x * 2) < EXACT
    if model[1].weight is None:  # which torch's fusion of a Linear does not take
        model[1].weight, model[1].bias = nn.Parameter(torch.ones(len(new[0].bias))), nn.Parameter(new[0].bias * 0)
        model.double()
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    fused = fuse(model[0], model[1])
    assert torch.allclose(new[0].weight, fused.weight, rtol=1e-12) and torch.allclose(
        new[0].bias, fused.bias, rtol=1e-12
    )


def test_the_usual_mistakes_of_folding_are_no_equality():
    """eps forgotten, the variance without a root, the layer's own bias forgotten: each is another function."""
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1))).double()
    conv, norm = model
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)

    def folded(eps: float, root: float, bias: float) -> nn.Module:
        new, scale = copy.deepcopy(conv), norm.weight * (norm.running_var + eps) ** -root
        with torch.no_grad():
            new.weight.mul_(scale[:, None, None, None])
            new.bias.copy_((bias * conv.bias - norm.running_mean) * scale + norm.bias)
        return new

    assert difference(model, folded(0.1, 0.5, 1), x) < EXACT
    for wrong in [(0, 0.5, 1), (0.1, 1, 1), (0.1, 0.5, 0)]:
        assert difference(model, folded(*wrong), x) > 1e-3


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def bn(**options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **options)


STAYS = {
    "behind a sum": WithForward(lambda m, x: m.bn(m.a(x) + x), a=conv(), bn=bn()),
    "read twice": WithForward(lambda m, x: m.bn(y := m.a(x)) + y.relu(), a=conv(), bn=bn()),
    "an output too": WithForward(lambda m, x: (m.bn(y := m.a(x)), y), a=conv(), bn=bn()),
    "a layer called twice": WithForward(lambda m, x: m.bn(m.a(m.a(x))), a=conv(), bn=bn()),
    "a norm called twice": WithForward(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(), b=conv(), bn=bn()),
    "read by the pass": WithForward(lambda m, x: m.bn(m.a(x)) * m.bn.weight.mean(), a=conv(), bn=bn()),
    "weight read by the pass": WithForward(lambda m, x: m.bn(m.a(x)) * m.a.weight.mean(), a=conv(), bn=bn()),
    "statistics of the batch": WithForward(lambda m, x: m.bn(m.a(x)), a=conv(), bn=bn(track_running_stats=False)),
    "behind ReLU": WithForward(lambda m, x: m.bn(m.a(x).relu()), a=conv(), bn=bn()),
    "in front": WithForward(lambda m, x: m.a(m.bn(x)), a=conv(), bn=bn()),
    "transposed": WithForward(lambda m, x: m.bn(m.a(x)), a=nn.ConvTranspose2d(4, 4, 2), bn=bn()),
    "over positions": WithForward(
        lambda m, x: m.bn(m.a(x.flatten(2)[..., :4])), a=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)
    ),
    "another weight's": WithForward(lambda m, x: m.bn(F.conv2d(x, m.a.weight * 2)), a=conv(), bn=bn()),
    "tied weights": WithForward(lambda m, x: m.bn(m.a(x)) + m.b(x), a=(shared := conv()), b=shared, bn=bn()),
}


@pytest.mark.parametrize("why", STAYS)
def test_a_norm_that_no_layer_can_take_stays(why):
    model = randomise_(copy.deepcopy(STAYS[why]), 3).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.double)
    new = fold.fold_batch_norm(model, x)
    assert norms(new) == 1 and difference(model, new, x) < EXACT


def test_linear_over_tokens_has_its_norm_over_positions():
    """Where tokens and features are as many, sizes do not tell: torch's own fusion folds the wrong dimension."""
    model = randomise_(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))).double()
    x = torch.randn(3, 5, 4, dtype=torch.double)  # five tokens, and five features
    assert difference(model, fuse_linear_bn_eval(*copy.deepcopy(model).eval()), x) > 0.1
    assert difference(model, fold.fold_batch_norm(model, x), x) < EXACT


def test_the_copy_keeps_types_modes_and_what_trains():
    model = randomise_(Plain()).bfloat16().train()
    model.conv1.weight.requires_grad_(False)
    new = fold.fold_batch_norm(model, torch.randn(2, 3, 8, 8).bfloat16())
    assert {x.dtype for x in new.parameters()} == {torch.bfloat16} and all(m.training for m in new.modules())
    assert not new.conv1.weight.requires_grad and new.conv2.weight.requires_grad and new.conv2.bias.requires_grad
    exact = fuse_conv_bn_eval(copy.deepcopy(model.conv1).double().eval(), copy.deepcopy(model.bn1).double().eval())
    assert torch.equal(new.conv1.weight, exact.weight.bfloat16())  # rounded once


def test_a_model_that_looks_at_its_own_modules_is_not_returned():
    model = WithForward(lambda m, x: m.bn(m.a(x)) * (1 + isinstance(m.bn, nn.Identity)), a=conv(), bn=bn())
    run = partial(fold.fold_batch_norm, randomise_(model), torch.randn(2, 4, 4, 4))
    check_refusal("does something that the trace does not show", run, EqualityError, leaves=model)


def test_a_model_without_norms_is_copied_and_never_run():
    model = nn.Sequential(nn.Linear(3, 4))
    new = fold.fold_batch_norm(model, "nothing that it could be called with")
    assert new is not model and torch.equal(new[0].weight, model[0].weight) and not stored(model) & stored(new)


# --- equalisation -----------------------------------------------------------------------------------------------------


@given(programs(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_equalising_any_network_leaves_its_function_and_the_network(program, seed):
    model = randomise_(Network(program), seed).double()
    before = digest(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    new = fold.equalize(model, x)
    assert digest(model) == before
    assert difference(model, new, 3 * torch.randn(3, 3, 8, 8, dtype=torch.double)) < EXACT
    made, read = new.hidden.weight.abs().amax(1), new.fc.weight.abs().amax(0)
    assert torch.allclose(made, read, rtol=1e-3)  # hidden - ReLU - fc is always a pair


@given(st.integers(0, 99), st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None)
def test_two_layers_get_the_paper_s_ranges(seed, dead):
    """Nagel et al. 2019, section 4.1, in one step, by hand."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-3, 3, 7)[:, None]
        if dead:
            model[0].weight[2] = 0  # never made
            model[2].weight[:, 5] = 0  # never read
    r1, r2 = model[0].weight.abs().amax(1), model[2].weight.abs().amax(0)
    s = (r1 * r2).sqrt() / r2
    s[(r1 == 0) | (r2 == 0)] = 1
    new = fold.equalize(model, torch.randn(2, 5, dtype=torch.double))
    assert torch.allclose(new[0].weight, model[0].weight / s[:, None], rtol=1e-12)
    assert torch.allclose(new[0].bias, model[0].bias / s, rtol=1e-12)
    assert torch.allclose(new[2].weight, model[2].weight * s, rtol=1e-12)


def test_relu6_breaks_the_equality_and_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-1, 1, 8)[:, None, None, None]
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    clipped, naive = copy.deepcopy(model), fold.equalize(model, x)
    clipped[1] = naive[1] = nn.ReLU6()
    assert difference(clipped, naive, x) > 1e-2  # what it would be to go on regardless
    clamp = WithForward(lambda _, y: y.clamp(0, 6))
    for clip, name in ((nn.ReLU6(), "hardtanh"), (nn.Hardtanh(0, 4), "hardtanh"), (clamp, "clamp")):
        clipped[1] = clip
        words = f"output of 0 is clipped from above ({name} in 1), ... nn.ReLU"
        check_refusal(words, partial(fold.equalize, clipped, x))


ROUTES = {
    "depthwise": Depthwise,
    "residual": Residual,
    "plain": Plain,
    "chain": lambda: nn.Sequential(*[m for m in chain(2) if not isinstance(m, nn.SiLU)]),
    "one layer, two readers": lambda: WithForward(
        lambda m, x: m.b(y := m.a(x).relu()).mean((2, 3)) + m.c(y.mean((2, 3))),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 4, 1),
        c=nn.Linear(6, 4),
    ),
    "excite": lambda: WithForward(
        lambda m, x: m.b((y := m.a(x)) * m.e(y.mean((2, 3), keepdim=True)).sigmoid()),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 4, 1),
        e=nn.Conv2d(6, 6, 1),
    ),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)),
    "padded": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ZeroPad2d(1), nn.AvgPool2d(2), nn.Conv2d(6, 4, 3)),
    "gated": lambda: WithForward(
        lambda m, x: m.d(F.silu(m.g(y := x.flatten(1))) * m.u(y)),
        g=nn.Linear(192, 6),
        u=nn.Linear(192, 6),
        d=nn.Linear(6, 4),
    ),
}


@pytest.mark.parametrize("kind", ROUTES)
def test_channels_are_followed_to_all_that_read_them(kind):
    torch.manual_seed(0)
    model = randomise_(ROUTES[kind]()).double()
    for module in model.modules():  # ranges that differ, so that a scale on the wrong channel shows
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            with torch.no_grad():
                module.weight *= torch.logspace(-1, 1, len(module.weight)).view(-1, *[1] * (module.weight.dim() - 1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    new = fold.equalize(model, x)
    assert difference(model, new, torch.randn(2, 3, 8, 8, dtype=torch.double)) < EXACT
    folded = fold.fold_batch_norm(model, x)
    assert any(not torch.equal(a, b) for a, b in zip(folded.parameters(), new.parameters(), strict=True))


BLOCKED = {
    "tanh": lambda m, x: m.b(m.a(x).tanh()),
    "an added number": lambda m, x: m.b(m.a(x) + 1),
    "an added branch": lambda m, x: m.b(m.a(x) + x),
    "padding with ones": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "another reader": lambda m, x: m.b(y := m.a(x)) + y.sin(),
    "a square": lambda m, x: m.b((y := m.a(x)) * y),
    "a statistic over channels": lambda m, x: m.b(y := m.a(x)) + y.mean(1, keepdim=True),
    "pooling over channels": lambda m, x: m.b(F.max_pool3d(m.a(x)[:, None], (4, 1, 1))[:, 0].expand(-1, 4, -1, -1)),
    "a shuffle": lambda m, x: m.b(m.a(x).view(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)),
    "a roll": lambda m, x: m.b(m.a(x).roll(1, 1)),
    "an output": lambda m, x: (m.b(y := m.a(x)), y),
    "transposed positions": lambda m, x: m.b(m.a(x).transpose(1, 2)),
}


@pytest.mark.parametrize("kind", BLOCKED)
def test_what_lets_no_scale_pass_is_no_pair(kind):
    model = WithForward(BLOCKED[kind], a=conv(), b=nn.Conv2d(4, 4, 1))
    before = digest(model)
    check_refusal(
        "Nothing in this model can be equalised: ... .", partial(fold.equalize, model, torch.randn(2, 4, 4, 4))
    )
    assert digest(model) == before


# --- smoothing --------------------------------------------------------------------------------------------------------


def block(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    norm = norm or nn.LayerNorm(6)
    layers = {"n": norm, "q": nn.Linear(6, 8), "k": nn.Linear(6, 8), "d": nn.Linear(8, 6)}
    model = WithForward(lambda m, x: x + m.d(m.q(y := m.n(x)) * m.k(y).relu()), **layers)
    with torch.no_grad():
        norm.weight.copy_(torch.logspace(-1, 1.5, 6))
    return model.double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_divides_by_the_paper_s_factors(alpha):
    """Xiao et al. 2023, equation 4, from maxima that are taken by hand."""
    model = block()
    data = [torch.randn(2, 5, 6, dtype=torch.double) for _ in range(3)]
    new = fold.smooth(model, data, alpha)
    assert max(difference(model, new, x * 5) for x in data) < EXACT
    inputs = torch.cat([model.n(x).abs().flatten(0, 1) for x in data]).amax(0)
    weights = torch.maximum(model.q.weight.abs().amax(0), model.k.weight.abs().amax(0))
    s = inputs**alpha / weights ** (1 - alpha)
    assert torch.allclose(new.n.weight, model.n.weight / s, rtol=1e-12)
    assert torch.allclose(new.n.bias, model.n.bias / s, rtol=1e-12)
    if alpha == 1:
        smoothed = torch.cat([new.n(x).abs().flatten(0, 1) for x in data]).amax(0)
        assert torch.allclose(smoothed, torch.ones_like(smoothed))


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_any_scale_at_any_site_leaves_the_function(name):
    model, batch = families.family(name).double(), families.inputs(name)
    new = copy.deepcopy(model)
    sites = [pair for pair in fold.scale_sites(new, Dataflow(new, (), batch)) if not pair[1].blocked]
    assert len(sites) >= 3
    for number, (source, route) in enumerate(sites):
        width = new.get_submodule(next(iter(route.readers))).in_features
        torch.manual_seed(number)
        fold.rescale_(new, source, route, torch.randn(width).exp())
        assert difference(model, new, **batch) < EXACT


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, lambda n: nn.LayerNorm(n, bias=False)])
def test_norms_of_either_kind_take_the_division(norm):
    x = torch.randn(2, 5, 6, dtype=torch.double)
    model = block(norm(6))
    new = fold.smooth(model, [x])
    assert difference(model, new, x) < EXACT and not any(isinstance(m, fold.Smoothed) for m in new.modules())
    assert not torch.allclose(new.n.weight, model.n.weight)
    assert not torch.allclose(new.q.weight * new.n.weight, new.q.weight * model.n.weight)


def test_a_shortcut_behind_the_norm_makes_the_layers_divide_themselves():
    """As in BERT. To scale the norm all the same, as for a pre-norm block, changes the shortcut too."""

    def forward(m, x):
        y = m.n(x)
        return y + m.q(y)

    model = WithForward(forward, n=nn.LayerNorm(6), q=nn.Linear(6, 6)).double()
    with torch.no_grad():
        model.n.weight.copy_(torch.logspace(-1, 1.5, 6))
    x = torch.randn(4, 6, dtype=torch.double)
    new = fold.smooth(model, [x])
    assert isinstance(new.q, fold.Smoothed) and difference(model, new, 3 * x) < EXACT
    assert torch.equal(new.n.weight, model.n.weight)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.n.weight /= new.q.divisor
        wrong.n.bias /= new.q.divisor
        wrong.q.weight *= new.q.divisor
    assert difference(model, wrong, x) > 0.1


POST_NORM = ("bert", "roberta", "distilbert", "minilm", "roformer")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_smoothed_exactly_or_refused(name):
    model = families.family(name).double()
    data = {key: x.double() if x.is_floating_point() else x for key, x in families.inputs(name).items()}
    before = {key: x.clone() for key, x in model.state_dict().items()}
    if name in ("gpt2", "falcon"):  # their layers are no nn.Linear, or do not compute as it does
        check_refusal("Nothing in this model can be smoothed", partial(fold.smooth, model, [data]))
        return
    new = fold.smooth(model, [data], 0.7)
    # norms of some families compute in float32 whatever the type of the model
    assert difference(model, new, **data) < (EXACT if name in ("bert", "opt", "vit", "neox", "phi") else 1e-5)
    divided = sum(isinstance(module, fold.Smoothed) for module in new.modules())
    assert divided == 12 if name in POST_NORM else divided <= 4  # query, key, value and the first of the two, 3 layers
    assert divided or any(not torch.equal(x, before[key]) for key, x in new.state_dict().items())
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_padding_is_not_looked_at():
    model = families.family("bert").double()
    plain = families.batches("bert")
    padded = families.batches("bert", pad=3)
    for a, b in zip(fold.smooth(model, plain).parameters(), fold.smooth(model, padded).parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


def test_what_cannot_be_compared_is_told_before_the_batches_are_read():
    layers = {"n": nn.LayerNorm(6), "q": nn.Linear(6, 8), "d": nn.Linear(8, 6)}
    model = WithForward(lambda m, x: (m.d(m.q(m.n(x))), torch.ones(1))[1], **layers)
    batches = iter([torch.randn(2, 6)] * 3)
    with pytest.raises(InputError, match="that its input decides"):
        fold.smooth(model, batches)
    assert len(list(batches)) == 2


BLOCK, TOKENS = block(), torch.randn(2, 5, 6, dtype=torch.double)
PERCEPTRON = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
REFUSALS: Refusals = {
    "alpha is -0.1, ... from 0 ... to 1": lambda: fold.smooth(BLOCK, [TOKENS], -0.1),
    "alpha is 1.5, ... from 0 ... to 1": lambda: fold.smooth(BLOCK, [TOKENS], 1.5),
    "alpha is nan, ... from 0 ... to 1": lambda: fold.smooth(BLOCK, [TOKENS], torch.nan),
    "alpha is 'half', ... from 0 ... to 1": lambda: fold.smooth(BLOCK, [TOKENS], "half"),
    "batches is empty": lambda: fold.smooth(BLOCK, []),
    "put it in a list": lambda: fold.smooth(BLOCK, TOKENS),
    "NaN or infinity in the input of q": lambda: fold.smooth(BLOCK, [TOKENS, TOKENS * torch.nan]),
    "Nothing in this model can be smoothed": lambda: fold.smooth(PERCEPTRON, [torch.randn(2, 3)]),
}


@refused(REFUSALS)
def test_what_cannot_be_smoothed_is_refused_in_a_sentence(words, call):
    check_refusal(words, call, leaves=BLOCK)
    assert not BLOCK.q._forward_pre_hooks and not BLOCK.d._forward_pre_hooks


# --- the course's models ----------------------------------------------------------------------------------------------


def shipped(load):
    try:
        return load()
    except DataError as error:
        pytest.skip(str(error))


def test_resnet20_folds_whole_and_equalises():
    model = models.resnet20().double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.double)
    new, even = fold.fold_batch_norm(model, x), fold.equalize(model, x)
    assert norms(new) == 0 and difference(model, new, x) < EXACT and difference(model, even, x) < EXACT
    rows, columns = even.stage1[0].conv1.weight.abs().amax((1, 2, 3)), even.stage1[0].conv2.weight.abs().amax((0, 2, 3))
    assert torch.allclose(rows, columns, rtol=1e-3)


def test_efficientnet_folds_whole_and_equalises_once_its_relu6_is_gone():
    model = shipped(models.efficientnet_lite0)
    x = torch.randn(1, 3, 32, 32)
    new = fold.fold_batch_norm(model, x)
    assert norms(new) == 0 and difference(model, new, x) < 1e-5
    check_refusal("clipped from above (hardtanh in stem.3)", partial(fold.equalize, model, x))
    for module in new.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    even = fold.equalize(new.double(), x.double())
    assert difference(new, even, x.double()) < EXACT

    def spread(model: nn.Module) -> float:  # of the channels' ranges in the depthwise layers
        ranges = [m.weight.detach().abs().amax((1, 2, 3)) for m in model.modules() if getattr(m, "groups", 1) > 1]
        return max(float(r.max() / r.median()) for r in ranges)

    assert spread(even) < 5 < 10 < spread(new)


def test_minilm_smooths_behind_its_post_norms():
    model = shipped(models.minilm).double()
    ids = torch.randint(1000, 20000, (2, 12))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    new = fold.smooth(model, [data])
    divided = [name for name, module in new.named_modules() if isinstance(module, fold.Smoothed)]
    assert len(divided) == 6 * 4 and difference(model, new, **data) < EXACT  # query, key, value and intermediate
