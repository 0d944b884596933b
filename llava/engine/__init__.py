"""Requests become a stream of tokens and text. The engine owns caches and steps; it is given a model, never loads one."""
