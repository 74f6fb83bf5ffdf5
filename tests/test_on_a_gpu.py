"""What is said on a GPU, by its kernels, is what is said on a processor, which the other tests hold to the slow oracle.

LVLM_FIX_GPU=1 CUDA_VISIBLE_DEVICES=0 pytest tests/test_on_a_gpu.py tests/test_replayed_*.py
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from on_device import GPU
from test_compiling import FIXES, prompts, say  # noqa: F401

from lvlm_fix.kernels import last_used

if not GPU:
    pytest.skip("needs a GPU, and LVLM_FIX_GPU=1", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
RAN = {"var": "visual_attention", "zipvl": "quantized_decode", "damro": "contrast", "vtc_cls": "cls_row"}
# With a least length DAMRO's cut may leave a beam no word at all, and which of none comes first is the device's choice.
OPTIONS = {"greedy": {}, "beams": {"num_beams": 3, "min_new_tokens": 0}}
# A rounding may choose another of ZipVL's codes.
TOLERANCE = {"zipvl": 5e-2, "zipvl evict": 5e-2, "all": 5e-2}


@pytest.fixture(scope="module")
def on_gpu(embedded):
    return deepcopy(embedded[0]).cuda()


@torch.inference_mode()
@pytest.mark.parametrize("compile", [False, True], ids=["queued", "replayed"])
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", FIXES)
def test_words_and_logits_are_those_of_the_processor(embedded, on_gpu, prompts, name, how, compile):  # noqa: F811
    there = say(embedded[0], FIXES[name], prompts, False, **OPTIONS[how])
    here = say(on_gpu, FIXES[name], deepcopy(prompts).to("cuda"), compile, **OPTIONS[how])
    assert last_used()[RAN.get(name.split()[0], "contrast")] == "triton"
    assert torch.equal(here.sequences.cpu(), there.sequences)
    if how == "beams":
        return  # nor are the logits of such a beam anything to compare
    for ours, theirs in zip(here.logits, there.logits, strict=True):
        kept = theirs.isfinite()
        assert torch.equal(ours.isfinite().cpu(), kept)
        torch.testing.assert_close(ours.cpu()[kept], theirs[kept], rtol=0, atol=TOLERANCE.get(name, 2e-3))


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXES)
def test_halves_go_all_the_way(on_gpu, prompts, name):  # noqa: F811
    half = deepcopy(on_gpu).half()
    inputs = deepcopy(prompts).to("cuda")
    inputs["pixel_values"] = inputs["pixel_values"].half()
    queued, replayed = (say(half, FIXES[name], inputs, compile) for compile in (False, True))
    assert torch.equal(queued.sequences, replayed.sequences)
    assert all(x.isfinite().any(-1).all() and not x.isnan().any() for x in queued.logits)
