"""Coupled channels of a model, found by tracing; the cut; and the proof of an equal model.

Open `groups.py` first: `trace` gives the groups of parameter entries to be removed as a unit.

>>> import torch
>>> from labkit.graph.groups import trace
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> print(*trace(model, torch.zeros(1, 4)))
0.weight: 8 units in 3 dimensions

groups.py: the groups of a model, and a search for numbers in the forward pass that depend on widths
units.py: units and groups from classes of labels
tracing.py: a pass that sends each operator through a rule
operators.py: the table of operators
rules.py: a call of an operator; rules of elementwise operators, norms and reductions
rules_products.py: rules of products
rules_shapes.py: rules of views, joins and indices
record.py: the notes of a trace
labels.py: numbers for the indices of dimensions, tied and pinned
spans.py: labels along the dimensions of a tensor
abstract.py: passes without values
passes.py: passes on copies of models and inputs, the running module, and a model left as before
fits.py: a trial cut
attributes.py: sizes and settings of modules after a cut
surgery.py: units removed, files of pruned models
equality.py: the smaller model beside the dense model, the removed channels masked
subclasses.py: subclasses of torch layers that compute the same as torch's
anatomy.py: attentions and feed-forward networks in a trace
dataflow.py: scales of channels in a trace
"""
