"""Bytes and names on disk: headers, memory-mapped tensors, key tables, atomic writes. Knows no model family."""
