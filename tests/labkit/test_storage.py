"""Every format gives the weight back, or the nearest that it has, and takes the bytes that its formula says."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import check_refusal

from labkit import bits
from labkit.data import fetch
from labkit.pruning import nm
from labkit.quantization import affine, formats
from labkit.storage import formats as storage
from labkit.storage.formats import FORMATS, ROUNDED

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EXACT = [name for name in FORMATS if name != "kernel-bf16" and name not in ROUNDED]


def pruned(shape, share, dtype=torch.float32, seed=0):
    """Exactly this share of the entries is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(shape, generator=generator) + 1
    zeros = torch.randperm(weight.numel(), generator=generator)[: round(share * weight.numel())]
    return weight.flatten().index_fill(0, zeros, 0).view(shape).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=2) | st.lists(st.integers(1, 6), min_size=3, max_size=4),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    seed=st.integers(0, 99),
)
def test_every_weight_survives_every_format(shape, share, dtype, seed):
    weight = pruned(shape, share, dtype, seed)
    for name in EXACT:
        arrays = FORMATS[name].pack(weight)
        if arrays is None:
            assert (name, dtype) == ("kernel", torch.float64) or (name == "nm" and not nm.is_nm(weight))
            continue
        assert torch.equal(FORMATS[name].unpack(arrays, shape).to(dtype), weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_bytes_follow_the_formulas(dtype, share):
    weight, rows, s = pruned((64, 96), share, dtype), 64, dtype.itemsize
    total, n = weight.numel(), int(weight.count_nonzero())
    blocks = int((weight.view(8, 8, 12, 8) != 0).any(3).any(1).sum())
    expected = {
        "dense": total * s,
        "coo": n * (s + 16),
        "csr": n * (s + 4) + 4 * (rows + 1),
        "bitmask": n * s + total // 8,
        "bsr8": blocks * (64 * s + 4) + 4 * (rows // 8 + 1),
    }
    assert {name: storage.nbytes(weight, name) for name in expected} == expected
    assert storage.nbytes(weight * nm.mask(weight), "nm") == total * s // 2 + total // 8


def test_the_kernel_stores_about_five_bytes_a_weight():
    weight = pruned((1024, 1024), 0.9)
    n = int(weight.count_nonzero())
    assert 5 * n < storage.nbytes(weight, "kernel") < 5.8 * n
    assert 3 * n < storage.nbytes(weight, "kernel-bf16") < 3.7 * n


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_coo_csr_and_bsr_are_as_torch_has_them():
    weight = pruned((48, 64), 0.8)
    coo, csr, bsr = weight.to_sparse_coo().coalesce(), weight.to_sparse_csr(), weight.to_sparse_bsr((8, 8))
    assert torch.equal(FORMATS["coo"].pack(weight)["indices"], coo.indices())
    for name, theirs in (("csr", csr), ("bsr8", bsr)):
        ours = FORMATS[name].pack(weight)
        assert torch.equal(ours["crow"].long(), theirs.crow_indices())
        assert torch.equal(ours["col"].long(), theirs.col_indices()) and torch.equal(ours["values"], theirs.values())


def test_bits_are_packed_from_the_lowest_of_the_first_byte_in_every_format():
    weight = torch.tensor([[0.0, 5, 0, 6, 7, 0, 0, 0, 0, 1, 0, 0]])
    assert FORMATS["bitmask"].pack(weight)["mask"].tolist() == [0b0001_1010, 0b0000_0010]
    # Places 1, 3 in the low nibble; 0 and the first zero, 1, above; 0, the first zero, and 1 in the next byte.
    assert FORMATS["nm"].pack(weight)["metadata"].tolist() == [0b01_00_11_01, 0b01_00]
    assert FORMATS["nm"].pack(weight)["values"].tolist() == [[5, 6], [7, 0], [0, 1]]
    assert FORMATS["nm"].pack(torch.tensor([[1.0, 1, 1, 0]])) is None


# --- few bits ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3, 64), (5, 192), (2, 4, 4, 4), (4, 32), (3, 27), (1, 1)]),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 100.0]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    seed=st.integers(0, 99),
)
def test_what_is_unpacked_is_what_was_simulated(shape, scale, zeros, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * scale).to(dtype)
    weight[torch.rand(shape, generator=generator) < zeros] = 0
    rows = weight.flatten(1).to(torch.promote_types(dtype, torch.float32))
    width = rows.shape[1]

    def simulated(bits, group, symmetric):
        groups = rows.unflatten(1, (-1, group))
        lo, hi = groups.amin(2, True), groups.amax(2, True)
        return affine.choose(lo, hi, bits, symmetric=symmetric, dtype=torch.float16).fake(groups).float()

    expected = {"int8": simulated(8, width, True), "int4": simulated(4, 64 if width % 64 == 0 else width, False)}
    for name in ("nf4", "mxfp4", "nvfp4"):
        divides = width % formats.FORMATS[name].block == 0
        expected[name] = formats.fake(rows.float(), name) if divides else None
    for name, values in expected.items():
        parts = FORMATS[name].pack(weight)
        assert (parts is None) == (values is None)
        if parts:
            assert torch.equal(FORMATS[name].unpack(parts, shape), values.view(shape)), name


def test_true_bits_have_the_scales_and_zeros_in_them():
    weight = torch.randn(96, 576)
    expected = {  # bits a weight
        "int8": 8 + 16 / 576,
        "int4": 4 + (16 + 4) / 64,
        "nf4": 4.25,
        "mxfp4": 4.25,
        "nvfp4": 4.5 + 32 / weight.numel(),
        "q4_1": 5.0,
    }
    assert {name: 8 * storage.nbytes(weight, name) / weight.numel() for name in ROUNDED} == pytest.approx(expected)
    whole_row = torch.randn(8, 27)  # odd, and no multiple of 64
    assert storage.nbytes(whole_row, "int4") == 8 * 27 // 2 + 8 * 2 + 8 // 2


@given(st.lists(st.integers(-8, 7), max_size=9))
def test_nibbles_are_the_bits_of_width_four_and_lose_no_sign(codes):
    codes = torch.tensor(codes, dtype=torch.int8)
    data = bits.to_bits(codes, 4)
    ones_and_zeros = codes.to(torch.uint8)[:, None] >> torch.arange(4, dtype=torch.uint8) & 1
    assert torch.equal(data, bits.to_bits(ones_and_zeros, 1))
    back = bits.from_bits(data, 4, len(codes)).to(torch.int8)
    assert torch.equal((back ^ 8) - 8, codes)  # two's complement
    assert bits.to_bits(torch.tensor([1, -1, 2]), 4).tolist() == [0xF1, 0x02]  # the earlier code below


@given(st.integers(1, 8), st.data())
def test_bits_of_any_width_come_back(width, data):
    numbers = torch.tensor(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), dtype=torch.uint8)
    packed = bits.to_bits(numbers, width)
    assert len(packed) == -(-len(numbers) * width // 8)
    assert torch.equal(bits.from_bits(packed, width, len(numbers)), numbers)


def blocks_by_gguf(weight):
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_1
    data = quants.quantize(weight.flatten(1).numpy(), kind)
    return torch.from_numpy(data).view(-1, data.shape[-1] * 32 // weight.flatten(1).shape[1]), kind, quants


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the zeros
def test_q4_1_blocks_are_those_of_the_gguf_package_to_the_byte():
    pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    weight[0] = 0
    weight[1] = 1.5
    weight[2] = torch.randint(-2, 3, (96,), generator=generator) / 2  # ties, and two extremes
    weight[3] = -weight[3].abs()
    theirs, kind, quants = blocks_by_gguf(weight)
    parts = FORMATS["q4_1"].pack(weight)
    assert torch.equal(parts["blocks"], theirs)
    values = torch.from_numpy(quants.dequantize(theirs.numpy(), kind)).view(weight.shape)
    assert torch.equal(FORMATS["q4_1"].unpack(parts, weight.shape), values)
    convolution = weight.view(64, 6, 4, 4)
    assert torch.equal(FORMATS["q4_1"].pack(convolution)["blocks"], theirs)


def test_the_blocks_of_smollm2_requantise_to_the_shipped_codes():
    gguf = pytest.importorskip("gguf")
    files = list(fetch.asset("smollm2").folder.glob("*.gguf"))
    if not files:
        pytest.skip("SmolLM2 is not in the cache: ./lab data fetch smollm2")
    differing = total = 0
    for tensor in gguf.GGUFReader(files[0]).tensors:
        if tensor.tensor_type.name == "Q4_1" and "blk.7." in tensor.name:
            shipped = torch.from_numpy(tensor.data.copy()).view(-1, 20)
            weight = FORMATS["q4_1"].unpack({"blocks": shipped}, (len(shipped), 32))
            ours = FORMATS["q4_1"].pack(weight)["blocks"]
            differing += int((ours != shipped).any(1).sum())
            total += len(shipped)
    assert total > 100_000 and differing == 0, (differing, total)


@pytest.mark.parametrize("name", [*ROUNDED])
def test_nan_and_a_scale_beyond_the_format_are_refused(name):
    for weight in (torch.full((2, 64), torch.nan), torch.full((2, 64), torch.inf)):
        check_refusal("NaN", partial(FORMATS[name].pack, weight))


def test_a_weight_that_blocks_do_not_fill_has_no_bytes_in_them():
    words = "The weight [3, 27] does not have rows of whole blocks of 32 weights: choose ano"
    check_refusal(words, lambda: storage.nbytes(torch.ones(3, 27), "q4_1"))
    assert FORMATS["nvfp4"].pack(torch.ones(3, 27)) is None
