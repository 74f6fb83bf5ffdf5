"""Where the cases of tests/interpreted/ run: in Triton's interpreter or, with LVLM_FIX_GPU=1, on a GPU."""

import os

import torch

GPU = os.environ.get("LVLM_FIX_GPU") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
if GPU:
    # tl.dot is wrong on bfloat16 in the interpreter.
    TOLERANCE[torch.bfloat16] = 1e-2


def prepare() -> None:
    """New tensors are made on the GPU, and new memory is NaN, so that what no program writes is seen."""
    assert GPU != INTERPRETED, "set LVLM_FIX_GPU=1 or TRITON_INTERPRET=1, and not both"
    if GPU:
        assert torch.cuda.is_available(), (
            "LVLM_FIX_GPU=1, but torch sees no GPU: set CUDA_VISIBLE_DEVICES=0 as well"
        )
        torch.set_default_device("cuda")
    # On a GPU an operation of torch's with no deterministic form only warns: it is no part of what is tested.
    torch.use_deterministic_algorithms(True, warn_only=GPU)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
