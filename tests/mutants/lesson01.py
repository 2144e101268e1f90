"""Answers to the exercises of lesson 01: right ones, written differently, and plausible wrong ones."""

import math
from functools import partial


def _conv_right(batch, c_in, c_out, h, w, kernel, groups, s):
    macs = batch * c_out * h * w * kernel * kernel * c_in / groups
    return 2 * macs, s * (batch * h * w * (c_in + c_out) + c_out * c_in * kernel**2 / groups)


def _conv_loop(batch, c_in, c_out, h, w, kernel, groups, s):
    weights = sum(c_in // groups * kernel * kernel for _ in range(c_out))
    return [2 * weights * batch * h * w, s * weights + s * batch * c_in * h * w + s * batch * c_out * h * w]


def _bound_if(flops, moved, peak, bandwidth):
    if flops / peak >= moved / bandwidth:
        return flops / peak, "compute"
    return moved / bandwidth, "memory"


def _bound_roof(flops, moved, peak, bandwidth):
    if not flops:
        return moved / bandwidth, "memory"
    intensity = flops / moved
    return flops / min(peak, bandwidth * intensity), "memory" if intensity < peak / bandwidth else "compute"


def _decode_min(weight_bytes, kv_bytes, parameters, batch, peak, bandwidth):
    return min(batch * bandwidth / (weight_bytes + batch * kv_bytes), peak / (2 * parameters))


def _decode_steps(weight_bytes, kv_bytes, parameters, batch, peak, bandwidth):
    step = max(2 * batch * parameters / peak, (weight_bytes + kv_bytes * batch) / bandwidth)
    return 1 / step * batch


def _fleet(devices, weights, kv, parameters, users, limit, *, drop="", batch_of=int, number_of=math.ceil, key="total"):
    """The worked answer with something left out or done otherwise: the raw material of the wrong ones."""
    offers = []
    for d in devices:
        limits = {
            "memory": (d["memory"] - weights) / kv,
            "moving": (limit * d["bandwidth"] - weights) / kv,
            "computing": limit * d["peak"] / (2 * parameters),
        }
        batch = batch_of(min(value for name, value in limits.items() if name != drop))
        if batch >= 1:
            number = number_of(users / batch)
            ranks = {"total": number * d["watts"], "number": number, "device": d["watts"]}
            offers.append((ranks[key], d["name"], number))
    return min(offers)[1:] if offers else None


def _fleet_search(devices, weights, kv, parameters, users, limit):
    best, answer = math.inf, None
    for d in devices:
        batch = 0
        while (
            weights + (batch + 1) * kv <= min(d["memory"], limit * d["bandwidth"])
            and 2 * parameters * (batch + 1) <= limit * d["peak"]
        ):
            batch += 1
        if batch and -(-users // batch) * d["watts"] < best:
            best, answer = -(-users // batch) * d["watts"], [d["name"], -(-users // batch)]
    return answer


RIGHT = {
    "01.1": (_conv_right, _conv_loop),
    "01.2": (_bound_if, _bound_roof),
    "01.3": (_decode_min, _decode_steps),
    "01.4": (_fleet, _fleet_search),
}

WRONG = {
    "01.1": {
        "multiply-adds for FLOPs": lambda b, i, o, h, w, k, g, s: (
            _conv_right(b, i, o, h, w, k, g, s)[0] / 2,
            _conv_right(b, i, o, h, w, k, g, s)[1],
        ),
        "groups forgotten": lambda b, i, o, h, w, k, g, s: _conv_right(b, i, o, h, w, k, 1, s),
        "groups squared": lambda b, i, o, h, w, k, g, s: _conv_right(b, i, o, h, w, k, g * g, s),
        "kernel not squared": lambda b, i, o, h, w, k, g, s: _conv_right(b, i, o, h, w, k**0.5, g, s),
        "values for bytes": lambda b, i, o, h, w, k, g, s: _conv_right(b, i, o, h, w, k, g, 1),
        "weights read for each image": lambda b, i, o, h, w, k, g, s: (
            _conv_right(b, i, o, h, w, k, g, s)[0],
            s * b * (h * w * (i + o) + o * i * k * k // g),
        ),
        "output not written": lambda b, i, o, h, w, k, g, s: (
            _conv_right(b, i, o, h, w, k, g, s)[0],
            s * (b * h * w * i + o * i * k * k // g),
        ),
    },
    "01.2": {
        "added": lambda f, m, p, b: (f / p + m / b, _bound_if(f, m, p, b)[1]),
        "the faster one": lambda f, m, p, b: (min(f / p, m / b), _bound_if(f, m, p, b)[1]),
        "names swapped": lambda f, m, p, b: (_bound_if(f, m, p, b)[0], "memory" if f / p >= m / b else "compute"),
        "memory at the ridge": lambda f, m, p, b: (max(f / p, m / b), "compute" if f / p > m / b else "memory"),
        "ridge inverted": lambda f, m, p, b: (max(f / p, m / b), "compute" if f / m >= b / p else "memory"),
        "peak and bandwidth swapped": lambda f, m, p, b: _bound_if(f, m, b, p),
        "only the time": lambda f, m, p, b: max(f / p, m / b),
    },
    "01.3": {
        "a step, not all sequences": lambda w, kv, n, b, p, bw: _decode_min(w, kv, n, b, p, bw) / b,
        "weights read for each sequence": lambda w, kv, n, b, p, bw: _decode_min(w * b, kv, n, b, p, bw),
        "one cache for all": lambda w, kv, n, b, p, bw: _decode_min(w, kv / b, n, b, p, bw),
        "no arithmetic": lambda w, kv, n, b, p, bw: b * bw / (w + b * kv),
        "no cache": lambda w, kv, n, b, p, bw: _decode_min(w, 0, n, b, p, bw),
        "one FLOP a parameter": lambda w, kv, n, b, p, bw: _decode_min(w, kv, n / 2, b, p, bw),
        "times added": lambda w, kv, n, b, p, bw: b / ((w + b * kv) / bw + 2 * n * b / p),
    },
    "01.4": {
        "memory forgotten": partial(_fleet, drop="memory"),
        "time to move forgotten": partial(_fleet, drop="moving"),
        "time to compute forgotten": partial(_fleet, drop="computing"),
        "batch rounded up": partial(_fleet, batch_of=math.ceil),
        "number rounded down": partial(_fleet, number_of=int),
        "fewest devices": partial(_fleet, key="number"),
        "least watts of one device": partial(_fleet, key="device"),
        "name only": lambda *args: (_fleet(*args) or [None])[0],
    },
}
