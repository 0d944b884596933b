"""Training data: samples and pictures in the published file formats, and `llava data check`, which validates them."""
