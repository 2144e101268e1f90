"""A trace of calls on a GPU as a picture: launches on the CPU above kernels on the GPU, by torch's profiler."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from labkit.show import COLOURS, WIDTH, Rows

LANES = {"launch, CPU": COLOURS[1], "kernel, GPU": COLOURS[0]}  # from top to bottom
LAUNCH, KERNEL = LANES


class Activity(NamedTuple):
    """A launch or a kernel: its lane, one of LANES, its name, its start from the first activity on, and its length."""

    lane: str
    name: str
    start_us: float
    length_us: float

    def since(self, moment_us: float) -> "Activity":
        """Return the activity with a start counted from a moment."""
        return self._replace(start_us=self.start_us - moment_us)


def trace(call: Callable[[], Any]) -> list[Activity]:
    """Run a call on the GPU under the profiler, after an untraced run, and return its launches and kernels."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return activities_of(profiler.events())


def activities_of(events: Iterable[FunctionEvent]) -> list[Activity]:
    """Return the launches and the kernels among a profiler's events, the earliest at 0."""
    activities = []
    for event in events:
        is_launch = event.name.startswith(("cuda", "cuLaunch")) and "Launch" in event.name
        if event.device_type == DeviceType.CUDA or is_launch:
            lane = LAUNCH if is_launch else KERNEL
            span = event.time_range
            activities.append(Activity(lane, event.name, span.start, span.elapsed_us()))
    activities.sort(key=lambda activity: activity.start_us)
    first_us = activities[0].start_us if activities else 0.0
    return [activity.since(first_us) for activity in activities]


def picture(calls: Mapping[str, Callable[[], Any]]) -> tuple[Figure, Rows]:
    """Trace calls and draw each in a panel, all over the same time.

    calls: {name: call without arguments, on the GPU}.
    Returns the figure, and a row per call (`summary`).
    """
    traces = {name: trace(call) for name, call in calls.items()}
    return drawn(traces), [summary(name, of_call) for name, of_call in traces.items()]


def summary(name: str, of_call: list[Activity]) -> dict[str, Any]:
    """Return the row of a call: launches, kernels, time from the first launch to the last end, share with a kernel."""
    kernels_us = [activity.length_us for activity in of_call if activity.lane == KERNEL]  # of one stream, in turns
    ends_us = [activity.start_us + activity.length_us for activity in of_call]
    end_us = max(ends_us, default=0.0)
    return {
        "call": name,
        "launches": len(of_call) - len(kernels_us),
        "kernels": len(kernels_us),
        "µs": end_us,
        "kernels run": sum(kernels_us) / end_us if end_us else 0.0,
    }


def drawn(traces: Mapping[str, list[Activity]]) -> Figure:
    """Draw a panel for each trace, with a lane of launches and a lane of kernels."""
    fig, axes = plt.subplots(len(traces), 1, figsize=(WIDTH, 1.6 * len(traces)), sharex=True, squeeze=False)
    for ax, (name, of_call) in zip(axes[:, 0], traces.items(), strict=True):
        _draw_lanes(ax, of_call)
        ax.set_title(name)
    axes[-1, 0].set_xlabel("microseconds")
    return fig


def _draw_lanes(ax: Axes, of_call: list[Activity]) -> None:
    for place, (lane, colour) in enumerate(LANES.items()):
        pieces = [(activity.start_us, activity.length_us) for activity in of_call if activity.lane == lane]
        ax.broken_barh(pieces, (place - 0.4, 0.8), color=colour)
    ax.set_yticks(range(len(LANES)), LANES)
    ax.set_ylim(len(LANES) - 0.5, -0.5)
    ax.set_ylabel("activity")
    ax.grid(axis="y", visible=False)
