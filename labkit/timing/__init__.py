"""Is a model faster, and do we know? Clocks, paired comparisons, the roofs of a machine, the work of a call.

Open `bench.py` first: `labkit.bench.compare` times two callables, and everything else serves a comparison.

>>> import torch
>>> from labkit import bench
>>> small, large = torch.randn(128, 128), torch.randn(512, 512)
>>> result = bench.compare(lambda: large @ large, lambda: small @ small, budget_s=0.5)  # 64 times the work
>>> result.verdict
'faster'
>>> low, high = result.ci95  # of the speed-up
>>> low <= result.speedup <= high
True

- times: `clocks.py` (a clock), `rounds.py` (the loop that times, and when to stop), `interference.py` (other programs),
  `stats.py` (intervals), `results.py` (a measurement, a comparison, a race);
- roofs: `machine.py`, with `fingerprint.py`, `roofs.py` and `ceilings.py`;
- work: `counting.py`, with `operators.py`, `traffic.py`, `work.py` and `components.py`;
- the two together: `roofline.py` and `roofline_plot.py`; `shapes.py` has the sizes of named transformers.
"""
