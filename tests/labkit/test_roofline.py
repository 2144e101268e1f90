"""Bounds equal those worked out by hand, a decode step the whole sequence, and the picture shows what is said."""

import math
from dataclasses import replace

import pytest
import torch
from families import SIZES, family
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.modules.kv_cache import decode_step
from labkit.timing import machine, roofline
from labkit.timing.bench import Measurement
from labkit.timing.ceilings import bandwidth_sweep, ceilings
from labkit.timing.counting import count
from labkit.timing.machine import DEVICES, Ceilings
from labkit.timing.roofline import Work, bound, placed
from labkit.timing.roofline_plot import plot

ROOFS = Ceilings("a small CPU", {"fp32": 100e9, "bf16": 400e9}, 20e9)
H100 = DEVICES["H100 SXM"]
LAYERS = SIZES["num_hidden_layers"]


def test_bound_is_the_slower_of_moving_and_computing() -> None:
    moving = bound(Work(flops=10**9, bytes=10**9), ROOFS)
    assert (moving.seconds, moving.limiter, moving.intensity, moving.ridge) == (0.05, "memory", 1.0, 5.0)
    computing = bound(Work(flops=10**10, bytes=10**9), ROOFS)
    assert (computing.seconds, computing.limiter) == (0.1, "compute")
    assert str(moving) == "at least 50 ms, memory-bound (1 FLOP/byte, ridge at 5)"


def test_work_without_products_is_bound_by_its_bytes() -> None:
    copying = bound(Work(flops=0, bytes=10**9), ROOFS)
    assert (copying.seconds, copying.limiter, copying.intensity) == (0.05, "memory", 0.0)
    assert bound(Work(flops=10**9, bytes=0), ROOFS).intensity == math.inf


def test_a_row_of_the_catalogue_bounds_too_and_its_ridge_is_295() -> None:
    assert bound(Work(1, 1), H100, "bf16").ridge == pytest.approx(295.3, abs=0.05)


def test_share_is_bound_over_measured() -> None:
    assert bound(Work(flops=10**10, bytes=1), ROOFS).share(0.2) == 0.5


def test_a_share_above_one_and_a_type_without_a_ceiling_give_a_warning() -> None:
    measurement = Measurement("int8", (0.1,) * 20, 1, "wall", "hot", "cpu", 1)
    assert placed(measurement, Work(10**9, 10**6), ROOFS).roof_share == pytest.approx(0.1)
    without = placed(measurement, Work(10**9, 10**6), ROOFS, "int8")
    assert without.roof_share is None and without.warnings == ("no share of the roof, for int8 has no ceiling here",)
    busy = replace(ROOFS, warnings=("other programs kept 1.2 cores busy",))
    (why,) = placed(measurement, Work(10**11, 10**6), busy).warnings
    assert why == (
        "above the roof: its data stay in a cache, or the count is too high, or other programs kept 1.2 cores busy"
    )
    unnamed = "there is no 'float32' ceiling for a small CPU"
    check_refusal(unnamed, lambda: placed(measurement, Work(10**9, 10**6), ROOFS, "float32"))


# --- one token on top of a cache --------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2"])
def decoder(request):
    return family(request.param)


def kv_heads(decoder) -> int:
    return getattr(decoder.config, "num_key_value_heads", None) or decoder.config.n_head


def test_step_equals_the_whole_sequence_at_every_call(decoder) -> None:
    prompt = torch.randint(0, 50, (3, 7))
    step = decode_step(decoder, prompt)
    with torch.inference_mode():
        whole = decoder(torch.cat([prompt, prompt[:, -1:]], dim=1)).logits[:, -1:]
        for _ in range(3):
            torch.testing.assert_close(step(), whole, rtol=1e-4, atol=1e-5)


def test_step_can_be_counted(decoder) -> None:
    """The cache of 7 tokens is read: bytes grow with the prompt by 2 x layers x KV heads x head size x 4."""
    short, long = (count(decode_step(decoder, torch.ones(1, n, dtype=torch.long))) for n in (7, 8))
    grows = 2 * LAYERS * kv_heads(decoder) * 8 * 4
    assert grows <= long.bytes - short.bytes <= 2 * grows  # read, and with a copying cache written anew


# --- the picture ------------------------------------------------------------------------------------------------------

POINTS = [("GEMV", 0.5, 9e9), ("GEMM", 50.0, 90e9), ("GEMM, wrong count", 50.0, 150e9)]


def test_plot_is_log_log_with_units_roof_and_named_points() -> None:
    fig = plot(POINTS, ROOFS, title="Here")
    (ax,), (legend,) = fig.axes, fig.legends
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_title(loc="left")) == ("log", "log", "Here")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("arithmetic intensity (FLOP/byte)", "performance (GFLOP/s)")
    roof, *points = ax.lines
    assert roof.get_xydata()[1].tolist() == [5.0, 100.0]  # the ridge
    fastest_first = sorted(POINTS, key=lambda point: -point[2])
    assert [(p.get_label(), *p.get_xydata()[0]) for p in points] == [(n, i, f / 1e9) for n, i, f in fastest_first]
    assert [text.get_text() for text in legend.get_texts()[1:]] == [name for name, _, _ in fastest_first]


def test_intervals_of_the_roof_are_drawn() -> None:
    ends = {"flops_range": {"fp32": (90e9, 110e9)}, "bandwidth_range": (10e9, 25e9)}
    known = replace(ROOFS, **ends)
    (ax,) = plot([], known).axes
    band = ax.collections[-2].get_paths()[0].vertices  # the last is the ridge's line
    assert band[:, 1].max() == pytest.approx(110)
    at_left = band[band[:, 0] == band[:, 0].min(), 1]
    assert (at_left.min(), at_left.max()) == pytest.approx((10 * ax.get_xlim()[0], 25 * ax.get_xlim()[0]))
    unknown = replace(known, bandwidth_range=(-math.inf, math.inf))
    assert len(plot([], unknown).axes[0].collections) == len(ax.collections) - 1


def test_every_point_is_inside_the_axes_and_looks_like_no_other() -> None:
    crowd = [(f"layer {i}", 10 * 1.4**i, 40e9 * 1.3**i) for i in range(30)] + [("slow", 1e-3, 1.0)]
    (ax,) = plot(crowd, ROOFS).axes
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert all(left < p.get_xdata()[0] < right and low < p.get_ydata()[0] < high for p in ax.lines[1:])
    assert len({(p.get_color(), p.get_marker()) for p in ax.lines[1:]}) == len(crowd)


def test_large_machines_are_drawn_in_tflops() -> None:
    large = Ceilings("H100", dict(H100.flops), H100.bandwidth)
    (ax,) = plot([], large, dtype="bf16").axes
    assert ax.get_ylabel() == "performance (TFLOP/s)"
    assert ax.lines[0].get_xydata()[1].tolist() == pytest.approx([295.3, 989.4], rel=1e-3)


IDS = torch.ones(1, 2, dtype=torch.long)
REFUSALS: Refusals = {
    "there is no 'fp8' ceiling for a small CPU: choose one of bf16, fp32": lambda: bound(Work(1, 1), ROOFS, "fp8"),
    "work without FLOPs and bytes has no bound": lambda: bound(Work(0, 0), ROOFS),
    "bound needs a Work: get it from": lambda: bound(3, ROOFS),
    "measured_seconds is 0.0, but it must be a finite number above 0": lambda: bound(Work(1, 1), ROOFS).share(0.0),
    "a point is (label, FLOP/byte, FLOP/s)": lambda: plot([("a", 1.0)], ROOFS),
    "point 'd' has no place on logarithmic axes": lambda: plot([("d", 0.0, 1e9)], ROOFS),
    "point 'e' has no place on logarithmic axes": lambda: plot([("e", 1.0, math.nan)], ROOFS),
    "there is no 'int8' ceiling for a small CPU": lambda: plot([], ROOFS, dtype="int8"),
    "Linear takes no KV cache": lambda: decode_step(nn.Linear(2, 2), IDS),
    "shape (4,); give token ids": lambda: decode_step(nn.Linear(2, 2), torch.ones(4, dtype=torch.long)),
    "shape (1, 0); give token ids": lambda: decode_step(nn.Linear(2, 2), torch.ones(1, 0, dtype=torch.long)),
    "shape (1, 2); give token ids": lambda: decode_step(nn.Linear(2, 2), torch.ones(1, 2)),
    "ceilings is a NoneType": lambda: bound(Work(1, 1), None),
    "ceilings is a float": lambda: bound(Work(1, 1), 1e9),
    "a row of labkit.machine.DEVICES": lambda: bound(Work(1, 1), "H100"),
    "bound needs a Work": lambda: bound((1, 1), ROOFS),
    "measured_seconds is '1'": lambda: bound(Work(1, 1), ROOFS).share("1"),
    "measured_seconds is nan": lambda: bound(Work(1, 1), ROOFS).share(math.nan),
    "a point is (label, FLOP/byte, FLOP/s), got 3": lambda: plot([3, 4, 5], ROOFS),
    "got 'abc'": lambda: plot(["abc"], ROOFS),
    "point 'a' has no place": lambda: plot([("a", "1", 1e9)], ROOFS),
    "point 'b' has no place": lambda: plot([("b", 1.0, None)], ROOFS),
    "point 'c' has no place": lambda: plot([("c", 1.0, math.inf)], ROOFS),
    "The prompt is a list": lambda: decode_step(family("llama"), [[1, 2]]),
    "The prompt is None": lambda: decode_step(family("llama"), None),
    "model is a str": lambda: decode_step("llama", IDS),
    "The prompt is on the meta device": lambda: decode_step(family("llama"), IDS.to("meta")),
    "takes no KV cache": lambda: decode_step(family("bert"), IDS),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


def test_names_that_are_loaded_on_demand_are_those_of_the_files_that_define_them():
    assert [roofline.count, roofline.decode_step] == [count, decode_step]
    assert roofline.plot is plot
    assert [machine.ceilings, machine.bandwidth_sweep] == [ceilings, bandwidth_sweep]
    with pytest.raises(AttributeError, match=r"module 'labkit.timing.machine' has no attribute 'roof'"):
        machine.roof  # noqa: B018
