"""Sections that need a GPU: bounds on a folded line where there is none, equal results before any time where there is.

Those marked gpu run on the device of tests/pretend too, where a time says nothing.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import labkit
from labkit import files, roofline, show
from labkit.lesson import gpu_trace, on_gpu, records
from labkit.lesson.gpu_trace import Activity
from labkit.lesson.on_gpu import Way
from labkit.lesson.session import Lab
from labkit.timing.machine import DEVICES
from labkit.timing.work import Work

NAME = "a product on a GPU"
WORK = Work(flops=2 * 64**3, bytes=64)  # limited by arithmetic, so that the type counts


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    for variable in ("LABKIT_PRESET", "LABKIT_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    return labkit.start("12", preset="smoke", device="cpu", results_dir=tmp_path / "runs")


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The text and the HTML of all that is shown from now on."""
    shown = []
    monkeypatch.setattr(show, "emit", lambda text, html="", **_: shown.append((text, html)))
    return shown


def matrices() -> tuple[Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return torch.randn(2, 64, 64, generator=draw, device="cuda").unbind()


def product(scale: float = 1.0) -> on_gpu.Callable:
    a, b = matrices()
    return lambda: scale * (a @ b)


def by_einsum() -> on_gpu.Callable:
    a, b = matrices()
    return lambda: torch.einsum("ik, kj -> ij", a, b)


def lacking() -> on_gpu.Callable:
    raise RuntimeError("No available kernel. Aborting execution.")


def one_case(**builds: on_gpu.Callable) -> on_gpu.Cases:
    return {"64 x 64": {name.replace("_", " "): Way(WORK, "fp32", build) for name, build in builds.items()}}


# --- without a GPU ----------------------------------------------------------------------------------------------------


def test_without_a_gpu_a_section_is_one_folded_line_with_the_bounds_in_it(lab: Lab, outputs: list):
    cases = one_case(matmul=lacking, einsum=lacking)  # nothing is built
    cases["64 x 64"]["half"] = Way(WORK, "fp16", lacking)
    assert on_gpu.section(lab, NAME, cases, "here is no CUDA device", within=0.01) == []
    ((text, html),) = outputs
    line = f"{NAME}: here is no CUDA device; not recorded yet."
    assert text.startswith(line) and html.startswith(f"<details><summary>{line}</summary>")
    for names, dtype in (("matmul; einsum", "fp32"), ("half", "fp16")):  # ways that share a bound share a row
        bound = roofline.bound(WORK, DEVICES["H100 SXM"], dtype)
        cells = ("64 x 64", names, show.quantity(bound.seconds, "s"), bound.limiter)
        assert "<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>" in html
    assert html.count("<tr>") == 1 + 2 and "SIMULATED" not in html
    assert html.count("COMPUTED") == text.count("COMPUTED") == 1
    assert lab.finish().named(NAME) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_missing_is_said(device: str):
    assert on_gpu.missing(device) == "here is no CUDA device"


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_device_of_the_session_decides():
    assert on_gpu.missing("cuda:0") == "" and on_gpu.missing("cpu") == "this session runs on the CPU"


@pytest.mark.gpu
def test_ways_are_raced_beside_their_bounds_and_a_lacking_way_is_left_out(lab: Lab, outputs: list):
    cases = one_case(matmul=product, einsum=by_einsum, not_here=lacking)
    rows = on_gpu.section(lab, NAME, cases, on_gpu.missing("cuda"), within=0.01)
    assert [row["way"] for row in rows] == ["matmul", "einsum"]
    ceilings = lab.ceilings("cuda")
    for row in rows:
        bound = roofline.bound(WORK, ceilings, "fp32")
        assert row["bound, ms"] == pytest.approx(1000 * bound.seconds)
        assert row["of the roof"] == pytest.approx(row["bound, ms"] / row["ms"])
    assert (rows[0]["speed-up"], rows[0]["low"]) == (1.0, 1.0) and rows[1]["speed-up"] > 0
    assert outputs[-1][0] == "64 x 64: not here is left out: No available kernel. Aborting execution."


@pytest.mark.gpu
@pytest.mark.parametrize(("wrong", "by"), [(1.02, "2.0%"), (0.0, "100.0%"), (math.nan, "nan%")])
def test_a_way_that_computes_something_else_is_never_timed(lab: Lab, outputs: list, wrong: float, by: str):
    cases = one_case(matmul=product, wrong=partial(product, wrong))
    assert on_gpu.section(lab, NAME, cases, "", within=0.01) == []
    assert outputs[-1][0] == f"64 x 64: wrong is left out: it differs from matmul by {by}."
    assert lab.finish().measurements == []


@pytest.mark.gpu
def test_what_a_gpu_recorded_is_shown_on_machines_without(lab: Lab, outputs: list):
    cases = one_case(matmul=product, einsum=by_einsum)
    on_gpu.section(lab, NAME, cases, "", within=0.01)
    record = lab.finish().model_copy(update={"created": "2026-11-07T10:00:00+00:00"})
    records.write(record, files.RECORDED / "a-card" / "12.json")
    outputs.clear()
    assert on_gpu.section(lab, NAME, cases, "here is no CUDA device", within=0.01) == []
    ((text, html),) = outputs
    card = torch.cuda.get_device_name()
    assert f"recorded on: {card}" in text and ", 7 Nov 2026." in text
    assert html.count("<table") == 2


@pytest.mark.gpu
def test_a_captured_call_gives_the_result_of_the_call():
    call = product()
    replay = on_gpu.captured(call)
    assert torch.equal(replay(), call()) and torch.equal(replay(), call())


@pytest.mark.gpu(pretended=False)
def test_a_graph_launches_once_what_eager_launches_one_by_one():
    a, b = matrices()

    def chain() -> Tensor:
        return (a @ b).relu().sum(0)

    _, (eager, graph) = gpu_trace.picture({"eager": chain, "graph": on_gpu.captured(chain)})
    assert eager["launches"] >= 3 and graph["launches"] == 1
    assert eager["kernels"] == graph["kernels"] >= 3


# --- the trace --------------------------------------------------------------------------------------------------------


def event(name: str, start_us: float, end_us: float, device: DeviceType) -> FunctionEvent:
    return FunctionEvent(id=0, name=name, thread=0, start_us=start_us, end_us=end_us, device_type=device)


def test_a_trace_has_launches_and_kernels_from_the_first_on():
    events = [
        event("aten::mm", 90.0, 125.0, DeviceType.CPU),
        event("gemm_bf16", 112.0, 118.0, DeviceType.CUDA),
        event("cudaLaunchKernel", 100.0, 104.0, DeviceType.CPU),
        event("cudaDeviceSynchronize", 105.0, 130.0, DeviceType.CPU),
        event("cuLaunchKernelEx", 108.0, 110.0, DeviceType.CPU),
    ]
    assert gpu_trace.activities_of(events) == [
        Activity("launch, CPU", "cudaLaunchKernel", 0.0, 4.0),
        Activity("launch, CPU", "cuLaunchKernelEx", 8.0, 2.0),
        Activity("kernel, GPU", "gemm_bf16", 12.0, 6.0),
    ]


def test_the_summary_says_how_long_kernels_run():
    kernels = [Activity(gpu_trace.KERNEL, "a", 5, 6), Activity(gpu_trace.KERNEL, "b", 16, 4)]
    of_call = [Activity(gpu_trace.LAUNCH, "l", 0, 4), *kernels]
    row = {"call": "eager", "launches": 1, "kernels": 2, "µs": 20, "kernels run": 0.5}
    assert gpu_trace.summary("eager", of_call) == row
    assert gpu_trace.summary("none", [])["kernels run"] == 0


def test_the_picture_has_a_panel_for_each_trace_and_a_lane_for_launches_and_kernels():
    traces = {name: [Activity(lane, "x", 0, 1) for lane in gpu_trace.LANES] for name in ("eager", "graph")}
    fig = gpu_trace.drawn(traces)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes] == ["eager", "graph"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["launch, CPU", "kernel, GPU"]
    assert [len(collection.get_paths()) for collection in fig.axes[0].collections] == [1, 1]
    rows = [gpu_trace.summary(name, of_call) for name, of_call in traces.items()]
    alt = "Two panels with a lane of launches and a lane of kernels each."
    show.figure(fig, alt=alt, table=rows, caption="traced")  # refuses axes without labels
