"""Coupled channels of a model, found by tracing; the cut; and the proof of an equal model.

Open `groups` first: `trace` gives the groups of parameter entries to be removed as a unit.

>>> import torch
>>> from labkit.graph.groups import trace
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> print(*trace(model, torch.zeros(1, 4)))
0.weight: 8 units in 3 dimensions

The files in the order of a trace:
  1. `copies`, `passes` and `abstract` run a model without computing.
  2. `tracing` sends each operator through a rule: `operators` is the table, `rules`, `rules_products` and
     `rules_shapes` are the rules.
  3. Rules tie `labels`, carried by tensors in `spans`, and add to the `record`.
  4. `units` makes groups of tied labels.
  5. `groups` searches for numbers in the forward pass that depend on widths: `fits` tries a cut, and `attributes`
     renumbers the modules.

`surgery` removes units, and `equality` compares the smaller model with the model before the cut, the removed channels
masked. `anatomy` and `dataflow` read attentions, feed-forward networks and scales of channels from a trace.
"""
