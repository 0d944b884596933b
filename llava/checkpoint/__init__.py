"""Turns a folder or hub id into a model: detects the format, resolves the checkpoint and loads its weights."""
