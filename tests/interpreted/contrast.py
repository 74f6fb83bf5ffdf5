"""Triton's contrast in the interpreter, against the float64 oracle; started by `test_fused_contrast.py`."""

import pytest
import torch
from on_device import TOLERANCE

from lvlm_fix import functional
from lvlm_fix.kernels.fused.contrast import fused_contrast


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(1,), (3, 2048), (2, 3, 5001)], ids=str)
@pytest.mark.parametrize(
    ("alpha", "beta", "loud"), [(0.5, 0.1, 3), (2.0, 0.0, 3), (0.0, 1.0, 3), (1.0, 0.1, 5000)]
)
def test_the_kernel_agrees_with_its_oracle(dtype, shape, alpha, beta, loud):
    torch.manual_seed(0)
    logits, negative = (torch.randn(2, *shape) * loud).to(dtype).unbind()
    logits[..., 1::7] = -torch.inf
    out, best = fused_contrast(logits, negative, alpha, beta, True)
    expected = functional.contrast_logits(logits.double(), negative.double(), alpha, beta).to(dtype)
    assert out.dtype == dtype and torch.equal(out.isneginf(), expected.isneginf())
    kept = ~expected.isneginf()
    assert (out[kept].double() - expected[kept].double()).norm() <= TOLERANCE[dtype] * expected[
        kept
    ].double().norm()
    assert torch.equal(best, out.argmax(-1))
    assert fused_contrast(logits, negative, alpha, beta, False)[1] is None


def test_of_equal_tokens_the_first_is_the_most_likely():
    logits = torch.zeros(2, 5000)
    logits[0, [4100, 2100, 2050]] = 4.0
    _, best = fused_contrast(logits, torch.zeros(2, 5000), 1.0, 0.0, True)
    assert best.tolist() == [2050, 0]


def test_a_row_without_any_token_stays_cut():
    nothing = torch.full((1, 3000), -torch.inf)
    out, best = fused_contrast(nothing, torch.zeros(1, 3000), 1.0, 0.1, True)
    assert out.isneginf().all() and best.tolist() == [0]
