"""Replacements for `nn.Linear` that store the weight in fewer bits and are called the same way."""
