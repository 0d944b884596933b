"""The network: vision tower, projector and decoder. Tensors in, tensors out; no files, text or sampling."""
