"""Turns requests into streams of tokens and text. The engine owns caches and steps; the caller passes in the model."""
