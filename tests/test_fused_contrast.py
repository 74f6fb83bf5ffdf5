"""contrast: the front's torch path, the Triton kernel by the interpreter, and what that takes of a GPU."""

import pytest
import torch

from lvlm_fix import functional
from lvlm_fix.kernels import contrast, last_used


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
def test_the_front_gives_what_its_oracle_gives(dtype):
    logits, negative = torch.randn(2, 3, 400).to(dtype).unbind()
    out, best = contrast(logits, negative, 0.5, 0.1, argmax=True)
    assert last_used()["contrast"] == "torch"
    assert torch.equal(out, functional.contrast_logits(logits, negative, 0.5, 0.1))
    assert torch.equal(best, out.argmax(-1))
    assert torch.equal(contrast(logits, negative, 0.5, 0.1), out)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(2, 4), 1.0, 0.1), "must share a shape"),
        ((torch.zeros(2, 0), torch.zeros(2, 0), 1.0, 0.1), "at least one token"),
        ((torch.zeros(2, 5).long(), torch.zeros(2, 5), 1.0, 0.1), "must be floating"),
        ((torch.zeros(2, 5), torch.zeros(2, 5), -1.0, 0.1), "alpha must not be negative"),
        ((torch.zeros(2, 5), torch.zeros(2, 5), 1.0, 1.1), "beta must lie in 0..1"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(inputs, message):
    with pytest.raises(ValueError, match=message):
        contrast(*inputs)


def test_the_interpreter_agrees_with_the_oracle():
    pytest.importorskip("triton")
    from ahead_of_time import run_interpreted

    run_interpreted("contrast.py", passed=26)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_fit_on_the_gpu(capability):
    pytest.importorskip("triton")
    from ahead_of_time import TYPES, compiled_usage, require_fits

    from lvlm_fix.kernels.fused import contrast as fused

    types = {"maxima": "*fp32", "best": "*fp32", "best_token": "*i32", "most_likely": "*i64", "alpha": "fp32"}
    types |= {"log_beta": "fp32", "vocabulary": "i32", "blocks": "i32"}
    for dtype in ("bfloat16", "float32"):
        kinds = types | dict.fromkeys(["logits", "negative_logits", "out"], TYPES[dtype])
        kernels = [
            (fused._block_maxima, {"BLOCK": fused.BLOCK}),
            (fused._combine, {"BLOCKS": 128, "BLOCK": fused.BLOCK, "ARGMAX": True}),
            (fused._first_best, {"BLOCKS": 128}),
        ]
        for kernel, constants in kernels:
            usage = compiled_usage(kernel, capability, kinds, constants, num_warps=fused.WARPS)
            require_fits(usage, capability)
