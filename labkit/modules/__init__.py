"""Looking into a model and replacing parts of a model. Read `batches` first.

batches, losses: the arguments, the labels and the loss of a batch of any form.
evaluating: a model in eval mode for a while. hooks: watching modules in a forward pass. replacing: replacing a module.
weights, masks: the prunable weights by name, and masks to hold weights at zero.
stacks, blocks: lists of layers, and a walk through a model block by block.
hessians: sums over a layer's inputs. returned, tensors: the tensors of an output, and of a sparse tensor.
undisturbed: a forward pass with every operator visible.

No module of this room knows about pruning, quantization or timing.
"""
