"""Converts, merges and splits checkpoints, writes the results to new folders, and verifies them."""
