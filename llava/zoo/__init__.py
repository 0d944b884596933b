"""What is published: the catalogue of LLaVA checkpoints, which entry a folder is, and which base it needs."""
