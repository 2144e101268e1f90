"""The record of SmolLM2 in few bits: bits, what is folded and dithered, which draws are compared."""

import itertools
import math

import llamas
import llm_quantization
import pytest
import torch
from llm_quantization import AS_IS, CACHES, DITHERED, IN_EVERY_DRAW, WAYS, Run, Sizes

from labkit import stats
from labkit.quantization.kv import KVFormat


def test_bits_count_scales_and_zero_points():
    expected = {"RTN": 4 + 20 / 64, "signed": 4.25, "MXFP4": 4.25, "Q4_1": 5, "K-quant": 4 + 12 / 32 + 32 / 192}
    assert {name: WAYS[name].bits for name in expected} == pytest.approx(expected)


def test_a_run_has_a_file_of_its_own_and_the_first_draw_comes_first():
    runs = llm_quantization.all_runs(Sizes())
    assert len({run.file for run in runs}) == len(runs)
    weights = [run for run in runs if run.part == "weights"]
    assert [run.draw for run in weights] == sorted(run.draw for run in weights)
    later = {run.way for run in weights if run.draw}
    assert later == set(IN_EVERY_DRAW) and all(run.checkpoint == DITHERED for run in weights if run.draw)


def test_draws_are_complete_from_the_first():
    runs = [Run("weights", "RTN", DITHERED, draw) for draw in range(3)] + [Run("cache", "", AS_IS, 5)]
    assert llm_quantization.complete_draws(runs, dict.fromkeys(runs), 3) == 3
    assert llm_quantization.complete_draws(runs, dict.fromkeys(runs[:2] + runs[3:]), 3) == 2
    assert llm_quantization.complete_draws(runs, dict.fromkeys(runs[:3]), 3) == 3  # a text of the cache is no draw
    assert llm_quantization.complete_draws(runs, {}, 3) == 0


def test_ways_are_compared_on_the_draws_that_both_have():
    draw = torch.Generator().manual_seed(0)
    losses = {name: (3 + torch.rand(n, 8, generator=draw)).tolist() for name, n in (("a", 3), ("b", 1), ("c", 3))}
    rows = {(row["after"], row["before"]): row for row in llm_quantization.compared(losses, 9)}
    assert {pair: row["draws"] for pair, row in rows.items()} == {("b", "a"): 1, ("c", "a"): 3, ("c", "b"): 1}
    value, low, high = stats.perplexity_ratio(losses["b"], losses["a"][:1], 9)
    assert [rows["b", "a"][key] for key in ("ratio", "low", "high")] == pytest.approx([value, low, high])


def test_windows_are_spread_from_begin_to_end():
    pieces = llm_quantization.spread(torch.arange(100), 4, 10)
    assert pieces[:, 0].tolist() == [0, 30, 60, 90]


def test_a_cache_counts_floats_scales_and_zero_points():
    bare = KVFormat(4, 4, "token", "token", window=0)
    assert llm_quantization.cache_bits(bare, 512, 128) == 4 + (16 + 4) / 32
    assert llm_quantization.cache_bits(None, 512, 128) == 16
    total, read = 0.0, 0
    for tokens, per in itertools.product(range(385, 513), ("channel", "token")):
        coded = tokens - 32 if per == "token" else (tokens - 32) // 32 * 32
        total += coded * 2.5625 + (tokens - coded) * 16
        read += tokens
    form = CACHES["2 bits, K channel, V token"]
    assert math.isclose(llm_quantization.cache_bits(form, 512, 128), total / read)


def test_folding_keeps_the_function_and_dithering_stays_within_half_a_step():
    model = llamas.llama().float()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight.uniform_(0.5, 2)
            block.post_attention_layernorm.weight.uniform_(0.5, 2)
    ids = torch.arange(8)[None]
    new = llm_quantization.folded(model)
    assert torch.allclose(new(ids).logits, model(ids).logits, atol=1e-4)
    assert all((block.input_layernorm.weight == 1).all() for block in new.model.layers)
    moved = llm_quantization.dithered(model, 0)
    for name, layer in llm_quantization.linears(model).items():
        groups = layer.weight.detach().unflatten(1, (-1, 32))
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        change = (moved.get_submodule(name).weight - layer.weight).detach().unflatten(1, (-1, 32)).abs().amax(-1)
        assert (change <= step / 2 + 1e-6).all() and (change > step / 4).float().mean() > 0.9
