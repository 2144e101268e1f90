"""Channels that hang together in a model, found by tracing; the cut; and the proof that the model is the same.

`trace` gives the groups of parameter entries that can only go as a unit, `surgery` removes them, and `equality`
compares the smaller model with the larger one whose removed channels are masked.
"""
