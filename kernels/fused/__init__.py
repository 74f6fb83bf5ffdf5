"""Triton kernels, one a file; the fronts in `lvlm_fix.kernels` run them on CUDA tensors.

Nothing here is imported before a front needs it: Triton is there on Linux only.
"""
