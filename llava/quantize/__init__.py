"""A Linear becomes a smaller thing with the same call."""
