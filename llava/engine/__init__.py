"""Requests become a stream of tokens and text. The engine owns caches and steps, and is given a model."""
