"""Triton's quantized_decode in the interpreter, against float64; started by `test_fused_quantized_decode.py`."""

from dataclasses import replace

import pytest
import torch
from on_device import TOLERANCE

from lvlm_fix import functional
from lvlm_fix.kernels import Redistribution, pack
from lvlm_fix.kernels.fused.quantized_decode import decode_by_kinds, fused_quantized_decode
from lvlm_fix.kernels.fused.quantized_slots import slot_kinds

VAR = {"rho": 0.3, "min_image_attention": 0.1, "p": 0.6}
both_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def doubled(q):
    held = {name: getattr(q, name) for name in ("scale", "zero_point", "channel_scale")}
    return replace(q, **{name: x.double() for name, x in held.items() if x is not None})


def inputs(rows, heads, shared, queries, width, groups, dtype, tail=9):
    """Query, packed groups of (tokens, bits), and the tail."""

    def drawn(count):
        return torch.randn(2, rows, shared, count, width).to(dtype).unbind()

    packed = [pack(*drawn(tokens), bits) for tokens, bits in groups]
    return torch.randn(rows, heads, queries, width).to(dtype), packed, *drawn(tail)


def assert_agrees(query, groups, tail_key, tail_value, key_mask=None, moved=None, scale=None):
    out = fused_quantized_decode(query, groups, tail_key, tail_value, key_mask, moved, scale)
    wide = [(doubled(keys), doubled(values)) for keys, values in groups]
    tails = tail_key.double(), tail_value.double()
    expected = functional.quantized_decode(
        query.double(), wide, *tails, key_mask, redistribution=moved, scale=scale
    )
    assert out.dtype == query.dtype and out.shape == query.shape
    assert out.isfinite().all()
    size = expected.norm()
    assert (out.double() - expected).norm() <= TOLERANCE[query.dtype] * (size if size > 0 else 1)
    return out


@both_dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "shared", "queries", "width", "groups"),
    [
        pytest.param(1, 1, 1, 1, 32, [], id="tail only"),
        pytest.param(1, 2, 1, 1, 32, [(1, 2)], id="one packed token"),
        pytest.param(2, 8, 2, 1, 64, [(40, 4), (131, 2), (64, 4)], id="three groups, GQA"),
        pytest.param(1, 4, 4, 3, 80, [(5, 4), (64, 2)], id="three queries, odd width"),
        pytest.param(1, 34, 2, 1, 32, [(20, 8)], id="more heads than rows of a program"),
        pytest.param(1, 1, 1, 1, 128, [(1100, 2)], id="several spans"),
        pytest.param(1, 1, 1, 1, 256, [(70, 4)], id="widest head"),
    ],
)
def test_the_kernel_agrees_with_its_oracle(dtype, rows, heads, shared, queries, width, groups):
    given = inputs(rows, heads, shared, queries, width, groups, dtype)
    slots = sum(tokens for tokens, _ in groups) + 9
    assert_agrees(*given, scale=0.2)
    masks = torch.rand(3, rows, slots)
    real, image, sink = masks[0] < 0.8, masks[1] < 0.6, masks[2] < 0.2
    assert_agrees(*given, real)
    assert_agrees(*given, real, Redistribution(image, sink, 0, **VAR))


@pytest.mark.parametrize(
    ("image", "sink"),
    [
        pytest.param((0, 0), (0, 3), id="no image"),
        pytest.param((0, 50), (0, 2), id="image at the start"),
        pytest.param((60, 80), (79, 80), id="image at the end"),
        pytest.param((5, 60), (0, 80), id="all sinks"),
        pytest.param((5, 60), (0, 0), id="no sinks"),
    ],
)
def test_wherever_image_and_sinks_are(image, sink):
    given = inputs(2, 4, 2, 2, 32, [(30, 4), (41, 2)], torch.float32)
    masks = torch.zeros(2, 2, 80, dtype=torch.bool)
    masks[0, :, slice(*image)], masks[1, :, slice(*sink)] = True, True
    # The first row's last query may be changed, its first may not; no query of the second row may.
    moved = Redistribution(*masks, torch.tensor([79, 80]), **VAR)
    out = assert_agrees(*given, moved=moved)
    plain = assert_agrees(*given)
    torch.testing.assert_close(out[0, :, 0], plain[0, :, 0])
    torch.testing.assert_close(out[1], plain[1])


@both_dtypes
def test_a_row_that_sees_nothing_gives_zeros_and_padding_is_not_read(dtype):
    query, groups, tail_key, tail_value = inputs(2, 4, 2, 1, 32, [(30, 4), (41, 2)], dtype)
    real = torch.ones(2, 80, dtype=torch.bool)
    real[0], real[1, :76] = False, False
    poisoned = tail_key.clone(), tail_value.clone()
    for x in poisoned:
        x[0], x[1, :, :5] = torch.nan, torch.nan
    masks = torch.rand(2, 2, 80) < 0.5
    for moved in (None, Redistribution(*masks, 0, **VAR)):
        out = assert_agrees(query, groups, tail_key, tail_value, real, moved)
        assert not out[0].any()
        assert torch.equal(fused_quantized_decode(query, groups, *poisoned, real, moved, None), out)


@both_dtypes
def test_huge_logits(dtype):
    query, groups, tail_key, tail_value = inputs(1, 2, 2, 1, 64, [(90, 4), (33, 2)], dtype)
    out = fused_quantized_decode(query * 100, groups, tail_key, tail_value, None, None, None)
    assert out.isfinite().all()
    # One token draws a head's whole attention.
    tail_key[:, :, 3] = 50 * query[:, :, 0].sign()
    assert_agrees(query.abs() * query.sign() * 4, groups, tail_key, tail_value)


@pytest.mark.parametrize(
    "laid_out",
    [
        pytest.param(
            lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, :9], id="room behind"
        ),
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads inside"),
        pytest.param(lambda x: torch.cat([x, x], dim=3)[..., :32], id="wider heads"),
    ],
)
def test_wherever_the_tail_lies_and_masks_may_be_wider(laid_out):
    query, groups, *tail = inputs(2, 4, 2, 1, 32, [(30, 4), (41, 2)], torch.float32)
    moved = [laid_out(x) for x in tail]
    assert_agrees(query, groups, *moved)
    real, image, sink = torch.rand(3, 2, 200) < torch.tensor([0.8, 0.6, 0.2])[:, None, None]
    wide = Redistribution(image, sink, 0, **VAR)
    cut = Redistribution(image[:, :80], sink[:, :80], 0, **VAR)
    expected = fused_quantized_decode(query, groups, *tail, real[:, :80], cut, None)
    kinds = slot_kinds(real, wide, 2, 200, query.device)
    assert torch.equal(decode_by_kinds(query, groups, *moved, *kinds, wide, None), expected)
