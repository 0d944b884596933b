"""Turns images and messages into a `ModelInput`, and token ids into text. Contains no modules and no device code."""
