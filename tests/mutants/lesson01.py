"""Right answers to the exercises of lesson 01, written otherwise than the worked ones."""


def conv_work_in_a_loop(batch, c_in, c_out, h, w, kernel, groups, s):
    weights = sum(c_in // groups * kernel * kernel for _ in range(c_out))
    return [2 * weights * batch * h * w, s * weights + s * batch * c_in * h * w + s * batch * c_out * h * w]


def time_bound_by_the_roof(flops, moved, peak, bandwidth):
    if not flops:
        return moved / bandwidth, "memory"
    intensity = flops / moved
    return flops / min(peak, bandwidth * intensity), "memory" if intensity < peak / bandwidth else "compute"


def largest_batch_by_search(device, weights, kv, parameters, limit):
    batch = 0
    while (
        weights + (batch + 1) * kv <= min(device["memory"], limit * device["bandwidth"])
        and 2 * parameters * (batch + 1) <= limit * device["peak"]
    ):
        batch += 1
    return batch


RIGHT = {
    "01.1": conv_work_in_a_loop,
    "01.2": time_bound_by_the_roof,
    "01.3": largest_batch_by_search,
}
