"""Every format gives the weight back and takes the bytes that its formula says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import storage
from labkit.pruning import nm
from labkit.storage import FORMATS

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EXACT = [name for name in FORMATS if name != "kernel-bf16"]


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
