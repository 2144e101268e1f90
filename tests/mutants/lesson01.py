"""Answers to the exercises of lesson 01: right ones, written differently, and plausible wrong ones."""


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


RIGHT = {
    "01.1": (_conv_right, _conv_loop),
    "01.2": (_bound_if, _bound_roof),
    "01.3": (_decode_min, _decode_steps),
    "01.4": (
        lambda tokens, speed, price, watts: (1e6 * tokens / speed * price / 3600, 1e6 * tokens / speed * watts / 3.6e6),
        lambda tokens, speed, price, watts: [tokens * price / (0.0036 * speed), tokens * watts / (3.6 * speed)],
    ),
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
        "one request": lambda t, r, c, p: (t / r / 3600 * c, t / r * p / 3.6e6),
        "hours not seconds": lambda t, r, c, p: (1e6 * t / r * c, 1e6 * t / r * p / 3.6e6),
        "joules for kWh": lambda t, r, c, p: (1e6 * t / r / 3600 * c, 1e6 * t / r * p),
        "watt hours for kWh": lambda t, r, c, p: (1e6 * t / r / 3600 * c, 1e6 * t / r / 3600 * p),
        "tokens left out": lambda t, r, c, p: (1e6 / r / 3600 * c, 1e6 / r * p / 3.6e6),
        "order swapped": lambda t, r, c, p: (1e6 * t / r * p / 3.6e6, 1e6 * t / r / 3600 * c),
    },
}
