"""Run with TRITON_INTERPRET=1, by tests/test_fused_cls_row.py: the kernel against the float64 oracle."""

import pytest
import torch

from lvlm_fix import functional
from lvlm_fix.kernels.fused.cls_row import fused_cls_row

# No tl.dot here: the interpreter is right on bfloat16 too.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "num_heads", "loud"),
    [
        pytest.param(1, 2, 32, 1, 1, id="one image token"),
        pytest.param(2, 145, 192, 3, 1, id="heads"),
        pytest.param(1, 50, 1000, 1, 1, id="full width"),
        pytest.param(2, 130, 160, 4, 1, id="heads of no power of two"),
        pytest.param(1, 300, 64, 1, 100, id="huge logits"),
    ],
)
def test_the_kernel_agrees_with_its_oracle(dtype, batch, tokens, width, num_heads, loud):
    torch.manual_seed(0)
    query, key = (torch.randn(2, batch, tokens, width) * loud).to(dtype).unbind()
    reference = functional.cls_scores(query.double(), key.double(), num_heads)
    for asking in (query, query[:, :1]):
        out = fused_cls_row(asking, key, num_heads)
        assert out.dtype == torch.float32
        assert out.shape == reference.shape
        assert (out - reference).norm() <= TOLERANCE[dtype] * reference.norm()
