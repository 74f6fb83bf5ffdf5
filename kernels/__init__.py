"""Fused Triton kernels. None yet: the methods run on the torch functions of `lvlm_fix.functional`."""
