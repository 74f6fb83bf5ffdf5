"""DAMRO's gate: where the model is sure the negative branch is spared, and what it says is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lvlm_fix import DAMRO, VTCCLS, ZipVL, attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
CONTRAST = DAMRO(alpha=1.5, beta=0.1, topk=7)
# From here on the plausibility cut leaves one token only.
EXACT = 1 / (1 + CONTRAST.beta)
OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.3},
}


@pytest.fixture(scope="module")
def prompts(embedded, ask, sample_pictures):
    kitchen, street = sample_pictures["kitchen"], sample_pictures["street"]
    return ask(embedded[1], ([kitchen], "Describe the image."), ([street], "Is there a fork in the image?"))


def told(fix):
    """The gate's entries, without those of the images."""
    return [entry for entry in fix.report["damro"] if "contrasted" in entry]


@torch.inference_mode()
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("beside", [(), (VTCCLS(keep=72),), (ZipVL(),)], ids=["alone", "vtc_cls", "zipvl"])
def test_a_gate_above_the_plausibility_cut_changes_no_answer(embedded, prompts, name, beside):
    model, answers, ran = embedded[0], [], 0
    for method in (CONTRAST, replace(CONTRAST, gate=EXACT)):
        with attach(model, method, *beside) as fix:
            torch.manual_seed(3)
            answers.append(model.generate(**prompts, max_new_tokens=16, **OPTIONS[name]))
            entries = told(fix)
    assert torch.equal(*answers)
    assert [entry["prompt"] for entry in entries] == [0, 1]
    ran = sum(entry["contrasted"] for entry in entries)
    # Otherwise nothing was spared, or nothing contrasted, and the comparison says little.
    assert 0 < ran < sum(entry["tokens"] for entry in entries)


@torch.inference_mode()
def test_it_tells_for_how_many_tokens_the_contrast_ran(embedded, prompts):
    model, gate = embedded[0], 0.8
    one = {name: value[:1] for name, value in prompts.items()}
    with attach(model, replace(CONTRAST, gate=gate)) as fix:
        said = model.generate(**one, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        (entry,) = told(fix)
    # Once more without a cache and without methods, all words given.
    prompt = one["input_ids"].shape[1]
    whole = {"input_ids": said, "attention_mask": torch.ones_like(said), "pixel_values": one["pixel_values"]}
    chances = model(**whole).logits[0, prompt - 1 : -1].softmax(-1).amax(-1)
    assert entry == {"prompt": 0, "tokens": 12, "contrasted": int((chances < gate).sum())}
    assert 0 < entry["contrasted"] < 12


@torch.inference_mode()
@pytest.mark.parametrize(("gate", "passes"), [(None, 1 + 9), (0.0, 1 + 9), (1.0, 1 + 9 + 9)])
def test_a_sure_model_makes_one_pass_a_token(embedded, prompts, gate, passes):
    model = embedded[0]
    rows = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    try:
        with attach(model, replace(CONTRAST, gate=gate)):
            model.generate(**prompts, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    finally:
        hook.remove()
    assert len(rows) == passes
    assert rows[1:] == ([4] * 9 if gate is None else [2] * (passes - 1))


def test_a_gate_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"beta and gate in 0\.\.1"):
        DAMRO(gate=1.5)
