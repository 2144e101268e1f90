"""Data and models of the course, committed or fetched once and verified by hash, and the loop that trains a model.

Open `training.py` first: its docstring loads, trains and scores a model in ten lines.

training.py: batches, the training loop, accuracy and perplexity
datasets.py: Fashion-MNIST, review snippets, prose, photos
models.py: a function for each model of the course
resnet.py: the course's CNN as a module
efficientnet.py: EfficientNet-lite0
fetch.py: data/manifest.toml, the user's cache, hashes
"""
