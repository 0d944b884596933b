"""Training data: samples and pictures from the files they are published in, and the check that looks at all of them."""
