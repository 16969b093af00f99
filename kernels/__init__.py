"""Triton kernels: one idea a file, the kernel and then its wrapper. They import torch and triton only."""
