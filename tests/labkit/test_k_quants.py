"""K-quants against a super-block rounded by a loop over its blocks, and the search against the ends of a block."""

import pytest
import torch
from refusals import Refusals, check_refusal, refused
from torch import Tensor

from labkit.errors import InputError
from labkit.quantization import affine, k_quants


def weight(out: int = 6, inputs: int = 256, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def test_bits_are_those_of_q4_k():
    assert k_quants.bits_per_weight() == 144 * 8 / 256  # bytes of a super-block in llama.cpp
    assert k_quants.bits_per_weight(6) == pytest.approx((96 + 9 + 4) * 8 / 192)


@pytest.mark.parametrize("blocks", [1, 6, 8])
def test_a_block_has_sixteen_points_on_a_line_whose_scale_and_minimum_are_codes(blocks: int):
    w = weight(inputs=32 * blocks)
    points = k_quants.fake(w, blocks=blocks).view(len(w), blocks, 32)
    for row in points.double():
        steps = []
        for block in row:
            values = block.unique()
            assert len(values) <= 16
            gaps = values.diff()
            step = gaps.min()
            assert (gaps / step).round().sub(gaps / step).abs().max() < 1e-3
            steps.append(float(step))
        unit = max(steps) / 63
        assert all(abs(step / unit - round(step / unit)) < 0.02 for step in steps)


def test_values_on_such_a_line_stay():
    codes = torch.arange(32).remainder(16).float().repeat(2, 8)
    scales = torch.tensor([63.0, 21, 9, 3, 63, 7, 33, 1]).repeat_interleave(32) / 1024
    minima = torch.tensor([63.0, 0, 9, 63, 1, 7, 30, 2]).repeat_interleave(32) / 256
    w = codes * scales - minima
    assert torch.allclose(k_quants.fake(w), w, atol=1e-6)


def test_the_search_is_nearer_than_the_ends_of_a_block():
    w = weight(64)
    ends = k_quants.fake(w)
    x = w.view(64, 8, 32)
    least = x.amin(-1, True)
    step = (x.amax(-1, True) - least) / 15
    from_end_to_end = ((x - least) / step).round() * step + least  # with exact scales
    assert affine.sqnr(w, ends) > affine.sqnr(w, from_end_to_end.view_as(w))


def test_an_important_input_is_rounded_better():
    w, importance = weight(64), torch.ones(256)
    importance[::16] = 100.0
    plain, weighed = k_quants.fake(w), k_quants.fake(w, importance)
    assert affine.sqnr(w[:, ::16], weighed[:, ::16]) > affine.sqnr(w[:, ::16], plain[:, ::16]) + 1


def test_constant_and_positive_blocks_are_finite():
    for w in (torch.zeros(2, 256), torch.full((2, 256), 0.3), weight().abs() + 1, -weight().abs() - 1):
        new = k_quants.fake(w)
        assert new.isfinite().all() and (new - w).abs().max() < 0.15 * w.abs().max() + 1e-6


REFUSALS: Refusals = {
    "blocks": lambda: k_quants.fake(weight(), blocks=0),
    "importance is [255]": lambda: k_quants.fake(weight(), torch.ones(255)),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_rows_that_super_blocks_do_not_fill_are_refused():
    with pytest.raises(InputError):
        k_quants.fake(weight(inputs=576))
    assert k_quants.fake(weight(inputs=576), blocks=6).shape == (6, 576)
