"""The zoo: a catalogue of published LLaVA checkpoints, used to identify a checkpoint and the base model it needs."""
