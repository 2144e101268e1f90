"""Answers to the exercises of lesson 13: right ones, written differently, and plausible wrong ones."""

import math

import torch

from labkit.timing import stats

# -------------------------------------------------------------------------------------------------------- interactions


def _interactions(times, *, least=2, inverse=False, flip=False, add=False, last_only=False):
    """Right, unless an option takes a part of the answer away."""
    without, table = times[frozenset()], {}
    for steps, time in times.items():
        if len(steps) < least:
            continue
        gains = [without / times[frozenset({step})] for step in steps]
        product = 1 + sum(gain - 1 for gain in gains) if add else math.prod(gains)
        gain = time / without if inverse else without / time
        table[steps] = product / gain if flip else gain / product
    return {max(table, key=len): table[max(table, key=len)]} if last_only and table else table


def _interactions_by_logarithms(times):
    logs = {steps: math.log(times[frozenset()]) - math.log(time) for steps, time in times.items()}
    singles = {steps: sum(logs[frozenset([step])] for step in steps) for steps in times}
    return {steps: math.exp(logs[steps] - singles[steps]) for steps in times if len(steps) >= 2}


# ---------------------------------------------------------------------------------------------------------------- gate


def _gate(
    before, after, points, *, width=1.959964, scale=100, swapped=False, value_only=False, lenient=False, three=True
):
    each = scale * (after.double() - before.double())
    each = -each if swapped else each
    mean, half = float(each.mean()), 0.0 if value_only else width * float(each.std()) / math.sqrt(len(each))
    if three and not each.any():
        half = 3 * scale / len(each)
    if lenient:
        return "passes" if mean >= -points else "fails" if mean + half < -points else "open"
    return "passes" if mean - half >= -points else "fails" if mean + half < -points else "open"


def _gate_by_stats(before, after, points):
    _, low, high = (100 * x for x in stats.paired_difference(after.double().tolist(), before.double().tolist()))
    if torch.equal(before, after):
        low, high = -300 / len(before), 300 / len(before)
    return "fails" if high < -points else "open" if low < -points else "passes"


def _gate_by_counts(before, after, points):
    n, lost, won = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    mean = (won - lost) / n
    half = 1.959964 * math.sqrt((won + lost - n * mean**2) / (n - 1) / n) if won + lost else 3 / n
    return {(True, True): "passes", (False, True): "open"}.get(
        (100 * (mean - half) >= -points, 100 * (mean + half) >= -points), "fails"
    )


def _gate_unpaired(before, after, points):
    n, (a, b) = len(before), (float(x.double().mean()) for x in (before, after))
    half = 1.959964 * math.sqrt((a * (1 - a) + b * (1 - b)) / n)
    low, high = 100 * (b - a - half), 100 * (b - a + half)
    return "passes" if low >= -points else "fails" if high < -points else "open"


def _gate_by_agreement(before, after, points):
    return _gate(torch.ones_like(before), before == after, points)


# -------------------------------------------------------------------------------------------------------------- faults


def _faults(report, *, per_item=True, count=10, forgets=(), same_batch=False):
    base, other = report["batches"]
    ms = report["baseline ms"]
    each = {size: time / size if per_item else time for size, time in ms.items()}
    quantile = report["quantile"]
    wrong = {
        "no interval": report["interval"] is None,
        "threads": report["threads"][0] != report["threads"][1],
        "baseline batch": base != other if same_batch else each[base] > min(each.values()),
        "no quality": report["points"] is None,
        "few requests": quantile is not None and report["requests"] < round(count / (1 - quantile), 6),
        "first call": report["first call"],
    }
    return {name for name, is_wrong in wrong.items() if is_wrong and name not in forgets}


def _faults_by_hand(report):
    names = set()
    if report["interval"] is None:
        names.add("no interval")
    if len(set(report["threads"])) > 1:
        names.add("threads")
    if min(report["baseline ms"], key=lambda size: report["baseline ms"][size] / size) != report["batches"][0]:
        names.add("baseline batch")
    if not report["points"]:
        names.add("no quality")
    if report["quantile"] and report["requests"] * (1 - report["quantile"]) < 10 - 1e-6:
        names.add("few requests")
    return names | ({"first call"} if report["first call"] else set())


# ------------------------------------------------------------------------------------------------------------ envelope


def _envelope(plans, *, first="once", nearest=True):
    plan = min(plans, key=lambda p: (p[first], p["each"]))
    path = [(0.0, plan["name"])]
    while faster := [p for p in plans if p["each"] < plan["each"]]:
        meet = {p["name"]: (p["once"] - plan["once"]) / (plan["each"] - p["each"]) for p in faster}
        plan = min(faster, key=lambda p, meet=meet: (meet[p["name"]] if nearest else -p["each"], p["each"]))
        path.append((meet[plan["name"]], plan["name"]))
    return path


def _envelope_by_crossings(plans):
    """All places where two plans meet, and who is cheapest in the middle of each stretch."""
    places = {0.0}
    for a in plans:
        places |= {(b["once"] - a["once"]) / (a["each"] - b["each"]) for b in plans if b["each"] < a["each"]}
    places = sorted(x for x in places if x >= 0)
    path = []
    for start, end in zip(places, [*places[1:], 2 * places[-1] + 2], strict=True):
        middle = (start + end) / 2
        name = min(plans, key=lambda p, n=middle: (p["once"] + n * p["each"], p["once"]))["name"]
        if not path or path[-1][1] != name:
            path.append((start, name))
    return path


def _every_plan(plans):
    """From where each beats the first, whether or not a third is cheaper."""
    first = min(plans, key=lambda p: (p["once"], p["each"]))
    faster = [p for p in plans if p["each"] < first["each"]]
    meets = {(p["once"] - first["once"]) / (first["each"] - p["each"]): p["name"] for p in faster}
    return [(0.0, first["name"]), *sorted(meets.items())]


def _the_last_only(plans):
    return [(0.0, min(plans, key=lambda p: p["each"])["name"])]


def _once_over_each(plans):
    path = sorted(plans, key=lambda p: (p["once"], p["each"]))
    return [(0.0, path[0]["name"]), *((p["once"] / p["each"], p["name"]) for p in path[1:])]


RIGHT = {
    "13.1": (_interactions, _interactions_by_logarithms),
    "13.2": (_gate, _gate_by_stats, _gate_by_counts),
    "13.4": (_faults, _faults_by_hand),
    "13.3": (_envelope, _envelope_by_crossings),
}

WRONG = {
    "13.1": {
        "single steps are in it": lambda times: _interactions(times, least=1),
        "time for gain": lambda times: _interactions(times, inverse=True),
        "upside down": lambda times: _interactions(times, flip=True),
        "gains added": lambda times: _interactions(times, add=True),
        "the largest combination only": lambda times: _interactions(times, last_only=True),
    },
    "13.2": {
        "the value decides": lambda *x: _gate(*x, value_only=True),
        "shares for points": lambda *x: _gate(*x, scale=1),
        "before less after": lambda *x: _gate(*x, swapped=True),
        "not paired": _gate_unpaired,
        "passes by its value": lambda *x: _gate(*x, lenient=True),
        "agreement for accuracy": _gate_by_agreement,
        "one standard error": lambda *x: _gate(*x, width=1.0),
        "without the rule of three": lambda *x: _gate(*x, three=False),
    },
    "13.4": {
        "time a call, not an item": lambda report: _faults(report, per_item=False),
        "batches have to be equal": lambda report: _faults(report, same_batch=True),
        "a request beyond the percentile is enough": lambda report: _faults(report, count=1),
        "quality is not asked for": lambda report: _faults(report, forgets=("no quality",)),
        "threads are not looked at": lambda report: _faults(report, forgets=("threads",)),
        "the first call is let through": lambda report: _faults(report, forgets=("first call",)),
    },
    "13.3": {
        "starts with the fastest": lambda plans: _envelope(plans, first="each"),
        "the next faster plan, wherever it meets": lambda plans: _envelope(plans, nearest=False),
        "each against the first": _every_plan,
        "the fastest from the start": _the_last_only,
        "once over each": _once_over_each,
    },
}
