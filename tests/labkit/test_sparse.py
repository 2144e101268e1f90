"""labkit.pruning.sparse and kernels: each format computes what dense does, is as small as it says, and says no well."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

from labkit import bench, storage
from labkit.errors import InputError
from labkit.pruning import native, nm, sparse, unstructured
from labkit.pruning.sparse import KERNELS, SparseLinear, convert, costs
from labkit.storage import FORMATS
from labkit.storage import nbytes as stored_bytes

ON_CPU = [name for name in KERNELS if "cpu" in KERNELS[name].devices]
EXACT = [name for name in ON_CPU if name != "kernel-bf16"]
needs_kernel = pytest.mark.skipif(not native.isas("sparse_linear"), reason="needs a C++ compiler")


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


# --- equal ------------------------------------------------------------------------------------------------------------

shapes = st.integers(1, 300)
densities = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])


@pytest.mark.parametrize("isa", native.ISAS)
@settings(deadline=None, max_examples=40)
@given(rows=shapes, columns=shapes, batch=st.integers(0, 140), density=densities, seed=st.integers(0, 9))
def test_kernel_equals_dense(isa, rows, columns, batch, density, seed):
    if isa not in native.isas("sparse_linear"):
        pytest.skip(f"this machine has no {isa}")
    weight = pruned(rows, columns, density, seed=seed)
    layout = native.pack(weight)
    x, bias = torch.randn(batch, columns), torch.randn(rows)
    assert_product(native.multiply(x, layout, rows, bias, isa), x, weight, bias)
    assert_product(native.multiply(x, layout, rows, None, isa), x, weight)


@needs_kernel
@pytest.mark.parametrize("isa", native.isas("sparse_linear"))
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 9, 16, 17, 33, 48, 49, 64, 65, 127, 128, 129, 512, 513])
def test_kernel_equals_dense_at_every_tile_width(isa, batch):
    weight, x = pruned(530, 333, 0.2), torch.randn(batch, 333)
    assert_product(native.multiply(x, native.pack(weight), 530, isa=isa), x, weight)


@needs_kernel
@pytest.mark.parametrize("isa", native.isas("sparse_linear"))
@pytest.mark.parametrize("batch", [1, 3, 16, 40, 64])
def test_kernel_with_bfloat16_weights_equals_dense_with_rounded_weights(isa, batch):
    weight, x = pruned(130, 250, 0.3, torch.bfloat16), torch.randn(batch, 250)
    assert_product(native.multiply(x, native.pack(weight), 130, isa=isa), x, weight)


@needs_kernel
@pytest.mark.parametrize("batch", [1, 40, 200])
def test_two_threads_give_the_bits_of_one(batch):
    layout, x = native.pack(pruned(700, 400, 0.2)), torch.randn(batch, 400)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.multiply(x, layout, 700)
        torch.set_num_threads(2)
        assert torch.equal(native.multiply(x, layout, 700), one)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_kernel_takes_rows_of_very_different_lengths():
    weight = torch.zeros(200, 600)
    weight[7], weight[100, :300], weight[150, 599] = 1.5, -2.0, 3.0
    x = torch.randn(70, 600)
    assert_product(native.multiply(x, native.pack(weight), 200), x, weight)
    assert_product(native.multiply(x[:1], native.pack(weight), 200), x[:1], weight)


@pytest.mark.parametrize("format", EXACT)
@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), batch=st.integers(1, 70), density=densities)
def test_format_equals_dense(format, rows, columns, batch, density):
    weight, bias, x = pruned(rows, columns, density), torch.randn(rows), torch.randn(batch, columns)
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
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps * float(expected.abs().max())
    )


@pytest.mark.parametrize("format", ON_CPU)
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
def test_inputs_of_any_rank(format, shape):
    weight, x = pruned(32, 48, 0.2), torch.randn(shape)
    expected = SparseLinear(weight, None, "dense")(x)
    torch.testing.assert_close(SparseLinear(weight, None, format)(x), expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("format", EXACT)
def test_inputs_that_are_not_contiguous(format):
    weight, x = pruned(32, 48, 0.2), torch.randn(48, 9).t()
    assert_product(SparseLinear(weight, None, format)(x), x, weight)


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("nm", "kernel-bf16")])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (70, 130), (33, 257)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_unpacking_gives_the_weight_back(format, shape, density):
    weight = pruned(*shape, density)
    assert torch.equal(FORMATS[format].unpack(FORMATS[format].pack(weight), shape), weight)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_bytes_follow_their_formulas(dtype):
    weight = pruned(64, 96, 0.1, dtype)
    total, kept, rows, size = weight.numel(), int(weight.count_nonzero()), 64, weight.element_size()
    blocks = int((weight.view(8, 8, 12, 8) != 0).any(3).any(1).sum())
    expected = {
        "dense": total * size,
        "coo": kept * (size + 16),
        "csr": kept * (size + 4) + 4 * (rows + 1),
        "csr64": kept * (size + 8) + 8 * (rows + 1),
        "bitmask": kept * size + total // 8,
        "bsr8": blocks * (64 * size + 4) + 4 * (rows // 8 + 1),
    }
    for format, data in expected.items():
        assert stored_bytes(weight, format) == data, format


def test_the_kernel_stores_about_five_bytes_a_weight():
    weight = pruned(2048, 2048, 0.1)
    kept = int(weight.count_nonzero())
    assert 5 * kept < stored_bytes(weight, "kernel") < 5.6 * kept
    assert 3 * kept < stored_bytes(weight, "kernel-bf16") < 3.5 * kept


def test_convolutions_are_stored_as_matrices():
    assert stored_bytes(pruned(64, 27, 0.5).view(64, 3, 3, 3), "csr") == stored_bytes(pruned(64, 27, 0.5), "csr")


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", *EXACT])
@pytest.mark.parametrize("batch", [1, 33])
def test_converted_equals_the_model(format, batch):
    model, x = mlp(), torch.randn(batch, 40)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, format=format, batch_size=batch)
    assert_same_model(converted, model, x)
    assert all(isinstance(converted[i], SparseLinear) and isinstance(model[i], nn.Linear) for i in (0, 2, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bfloat16_weights_are_an_option():
    model, x = mlp(), torch.randn(8, 40)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16().float()
    assert_same_model(convert(model, format="kernel-bf16"), rounded, x)


def test_a_single_linear_becomes_a_sparse_one():
    linear = nn.Linear(16, 8)
    assert isinstance(convert(linear, format="csr"), SparseLinear) and type(linear) is nn.Linear


def test_the_device_dtype_and_mode_stay():
    model = mlp().to(torch.bfloat16).train()
    model[3].eval()
    converted = convert(model, format="kernel")
    assert [layer.training for layer in converted] == [True, True, True, False]
    assert (
        converted[0].bias.dtype == torch.bfloat16 and converted(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16
    )
    assert converted[2].bias is None


def test_shared_layers_stay_shared():
    linear = nn.Linear(16, 16)
    converted = convert(nn.Sequential(linear, nn.ReLU(), linear), format="csr")
    assert converted[0] is converted[2]


def test_masks_of_labkit_are_applied():
    model = unstructured.prune(mlp(1.0), 0.8)
    converted, x = convert(model, format="csr"), torch.randn(5, 40)
    assert_same_model(converted, model, x)
    kept = sum(len(converted[i].parts["values"]) for i in (0, 2, 3))
    total = sum(model[i].weight.numel() for i in (0, 2, 3))
    assert abs(kept - 0.2 * total) < 1


def test_masks_of_torch_are_applied_though_their_hook_has_not_run():
    model, x = mlp(1.0), torch.randn(5, 40)
    for i in (0, 2, 3):
        prune.l1_unstructured(model[i], "weight", 0.9)
        model[i].weight_orig.data *= 2
    converted = convert(model, format="csr")
    assert_same_model(converted, model, x)
    assert converted[2].parts["values"].numel() == round(0.1 * 96 * 96)


def test_parametrized_weights_are_seen_as_the_forward_pass_sees_them():
    class Relu(nn.Module):
        def forward(self, weight):
            return weight.relu()

    linear, x = nn.Linear(30, 20), torch.randn(4, 30)
    parametrize.register_parametrization(linear, "weight", Relu())
    torch.testing.assert_close(convert(linear, format="kernel")(x), linear(x).detach())


def test_modules_that_read_weights_from_outside_keep_working():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    converted, x = convert(model, format="kernel", batch_size=10), torch.randn(2, 5, 32)
    assert isinstance(converted.linear1, SparseLinear) and isinstance(converted.self_attn.out_proj, nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert model.activation_relu_or_gelu == 1
    torch.testing.assert_close(converted.linear1.weight, model.linear1.weight.detach())


def test_state_dicts_hold_the_packed_form_and_load_into_another_sparsity():
    full, thin, x = convert(mlp(0.9), format="kernel"), convert(mlp(0.1), format="kernel"), torch.randn(3, 40)
    state = thin.state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) < 0.5 * sum(
        t.numel() * t.element_size() for t in mlp().state_dict().values()
    )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    full.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(full(x), thin(x))


@pytest.mark.parametrize("format", EXACT)
def test_deepcopy_and_pickle_keep_the_layer(format):
    layer, x = SparseLinear(pruned(20, 30, 0.3), torch.randn(20), format), torch.randn(4, 30)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)


@needs_kernel
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_cast_of_the_packed_weights_is_not_misread(cast):
    layer, x = SparseLinear(pruned(20, 30, 0.3), None, "kernel"), torch.randn(4, 30)
    bound = 2**-8 * F.linear(x.abs(), layer.weight.abs()) + 1e-6  # half a unit of bfloat16's last place, a weight
    assert ((cast(copy.deepcopy(layer))(x) - layer(x)).abs() <= bound).all()


def test_auto_follows_its_costs():
    def chosen(density, batch_size, shape=(1024, 1024)):
        linear = nn.Linear(*shape[::-1])
        linear.weight.data = pruned(*shape, density)
        return convert(linear, batch_size=batch_size).format

    assert chosen(1.0, 64) == "dense"
    assert chosen(0.1, 1, shape=(32, 32)) == "dense"
    fast = "kernel" if native.isas("sparse_linear") else "csr"
    assert chosen(0.05, 1) == chosen(0.05, 64) == fast
    nonzeros = int(pruned(1024, 1024, 0.1).count_nonzero())
    found = costs(1024, 1024, nonzeros, 64)
    assert chosen(0.1, 64) == min(found, key=found.get)


def test_auto_never_changes_the_precision():
    linear = nn.Linear(512, 512, dtype=torch.float64)
    linear.weight.data = pruned(512, 512, 0.02, torch.float64)
    x = torch.randn(3, 512, dtype=torch.float64)
    torch.testing.assert_close(convert(linear, batch_size=3)(x), linear(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (nn.Linear(4, 4), {"format": "zip"}, "no format 'zip' that runs"),
        (nn.Linear(4, 4), {"format": "bitmask"}, "no format 'bitmask' that runs"),
        (nn.Linear(4, 4), {"format": "2:4"}, "runs on cuda, not on cpu"),
        (nn.Linear(4, 4), {"batch_size": 0}, "batch_size is 0"),
        (nn.Linear(4, 4), {"batch_size": 1.5}, "batch_size is 1.5"),
        (nn.Linear(4, 4, dtype=torch.float64), {"format": "kernel-bf16"}, "None of the model's Linear layers"),
        (nn.Sequential(nn.ReLU()), {}, "no nn.Linear to convert"),
        ({"weight": torch.zeros(4, 4)}, {}, "takes a torch.nn.Module, not a dict"),
    ],
)
@needs_kernel
def test_what_cannot_be_converted_is_refused(model, arguments, says):
    with pytest.raises(InputError, match=says):
        convert(model, **arguments)


def test_a_gradient_is_refused():
    layer = SparseLinear(torch.eye(4), None, "csr")
    with pytest.raises(InputError, match="computes no gradients"):
        layer(torch.randn(2, 4, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(2, 4, requires_grad=True))


def test_a_converted_model_runs_without_no_grad():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    assert convert(model, format="csr")(torch.randn(2, 8)).requires_grad is False
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_inputs_are_refused():
    with pytest.raises(InputError, match="has 5 features"):
        SparseLinear(torch.eye(4), None, "csr")(torch.randn(2, 5))
    with pytest.raises(InputError, match="computes in float32 on a CPU"):
        SparseLinear(torch.eye(4), None, "kernel")(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("format", [*EXACT, "bitmask"])
def test_damaged_parts_are_refused(format):
    parts = FORMATS[format].pack(pruned(40, 50, 0.3))
    damaged = {name: part[:-1].clone() for name, part in parts.items()}
    with pytest.raises(InputError):
        storage.check(damaged, format, (40, 50))


@pytest.mark.parametrize(("part", "value"), [("columns", 255), ("order", 999), ("lengths", 200), ("starts", 7)])
def test_a_damaged_kernel_layout_does_not_load(part, value):
    layer = SparseLinear(pruned(40, 50, 0.3), None, "kernel")
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state[f"packed_{part}"][-1] = value
    with pytest.raises(InputError, match="damaged"):
        layer.load_state_dict(state)


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """compiler("name ..."): as if CXX were that and nothing compiled yet."""

    def forget():
        for cached in (native.load,):
            cached.cache_clear()

    def choose(command):
        monkeypatch.setenv("CXX", command)
        monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
        forget()

    yield choose
    forget()


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "g++ -include no_such_header.h"])
def test_without_a_compiler_it_is_slower_said_once_and_right(compiler, command, tmp_path):
    packed = SparseLinear(pruned(30, 20, 0.3), torch.randn(30), "kernel")  # as loaded from another machine
    compiler(command)
    model, x = mlp(), torch.randn(3, 40)
    with pytest.warns(UserWarning, match="could not be compiled") as said:
        converted = convert(model, format="kernel")
        assert convert(model)[0].format in ("dense", "csr")
        packed(x[:, :20])
    assert len(said) == 1
    assert converted[0].format == "csr"
    assert_same_model(converted, model, x)
    assert_product(packed(x[:, :20]), x[:, :20], packed.weight, packed.bias)
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_a_mask_is_slower_said_once_and_right(compiler):
    weight = torch.randn(1024, 1024)
    kept = nm.mask(weight)
    compiler("no-such-compiler")
    with pytest.warns(UserWarning, match="nm_mask.cpp could not be compiled") as said:
        assert torch.equal(nm.mask(weight), kept) and torch.equal(nm.mask(weight), kept)
    assert len(said) == 1


@needs_kernel
def test_two_processes_may_compile_at_once(tmp_path):
    code = "from labkit.pruning import native; assert native.isas('sparse_linear')"
    environment = {"LABKIT_CACHE": str(tmp_path), "PATH": __import__("os").environ["PATH"]}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(list((tmp_path / "kernels").iterdir())) == 1


# --- fast -------------------------------------------------------------------------------------------------------------


@pytest.mark.timing
@needs_kernel
@pytest.mark.parametrize("batch", [1, 64])
def test_the_kernel_beats_dense_at_ninety_percent(batch):
    """Over 128 MB of weights: one alone may lie in a large L3, where a dense product at batch 1 is twice as fast."""
    weights, x = [pruned(2048, 2048, 0.1, seed=seed) for seed in range(8)], torch.randn(batch, 2048)
    layers, threads = [SparseLinear(weight, None, "kernel") for weight in weights], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        result = bench.compare(
            lambda: [F.linear(x, weight) for weight in weights], lambda: [layer(x) for layer in layers]
        )
    finally:
        torch.set_num_threads(threads)
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
    linear.weight.data.view(-1, 4)[:, 2:] = 0
    x = torch.randn(128, 256, dtype=torch.float16, device="cuda")
    converted = convert(linear, format="2:4")
    assert converted.format == "2:4"
    torch.testing.assert_close(converted(x), linear(x).detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_the_kernel_is_refused_on_cuda():
    with pytest.raises(InputError, match="runs on cpu, not on cuda"):
        convert(mlp().cuda(), format="kernel")
    assert convert(mlp().cuda())[0].format == "dense"


def test_no_warning_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ON_CPU:
            sparse.convert(mlp(), format=format)(torch.randn(2, 40))
