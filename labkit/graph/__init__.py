"""Channels that hang together in a model, found by tracing; the cut; and the proof that the model is the same.

Open `groups` first: `trace` gives the groups of parameter entries that can only go as a unit.

>>> import torch
>>> from labkit.graph.groups import trace
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> print(*trace(model, torch.zeros(1, 4)))
0.weight: 8 units in 3 dimensions

A trace in the order of its steps: `passes`, `copies` and `abstract` run a model without computing; `tracing` sends each
operator through its rule (`operators`, `rules`, `rules_products`, `rules_shapes`); rules tie `labels`, which tensors
carry in `spans`, and fill the `record`; `units` makes groups of the labels; `fits` tries a cut, for which `attributes`
renumbers the modules.

`surgery` removes units, and `equality` compares the smaller model with the larger one whose removed channels are
masked. `anatomy` and `dataflow` read attentions, feed-forward networks and scales of channels from a trace.
"""
