"""The Triton kernel of sparse_prefill: what it computes, by the interpreter, and what it takes of a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import TYPES, compiled_usage, require_fits, run_interpreted  # noqa: E402

from lvlm_fix.kernels.fused import sparse_prefill as fused  # noqa: E402
from lvlm_fix.kernels.fused.launch import padded_width, precision  # noqa: E402

TENSORS = ("query", "key", "value", "out")
STRIDES = {f"{name}_{axis}": "i32!" for name in TENSORS for axis in "bht"}
OTHERS = {
    "index": "*i32",
    "places": "*i64",
    "index_b": "i32",
    "scale": "fp32",
    "heads": "i32",
    "group": "i32",
}


def test_the_interpreter_agrees_with_the_oracle():
    run_interpreted("sparse_prefill.py", passed=13)


# A configuration is compiled at the largest head size that it serves, where it takes the most.
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("float16", 64),
        ("float16", 128),
        ("float16", 256),
        ("bfloat16", 128),
        ("float32", 128),
        ("float32", 32),
        ("float16", 96),
    ],
)
def test_each_configuration_fits_on_the_gpu(dtype, width, capability):
    chosen = fused.configuration(padded_width(width), getattr(torch, dtype), capability)
    launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"WIDTH": width, "PADDED": padded_width(width), "PRECISION": precision(getattr(torch, dtype))}
    types = dict.fromkeys(TENSORS, TYPES[dtype]) | STRIDES | OTHERS
    usage = compiled_usage(fused._sparse_prefill, capability, types, constants | chosen, **launch)
    require_fits(usage, capability)
