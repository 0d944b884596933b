"""Drop-in replacements for `nn.Linear` that store the weight in fewer bits."""
