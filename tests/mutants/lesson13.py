"""Right answers to the exercises of lesson 13, written otherwise than the worked ones."""

import math

from labkit import stats


def interactions_by_logarithms(times):
    logs = {steps: math.log(times[frozenset()]) - math.log(time) for steps, time in times.items()}
    singles = {steps: sum(logs[frozenset([step])] for step in steps) for steps in times}
    return {steps: math.exp(logs[steps] - singles[steps]) for steps in times if len(steps) >= 2}


def gate_by_the_limit_reached(before, after, points):
    _, low, high = stats.accuracy_change(after.tolist(), before.tolist())
    ends_within = [end >= -points / 100 for end in (low, high)]
    return ("fails", "open", "passes")[sum(ends_within)]


def faults_by_hand(report):
    names = set()
    if report["interval"] is None:
        names.add("no interval")
    of_baseline, of_candidate = report["threads"]
    if of_baseline < of_candidate:
        names.add("threads")
    if min(report["baseline ms"], key=lambda size: report["baseline ms"][size] / size) != report["batches"][0]:
        names.add("baseline batch")
    if not report["points"]:
        names.add("no quality")
    if report["quantile"] and report["requests"] * (1 - report["quantile"]) < 10 - 1e-6:
        names.add("few requests")
    return names | ({"first call"} if report["first call"] else set())


RIGHT = {
    "13.1": interactions_by_logarithms,
    "13.2": gate_by_the_limit_reached,
    "13.3": faults_by_hand,
}
