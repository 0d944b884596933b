"""Training, from a recipe and data files to a trained model: sample order, batches, the loop, checkpoints, export."""
