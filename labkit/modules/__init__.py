"""Looking into a model and replacing parts of it, without a word of pruning, quantization or timing.

Open `batches.py` first: arguments, labels and tokens of a batch of any form.

batches.py: the model's arguments, the labels, and the tokens without padding
losses.py: the loss of a batch
evaluating.py: a model in eval mode for a while
hooks.py: watching modules in a forward pass
weights.py: the prunable weights by name
masks.py: weights held at zero
stacks.py: lists of layers
blocks.py: a walk through a model block by block
hessians.py: sums over a layer's inputs
kv_cache.py: a decoder with a filled cache
returned.py: the tensors of an output
tensors.py: the tensors of a sparse tensor
replacing.py: replacing a module
undisturbed.py: a forward pass with every operator visible
"""
