"""Converts images and messages to a `ModelInput`, and token ids to text. Contains no modules or device code."""
