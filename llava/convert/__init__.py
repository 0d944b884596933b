"""Converts, merges and splits resolved checkpoints into new folders, and verifies the results."""
