"""Tensor files on disk: headers, memory-mapped tensors, key tables, atomic writes. Independent of any model family."""
