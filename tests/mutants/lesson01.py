"""Right answers to the exercises of lesson 01, written otherwise than the worked ones."""

import math


def conv_work_in_a_loop(batch, c_in, c_out, h, w, kernel, groups, s):
    weights = sum(c_in // groups * kernel * kernel for _ in range(c_out))
    return [2 * weights * batch * h * w, s * weights + s * batch * c_in * h * w + s * batch * c_out * h * w]


def time_bound_by_the_roof(flops, moved, peak, bandwidth):
    if not flops:
        return moved / bandwidth, "memory"
    intensity = flops / moved
    return flops / min(peak, bandwidth * intensity), "memory" if intensity < peak / bandwidth else "compute"


def decode_limit_by_two_rates(weight_bytes, kv_bytes, parameters, batch, peak, bandwidth):
    return min(batch * bandwidth / (weight_bytes + batch * kv_bytes), peak / (2 * parameters))


def fleet_by_search(devices, weights, kv, parameters, users, limit):
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
    "01.1": conv_work_in_a_loop,
    "01.2": time_bound_by_the_roof,
    "01.3": decode_limit_by_two_rates,
    "01.4": fleet_by_search,
}
