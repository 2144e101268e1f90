"""Every packed layer computes what the dense one does; a speed-up is measured between equals."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from families import family, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import nn
from torch.nn.utils import parametrize, prune

from labkit.pruning import nm, sparse, unstructured
from labkit.pruning.sparse import KERNELS, SparseLinear, convert, costs
from labkit.storage import native
from labkit.timing import bench
from labkit.timing.machine import on_threads

ON_CPU = [name for name in KERNELS if "cpu" in KERNELS[name].devices]
EXACT = [name for name in ON_CPU if name != "kernel-bf16"]
needs_compiler = pytest.mark.skipif(not native.isas("sparse_linear"), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pruned(out_features, in_features, density, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=draw)
    return (weight * (torch.rand(out_features, in_features, generator=draw) < density)).to(dtype)


def assert_product(y, x, weight, bias=None):
    """y is x W^T + bias up to the rounding of float32 sums of K terms in any order: K eps times the absolute sum."""
    x, weight = x.double(), weight.double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    bound = (x.shape[-1] + 1) * 2**-24 * 1.01 * (F.linear(x.abs(), weight.abs()) + bias.abs())
    assert y.shape == (*x.shape[:-1], len(weight))
    assert ((y.double() - F.linear(x, weight, bias)).abs() <= bound).all()


def assert_same_model(model, other, x):
    """Rounding of three layers of at most 96 terms, relative to the largest output."""
    with torch.no_grad():
        expected = other(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=3 * 98 * 2**-23 * float(expected.abs().max()))


def mlp(density=0.1, width=96):
    model = nn.Sequential(nn.Linear(40, width), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Linear(width, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data = pruned(*layer.weight.shape, density)
    return model


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", EXACT)
@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    density=st.floats(0, 1),
    batch=st.lists(st.integers(0, 9), max_size=2) | st.just([70]),
)
def test_every_format_equals_dense_for_inputs_of_any_rank(format, rows, columns, density, batch):
    weight, bias, x = pruned(rows, columns, density), torch.randn(rows), torch.randn(*batch, columns)
    assert_product(SparseLinear(weight, bias, format)(x), x, weight, bias)


@pytest.mark.parametrize("format", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_round_once(format, dtype):
    weight, bias, x = pruned(40, 60, 0.3, dtype), torch.randn(40).to(dtype), torch.randn(6, 60).to(dtype)
    if format == "kernel-bf16":
        weight = weight.bfloat16()
    y = SparseLinear(weight, bias, format)(x)
    assert y.dtype == dtype
    expected = F.linear(x.double(), weight.double(), bias.double())
    # One rounding of the product, one of the sum with the bias.
    atol = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)


@needs_compiler
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_cast_of_the_packed_weights_is_not_misread(cast):
    layer, x = SparseLinear(pruned(20, 30, 0.3), None, "kernel"), torch.randn(4, 30)
    bound = 2**-8 * F.linear(x.abs(), layer.weight.abs()) + 1e-6  # half a unit of bfloat16's last place, a weight
    assert ((cast(copy.deepcopy(layer))(x) - layer(x)).abs() <= bound).all()


def test_a_state_dict_holds_the_packed_form_and_does_not_load():
    model = convert(mlp(0.1), format="csr")
    state = model.state_dict()
    assert sum(t.nbytes for t in state.values()) < 0.5 * sum(t.nbytes for t in mlp().state_dict().values())
    check_refusal("load the dense model's weights", lambda: model.load_state_dict(state), leaves=model)


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", *EXACT])
def test_a_converted_model_equals_the_model_which_stays_as_it_was(format):
    model, x = mlp(), torch.randn(33, 40)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, format=format, batch_size=33)
    assert_same_model(converted, model, x)
    assert all(isinstance(converted[i], SparseLinear) and isinstance(model[i], nn.Linear) for i in (0, 2, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not converted(x).requires_grad


def test_the_dtype_and_mode_stay():
    model = mlp().to(torch.bfloat16).train()
    model[3].eval()
    converted = convert(model, format="kernel")
    assert [layer.training for layer in converted] == [True, True, True, False]
    assert converted[0].bias.dtype == converted(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16
    assert converted[2].bias is None


def test_a_linear_alone_and_shared_ones():
    linear = nn.Linear(16, 16)
    assert isinstance(convert(linear, format="csr"), SparseLinear) and type(linear) is nn.Linear
    converted = convert(nn.Sequential(linear, nn.ReLU(), linear), format="csr")
    assert converted[0] is converted[2]


def test_masks_of_torch_are_applied_though_their_hook_has_not_run():
    model, x = mlp(1.0), torch.randn(5, 40)
    for i in (0, 2, 3):
        prune.l1_unstructured(model[i], "weight", 0.9)
        model[i].weight_orig.data *= 2
    converted = convert(model, format="csr")
    assert_same_model(converted, model, x)
    assert converted[2].parts["values"].numel() == round(0.1 * 96 * 96)


def test_parametrized_weights_are_seen_as_the_forward_pass_sees_them():
    linear, x = nn.Linear(30, 20), torch.randn(4, 30)
    parametrize.register_parametrization(linear, "weight", nn.ReLU())
    torch.testing.assert_close(convert(linear, format="kernel")(x), linear(x).detach())


def test_the_linear_layers_of_gpt2_are_converted():
    """Its Conv1D holds [in, out]."""
    model, tokens = unstructured.prune(family("gpt2").transformer, 0.5), inputs("gpt2")["input_ids"]
    converted = convert(model, format="csr")
    assert sum(isinstance(module, SparseLinear) for module in converted.modules()) == 3 * 4
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-5)


class Counting(SparseLinear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_modules_that_read_weights_from_outside_keep_working():
    """nn.TransformerEncoderLayer's fused path would read the dense weights, past the layers."""
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    converted, x = convert(model, format="kernel", batch_size=10), torch.randn(2, 5, 32)
    assert isinstance(converted.linear1, SparseLinear) and isinstance(converted.self_attn.out_proj, nn.Linear)
    converted.linear1.__class__ = Counting
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert converted.linear1.calls == 1 and model.activation_relu_or_gelu == 1
    torch.testing.assert_close(converted.linear1.weight, model.linear1.weight.detach())


def layer(format="csr"):
    return SparseLinear(torch.eye(4), None, format)


def converted(**options):
    return lambda: convert(nn.Linear(4, 4), **options)


CONVERSIONS: Refusals = {
    "no format 'zip' that runs": converted(format="zip"),
    "no format 'bitmask' that runs": converted(format="bitmask"),
    "runs on cuda, not on cpu": converted(format="2:4"),
    "batch_size is 0": converted(batch_size=0),
    "batch_size is 1.5": converted(batch_size=1.5),
    "None of the model's Linear layers": lambda: convert(nn.Linear(4, 4, dtype=torch.float64), format="kernel-bf16"),
    "no nn.Linear to convert": lambda: convert(nn.Sequential(nn.ReLU())),
    "takes a torch.nn.Module, not a dict": lambda: convert({"weight": torch.zeros(4, 4)}),
}


@needs_compiler
@refused(CONVERSIONS)
def test_what_cannot_be_converted_is_refused(words, call):
    check_refusal(words, call)


REFUSALS: Refusals = {
    "computes no gradients": lambda: layer()(torch.randn(2, 4, requires_grad=True)),
    "has 5 features": lambda: layer()(torch.randn(2, 5)),
    "computes in float32 on a CPU": lambda: layer("kernel")(torch.randn(2, 4, dtype=torch.float64)),
}


@refused(REFUSALS)
def test_what_a_layer_cannot_do_is_refused(words, call):
    check_refusal(words, call)


def test_an_input_that_could_have_a_gradient_is_taken_where_none_is_asked_for():
    with torch.no_grad():
        assert torch.equal(layer()(torch.eye(4, requires_grad=True)), torch.eye(4))


def test_no_warning_reaches_the_user():
    sparse._warn_of_beta.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ON_CPU:
            convert(mlp(), format=format)(torch.randn(2, 40))


# --- auto -------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("batch_size", "tiles"),
    [(2, [4]), (4, [4]), (5, [8]), (9, [16]), (48, [48]), (49, [64]), (64, [64]), (65, [64, 4]), (130, [64, 64, 4])],
)
def test_the_cost_of_the_kernel_is_that_of_its_tiles(batch_size, tiles):
    """n (18 + 1.04 T) + 2 T out in / 112 for a tile of T rows, and 200,000 for the call."""
    n = 100_000
    expected = sum(n * (18 + 1.04 * t) + 2 * t * 512 * 1024 / 112 for t in tiles) + 200_000
    assert costs(512, 1024, n, batch_size)["kernel"] == pytest.approx(expected, rel=1e-12)


def test_the_costs_of_dense_and_csr():
    small, large = 1024 * 1024, 2048 * 1024
    assert costs(1024, 1024, 1000, 1) == {**costs(1024, 1024, 1000, 1), "dense": small * 4.5, "csr": 51_000 + 200_000}
    assert costs(1024, 1024, 1000, 2)["dense"] == small * 10 and costs(2048, 1024, 1000, 2)["dense"] == large * 22


def test_auto_follows_its_costs():
    def chosen(density, batch_size, shape=(1024, 1024)):
        linear = nn.Linear(*shape[::-1])
        linear.weight.data = pruned(*shape, density)
        return convert(linear, batch_size=batch_size).format

    assert chosen(1.0, 64) == "dense"
    assert chosen(0.1, 1, shape=(32, 32)) == "dense"
    fast = "kernel" if native.isas("sparse_linear") else "csr"
    assert chosen(0.05, 1) == chosen(0.05, 64) == fast
    units = costs(1024, 1024, int(pruned(1024, 1024, 0.1).count_nonzero()), 64)
    assert chosen(0.1, 64) == min(units, key=units.get)


def test_auto_never_changes_the_precision():
    linear = nn.Linear(512, 512, dtype=torch.float64)
    linear.weight.data = pruned(512, 512, 0.02, torch.float64)
    x = torch.randn(3, 512, dtype=torch.float64)
    torch.testing.assert_close(convert(linear, batch_size=3)(x), linear(x).detach(), rtol=1e-12, atol=1e-12)


# --- what a format gains in time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_a_random_weight_has_exactly_the_zeros_asked_for_each_time_at_the_same_places(sparsity):
    weight = sparse.random_weight(64, 128, sparsity)
    assert int((weight == 0).sum()) == round(64 * 128 * sparsity)
    assert torch.equal(weight, sparse.random_weight(64, 128, sparsity))


@pytest.mark.timing
@needs_compiler
@pytest.mark.parametrize("batch", [1, 64])
def test_the_kernel_beats_dense_at_ninety_percent(batch):
    """Over 128 MB of weights: one alone may lie in a large L3, where a dense product at batch 1 is twice as fast."""
    weights, x = [pruned(2048, 2048, 0.1, seed=seed) for seed in range(8)], torch.randn(batch, 2048)
    layers = [SparseLinear(weight, None, "kernel") for weight in weights]
    with on_threads(1):
        result = bench.compare(
            lambda: [F.linear(x, weight) for weight in weights], lambda: [layer(x) for layer in layers]
        )
    assert result.speedup > 3, result


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["dense", "coo", "csr", "bsr16", "bsr32"])
def test_formats_equal_dense_on_cuda(format):
    model = mlp().cuda()
    x = torch.randn(64, 40, device="cuda")
    torch.testing.assert_close(convert(model, format=format)(x), model(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_two_four_equals_dense_on_cuda():
    linear = nn.Linear(256, 256, dtype=torch.float16, device="cuda")
    linear.weight.data *= nm.mask(linear.weight)
    x = torch.randn(128, 256, dtype=torch.float16, device="cuda")
    converted = convert(linear, format="2:4")
    assert converted.format == "2:4" and torch.equal(converted.weight, linear.weight)
    torch.testing.assert_close(converted(x), linear(x).detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_the_kernel_is_refused_on_cuda():
    check_refusal("runs on cpu, not on cuda", lambda: convert(mlp().cuda(), format="kernel"))
    assert convert(mlp().cuda())[0].format == "dense"
