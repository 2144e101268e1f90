"""Bounds on time and speed equal those worked out by hand, and the picture shows what the words say."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from matplotlib.text import Text
from torch import nn

from labkit.errors import InputError
from labkit.roofline import Point, Work, bound, count, decode_bound, describe, plot


@dataclass(frozen=True)
class Roofs:
    flops: dict[str, float] = field(default_factory=lambda: {"fp32": 100e9, "bf16": 400e9})
    bandwidth: float = 20e9
    device: str = "a small CPU"
    how: str = "measured"


H100 = Roofs({"bf16": 989.4e12, "fp32": 67e12}, 3.35e12, "H100 SXM", "datasheet")  # NVIDIA's datasheet, dense peaks


def test_bound_is_the_slower_of_moving_and_computing() -> None:
    moving = bound(Work(flops=10**9, bytes=10**9), Roofs())
    assert (moving.seconds, moving.limiter, moving.intensity, moving.ridge) == (0.05, "memory", 1.0, 5.0)
    computing = bound(Work(flops=10**10, bytes=10**9), Roofs())
    assert (computing.seconds, computing.limiter) == (0.1, "compute")


def test_label_flips_at_the_ridge() -> None:
    assert bound(Work(flops=49, bytes=10), Roofs()).limiter == "memory"
    assert bound(Work(flops=51, bytes=10), Roofs()).limiter == "compute"


def test_dtype_picks_the_peak() -> None:
    work = Work(flops=10**12, bytes=1)
    assert bound(work, Roofs(), dtype="bf16").seconds == bound(work, Roofs()).seconds / 4


def test_h100_ridge_is_295() -> None:
    assert bound(Work(1, 1), H100, "bf16").ridge == pytest.approx(295.3, abs=0.05)


def test_bound_of_a_sequence_is_the_sum_of_maxima() -> None:
    memory, compute = Work(flops=0, bytes=10**9), Work(flops=10**10, bytes=0)
    both = bound([memory, compute], Roofs())
    assert both.seconds == pytest.approx(0.05 + 0.1)
    assert both.limiter == "compute"
    assert both.seconds > bound(Work(flops=10**10, bytes=10**9), Roofs()).seconds  # which lets them overlap


def test_bound_of_the_operators_is_never_below_that_of_the_whole() -> None:
    work = count(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(4, 64))
    assert bound(work.by_op, Roofs()).seconds >= bound(work, Roofs()).seconds


def test_share_is_bound_over_measured() -> None:
    assert bound(Work(flops=10**10, bytes=1), Roofs()).share(0.2) == 0.5


@pytest.mark.timing
def test_no_measured_product_beats_the_measured_roofs() -> None:
    from labkit.bench import measure
    from labkit.machine import ceilings

    layer, x = nn.Linear(1024, 1024, bias=False), torch.randn(512, 1024)
    found, seconds = [], []
    with torch.inference_mode():
        for _ in range(2):  # in turns: the speed of a machine shared with others wanders
            found.append(bound(count(layer, x), ceilings("cpu")))
            seconds += measure(lambda: layer(x), device="cpu").samples_s
    assert min(one.share(min(seconds)) for one in found) < 1.05


@pytest.mark.parametrize(("weights", "tokens"), [(14e9, 239.3), (7e9, 478.6), (3.5e9, 957.1)])
def test_decode_bound_of_seven_billion_on_h100(weights: float, tokens: float) -> None:
    assert decode_bound(weight_bytes=weights, kv_bytes=0, bandwidth=3.35e12) == pytest.approx(tokens, abs=0.05)


def test_decode_bound_of_a_large_batch_is_that_of_computing() -> None:
    speed = decode_bound(
        weight_bytes=14e9, kv_bytes=0, bandwidth=3.35e12, batch=4096, flops_per_token=14e9, peak=989.4e12
    )
    assert speed == pytest.approx(70671, abs=1)


def test_decode_bound_reads_each_sequences_cache() -> None:
    alone = decode_bound(weight_bytes=4.0, kv_bytes=1.0, bandwidth=10.0)
    together = decode_bound(weight_bytes=4.0, kv_bytes=1.0, bandwidth=10.0, batch=6)
    assert (alone, together) == (2.0, 6.0)


POINTS = [Point("GEMV", 0.5, 9e9), ("GEMM", 50.0, 90e9), ("GEMM, wrong count", 50.0, 150e9)]


def test_description_says_each_share() -> None:
    words = describe(POINTS, Roofs())
    assert "a small CPU, measured: 20 GB/s, fp32 peak 100 GFLOP/s, ridge at 5 FLOP/byte" in words
    assert "GEMV: 0.5 FLOP/byte, 9 GFLOP/s, 90 % of the memory roof." in words
    assert "GEMM: 50 FLOP/byte, 90 GFLOP/s, 90 % of the compute roof." in words
    assert (
        "150 % of the compute roof: above it, so its data stay in a cache, or the count or a ceiling is wrong." in words
    )


def test_plot_is_log_log_with_units_roofs_and_points() -> None:
    datasheet = Roofs({"fp32": 150e9}, 30e9, "a small CPU", "datasheet")
    (ax,) = plot(POINTS, Roofs(), datasheet=datasheet, title="Here").axes
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_title(loc="left")) == ("log", "log", "Here")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("arithmetic intensity (FLOP/byte)", "performance (GFLOP/s)")
    measured, dashed, *points = ax.lines
    assert (measured.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert measured.get_xydata()[1].tolist() == [5.0, 100.0]  # the ridge
    assert [tuple(p.get_xydata()[0]) for p in points] == [(i, f / 1e9) for _, i, f in POINTS]
    assert {label for label, _, _ in POINTS} <= {text.get_text() for text in ax.texts}


def test_large_machines_are_drawn_in_tflops() -> None:
    assert plot([], H100, dtype="bf16").axes[0].get_ylabel() == "performance (TFLOP/s)"


def test_labels_do_not_cover_one_another() -> None:
    crowd = [(f"layer {i}", 10 * 1.1**i, 40e9 * 1.03**i) for i in range(8)]
    fig = plot(crowd, Roofs())
    fig.canvas.draw()
    renderer, labels = fig.canvas.get_renderer(), [t for t in fig.axes[0].texts if "layer" in t.get_text()]
    boxes = [Text.get_window_extent(label, renderer) for label in labels]  # without the leaders
    assert len(boxes) == 8 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plotting_leaves_pyplot_alone() -> None:
    code = (
        "import sys; from types import SimpleNamespace as N; from labkit.roofline import plot;"
        "plot([('a', 1, 1e9)], N(flops={'fp32': 1e11}, bandwidth=1e10, device='d', how='measured'));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: bound(Work(1, 1), Roofs(), "fp8"), "no ceiling is known for dtype 'fp8' here: choose from bf16, fp32"),
        (lambda: bound(Work(1, 1), Roofs(bandwidth=0.0)), "ceilings have to be positive"),
        (lambda: bound(Work(0, 0), Roofs()), "work without FLOPs and bytes has no bound"),
        (lambda: bound([], Roofs()), "needs a Work or a sequence of them"),
        (lambda: bound([3], Roofs()), "needs a Work or a sequence of them"),
        (lambda: bound(3, Roofs()), "needs a Work or a sequence of them"),
        (lambda: bound(Work(1, 1), Roofs()).share(0.0), "a measured time has to be positive, got 0.0"),
        (lambda: decode_bound(weight_bytes=1, kv_bytes=0, bandwidth=0), "bandwidth and peak have to be positive"),
        (lambda: decode_bound(weight_bytes=-1, kv_bytes=0, bandwidth=1), "can't be negative, nor all zero"),
        (lambda: decode_bound(weight_bytes=0, kv_bytes=0, bandwidth=1), "can't be negative, nor all zero"),
        (lambda: decode_bound(weight_bytes=1, kv_bytes=0, bandwidth=1, batch=0), "a whole number from 1 up, got 0"),
        (lambda: decode_bound(weight_bytes=1, kv_bytes=0, bandwidth=1, flops_per_token=2.0), "needs a peak"),
        (lambda: plot([("a", 1.0)], Roofs()), "a point is .label, FLOP/byte, FLOP/s."),
        (lambda: plot([("a", 0.0, 1e9)], Roofs()), "point 'a' has no place on logarithmic axes"),
        (lambda: describe([("a", 1.0, float("nan"))], Roofs()), "point 'a' has no place on logarithmic axes"),
        (lambda: plot([], Roofs(), dtype="int8"), "no ceiling is known for dtype 'int8'"),
        (
            lambda: plot([], Roofs(), dtype="bf16", datasheet=Roofs({"fp32": 1e9})),
            "no ceiling is known for dtype 'bf16'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()
