"""The zoo: the catalogue of published LLaVA checkpoints, used to identify a folder and the base model it needs."""
