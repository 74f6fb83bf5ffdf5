"""Attention of one new token is the oracle's, whatever is cached of the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lvlm_fix import DAMRO, VAR, attach, decoding
from lvlm_fix.decoding import ROOM, Slots, attend
from lvlm_fix.dispatch import without_plans
from lvlm_fix.functional import visual_attention
from lvlm_fix.kernels import Redistribution

PARAMETERS = {"rho": 0.3, "min_image_attention": 0.01, "p": 0.6}


def masks(rows: int, prompt: int, hidden: bool, sinks: bool = True):
    real = torch.ones(rows, prompt, dtype=torch.bool)
    if hidden:
        real[0, :3] = False
    image = torch.zeros_like(real)
    image[:, 2:9] = True
    sink = torch.zeros_like(real)
    if sinks:
        # One of the text and one of the image; the last row has none of the image and is left alone.
        sink[:, 10] = True
        sink[:-1, 5] = True
    return real, image, sink


@pytest.mark.parametrize("after", [1, 7, ROOM, ROOM + 3])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_one_token_is_the_oracles(after, hidden, shared):
    rows, heads, prompt, width = 3, 4, 14, 8
    real, image, sink = masks(rows, prompt, hidden)
    slots = Slots(real, image, sink, torch.float64)
    query = torch.randn(rows, heads, 1, width, dtype=torch.float64) * 2
    key, value = torch.randn(2, rows, shared, prompt + after, width, dtype=torch.float64)
    seen, shown, sunk = slots.cut(prompt + after)
    moved = Redistribution(shown, sunk, torch.zeros(rows, dtype=torch.long), **PARAMETERS)
    expected = visual_attention(query, key, value, shown, sunk, first_query=0, key_mask=seen, **PARAMETERS)
    torch.testing.assert_close(attend(query, key, value, slots, moved, None), expected)
    idle = visual_attention(
        query, key, value, shown, sunk, first_query=0, key_mask=seen, **PARAMETERS | {"p": 0.0}
    )
    torch.testing.assert_close(attend(query, key, value, slots, None, None), idle)
    # Otherwise nothing was there to move, and the first comparison says nothing.
    assert not torch.equal(expected[:-1], idle[:-1])
    torch.testing.assert_close(expected[-1], idle[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_halves_are_the_oracles_to_their_precision(dtype, hidden):
    rows, prompt, after = 3, 14, ROOM + 3
    slots = Slots(*masks(rows, prompt, hidden), dtype)
    query, key, value = torch.randn(rows, 4, 1, 8), *torch.randn(2, rows, 2, prompt + after, 8)
    query, key, value = (x.to(dtype) for x in (query * 2, key, value))
    seen, shown, sunk = slots.cut(prompt + after)
    moved = Redistribution(shown, sunk, torch.zeros(rows, dtype=torch.long), **PARAMETERS)
    for given in (moved, None):
        parameters = PARAMETERS if given else PARAMETERS | {"p": 0.0}
        wide = (x.double() for x in (query, key, value))
        expected = visual_attention(*wide, shown, sunk, first_query=0, key_mask=seen, **parameters)
        found = attend(query, key, value, slots, given, None)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


def test_the_kernel_gets_masks_that_reach_beyond_the_keys():
    pytest.importorskip("triton")
    from ahead_of_time import run_interpreted

    run_interpreted("decoding.py", passed=4)


def test_new_keys_are_real_text():
    real, image, sink = masks(2, 14, hidden=True)
    slots = Slots(real, image, sink, torch.float32)
    seen, shown, sunk = slots.cut(14 + 2 * ROOM)
    assert seen[:, 14:].all() and not shown[:, 14:].any() and not sunk[:, 14:].any()
    assert (
        torch.equal(seen[:, :14], real)
        and torch.equal(shown[:, :14], image)
        and torch.equal(sunk[:, :14], sink)
    )


def test_without_hidden_keys_no_mask_is_made():
    real, image, _ = masks(2, 14, hidden=False)
    assert Slots(real, image, None, torch.float32).bias is None


@dataclass(frozen=True)
class Counting(VAR):
    """VAR that says when it is asked how to decode."""

    asked: ClassVar[list[int]] = []

    def attention(self, step):
        if step.hidden_states is None:
            self.asked.append(step.layer)
        return super().attention(step)


@pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning")
@pytest.mark.parametrize("beside", [(), (DAMRO(),)], ids=["alone", "with padding"])
def test_steady_methods_are_asked_once_a_layer(random_llava, monkeypatch, ask, sample_pictures, beside):
    monkeypatch.setattr(decoding, "ROOM", 4)  # so that masks are written anew on the way
    model, processor = random_llava
    inputs = ask(processor, ([sample_pictures["kitchen"]], "What is in the image?"))
    method = Counting(p=0.9, rho=0.05, min_image_attention=0.05, tau=9.0, first_layer=1, sink_dims=(39, 20))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": 1}
    said, asked = {}, {}
    for steady in (True, False):
        monkeypatch.setattr(Counting, "steady", steady)
        Counting.asked.clear()
        with attach(model, method, *beside):
            out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
        said[steady], asked[steady] = torch.stack(out.logits), Counting.asked.copy()
    assert torch.equal(said[True], said[False])
    layers = list(range(model.config.text_config.num_hidden_layers))
    assert asked == {True: layers, False: layers * 11}
    plain = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    assert not torch.allclose(said[True], torch.stack(plain.logits), atol=1e-3)


def test_a_step_on_a_gpu_is_not_planned_by_cudnn_and_leaves_it_as_it_was():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    assert enabled()
    with without_plans(torch.device("cpu")):
        assert enabled()
    with pytest.raises(KeyError), without_plans(torch.device("cuda")):
        assert not enabled()
        raise KeyError
    assert enabled()
    nothing_else = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    with nothing_else, without_plans(torch.device("cuda")):
        assert enabled()
