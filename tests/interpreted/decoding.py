"""Decoding hands the kernel masks that reach beyond the last key: what stands there counts for nothing."""

import pytest
import torch
from on_device import GPU, TOLERANCE

from lvlm_fix import decoding
from lvlm_fix.decoding import ROOM, Slots, attend
from lvlm_fix.functional import visual_attention
from lvlm_fix.kernels import Redistribution
from lvlm_fix.kernels.fused import visual_front
from lvlm_fix.kernels.fused.visual_decode import visual_decode

PARAMETERS = {"rho": 0.3, "min_image_attention": 0.01, "p": 0.6}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Without a GPU, the kernel is called as the front would call it on one."""
    if not GPU:
        monkeypatch.setattr(decoding, "fits_attention", lambda query: True)
        monkeypatch.setattr(
            visual_front, "fused_attention", lambda *given: visual_decode(*given, multiprocessors=2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_one_token_after_another_is_the_oracles(dtype, hidden):
    rows, heads, shared, prompt, width = 3, 4, 2, 14, 16
    real = torch.ones(rows, prompt, dtype=torch.bool)
    real[0, :3] = not hidden
    image, sink = torch.zeros_like(real), torch.zeros_like(real)
    image[:, 2:9] = True
    # One of the text and one of the image; the last row has none of the image and is left alone.
    sink[:, 10], sink[:-1, 5] = True, True
    slots, start = Slots(real, image, sink, dtype), torch.zeros(rows, dtype=torch.long)
    _, shown, sunk = slots.cut(prompt)
    moved = Redistribution(shown, sunk, start, **PARAMETERS)
    for after in (1, 2, ROOM, ROOM + 3):
        query = (torch.randn(rows, heads, 1, width) * 2).to(dtype)
        # A view of a longer cache, as it grows: the kernel must not read on.
        held = torch.full((2, rows, shared, prompt + after + 5, width), torch.nan, dtype=dtype)
        held[:, :, :, : prompt + after] = torch.randn(2, rows, shared, prompt + after, width)
        key, value = held[:, :, :, : prompt + after]
        seen, shown, sunk = slots.cut(prompt + after)
        wide = (x.double() for x in (query, key, value))
        expected = visual_attention(*wide, shown, sunk, first_query=0, key_mask=seen, **PARAMETERS)
        found = attend(query, key, value, slots, moved, None)
        torch.testing.assert_close(
            found.double(), expected, atol=TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype]
        )
