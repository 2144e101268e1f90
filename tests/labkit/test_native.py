"""The compiled kernels give what torch gives, with every instruction set; without a compiler slower code does."""

import os
import subprocess
import sys

import kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import check_refusal
from test_sparse import assert_product, assert_same_model, mlp, pruned

from labkit.pruning import nm
from labkit.pruning.sparse import SparseLinear, convert
from labkit.storage import native, sell

needs_compiler = pytest.mark.skipif(not native.isas("sparse_linear"), reason="needs a C++ compiler")


isa = kernels.every_isa("sparse_linear")
fastest_fetch = sell.fastest_fetch  # before a fixture takes its place


@pytest.fixture(params=sell.FETCHES, scope="module")
def fetch(request):
    """The ways to fetch weights ahead, of which the sparse kernel takes one meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sell, "fastest_fetch", lambda: request.param)
        yield request.param


variants = pytest.mark.usefixtures("isa", "fetch")


# --- sparse_linear ----------------------------------------------------------------------------------------------------

sizes = st.integers(1, 300)


@variants
@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, batch=st.integers(0, 140), density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
def test_the_kernel_equals_dense(rows, columns, batch, density):
    weight = pruned(rows, columns, density)
    layout = sell.pack(weight)
    x, bias = torch.randn(batch, columns), torch.randn(rows)
    assert_product(sell.multiply(x, layout, rows, bias), x, weight, bias)
    assert_product(sell.multiply(x, layout, rows, None), x, weight)


@variants
@pytest.mark.parametrize("dtype", sell.VALUES)
def test_the_kernel_equals_dense_at_every_tile_width(dtype):
    weight = pruned(530, 333, 0.2, dtype)
    layout = sell.pack(weight)
    for batch in (1, 2, 4, 5, 9, 16, 17, 33, 48, 49, 64, 65, 127, 128, 129, 513):
        x = torch.randn(batch, 333)
        assert_product(sell.multiply(x, layout, 530, None), x, weight)


@variants
@pytest.mark.parametrize("batch", [1, 3, 16, 70])
def test_the_kernel_takes_inputs_that_begin_anywhere_in_memory(batch):
    weight = pruned(70, 90, 0.3)
    layout = sell.pack(weight)
    numbers = torch.randn(batch * 90 + 3)
    for start in (1, 3):
        x = numbers[start : start + batch * 90].view(batch, 90)
        assert_product(sell.multiply(x, layout, 70, None), x, weight)


@variants
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_no_number_reaches_no_other_row(value):
    weight = pruned(50, 200, 0.3)
    layout = sell.pack(weight)
    x = torch.randn(70, 200)
    spoilt = x.clone()
    spoilt[66, 7] = value
    result, expected = sell.multiply(spoilt, layout, 50, None), sell.multiply(x, layout, 50, None)
    other = torch.arange(70) != 66
    assert torch.equal(result[other], expected[other])
    reads_it = weight[:, 7] != 0
    assert reads_it.any() and not result[66, reads_it].isfinite().any()


@needs_compiler
def test_the_fetch_that_wins_the_race_is_used(monkeypatch):
    assert set(sell.race()) == set(sell.FETCHES)
    monkeypatch.setattr(sell, "race", lambda: {"streamed": 2.0, "cached": 1.0})
    assert fastest_fetch.__wrapped__() == "cached"


@needs_compiler
def test_the_kernel_takes_rows_of_very_different_lengths():
    weight = torch.zeros(200, 600)
    weight[7], weight[100, :300], weight[150, 599] = 1.5, -2.0, 3.0
    for batch in (1, 70):
        x = torch.randn(batch, 600)
        assert_product(sell.multiply(x, sell.pack(weight), 200, None), x, weight)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 40, 200])
def test_two_threads_give_the_bits_of_one(threads, batch):
    layout, x = sell.pack(pruned(700, 400, 0.2)), torch.randn(batch, 400)
    threads(1)
    alone = sell.multiply(x, layout, 700, None)
    threads(2)
    assert torch.equal(sell.multiply(x, layout, 700, None), alone)


# --- nm_mask ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", native.NM_DTYPES)
def test_a_compiled_mask_is_that_of_the_comparisons(threads, dtype):
    """Ties, both infinities, -0.0; counts that end within a vector and within a thread's share."""
    generator, patterns = torch.Generator().manual_seed(0), set()
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, 1e-7]).to(dtype)
    for m in (2, 4, 8, 16, 3):
        for count, number in ((0, 1), (1, 1), (7, 2), (1025, 1), (20_001, 2)):
            threads(number)
            groups = values[torch.randint(len(values), (count, m), generator=generator)]
            if not native.nm_takes(groups):
                continue
            patterns.add(m)
            for n in {1, m // 2, m - 1, m}:
                largest = torch.empty(groups.shape, dtype=torch.bool)
                native.nm_largest(groups, n, largest)
                assert torch.equal(largest, nm.mask(groups.double(), n, m))
    assert {2, 4} <= patterns <= {2, 4, 8, 16}


@needs_compiler
@pytest.mark.parametrize("dtype", native.NM_DTYPES)
def test_a_compiled_mask_refuses_nan_and_leaves_other_memory_and_types_alone(dtype):
    weight = torch.ones(1024, 1028, dtype=dtype)
    assert nm.mask(weight).sum() == weight.numel() // 2
    weight[-1, -1] = -torch.nan
    check_refusal("holds NaN", lambda: nm.mask(weight))
    groups = weight.view(-1, 4)
    assert native.nm_takes(groups)
    for foreign in (groups.double(), groups.t().contiguous().t(), groups.to(torch.int16), groups.to("meta")):
        assert not native.nm_takes(foreign)


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """compiler("name ..."): as if CXX were that and nothing compiled yet."""

    def choose(command):
        monkeypatch.setenv("CXX", command)
        monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
        native.load.cache_clear()

    yield choose
    native.load.cache_clear()


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "g++ -include no_such_header.h"])
def test_without_a_compiler_a_product_is_slower_said_once_and_right(compiler, command, tmp_path):
    packed = SparseLinear(pruned(30, 20, 0.3), torch.randn(30), "kernel")  # as loaded from another machine
    compiler(command)
    model, x = mlp(), torch.randn(3, 40)
    with pytest.warns(UserWarning, match="could not be compiled") as warned:
        converted = convert(model, format="kernel")
        assert convert(model)[0].format in ("dense", "csr")
        packed(x[:, :20])
    assert len(warned) == 1
    assert converted[0].format == "csr"
    assert_same_model(converted, model, x)
    assert_product(packed(x[:, :20]), x[:, :20], packed.weight, packed.bias)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_a_compiler_a_mask_is_slower_said_once_and_right(compiler):
    weight = torch.randn(1024, 1024)
    expected = nm.mask(weight)
    compiler("no-such-compiler")
    with pytest.warns(UserWarning, match="nm_mask.cpp could not be compiled") as warned:
        assert torch.equal(nm.mask(weight), expected) and torch.equal(nm.mask(weight), expected)
    assert len(warned) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_is_told_as_what_it_is(compiler, tmp_path):
    compiler("g++")
    (tmp_path / "kernels").write_text("")  # no folder can be made there, as on a read-only disk
    with pytest.warns(UserWarning, match=r"could not be compiled \(.*kernels.*\).*: name a folder .* in LABKIT_CACHE"):
        assert native.load("nm_mask") is None


@needs_compiler
@pytest.mark.slow
def test_two_processes_may_compile_at_once(tmp_path):
    code = "from labkit.storage import native; assert native.isas('nm_mask')"
    environment = {"LABKIT_CACHE": str(tmp_path), "PATH": os.environ["PATH"]}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(list((tmp_path / "kernels").iterdir())) == 1
