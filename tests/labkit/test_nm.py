"""The N:M pattern against a loop over groups: exactly n of every m, whatever shape, stride, type and ties."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused

from labkit.pruning import nm, pattern
from labkit.timing.machine import on_threads

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def by_loop(weight, n, m):
    """The mask, group by group: sorted by magnitude, of equal ones the lower index first."""
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    rows = weight.double()[None] if weight.dim() == 1 else weight.double().movedim(1, -1)
    out = kept[None] if weight.dim() == 1 else kept.movedim(1, -1)
    for row, chosen in zip(rows.flatten(0, -2).tolist(), positions(out), strict=True):
        for start in range(0, len(row), m):
            for i in sorted(range(start, start + m), key=lambda i: (-abs(row[i]), i))[:n]:
                out[(*chosen, i)] = True
    return kept


def positions(rows):
    return list(torch.cartesian_prod(*map(torch.arange, rows.shape[:-1])).view(-1, rows.dim() - 1).unbind(0))


@st.composite
def patterns(draw):
    m = draw(st.integers(1, 16))
    return draw(st.integers(1, m)), m


def strided(weight, how):
    """The same values with other strides."""
    if how == "transposed":
        return weight.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        return torch.stack([weight, weight], -1).flatten(-2)[..., ::2]
    if how == "channels first in memory" and weight.dim() > 1:
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return weight


STRIDES = ["contiguous", "transposed", "sliced", "channels first in memory"]


@st.composite
def weights(draw, m):
    """Few different values, so that most groups have ties; -0.0 and negative ones among them."""
    width = draw(st.integers(0, 3)) * m
    shape = draw(st.sampled_from([(), (3,), (2, 2), (2, 3, 1), (1, 1, 2, 2)]))  # what stands around the input dimension
    shape = (width,) if not shape else (shape[0], width, *shape[1:])
    dtype = draw(st.sampled_from(DTYPES))
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, 0.5])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    chosen = values[torch.randint(draw(st.integers(1, 8)), shape, generator=generator)]
    return strided((chosen.abs() if dtype == torch.uint8 else chosen).to(dtype), draw(st.sampled_from(STRIDES)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mask_is_the_loop(data):
    n, m = data.draw(patterns())
    weight = data.draw(weights(m))
    before = weight.clone()
    kept = nm.mask(weight, n, m)
    assert kept.shape == weight.shape and kept.is_contiguous() and kept.dtype == torch.bool
    assert torch.equal(kept, by_loop(weight, n, m))
    assert torch.equal(weight.double(), before.double())


def test_extreme_values_rank_by_magnitude():
    info = torch.finfo(torch.float32)
    weight = torch.tensor([info.tiny, -torch.inf, info.max, info.smallest_normal / 4])
    assert nm.mask(weight).tolist() == [False, True, True, False]
    assert nm.mask(torch.tensor([-128, 127, 1, 2], dtype=torch.int8), 1, 4).tolist() == [True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_the_chunks_of_a_large_weight_make_one_mask(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(pattern, "COMPILED", float("inf"))
    weight = torch.randn(1030, 1024, generator=torch.Generator().manual_seed(0))
    groups = weight.view(-1, 4).abs()
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)
    assert torch.equal(nm.mask(weight), expected.view_as(weight))  # no ties between the second and the third here


def test_is_nm_counts_what_is_not_zero():
    assert nm.is_nm(torch.tensor([[0.0, 1, 0, -0.0, 5, 6, 0, 0]]))
    assert not nm.is_nm(torch.tensor([[0.0, 1, 2, 3, 5, 6, 0, 0]]))
    assert not nm.is_nm(torch.tensor([[0.0, torch.nan, 1, 1]]))
    assert not nm.is_nm(torch.zeros(2, 6))


def test_kept_energy():
    weight = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    assert nm.kept_energy(weight, nm.mask(weight, 1, 4)) == 16 / 25
    assert nm.kept_energy(torch.zeros(4), torch.zeros(4, dtype=torch.bool)) == 1.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_refused_in_every_format(dtype):
    weight = torch.tensor([1.0, torch.nan, 0.0, -2.0]).to(dtype)
    check_refusal("holds NaN", lambda: nm.mask(weight))


@pytest.mark.timing
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8)])
def test_a_mask_takes_a_third_of_topk_at_most(n, m):
    """On one thread and in CPU time; benchmarks/nm_mask.py has the intervals."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))

    def by_topk():
        groups = weight.abs().view(-1, m)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        return kept.scatter_(1, groups.topk(n, dim=1).indices, True).view_as(weight)

    seconds = {"topk": [], "mask": []}
    with on_threads(1):
        for _ in range(7):
            for name, run in (("topk", by_topk), ("mask", lambda: nm.mask(weight, n, m))):
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    assert min(seconds["topk"]) > 3 * min(seconds["mask"])


# --- bytes ------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_decompress_is_the_inverse_of_compress(data):
    weight = data.draw(weights(4))
    pruned = torch.where(nm.mask(weight), weight.double(), 0.0).to(weight.dtype)
    packed = nm.compress(pruned)
    stored = packed.values.nbytes + packed.metadata.nbytes
    assert stored == weight.numel() // 2 * weight.element_size() + -(-weight.numel() // 8)
    restored = nm.decompress(packed)
    assert restored.dtype == weight.dtype and restored.shape == weight.shape
    assert torch.equal(restored.double(), pruned.double())


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS: Refusals = {
    "input dimension of a weight [2, 6] is 6, no multiple of m = 4": lambda: nm.mask(torch.ones(2, 6)),
    "pattern 0:4 is none": lambda: nm.mask(torch.ones(2, 8), 0, 4),
    "pattern 5:4 is none": lambda: nm.mask(torch.ones(2, 8), 5, 4),
    "pattern 2:17 is none": lambda: nm.mask(torch.ones(2, 34), 2, 17),
    "pattern 2.0:4 is none": lambda: nm.mask(torch.ones(2, 8), 2.0, 4),
    "pattern True:4 is none": lambda: nm.mask(torch.ones(2, 4), True, 4),
    "0 dimensions": lambda: nm.mask(torch.tensor(1.0)),
    "complex64 has no N:M pattern": lambda: nm.mask(torch.ones(4, dtype=torch.complex64)),
    "keep is torch.float32": lambda: nm.kept_energy(torch.ones(4), torch.ones(4)),
    "is not 2:4 along its input dimension": lambda: nm.compress(torch.ones(2, 8)),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
