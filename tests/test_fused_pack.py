"""pack: the Triton kernels by the interpreter, and what they take of a GPU; the torch path is `quantize_kv` itself."""

import pytest
import torch

from lvlm_fix.kernels import pack


@pytest.mark.parametrize(
    ("keys", "values", "bits", "message"),
    [
        (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8), 4, "values must have shape"),
        (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8).half(), 4, "share one floating dtype"),
        (torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8), 4, "must hold elements"),
        (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 3, "bits must be 2, 4 or 8, got 3"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(keys, values, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(keys, values, bits)


def test_the_interpreter_agrees_with_quantize_kv():
    pytest.importorskip("triton")
    from ahead_of_time import run_interpreted

    run_interpreted("pack.py", passed=30)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_fit_on_the_gpu(capability):
    pytest.importorskip("triton")
    from ahead_of_time import TYPES, compiled_usage, require_fits

    from lvlm_fix.kernels.fused import pack as fused

    same = ("keys", "values", "key_scale", "key_low", "value_scale", "value_low", "channel_scale")
    types = {"partial": "*fp32", "key_codes": "*u8", "value_codes": "*u8", "tokens": "i32"}
    types |= {"span": "i32", "parts": "i32"}
    for dtype, width, bits in [
        ("float16", 128, 4),
        ("bfloat16", 80, 2),
        ("float32", 256, 2),
        ("float16", 32, 2),
        ("float32", 96, 8),
    ]:
        kinds = types | dict.fromkeys(same, TYPES[dtype])
        info = torch.finfo(getattr(torch, dtype))
        tile = {"WIDTH": width, **fused.configuration(width, bits, getattr(torch, dtype).itemsize)}
        padded = tile["BYTES"] * tile["PER_BYTE"]
        spans = {"WIDTH": width, "PADDED": padded, "BLOCK": tile["BLOCK"]}
        rounding = {"EPS": info.eps, "FLOOR": max(info.tiny * info.eps, 1.1754943508222875e-38)}
        merged = {"WIDTH": width, "PADDED": padded, "LEVELS": 2**bits - 1, "AT_ONCE": fused.PARTS_AT_ONCE}
        for kernel, constants, warps in (
            (fused._channel_ranges, spans, fused.WARPS),
            (fused._channel_scales, merged | rounding, 1),
            (fused._pack, tile | rounding | {"BITS": bits}, fused.WARPS),
        ):
            require_fits(compiled_usage(kernel, capability, kinds, constants, num_warps=warps), capability)
