"""Sink dimensions: found where massive activations were planted, and nowhere else; kept from run to run."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_fix import VAR, SinkDims, UnsupportedModelError, find_sink_dims, load
from lvlm_fix.sinks import FIRST_LAYER, cache_file, massive_dims, threshold_at

BOS = 1


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(llava):
    return copy.deepcopy(llava[0])


def plant(model, dims: dict[int, float], rows=BOS):
    """Give tokens massive activations: RMSNorm and the residual stream carry them through every layer."""
    with torch.no_grad():
        for dim, value in dims.items():
            model.get_input_embeddings().weight[rows, dim] = value
    return model


def plant_in_mlp(model, dim: int, value: float):
    """The same as trained models do it: an early MLP writes it, at BOS only."""
    mlp = model.get_decoder().layers[1].mlp
    inner = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda module, given: inner.append(given[0]))
    ids = torch.randint(4, model.get_input_embeddings().weight.shape[0], (8, 24))
    ids[:, 0] = BOS
    with torch.no_grad():
        model.get_decoder()(input_ids=ids, use_cache=False)
        handle.remove()
        bos, others = inner[0][0, 0], inner[0][:, 1:].flatten(0, 1)
        # The direction of BOS that the other tokens have none of, as far as that goes.
        span = torch.linalg.svd(others.double(), full_matrices=False)[2][:64]
        own = bos.double() - span.T @ (span @ bos.double())
        mlp.down_proj.weight[dim] += (own * value / own.dot(bos.double())).float()
    return model


def test_a_model_without_massive_activations_has_none(model):
    found = find_sink_dims(model)
    assert found.dims == () and found.values == () and found.source == "measured"
    assert found.width == len(found.profile) == model.config.text_config.hidden_size


@pytest.mark.parametrize("dims", [{17: 900.0}, {5: -700.0, 40: 500.0}, {3: 600.0, 30: 600.0, 60: -600.0}])
def test_planted_dimensions_are_found_and_no_others(model, dims):
    found = find_sink_dims(plant(model, dims))
    assert found.dims == tuple(sorted(dims))
    assert min(found.values) > found.threshold


def test_what_an_early_mlp_writes_is_found(embedded):
    model = copy.deepcopy(embedded[0])
    assert find_sink_dims(plant_in_mlp(model, 77, 2000.0)).dims == (77,)


def test_a_dimension_that_is_massive_in_every_token_is_no_sink(model):
    assert find_sink_dims(plant(model, {17: 900.0}, rows=slice(None))).dims == ()


def test_values_are_those_of_the_hidden_states_at_bos(embedded):
    model = plant(copy.deepcopy(embedded[0]), {17: 900.0})
    found = find_sink_dims(model)
    ids = torch.tensor([[BOS, 50, 60, 70]])
    with torch.inference_mode():
        states = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
    seen = [states[layer][0, 0] for layer in range(FIRST_LAYER, model.config.text_config.num_hidden_layers)]
    # BOS sees only itself, so what follows it does not matter.
    profile = torch.stack([x.abs() / x.pow(2).mean().sqrt() for x in seen]).median(0).values
    assert found.values[0] == pytest.approx(float(profile[17]), abs=1e-3)
    np.testing.assert_allclose(found.profile, profile, atol=1e-3)


@pytest.mark.parametrize(("width", "tau"), [(4096, 20.0), (5120, 20.0), (1024, 10.0), (256, 5.0)])
def test_the_threshold_suits_the_width(width, tau):
    assert threshold_at(width) == tau == VAR().threshold(width)


@pytest.mark.parametrize(
    ("normalised", "medians", "others"), [(4.9, 1000, 1000), (9.0, 90, 1000), (9.0, 1000, 4)]
)
def test_all_three_marks_of_a_massive_activation_are_needed(normalised, medians, others):
    def found(*last):
        return massive_dims(*(torch.tensor([0.5, value]) for value in last), 5.0)

    assert found(9.0, 1000.0, 1000.0) == [1]
    assert found(normalised, float(medians), float(others)) == []


def llama_2(**changes):
    """A LLaVA on the meta device: shapes, and no weights that could be run."""
    text = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32064}
    text |= {"num_attention_heads": 32, "max_position_embeddings": 4096}
    config = LlavaConfig(text_config=LlamaConfig(**text | changes), vision_feature_layer=-2)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def test_llama_2_has_the_papers():
    found = find_sink_dims(llama_2())
    assert (found.dims, found.source, found.threshold) == ((1415, 2533), "paper", 20.0)
    large = {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824}
    assert find_sink_dims(llama_2(num_attention_heads=40, **large)).dims == (2100, 4743)
    assert VAR().prepare(llama_2()).sink_dims == (1415, 2533)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 14336},
        {"vocab_size": 128256},
        {"max_position_embeddings": 2048},
        {"num_hidden_layers": 30},
    ],
    ids=["Mistral", "Llama-3", "LLaMA-1", "fewer layers"],
)
def test_other_decoders_of_that_width_are_measured(changes):
    with pytest.raises((NotImplementedError, RuntimeError)):  # for they have no weights here
        find_sink_dims(llama_2(**changes))


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.get_decoder().layers[0].eval()
    before = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    find_sink_dims(model)
    assert [(module.training, len(module._forward_pre_hooks)) for module in model.modules()] == before
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def test_a_training_model_is_measured_in_evaluation_mode(model):
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.9
    assert find_sink_dims(model.train()).profile == find_sink_dims(model.eval(), use_cache=False).profile


def test_var_takes_them(embedded):
    model = plant(copy.deepcopy(embedded[0]), {17: 900.0})
    assert VAR().prepare(model).sink_dims == (17,)
    assert VAR(sink_dims=(4,)).prepare(model).sink_dims == (4,)


def test_what_is_no_lvlm_is_refused():
    with pytest.raises(UnsupportedModelError, match="supported are"):
        find_sink_dims(torch.nn.Linear(2, 2))


# -- the cache


def runs(model) -> list[int]:
    """Grows by one entry each time the decoder runs."""
    seen: list[int] = []
    model.get_decoder().register_forward_pre_hook(lambda module, given: seen.append(1))
    return seen


def test_the_same_model_is_measured_once(model):
    seen = runs(model)
    first, again = find_sink_dims(model), find_sink_dims(model)
    assert len(seen) == 1 and again.source == "cached" and again.dims == first.dims
    assert find_sink_dims(model, use_cache=False).source == "measured" and len(seen) == 2


def test_another_process_reads_the_file(embedded):
    model = plant(copy.deepcopy(embedded[0]), {17: 900.0})
    first = find_sink_dims(model)
    other = copy.deepcopy(model)  # nothing is in memory for this object
    seen = runs(other)
    found = find_sink_dims(other)
    assert (found.dims, found.values, found.threshold) == (first.dims, first.values, first.threshold)
    assert found.source == "cached" and not seen


def test_two_models_of_one_name_do_not_share(embedded, random_llava):
    models = [copy.deepcopy(one) for one in (embedded[0], embedded[0], random_llava[0])]
    plant(models[1], {17: 900.0})
    assert models[0].name_or_path == models[1].name_or_path
    assert [find_sink_dims(one).dims for one in models] == [(), (17,), ()]
    again = [find_sink_dims(copy.deepcopy(one)) for one in models]
    assert [one.dims for one in again] == [(), (17,), ()]
    assert {one.source for one in again} == {"cached"}


def test_a_model_that_changed_is_measured_again(embedded):
    model = copy.deepcopy(embedded[0])
    assert find_sink_dims(model).dims == ()
    assert find_sink_dims(plant(model, {17: 900.0})).dims == (17,)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null"])
def test_a_damaged_cache_is_ignored_with_a_warning(model, content):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(content)
    with pytest.warns(UserWarning, match="it is ignored and written anew"):
        assert find_sink_dims(model).dims == ()
    with warnings.catch_warnings(action="error"):
        assert find_sink_dims(copy.deepcopy(model)).source == "cached"


@pytest.mark.parametrize("entry", [3, {}, {"dims": "x"}, {"dims": [10**6]}, {"width": 1}])
def test_a_damaged_entry_is_measured_again(embedded, entry):
    model = copy.deepcopy(embedded[0])
    find_sink_dims(model)
    entries = json.loads(cache_file().read_text())
    ((key, good),) = entries.items()
    damaged = good | entry if isinstance(entry, dict) and entry else entry
    cache_file().write_text(json.dumps({key: damaged}))
    with pytest.warns(UserWarning, match="an entry is damaged"):
        assert find_sink_dims(copy.deepcopy(model)).source == "measured"


def test_a_cache_that_cannot_be_written_is_no_error(model):
    cache_file().parent.parent.mkdir(parents=True)
    cache_file().parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="measured again"):
        assert find_sink_dims(model).dims == ()


def test_nothing_is_left_beside_the_cache(model):
    find_sink_dims(model)
    assert [path.name for path in cache_file().parent.iterdir()] == ["sink_dims.json"]


# -- the picture


def test_the_picture_shows_the_sink_dimensions(embedded, tmp_path):
    model = plant(copy.deepcopy(embedded[0]), {17: 900.0, 200: 400.0})
    path, plain = tmp_path / "sinks.png", tmp_path / "none.png"
    find_sink_dims(model, picture=path)
    find_sink_dims(embedded[0], picture=plain)
    for drawn in (path, plain):
        with Image.open(drawn) as image:
            assert image.format == "PNG" and min(image.size) >= 300
    red = [np.asarray(Image.open(one).convert("RGB")).astype(int) for one in (path, plain)]
    counts = [int(((one[..., 0] > 180) & (one[..., 2] < 60)).sum()) for one in red]
    assert counts[0] > 200 and counts[1] == 0


def test_a_cached_result_is_drawn_too(embedded, tmp_path):
    model = plant(copy.deepcopy(embedded[0]), {17: 900.0})
    first = find_sink_dims(model)
    other = copy.deepcopy(model)
    found = find_sink_dims(other, picture=tmp_path / "sinks.png")
    assert found.source == "cached" and found.profile == first.profile
    assert (tmp_path / "sinks.png").stat().st_size > 1000


def test_drawing_what_was_not_measured_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="find_sink_dims"):
        SinkDims((1,), 5.0, (9.0,), 4, "cached").draw(tmp_path / "sinks.png")


def test_a_saved_model_is_known_by_its_weights_wherever_it_is(embedded, tmp_path):
    embedded[0].save_pretrained(tmp_path / "copy")
    embedded[1].save_pretrained(tmp_path / "copy")
    assert find_sink_dims(load(tmp_path / "copy")[0]).source == "measured"
    assert find_sink_dims(load(tmp_path / "copy")[0]).source == "cached"
