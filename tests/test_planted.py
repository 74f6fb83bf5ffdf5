"""Models in which the right answer is known: outliers and sinks are planted on tokens of our choice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lvlm_fix import DAMRO, VAR, ZipVL, attach
from lvlm_fix.packed_layer import PackedLayer

pytestmark = pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning")

BACKGROUND = [0, 11, 60, 143]
DIM = 40


class Raised(nn.Module):
    """A layer whose output gets something added on chosen tokens."""

    def __init__(self, layer: nn.Module, tokens: list[int], extra: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.tokens, self.extra = layer, tokens, extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x).clone()
        out[:, self.tokens] += self.extra
        return out


@pytest.fixture
def inputs(embedded, ask, sample_pictures):
    return ask(embedded[1], ([sample_pictures["kitchen"]], "What is in the image?"))


@pytest.fixture
def with_sinks(embedded):
    """The embedded LVLM, with four image tokens massive in one dimension of its decoder."""
    model = copy.deepcopy(embedded[0])
    extra = torch.zeros(model.config.text_config.hidden_size)
    extra[DIM] = 200.0
    model.model.multi_modal_projector = Raised(model.model.multi_modal_projector, BACKGROUND, extra)
    return model


@pytest.fixture
def with_outliers(embedded, inputs):
    """The embedded LVLM, whose CLS token looks at four patches in the layer that the projector reads."""
    model = copy.deepcopy(embedded[0])
    layer = [m for m in model.model.vision_tower.modules() if type(m).__name__ == "CLIPEncoderLayer"][-2]
    seen = []
    handle = layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out[0, 0]))
    with torch.inference_mode():
        model.model.get_image_features(pixel_values=inputs["pixel_values"])
    handle.remove()
    towards_cls = 30 * seen[0] / seen[0].norm()
    layer.self_attn.k_proj = Raised(layer.self_attn.k_proj, [1 + token for token in BACKGROUND], towards_cls)
    return model


def test_damro_contrasts_the_planted_outliers(with_outliers, inputs):
    with attach(with_outliers, DAMRO(topk=4)) as fix, torch.inference_mode():
        with_outliers(**inputs)
        assert fix.report["damro"][0]["outliers"] == BACKGROUND
    with attach(with_outliers, DAMRO(topk=6)) as fix, torch.inference_mode():
        with_outliers(**inputs)
        assert set(BACKGROUND) < set(fix.report["damro"][0]["outliers"])


def test_the_model_without_them_has_other_outliers(embedded, inputs):
    model, _ = embedded
    with attach(model, DAMRO(topk=4)) as fix, torch.inference_mode():
        model(**inputs)
        assert not set(BACKGROUND) & set(fix.report["damro"][0]["outliers"])


def test_var_finds_the_planted_sinks_in_every_layer(with_sinks, inputs):
    with attach(with_sinks, VAR(sink_dims=(DIM,))) as fix, torch.inference_mode():
        with_sinks(**inputs)
        report = fix.report["var"][0]
    assert report["layers"] == [2, 3, 4, 5, 6]
    assert report["image_sinks"] == [BACKGROUND] * 5


class Watch:
    """The attention of the prompt's last token in one layer of a model that runs with eager attention."""

    def __init__(self, model, inputs, layer):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.inference_mode():
            self.weights = eager(**inputs, output_attentions=True).attentions[layer][0, :, -1]


def test_var_moves_the_planted_sinks_weight_to_the_image(with_sinks, inputs):
    """The first changed layer sees what the plain model sees there, so its output is known from plain attention."""
    method = VAR(p=0.6, rho=0.0, min_image_attention=0.0, first_layer=2, sink_dims=(DIM,))
    layer = with_sinks.model.language_model.layers[2].self_attn
    outputs, values = [], []
    layer.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0, -1]))
    layer.v_proj.register_forward_hook(lambda module, args, out: values.append(out[0]))
    with torch.inference_mode():
        with_sinks(**inputs)
        with attach(with_sinks, method):
            with_sinks(**inputs)
        weights = Watch(with_sinks, inputs, 2).weights
    image = (inputs["input_ids"][0] == with_sinks.config.image_token_id).nonzero()[:, 0]
    sinks = image[BACKGROUND]
    others = torch.tensor([column for column in image.tolist() if column not in sinks.tolist()])
    moved = weights.clone()
    moved[:, sinks] *= 0.4
    moved[:, others] *= 1 + 0.6 * weights[:, sinks].sum(1, True) / weights[:, others].sum(1, True)
    torch.testing.assert_close(moved.sum(1), torch.ones(len(moved)))
    by_head = values[0].view(len(values[0]), len(weights), -1).transpose(0, 1)

    def attended(some):
        return (some[:, None] @ by_head)[:, 0].flatten()

    torch.testing.assert_close(outputs[0], attended(weights), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[1], attended(moved), rtol=0, atol=1e-5)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-4


@pytest.mark.parametrize("evict", [False, True], ids=["two bits", "evict"])
def test_zipvls_cache_really_holds_fewer_bytes(embedded, inputs, evict):
    model, _ = embedded
    method = ZipVL(tau=0.6, recent=16, random=32, window=8, evict=evict)
    plain = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.past_key_values.layers)
    with attach(model, method) as fix:
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        entry = fix.report["zipvl"][0]
    layers = output.past_key_values.layers
    assert all(isinstance(layer, PackedLayer) for layer in layers)
    assert output.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    assert sum(layer.full_nbytes for layer in layers) == whole
    held = sum(tensor_bytes(vars(layer)) for layer in layers)
    assert held == sum(layer.nbytes for layer in layers)
    assert held < (0.2 if evict else 0.25) * whole
    assert entry["bytes"] < held
    assert len(entry["ratios"]) == len(layers)
    assert len(set(entry["ratios"])) > 1
    assert all(0.1 < ratio < 0.7 for ratio in entry["ratios"])


def tensor_bytes(value) -> int:
    """Bytes of the memory behind all tensors that a value holds; what is behind several counts once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in storages_of(value)}
    return sum(storages.values())


def storages_of(value) -> list[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [storage for part in value for storage in storages_of(part)]
    return storages_of(vars(value)) if hasattr(value, "__dict__") else []
