"""Models and data of the lessons, fetched once and verified by hash, and the loop that trains a model."""
