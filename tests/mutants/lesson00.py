"""Right answers to the exercises of lesson 00, written otherwise than the worked ones."""

import math
import random
import statistics
from itertools import accumulate

import numpy as np
from scipy.stats import binom


def false_alarms_in_a_loop(benchmark, fn, trials):
    count = 0
    for _ in range(trials):
        low, high = benchmark(fn, fn)
        if not (low <= 1.01 and high >= 1 / 1.01):
            count += 1
    return count


def _rank(n):
    k, ways = 0, 0
    while 40 * (ways + math.comb(n, k)) <= 2**n:
        ways += math.comb(n, k)
        k += 1
    return k


def coin_rank_by_sums(n):
    return sum(below / 2**n <= 0.025 for below in accumulate(math.comb(n, i) for i in range(n // 2 + 1)))


def _order(pairs, seed):
    a_first = [i % 2 == 0 for i in range(pairs)]
    random.Random(seed).shuffle(a_first)
    return a_first


def _ends(ratios, k=None):
    ratios = sorted(ratios)
    k = _rank(len(ratios)) if k is None else k
    return (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)


def paired_speedup_of_logarithms(a, b, pairs, seed, clock):
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


def repaired_by_the_mean(machine, a, b):
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


def coin_rank_by_scipy(n):
    return (binom.cdf(np.arange(n + 1), n, 0.5) <= 0.025).sum()  # a whole number of numpy's


RIGHT = {
    "00.1": false_alarms_in_a_loop,
    "00.2": coin_rank_by_sums,
    "00.3": paired_speedup_of_logarithms,
    "00.4": repaired_by_the_mean,
}

MORE_RIGHT = {
    "00.2": [coin_rank_by_scipy],
}
