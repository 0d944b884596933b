"""Tensors in, tensors out: the vision tower, the projector, the decoder. No files, no text, no sampling."""
