"""GPU kernels. Each file contains a Triton kernel and an eager PyTorch twin that computes the same."""
