"""The tower's CLS rows: however many layers wait for each other, and however the tower is called."""

from __future__ import annotations

import pytest
import torch

from lvlm_fix import functional, recorder
from lvlm_fix.methods import DAMRO, VTCCLS
from lvlm_fix.models import family_of
from lvlm_fix.recorder import TowerRecorder


def projections(tower, pixels, layers):
    """Of each layer the outputs of its query and key projections, (B, N + 1, C)."""
    seen = {(layer, name): [] for layer in range(len(layers)) for name in ("q_proj", "k_proj")}
    handles = [
        getattr(layers[layer], name).register_forward_hook(lambda _, __, out, of=of: of.append(out))
        for (layer, name), of in seen.items()
    ]
    tower(pixels)
    for handle in handles:
        handle.remove()
    return [[seen[layer, name][0] for name in ("q_proj", "k_proj")] for layer in range(len(layers))]


@pytest.mark.parametrize("waiting", [0, recorder.WAITING, 2**40], ids=["none", "some", "all"])
@pytest.mark.parametrize(
    "methods",
    [(DAMRO(),), (VTCCLS(start_layer=-3),), (VTCCLS(start_layer=-3), DAMRO())],
    ids=["damro", "vtc_cls", "both"],
)
@pytest.mark.parametrize("parts", [[1, 2], [1, 1, 1]], ids=["unlike", "alike"])
def test_a_tower_called_in_parts_gives_the_scores_of_full_attention(
    embedded, monkeypatch, waiting, methods, parts
):
    monkeypatch.setattr(recorder, "WAITING", waiting)
    model, _ = embedded
    family, tower = family_of(model), model.base_model.vision_tower
    layers, size = family.tower_attention(model), model.config.vision_config.image_size
    torch.manual_seed(0)
    pixels, heads = torch.randn(3, 3, size, size), model.config.vision_config.num_attention_heads
    feature, last = family.feature_layer(model), len(layers)
    read = {layer for method in methods for layer in method.scored_layers(last)}
    with torch.no_grad():
        whole = projections(tower, pixels, layers)
        watching = TowerRecorder(model, family, methods)
        watching.install()
        try:
            for part in pixels.split(parts):
                tower(part)
            crops = watching.crops()
        finally:
            watching.remove()
    assert len(crops) == 3
    for crop, scores in enumerate(crops):
        for layer in range(last):
            own = functional.cls_scores(*(x[crop : crop + 1].double() for x in whole[layer]), heads)[0]
            if layer in read:
                torch.testing.assert_close(scores[layer].double(), own, atol=1e-6, rtol=1e-4)
            else:
                assert scores[layer].isnan().all()
        own = functional.cls_scores(*(x[crop : crop + 1].double() for x in whole[feature]), 1)[0]
        if methods == (VTCCLS(start_layer=-3),):
            assert scores[last].isnan().all()
        else:
            torch.testing.assert_close(scores[last].double(), own, atol=1e-6, rtol=1e-4)


def test_a_tower_that_was_not_seen_whole_is_told(embedded):
    model, _ = embedded
    watching = TowerRecorder(model, family_of(model), (DAMRO(),))
    with pytest.raises(RuntimeError, match="layers were not all seen"):
        watching.crops()


@pytest.mark.parametrize(
    "methods", [(DAMRO(),), (VTCCLS(),), (VTCCLS(), DAMRO())], ids=["damro", "vtc", "both"]
)
def test_scores_have_no_gradient_and_the_tower_keeps_its_own(embedded, methods):
    model, _ = embedded
    tower, size = model.base_model.vision_tower, model.config.vision_config.image_size
    watching, found = TowerRecorder(model, family_of(model), methods), []
    pixels = torch.rand(2, 3, size, size)
    watching.install()
    try:
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                assert tower(pixels).last_hidden_state.requires_grad == (mode is torch.enable_grad)
                found.append(torch.stack(watching.crops()))
    finally:
        watching.remove()
    assert not found[0].requires_grad
    torch.testing.assert_close(*found, equal_nan=True, rtol=0, atol=0)
