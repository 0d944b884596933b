"""Layouts on disk, one file each: how it is recognised, read and written."""
