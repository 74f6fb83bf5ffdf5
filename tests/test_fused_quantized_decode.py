"""quantized_decode: the torch path, the Triton kernels by the interpreter, and what those take of a GPU."""

import gc
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch

from lvlm_fix import functional
from lvlm_fix.kernels import Redistribution, last_used, pack, quantized_decode
from lvlm_fix.kernels.dispatch import once_for_groups

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
VAR = {"rho": 0.3, "min_image_attention": 0.1, "p": 0.6}


def doubled(q):
    held = {name: getattr(q, name) for name in ("scale", "zero_point", "channel_scale")}
    return replace(q, **{name: x.double() for name, x in held.items() if x is not None})


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("redistributed", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "shared", "queries", "width", "groups"),
    [
        (1, 1, 1, 1, 32, []),
        (2, 4, 2, 1, 64, [(40, 4), (71, 2), (10, 8)]),
        (1, 6, 3, 3, 7, [(5, 4), (64, 2)]),
        (1, 2, 1, 1, 128, [(5000, 2)]),
    ],
)
def test_the_torch_path_agrees_with_its_oracle(
    dtype, masked, redistributed, rows, heads, shared, queries, width, groups
):
    def drawn(count):
        return torch.randn(2, rows, shared, count, width).to(dtype).unbind()

    packed = [pack(*drawn(tokens), bits) for tokens, bits in groups]
    query, tail = torch.randn(rows, heads, queries, width).to(dtype), drawn(9)
    masks = torch.rand(3, rows, 9 + sum(tokens for tokens, _ in groups))
    real = masks[0] < 0.8 if masked else None
    moved = Redistribution(masks[1] < 0.6, masks[2] < 0.2, 0, **VAR) if redistributed else None
    out = quantized_decode(query, packed, *tail, real, redistribution=moved)
    assert last_used()["quantized_decode"] == "torch"
    wide = [(doubled(keys), doubled(values)) for keys, values in packed]
    tails = [x.double() for x in tail]
    expected = functional.quantized_decode(query.double(), wide, *tails, real, redistribution=moved)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_a_row_that_sees_nothing_gives_zeros():
    x = torch.randn(1, 2, 20, 8)
    hidden = torch.zeros(1, 22, dtype=torch.bool)
    assert not quantized_decode(x[:, :, :1], [pack(x, x, 4)], x[:, :, :2], x[:, :, :2], hidden).any()


def test_groups_are_known_again_and_new_ones_noticed():
    """What was found of groups is kept for those: not for others that a list of the same length holds."""
    x = torch.randn(3, 1, 2, 20, 8)
    one, other, third = (pack(each, each, 4) for each in x)
    tail, query = x[0, :, :, :2], x[0, :, :, :1]
    for groups in ([one], [one, other], [one, third], [third], [one, other], []):
        out = quantized_decode(query, groups, tail, tail)
        torch.testing.assert_close(out, functional.quantized_decode(query, groups, tail, tail))
    with pytest.raises(ValueError, match=r"groups\[1\] must hold keys"):
        quantized_decode(query, [one, other[::-1]], tail, tail)


def test_what_was_found_of_groups_goes_with_them():
    asked = []

    @once_for_groups
    def count(groups, *rest):
        asked.append(rest)
        return len(groups)

    x = torch.randn(1, 1, 4, 8)
    groups = [pack(x, x, 4), pack(x, x, 2)]
    assert [count(groups), count(list(groups)), count(groups, 1), count(groups[:1])] == [2, 2, 2, 1]
    assert asked == [(), (1,), ()]
    gone = weakref.ref(groups[1][0])
    del groups
    gc.collect()
    assert gone() is None


def test_what_does_not_fit_is_said_in_a_sentence():
    x = torch.randn(1, 2, 20, 8)
    group, tail = pack(x, x, 4), x[:, :, :2]

    def message(*inputs, **options):
        with pytest.raises(ValueError) as caught:
            quantized_decode(*inputs, **options)
        return str(caught.value)

    assert "must hold the 3 queries' own" in message(x[:, :, :3], [group], tail, tail)
    assert "groups[1] must hold keys packed per channel" in message(tail, [group, group[::-1]], tail, tail)
    assert "one number of bits" in message(tail, [(group[0], pack(x, x, 2)[1])], tail, tail)
    assert "key_mask must have shape (R=1, S=22)" in message(
        tail, [group], tail, tail, torch.ones(1, 21, dtype=torch.bool)
    )
    assert "key_mask must be bool" in message(tail, [group], tail, tail, torch.ones(1, 22))
    assert "share one floating dtype" in message(tail.half(), [group], tail, tail)


def test_the_interpreter_agrees_with_the_oracle():
    pytest.importorskip("triton")
    from ahead_of_time import run_interpreted

    run_interpreted("quantized_decode.py", passed=26)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_fit_on_the_gpu(capability):
    pytest.importorskip("triton")
    from ahead_of_time import TYPES, compiled_usage, require_fits

    from lvlm_fix.kernels.fused import quantized_merge, quantized_spans

    types = dict.fromkeys(["numbers", "partial"], "*fp32") | {
        "kinds": "*u8",
        "table": "*i64",
        "start": "*i64",
    }
    types |= dict.fromkeys(["first_span", "spans", "slots", "kinds_row", "rows"], "i32")
    types |= dict.fromkeys(["tail", "columns", "queries"], "i32")
    types |= dict.fromkeys(["scale", "rho", "min_image_attention", "p"], "fp32")
    same = ("query", "tail_key", "tail_value", "out")
    # VAR needs the masks; without it there may be padding or none.
    plain, padded, cured = (False, False), (True, False), (True, True)
    usual = (4, 2)
    cases = list(product(("bfloat16",), (128, 256), [usual], (padded, cured)))
    cases += list(product(("float32",), (128, 256), [(2, 2), (4, 4)], (padded, cured)))
    cases += [
        ("bfloat16", 128, (8, 8), cured),
        ("float32", 80, (8, 8), plain),
        ("float32", 80, (2, 2), plain),
    ]
    cases += [("float16", 128, usual, plain), ("float16", 96, (4, 4), plain), ("float16", 32, (8, 8), plain)]
    cases += [("bfloat16", 128, (2, 2), cured), ("float16", 80, usual, plain), ("float16", 32, usual, cured)]
    for dtype, width, (bits, other), (masked, moved) in cases:
        kinds = types | dict.fromkeys(same, TYPES[dtype])
        tile = quantized_spans.configuration(width, moved, dtype == "float32")
        warps = tile.pop("num_warps")
        shared = {"KEY_HEADS": 8, "WIDTH": width, "MASKED": masked, "MOVED": moved}
        if not masked:
            shared["kinds"] = None
        constants = (
            shared
            | tile
            | {"BITS": bits, "OTHER_BITS": other, "ROWS": quantized_spans.ROWS, "PRECISE": dtype == "float32"}
        )
        usage = compiled_usage(quantized_spans._split, capability, kinds, constants, num_warps=warps)
        require_fits(usage, capability)
    blocks = {
        "CHANNELS": 256,
        "SPAN_BLOCK": quantized_merge.SPAN_BLOCK,
        "TAIL_BLOCK": quantized_merge.TAIL_BLOCK,
    }
    constants = {"KEY_HEADS": 8, "WIDTH": 256, "MASKED": True, "MOVED": True, **blocks}
    kinds = types | dict.fromkeys(same, "*fp32")
    require_fits(
        compiled_usage(quantized_merge._combine, capability, kinds, constants, num_warps=4), capability
    )
