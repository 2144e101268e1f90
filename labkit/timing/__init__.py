"""Is it faster, and do we know? Clocks, paired comparisons, the machine's ceilings, and the work of a call.

`labkit.bench.compare` times two callables, `labkit.machine.ceilings` measures the roof, and `labkit.roofline.count`
counts the work that a call has to do.
"""
