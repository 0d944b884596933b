"""Trains a model from a recipe and data files: sample order, batches, training loop, checkpoints and export."""
