"""Looking into a model and exchanging a part of it. Read `batches` first.

batches, losses: the arguments, the labels and the loss of a batch, whatever form the batch has.
hooks: watching modules while the model runs. replacing: putting another module in a module's place.
weights, masks: the prunable weights by name, and masks that hold weights at zero.
stacks, blocks: lists of layers, and a walk through a model block by block.
hessians: sums over a layer's inputs. returned, tensors: the tensors of an output, and of a sparse tensor.
undisturbed: a forward pass of which every operator can be seen.

No module of this room knows about pruning, quantization or timing.
"""
