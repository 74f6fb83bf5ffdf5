"""The Triton kernels of visual_attention: what they compute, by the interpreter, and what they take of a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import REGISTERS, SHARED, TYPES, compiled_usage, require_fits, run_interpreted  # noqa: E402

from lvlm_fix.kernels.fused import visual_attention, visual_decode  # noqa: E402
from lvlm_fix.kernels.fused.launch import padded_width  # noqa: E402

# The smallest Ampere and Ada chips (sm_86, sm_89); configurations for sm_80 run there too.
SMALLEST_SHARED = 101_376
MASKS = dict.fromkeys(["image", "sink", "seen"], "*u8") | dict.fromkeys(
    ["image_b", "sink_b", "seen_b"], "i32"
)
STRIDES = {f"{name}_{axis}": "i32!" for name in ("query", "key", "value", "out") for axis in "bht"}
COUNTS = dict.fromkeys(
    ["heads", "shared", "group", "queries", "tokens", "length", "runs", "changed_tiles"], "i32"
)
PARAMETERS = dict.fromkeys(["scale", "rho", "min_image_attention", "p"], "fp32")
LISTS = dict.fromkeys(["start", "count", "sinks"], "*i32")
PARTS = {"partial": "*fp32", "first_query": "*i64", "first_b": "i32"}
ALL = {**MASKS, **STRIDES, **COUNTS, **PARAMETERS, **LISTS, **PARTS}
# A configuration is compiled at the largest head size that it serves, where it takes the most.
each_configuration = pytest.mark.parametrize(
    ("dtype", "width"),
    [("bfloat16", 64), ("bfloat16", 128), ("float16", 256), ("float32", 128), ("float16", 80)],
)
each_capability = pytest.mark.parametrize("capability", [80, 90])


def types(dtype):
    return ALL | dict.fromkeys(["query", "key", "value", "out"], TYPES[dtype])


def constants(width, masked):
    return {"CAUSAL": True, "MASKED": masked, "WIDTH": width, "BLOCK_D": padded_width(width)}


def require_fits_everywhere(usage, capability):
    require_fits(usage, capability)
    assert capability == 90 or usage.shared <= SMALLEST_SHARED < SHARED[80]


def test_the_interpreter_agrees_with_the_oracle():
    run_interpreted("visual_attention.py", passed=80)


@pytest.mark.parametrize("masked", [False, True], ids=["no padding", "padding"])
@each_capability
@each_configuration
def test_each_configuration_for_prefill_fits_on_the_gpu(dtype, width, capability, masked):
    itemsize = getattr(torch, dtype).itemsize
    tile = visual_attention.prefill_configuration(width, itemsize, hopper=capability == 90)
    blocks = {"BLOCK_M": tile.rows, "CHANGED_M": tile.changed, "BLOCK_N": tile.keys}
    usage = compiled_usage(
        visual_attention._visual_prefill,
        capability,
        types(dtype),
        constants(width, masked) | blocks,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    require_fits_everywhere(usage, capability)


@pytest.mark.parametrize("causal", [False, True], ids=["one query", "few queries"])
@each_capability
@each_configuration
def test_each_configuration_for_decoding_fits_on_the_gpu(dtype, width, capability, causal):
    tile = visual_decode.decode_configuration(width, getattr(torch, dtype).itemsize)
    blocks = {"BLOCK_M": visual_decode.ROWS, "BLOCK_N": tile.keys, "CAUSAL": causal}
    usage = compiled_usage(
        visual_decode._visual_decode,
        capability,
        types(dtype),
        constants(width, masked=True) | blocks,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    require_fits_everywhere(usage, capability)
    # As many programs as the launcher counts on. A KiB of shared memory of each is the system's.
    assert tile.resident * usage.registers * usage.warps * 32 <= REGISTERS
    assert tile.resident * (usage.shared + 1024) <= SHARED[capability] + 1024


@each_capability
def test_the_small_kernels_fit_on_the_gpu(capability):
    largest = {"WIDTH": 256, "BLOCK_D": 256, "BLOCK_R": visual_decode.MOST_RUNS}
    warps = visual_decode.COMBINING_WARPS
    usage = compiled_usage(visual_decode._combine, capability, types("float16"), largest, num_warps=warps)
    require_fits_everywhere(usage, capability)
    listing = {"MASKED": True, "BLOCK": 1024}
    usage = compiled_usage(visual_attention._find_sinks, capability, types("float16"), listing, num_warps=4)
    require_fits_everywhere(usage, capability)


@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("tokens", [1, 640, 2900, 16_384, 65_536])
@pytest.mark.parametrize("programs", [4, 32, 256])
def test_decoding_splits_all_keys_into_runs_that_one_program_adds_up(tokens, programs, multiprocessors):
    keys = 64
    places = 3 * multiprocessors
    length = visual_decode.run_length(tokens, programs, places, keys)
    runs = -(-tokens // length)
    assert length % keys == 0
    assert 1 <= runs <= visual_decode.MOST_RUNS
    # As many programs as fill the GPU, or as short runs as pay.
    wanted = min(places // programs, visual_decode.MOST_RUNS)
    assert runs >= wanted // 2 or length == 2 * keys
