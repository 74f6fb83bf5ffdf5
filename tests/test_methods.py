"""Methods as their papers' hyper-parameters: written, read, refused, listed."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvlm_fix import attach
from lvlm_fix.functional import outlier_tokens
from lvlm_fix.methods import DAMRO, METHODS, VAR, VTCCLS, AttentionStep, Method, ZipVL, parse
from lvlm_fix.methods.base import made
from lvlm_fix.vision import VisionEncoding

STAGES = {"select", "negative_tokens", "attention", "cache", "logits"}


def encoding(layers=4, tokens=9, seed=0):
    torch.manual_seed(seed)
    return VisionEncoding(torch.rand(layers, tokens), torch.rand(tokens), (3, 3))


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_is_listed_under_its_name_with_its_paper_and_stages(self, name):
        method = METHODS[name]
        assert method.name == name == name.lower()
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}", method.paper)
        assert method.paper.removeprefix("arXiv ") in method.__doc__
        assert method.stages()
        assert set(method.stages()) <= STAGES
        assert set(method.conflicts) <= set(METHODS) - {name}

    def test_is_a_frozen_dataclass(self, name):
        method = METHODS[name]()
        field = dataclasses.fields(method)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field, 1)
        assert method == METHODS[name]()
        assert hash(method) == hash(METHODS[name]())

    def test_needs_no_arguments_to_be_written(self, name):
        assert parse(name) == parse(f"{name}()") == parse(name.upper()) == [METHODS[name]()]


def test_every_method_is_listed():
    own = {method for method in Method.__subclasses__() if method.__module__.startswith("lvlm_fix.methods.")}
    assert set(METHODS.values()) == own
    assert list(METHODS.values()) == [DAMRO, VAR, VTCCLS, ZipVL]


def test_stages_are_those_that_a_method_overrides():
    assert DAMRO.stages() == ("negative_tokens", "logits")
    assert VTCCLS.stages() == ("select",)
    assert VAR.stages() == ("attention",)
    assert ZipVL.stages() == ("attention", "cache")
    assert Method.stages() == ()


def test_the_base_changes_nothing():
    logits = torch.rand(2, 5)
    assert Method().select(encoding()) is None
    assert Method().negative_tokens(encoding()) is None
    assert Method().logits(logits, torch.rand(2, 5)) is logits


numbers = st.floats(0, 1e6, allow_nan=False)


@given(alpha=numbers, beta=st.floats(0, 1), topk=st.integers(1, 10_000))
def test_damro_is_read_as_it_is_written(alpha, beta, topk):
    method = DAMRO(alpha=alpha, beta=beta, topk=topk)
    assert parse(repr(method)) == [method]
    assert parse(f"damro(topk={topk}, alpha={alpha!r},beta={beta!r})") == [method]


@given(keep=st.floats(1e-6, 1) | st.integers(1, 10**6), start_layer=st.integers(-50, 50))
def test_vtc_cls_is_read_as_it_is_written(keep, start_layer):
    method = VTCCLS(keep=keep, start_layer=start_layer)
    assert parse(f"vtc_cls(keep={keep!r}, start_layer={start_layer})") == [method]


@pytest.mark.parametrize("text", ["", "  ", "none", "None", "plain"])
def test_no_method_is_read_as_none(text):
    assert parse(text) == []


def test_several_methods_are_read_in_order():
    assert parse("vtc_cls(keep=64), damro(alpha=2)") == [VTCCLS(keep=64), DAMRO(alpha=2)]
    assert parse("damro,vtc_cls,") == [DAMRO(), VTCCLS()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dammro", "unknown method 'dammro': the methods are damro, var, vtc_cls, zipvl"),
        ("damro, none", "unknown method 'none'"),
        ("damro(0.5)", "write them as"),
        ("damro(alpha=", "cannot read methods"),
        ("damro; vtc_cls", "cannot read methods"),
        ("damro vtc_cls", "cannot read methods"),
        ("7", "cannot read methods"),
        ("os.system", "cannot read methods"),
        ("damro()()", "cannot read methods"),
        ("*damro", "cannot read methods"),
        ("damro], [vtc_cls", "cannot read methods"),
        ("damro for x in y", "cannot read methods"),
        ("damro]+[vtc_cls", "cannot read methods"),
        ("damro(alpha=__import__('os'))", "cannot read methods"),
        ("damro(alpha=2*3)", "cannot read methods"),
        ("damro(gamma=1)", "damro takes alpha, beta, topk"),
        ("damro(alpha='x')", "damro takes alpha, beta, topk"),
        ("damro(**{'alpha': 1})", "damro takes alpha, beta, topk"),
        ("damro(alpha=-1)", "alpha must be at least 0"),
        ("vtc_cls(keep=0)", "keep must be a positive number"),
        ("var(rho=1.5)", "rho and min_image_attention must lie in 0..1"),
        ("zipvl(bits=3)", "bits 2, 4 or 8"),
        ("zipvl(scope='text')", "scope all or image"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": -0.1},
        {"beta": -0.1},
        {"beta": 1.1},
        {"topk": 0},
        {"topk": 2.5},
        {"alpha": math.inf},
        {"alpha": math.nan},
        {"topk": math.inf},
    ],
)
def test_damro_refuses_values_out_of_range(arguments):
    with pytest.raises(
        ValueError, match=r"DAMRO\(.*alpha must be at least 0, beta and gate in 0..1 and topk"
    ):
        DAMRO(**arguments)


@pytest.mark.parametrize("keep", [0, -1, math.nan, math.inf])
def test_vtc_cls_refuses_to_keep_nothing(keep):
    with pytest.raises(ValueError, match=r"VTCCLS\(.*keep must be a positive number"):
        VTCCLS(keep=keep)


def test_the_papers_settings():
    assert DAMRO.for_model("llava-1.5") == DAMRO(alpha=0.5, beta=0.1, topk=10)
    assert DAMRO.for_model("llava-next", task="captions") == DAMRO(alpha=2.0, beta=0.1, topk=10)
    assert DAMRO.for_model("instructblip") == DAMRO(alpha=0.5, beta=0.1, topk=4)
    assert DAMRO.for_model("instructblip", "captions") == DAMRO(alpha=1.5, beta=0.1, topk=4)
    assert VTCCLS.for_model("llava-1.5").keep == 128
    assert VAR.for_model("llava-1.5") == VAR(p=0.6, rho=0.8, min_image_attention=0.2, tau=20.0)
    assert [VAR.for_model("llava-1.5", task).rho for task in ("pope", "captions", "vision")] == [
        0.5,
        0.5,
        0.9,
    ]
    assert ZipVL.for_model("llava-1.5") == ZipVL(tau=0.975, recent=64, random=64, bits=4, low_bits=2)
    for method in (VAR, ZipVL):
        with pytest.raises(ValueError, match=r"no setting for model 'gpt'.*llava-1.5, llava-next"):
            method.for_model("gpt")
    with pytest.raises(ValueError, match=r"task 'vqa'.*general, pope, captions, vision"):
        VAR.for_model("llava-1.5", "vqa")
    with pytest.raises(ValueError, match=r"no setting for model 'gpt'.*llava-1.5, llava-next, instructblip"):
        DAMRO.for_model("gpt")
    with pytest.raises(ValueError, match=r"task 'vqa'.*pope, captions"):
        DAMRO.for_model("llava-1.5", "vqa")
    with pytest.raises(ValueError, match="no setting for model 'llava-next'"):
        VTCCLS.for_model("llava-next")


def test_damros_negative_tokens_are_its_outliers_in_raster_order():
    vision = encoding()
    tokens = DAMRO(topk=4).negative_tokens(vision).tolist()
    assert tokens == sorted(outlier_tokens(vision.feature_scores[None], 4)[0].tolist())
    assert DAMRO(topk=100).negative_tokens(vision).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("keep", "count"), [(4, 4), (1, 1), (100, 9), (1 / 3, 3), (0.5, 4), (0.999, 9), (1e-9, 1)]
)
def test_vtc_cls_keeps_a_number_or_a_fraction(keep, count):
    vision = encoding()
    kept = VTCCLS(keep=keep).select(vision).tolist()
    total = vision.layer_scores[:-1].sum(0)
    assert kept == sorted(total.argsort(descending=True)[:count].tolist())


def test_vtc_cls_leaves_the_last_and_the_first_layers_out():
    layers = torch.zeros(5, 4)
    layers[0, 0], layers[3, 2], layers[4, 3] = 9.0, 1.0, 9.0
    vision = VisionEncoding(layers, torch.rand(4), (2, 2))
    assert VTCCLS(keep=1, start_layer=1).select(vision).tolist() == [2]
    assert VTCCLS(keep=1, start_layer=0).select(vision).tolist() == [0]


def test_vtc_cls_refuses_a_tower_that_is_too_short():
    with pytest.raises(ValueError, match="start_layer must name a layer before the last of 3, got -4"):
        VTCCLS().select(encoding(layers=3))


def test_damro_contrasts_half_precision_in_float32():
    half = torch.tensor([[2.0, 1.0]], dtype=torch.bfloat16)
    contrasted = DAMRO(alpha=0.1, beta=0).logits(half, torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16))
    assert contrasted.dtype == torch.float32
    torch.testing.assert_close(contrasted, torch.tensor([[2.1, 1.0]]))


# -- attention


def step(layer=2, tokens=12, **changes):
    """One layer's prefill of a row of `tokens` of which 4 to 8 are the image."""
    torch.manual_seed(1)
    image = torch.zeros(1, tokens, dtype=torch.bool)
    image[:, 4:8] = True
    given = {
        "layer": layer,
        "layers": 5,
        "query": torch.randn(1, 2, tokens, 8),
        "key": torch.randn(1, 2, tokens, 8),
        "value": torch.randn(1, 2, tokens, 8),
        "scale": None,
        "real": torch.ones(1, tokens, dtype=torch.bool),
        "image_mask": image,
        "first_query": torch.tensor([8]),
        "hidden_states": torch.ones(1, tokens, 16),
    }
    return AttentionStep(**given | changes)


def with_massive(tokens, dim=3):
    """Hidden states (1, 12, 16) of ones, where `tokens` are massive in one dimension."""
    hidden = torch.ones(1, 12, 16)
    hidden[0, tokens, dim] = 100.0
    return hidden


ALERT = VAR(sink_dims=(3,), tau=40.0)  # at width 16 the threshold is 2.5; |x| / rms of a planted token is 4


def test_var_finds_the_planted_sinks():
    changed = ALERT.attention(step(hidden_states=with_massive([0, 5])))
    assert changed.sinks.nonzero()[:, 1].tolist() == [0, 5]
    assert changed.redistribution.sink_mask.equal(changed.sinks)
    assert changed.redistribution.first_query.tolist() == [8]
    assert (changed.redistribution.p, changed.redistribution.rho) == (ALERT.p, ALERT.rho)


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_var_leaves_the_first_two_layers_and_the_last_alone(layer):
    given = step(layer, hidden_states=with_massive([0, 5]))
    assert ALERT.attention(given) is given


@pytest.mark.parametrize("massive", [[], [0], [0, 11]])
def test_var_leaves_a_layer_without_image_sinks_alone(massive):
    changed = ALERT.attention(step(hidden_states=with_massive(massive)))
    assert changed.sinks is None
    assert changed.redistribution is None


def test_var_looks_at_its_sink_dims_only_and_not_at_padding():
    assert ALERT.attention(step(hidden_states=with_massive([5], dim=4))).sinks is None
    real = torch.ones(1, 12, dtype=torch.bool)
    real[:, :6] = False
    assert ALERT.attention(step(hidden_states=with_massive([5]), real=real)).sinks is None


def test_var_remembers_its_sinks_when_decoding():
    sinks = torch.zeros(1, 12, dtype=torch.bool)
    sinks[:, 5] = True
    decoding = {"hidden_states": None, "query": torch.randn(1, 2, 1, 8)}
    assert ALERT.attention(step(sinks=sinks, **decoding)).redistribution.sink_mask is sinks
    assert ALERT.attention(step(sinks=None, **decoding)).redistribution is None


def test_vars_threshold_suits_the_width():
    assert VAR().threshold(4096) == VAR().threshold(5120) == 20
    assert VAR().threshold(1024) == 10
    assert VAR(tau=12).threshold(256) == 3


def test_zipvl_keeps_what_attention_is_on():
    key = torch.zeros(1, 2, 200, 8)
    key[:, :, [3, 50, 120], 0] = 60.0  # all queries look at these three
    query = torch.zeros(1, 2, 200, 8)
    query[..., 0] = 4.0
    real = torch.ones(1, 200, dtype=torch.bool)
    image = torch.zeros_like(real)
    image[:, 10:150] = True
    given = {"query": query, "key": key, "value": key, "real": real, "image_mask": image}
    given["hidden_states"] = torch.ones(1, 200, 16)
    method = ZipVL(window=4)
    changed = method.attention(step(tokens=200, **given))
    assert changed.important[0].nonzero()[:, 0].tolist() == [3, 50, 120, 196, 197, 198, 199]
    assert made(changed.told["ratios"]).item() == pytest.approx(7 / 200)
    image_only = dataclasses.replace(method, scope="image").attention(step(tokens=200, **given))
    dropped = (~image_only.important[0]).nonzero()[:, 0].tolist()
    assert dropped == [t for t in range(10, 150) if t not in (50, 120)]
    everything = dataclasses.replace(method, tau=1.0).attention(step(tokens=200, **given))
    assert everything.important.all()


def test_zipvls_probes_are_the_newest_and_some_others_whatever_the_batch():
    real = torch.ones(3, 40, dtype=torch.bool)
    real[1, :25], real[2, :38] = False, False
    probes = ZipVL(recent=5, random=6).probes(real)
    assert probes.shape == (3, 11)
    assert probes[:, -2:].tolist() == [[38, 39]] * 3
    assert probes[0, -5:].tolist() == [35, 36, 37, 38, 39]
    alone = ZipVL(recent=5, random=6).probes(torch.ones(1, 15, dtype=torch.bool))
    assert (probes[1] - 25).tolist() == alone[0].tolist()
    assert len(set(alone[0].tolist())) == 11
    assert not real[2, probes[2, :-2]].any()  # a short row's missing probes stand on its padding
    assert probes[0].tolist() != ZipVL(recent=5, random=6, seed=1).probes(real)[0].tolist()


def test_zipvl_leaves_decoding_alone():
    decoding = step(hidden_states=None, query=torch.randn(1, 2, 1, 8))
    assert ZipVL().attention(decoding) is decoding
    assert ZipVL().cache(decoding) is None


@pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning")
def test_only_layers_that_a_method_reads_are_scored(embedded, ask, sample_pictures):
    model, processor = embedded
    inputs = ask(processor, ([sample_pictures["kitchen"]], "What is in the image?"))
    read = {}
    for method in (DAMRO(), VTCCLS(start_layer=-3)):
        with attach(model, method) as fix:
            model.generate(**inputs, max_new_tokens=1)
            (image,) = fix.pipeline.encoder.known.values()
            scores = image.vision.layer_scores.isnan().all(1)
            read[method.name] = [layer for layer, unread in enumerate(scores.tolist()) if not unread]
            assert image.vision.feature_scores.isfinite().all() == method.reads_feature_scores
    feature = len(scores) - 2
    assert read == {"damro": [], "vtc_cls": [feature - 1, feature]}
