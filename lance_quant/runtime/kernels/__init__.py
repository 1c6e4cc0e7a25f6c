"""Triton kernels over the native buffers; each module imports triton, so import one only where it is to run."""
