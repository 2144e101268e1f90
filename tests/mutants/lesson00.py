"""Answers to the exercises of lesson 00: right ones, written differently, and plausible wrong ones."""

import math
import random
import statistics
from itertools import accumulate


def _alarms_sum(benchmark, fn, trials):
    intervals = [benchmark(fn, fn) for _ in range(trials)]
    return sum(low > 1.01 or high < 1 / 1.01 for low, high in intervals)


def _alarms_loop(benchmark, fn, trials):
    count = 0
    for _ in range(trials):
        low, high = benchmark(fn, fn)
        if not (low <= 1.01 and high >= 0.99):
            count += 1
    return count


def _rank_loop(n):
    k, ways = 0, 0
    while 40 * (ways + math.comb(n, k)) <= 2**n:
        ways += math.comb(n, k)
        k += 1
    return k


def _rank_accumulate(n):
    return sum(below / 2**n <= 0.025 for below in accumulate(math.comb(n, i) for i in range(n // 2 + 1)))


def _order(pairs, seed):
    a_first = [i % 2 == 0 for i in range(pairs)]
    random.Random(seed).shuffle(a_first)
    return a_first


def _ratios(a, b, a_first, clock):
    ratios = []
    for first in a_first:
        one, other = (clock(fn) for fn in ((a, b) if first else (b, a)))
        ratios.append(one / other if first else other / one)
    return ratios


def _ends(ratios, k=None):
    ratios = sorted(ratios)
    k = _rank_loop(len(ratios)) if k is None else k
    return (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)


def _paired(a, b, pairs, seed, clock):
    ratios = _ratios(a, b, _order(pairs, seed), clock)
    return statistics.median(ratios), *_ends(ratios)


def _paired_logs(a, b, pairs, seed, clock):
    rng = random.Random(seed)
    firsts = rng.sample(range(pairs), pairs // 2)
    logs = []
    for pair in range(pairs):
        if pair in firsts:
            t_b, t_a = clock(b), clock(a)
        else:
            t_a, t_b = clock(a), clock(b)
        logs.append(math.log(t_a) - math.log(t_b))
    low, high = _ends([math.exp(x) for x in logs])
    return [math.exp(statistics.median(logs)), low, high]


def _blocks(a, b, pairs, seed, clock):
    sides = [[clock(fn) for _ in range(pairs)] for fn in (a, b)]
    ratios = [x / y for x, y in zip(*sides, strict=True)]
    return statistics.median(ratios), *_ends(ratios)


def _alternating(a, b, pairs, seed, clock):
    ratios = _ratios(a, b, [i % 2 == 0 for i in range(pairs)], clock)
    return statistics.median(ratios), *_ends(ratios)


def _coin_order(a, b, pairs, seed, clock):
    rng = random.Random(seed)
    ratios = _ratios(a, b, [rng.random() < 0.5 for _ in range(pairs)], clock)
    return statistics.median(ratios), *_ends(ratios)


def _medians(a, b, pairs, seed, clock):
    sides = {a: [], b: []}
    for first in _order(pairs, seed):
        for fn in (a, b) if first else (b, a):
            sides[fn].append(clock(fn))
    ratios = [x / y for x, y in zip(sorted(sides[a]), sorted(sides[b]), strict=True)]
    return statistics.median(sides[a]) / statistics.median(sides[b]), *_ends(ratios)


def _by_function(a, b, pairs, seed, clock):
    ratios = []
    for first in _order(pairs, seed):
        times = {fn: clock(fn) for fn in ((a, b) if first else (b, a))}
        ratios.append(times[a] / times[b])
    return statistics.median(ratios), *_ends(ratios)


def _upside_down(a, b, pairs, seed, clock):
    ratios = [1 / ratio for ratio in _ratios(a, b, _order(pairs, seed), clock)]
    return statistics.median(ratios), *_ends(ratios)


def _one_rank_in(a, b, pairs, seed, clock):
    ratios = _ratios(a, b, _order(pairs, seed), clock)
    k = _rank_loop(pairs)
    return statistics.median(ratios), *_ends(ratios, k + 1 if k else 0)


def _no_least(a, b, pairs, seed, clock):
    ratios = _ratios(a, b, _order(pairs, seed), clock)
    return statistics.median(ratios), *_ends(ratios, max(1, _rank_loop(pairs)))


def _timed(machine, fn, *, before=True, after=True, x=None):
    x = machine.new_input() if x is None else x
    if before:
        machine.wait()
    start = machine.now()
    machine.launch(fn, x)
    if after:
        machine.wait()
    return machine.now() - start


def _repaired(machine, a, b):
    ratios = _ratios(a, b, [True, False, False, True] * 10, lambda fn: _timed(machine, fn))
    return statistics.median(ratios)


def _repaired_by_mean(machine, a, b):
    logs = []
    for a_first in _order(20, 0):
        seconds = {}
        for fn in (a, b) if a_first else (b, a):
            batch = machine.new_input()
            machine.wait()
            seconds[fn] = machine.now()
            machine.launch(fn, batch)
            machine.wait()
            seconds[fn] = machine.now() - seconds[fn]
        logs.append(math.log(seconds[a] / seconds[b]))
    return math.exp(statistics.mean(logs))


def _hoisted(machine, a, b):
    x = machine.new_input()
    return statistics.median(_ratios(a, b, _order(20, 0), lambda fn: _timed(machine, fn, x=x)))


def _in_blocks(machine, a, b):
    sides = [[_timed(machine, fn) for _ in range(20)] for fn in (a, b)]
    return statistics.median(sides[0]) / statistics.median(sides[1])


RIGHT = {
    "00.1": (_alarms_sum, _alarms_loop),
    "00.2": (_rank_loop, _rank_accumulate),
    "00.3": (_paired, _paired_logs),
    "00.4": (_repaired, _repaired_by_mean),
}

WRONG = {
    "00.1": {
        "only one direction": lambda bm, fn, trials: sum(bm(fn, fn)[0] > 1.01 for _ in range(trials)),
        "against a wrapper": lambda bm, fn, trials: _alarms_sum(lambda a, b: bm(a, lambda: b()), fn, trials),
        "a share": lambda bm, fn, trials: _alarms_sum(bm, fn, trials) / trials,
        "whatever is not 1": lambda bm, fn, trials: sum(not lo <= 1 <= hi for lo, hi in (bm(fn, fn),) * trials),
        "any end beyond": lambda bm, fn, trials: sum(
            lo < 1 / 1.01 or hi > 1.01 for lo, hi in (bm(fn, fn) for _ in range(trials))
        ),
        "excludes 1": lambda bm, fn, trials: sum(not lo <= 1 <= hi for lo, hi in (bm(fn, fn) for _ in range(trials))),
        "one trial more": lambda bm, fn, trials: (bm(fn, fn), _alarms_sum(bm, fn, trials))[1],
    },
    "00.2": {
        "normal law": lambda n: max(0, int(n / 2 - 1.96 * math.sqrt(n) / 2)),
        "5 % on each side": lambda n: sum(b / 2**n <= 0.05 for b in accumulate(math.comb(n, i) for i in range(n))),
        "one less": lambda n: max(0, _rank_loop(n) - 1),
        "one more": lambda n: _rank_loop(n) + 1,
        "at least one": lambda n: max(1, _rank_loop(n)),
        "quarter": lambda n: n // 4,
        "chances not added": lambda n: sum(math.comb(n, i) / 2**n <= 0.025 for i in range(n // 2)),
        "a float": lambda n: float(_rank_loop(n)),
    },
    "00.3": {
        "all of a, then all of b": _blocks,
        "strictly alternating": _alternating,
        "a coin for every pair": _coin_order,
        "ratio of the medians": _medians,
        "b over a": _upside_down,
        "one rank further in": _one_rank_in,
        "times kept by function": _by_function,
        "an interval from five pairs": _no_least,
    },
    "00.4": {
        "never waits": lambda m, a, b: statistics.median(
            _ratios(a, b, _order(20, 0), lambda fn: _timed(m, fn, before=False, after=False))
        ),
        "waits before only": lambda m, a, b: statistics.median(
            _ratios(a, b, _order(20, 0), lambda fn: _timed(m, fn, after=False))
        ),
        "waits after only": lambda m, a, b: statistics.median(
            _ratios(a, b, _order(20, 0), lambda fn: _timed(m, fn, before=False))
        ),
        "one input for all": _hoisted,
        "in blocks": _in_blocks,
        "a always first": lambda m, a, b: statistics.median(_ratios(a, b, [True] * 20, lambda fn: _timed(m, fn))),
        "b over a": lambda m, a, b: 1 / _repaired(m, a, b),
    },
}
