"""Looking into a model and exchanging a part of it: batches, hooks, stacks of layers, sums over a layer's inputs.

Nothing here knows what is pruned, quantised or timed.
"""
