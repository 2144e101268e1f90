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

bench.py: measure and compare
rounds.py: the loop that times, and when to stop
clocks.py: wall time, CPU time, CUDA events
interference.py: other programs on the machine
doubts.py: few samples, drift, threads that make a call slower
stats.py: intervals of medians and ratios
results.py: a measurement, a comparison
race.py: several callables in turns
processes.py: a comparison in several processes
counting.py: the work of a call
operators.py: formulas of operators that torch's counter leaves out
traffic.py: bytes that a call moves
work.py: the result of counting
machine.py: fingerprint and ceilings of this machine
fingerprint.py: the facts behind a result
roofs.py: a catalogue of accelerators
ceilings.py: measured ceilings
roofline.py: the work of a call against the roofs of a machine
roofline_plot.py: the picture
shapes.py: sizes of named transformers
quality_stats.py: intervals of accuracies and scores
paired.py: intervals of changes between two models on the same images or texts
"""
