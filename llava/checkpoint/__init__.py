"""Checkpoints on disk: what a folder holds, under which names, and how it becomes weights. `convert` writes them."""
