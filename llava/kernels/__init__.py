"""GPU kernels. Each file contains a Triton kernel and an eager PyTorch twin that computes the same.

`llava doctor` lists the modules that have a function named `…_kernel`, with the first line of their docstrings. A
kernel with needs of its own defines `why_not(device)`, as in `support`.
"""
