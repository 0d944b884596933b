"""From a folder or hub id to a model: detect the format, resolve the checkpoint, load its weights."""
