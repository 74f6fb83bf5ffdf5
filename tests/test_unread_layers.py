"""Tower layers above the one that features are taken from are not run under attach, unless somebody looks."""

from __future__ import annotations

import pytest
import torch

from lvlm_fix import DAMRO, VAR, VTCCLS, attach, encoding
from lvlm_fix.encoding import ImageEncoder
from lvlm_fix.models import family_of

pytestmark = pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning")


@pytest.fixture
def ran(llava):
    """Numbers of the tower's layers whose feed-forward part ran, in order; emptied by the test itself."""
    numbers, layers = [], llava[0].base_model.vision_tower.encoder.layers
    handles = [
        layer.mlp.register_forward_hook(lambda *_, number=number: numbers.append(number))
        for number, layer in enumerate(layers)
    ]
    yield numbers
    for handle in handles:
        handle.remove()


@pytest.fixture
def pixels(llava):
    size = llava[0].config.vision_config.image_size
    return torch.randn(2, 3, size, size)


def features(model, pixels, **options):
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels, **options)


@pytest.mark.parametrize("fix", [DAMRO(), VAR(sink_dims=(1, 2)), VTCCLS(keep=9)], ids=lambda fix: fix.name)
def test_features_are_the_same_bit_for_bit_without_the_last_layer(llava, ran, pixels, fix):
    model, _ = llava
    plain, count = features(model, pixels), model.config.vision_config.num_hidden_layers
    assert ran == list(range(count))
    ran.clear()
    with attach(model, fix):
        seen = features(model, pixels)
    assert ran == list(range(count - 1))
    assert all(map(torch.equal, plain.pooler_output, seen.pooler_output))
    # transformers 5.17 keeps the hidden states that it was not asked for, 5.24 does not.
    assert len(seen.hidden_states) == count + 1 and seen.hidden_states[-1] is None
    assert torch.equal(seen.hidden_states[-2], plain.hidden_states[-2])
    assert seen.last_hidden_state is None and seen["pooler_output"] is seen.pooler_output


@pytest.mark.parametrize(
    "options",
    [{"output_hidden_states": True}, {"output_attentions": True}, {"vision_feature_layer": -1}],
    ids=lambda options: next(iter(options)),
)
def test_who_asks_for_more_gets_all_of_the_tower(llava, ran, pixels, options):
    model, _ = llava
    model.base_model.vision_tower.set_attn_implementation("eager")  # the only one that has attention to show
    try:
        plain = features(model, pixels, **options)
        ran.clear()
        with attach(model, VAR(sink_dims=(1, 2))):
            seen = features(model, pixels, **options)
    finally:
        model.base_model.vision_tower.set_attn_implementation("sdpa")
    assert len(ran) == model.config.vision_config.num_hidden_layers
    assert torch.equal(seen.last_hidden_state, plain.last_hidden_state)
    assert all(map(torch.equal, plain.pooler_output, seen.pooler_output))


def test_the_tower_on_its_own_and_after_an_error_runs_all_layers(llava, ran, pixels):
    model, _ = llava
    tower, count = model.base_model.vision_tower, model.config.vision_config.num_hidden_layers
    with attach(model, VAR(sink_dims=(1, 2))):
        with pytest.raises(AttributeError):
            features(model, "no picture")
        ran.clear()
        tower(pixels)
    assert len(ran) == count
    assert not any("forward" in vars(layer) for layer in tower.encoder.layers)


def test_what_stands_over_a_layer_stays_there(llava, pixels):
    model, _ = llava
    layer = model.base_model.vision_tower.encoder.layers[-1]
    layer.forward = own = layer.forward
    try:
        with attach(model, VAR(sink_dims=(1, 2))):
            features(model, pixels)
        assert layer.forward is own
    finally:
        del layer.forward


def test_a_layer_that_a_method_reads_is_run(embedded):
    """VTC-CLS leaves the last layer out, so only a tower that features are taken early from has one to read."""
    model, _ = embedded
    family, taken = family_of(model), model.config.vision_feature_layer
    model.config.vision_feature_layer = 3
    try:
        assert len(family.unread_layers(model)) == 5
        for fix, left in ((VTCCLS(keep=9), 0), (DAMRO(), 5), (VTCCLS(keep=9, start_layer=0), 0)):
            with attach(model, fix) as handle:
                assert len(handle.pipeline.encoder.unread) == left
    finally:
        model.config.vision_feature_layer = taken


def test_layers_that_are_joined_are_all_run(embedded):
    model, _ = embedded
    taken = model.config.vision_feature_layer
    try:
        for several, left in (([1, -2], 1), ([-3, -4], 2), ([2, -1], 0), ([0, 0], 8)):
            model.config.vision_feature_layer = several
            assert len(family_of(model).unread_layers(model)) == left
    finally:
        model.config.vision_feature_layer = taken


def test_pictures_repeated_for_beams_leave_what_was_encoded_whole(monkeypatch, llava, sample_pictures, ask):
    """As transformers before 5.24 hand them on: the encoder's own result must not be used up by dealing them out."""
    model, processor = llava
    inputs = ask(processor, ([sample_pictures["kitchen"], sample_pictures["street"]], "What is it?"))
    beams = {"input_ids": inputs["input_ids"].repeat(2, 1)}
    beams["pixel_values"] = inputs["pixel_values"].repeat_interleave(2, 0)
    results, encode = [], ImageEncoder.get_image_features

    def watched(self, *args, **kwargs):
        results.append(encode(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(encoding, "REPEATS_PICTURES", True)
    monkeypatch.setattr(ImageEncoder, "get_image_features", watched)
    with attach(model, VTCCLS(keep=9, start_layer=-2)), torch.no_grad():
        model(**beams)
    assert [len(result.pooler_output) for result in results] == [2]
