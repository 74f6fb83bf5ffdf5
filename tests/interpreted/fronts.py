"""On a GPU, each front runs Triton, and says so: see conftest.py."""

import pytest
import torch
from on_device import GPU

from lvlm_fix.kernels import (
    cls_row,
    contrast,
    last_used,
    pack,
    probe_scores,
    quantized_decode,
    sparse_prefill,
    visual_attention,
)

pytestmark = pytest.mark.skipif(not GPU, reason="fronts run Triton on a GPU only")
VAR = {"rho": 0.3, "min_image_attention": 0.1, "p": 0.6, "first_query": 10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_front_says_that_triton_ran(dtype):
    x = torch.randn(1, 2, 40, 64).to(dtype)
    mask = torch.rand(1, 40) < 0.5
    calls = {
        "visual_attention": lambda: visual_attention(x, x, x, mask, mask, **VAR),
        "sparse_prefill": lambda: sparse_prefill(x, x, x, mask),
        "probe_scores": lambda: probe_scores(x[:, :, -3:], x, torch.arange(37, 40)),
        "pack": lambda: pack(x, x, 4),
        "quantized_decode": lambda: quantized_decode(x[:, :, :1], [pack(x, x, 4)], x, x),
        "contrast": lambda: contrast(x, x, 0.5, 0.1, argmax=True),
        "cls_row": lambda: cls_row(x[0], x[0], 2),
    }
    for front, call in calls.items():
        call()
        assert last_used()[front] == "triton", front
