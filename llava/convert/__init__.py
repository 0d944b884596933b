"""One checkpoint made into another: layouts written, deltas and LoRAs merged or taken out, results checked."""
