"""The Triton kernels of probe_scores: what they compute, by the interpreter, and what they take of a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import TYPES, compiled_usage, require_fits, run_interpreted  # noqa: E402

from lvlm_fix.kernels.fused import probe_scores as fused  # noqa: E402
from lvlm_fix.kernels.fused.launch import precision  # noqa: E402

STRIDES = {f"{name}_{axis}": "i32!" for name in ("query", "key") for axis in "bhpt"}
COUNTS = dict.fromkeys(["tokens", "key_heads", "group", "PROBES"], "i32")
STATISTICS = dict.fromkeys(["maximum", "total", "row_maximum", "row_inverse", "sums"], "*fp32")
MASKS = {"position": "*i32", "key_mask": "*i1", "scale": "fp32"}


def test_the_interpreter_agrees_with_the_oracle():
    run_interpreted("probe_scores.py", passed=12)


# A configuration is compiled at the largest head size that it serves, where it takes the most.
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [("float16", 128), ("float16", 256), ("bfloat16", 128), ("float32", 128), ("float32", 256)],
)
@pytest.mark.parametrize("kernel", ["_row_statistics", "_column_sums"])
def test_each_configuration_fits_on_the_gpu(kernel, dtype, width, capability):
    chosen = fused.configuration(width, getattr(torch, dtype))
    launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        "WIDTH": width,
        "PADDED": width,
        "PRECISION": precision(getattr(torch, dtype)),
        "MASKED": True,
    }
    if kernel == "_row_statistics":
        constants["SPAN"] = fused.SPAN
    types = {"query": TYPES[dtype], "key": TYPES[dtype], **STRIDES, **COUNTS, **STATISTICS, **MASKS}
    usage = compiled_usage(getattr(fused, kernel), capability, types, constants | chosen, **launch)
    require_fits(usage, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_merge_statistics", "_finish"])
def test_the_sums_fit_on_the_gpu(kernel, capability):
    types = {**STATISTICS, **COUNTS, **MASKS, "scores": "*fp32", "normalised": "*fp32", "spans": "i32"}
    types |= {"rows": "i32", "heads": "i32"}
    constants = {"BLOCK_SUM": fused.BLOCK_SUM}
    if kernel == "_finish":
        constants |= {"PADDED_PROBES": 32, "MASKED": True}
    require_fits(compiled_usage(getattr(fused, kernel), capability, types, constants), capability)
