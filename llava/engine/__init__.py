"""Turns requests into streams of tokens and text. The engine owns caches and steps; the model is passed in."""
