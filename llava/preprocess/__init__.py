"""Converts images and messages to a `ModelInput`, and token ids to text. Contains no `nn.Module` and no device code."""
