"""Methods as their papers' hyper-parameters: written, read, refused, listed."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvlm_fix.functional import outlier_tokens
from lvlm_fix.methods import DAMRO, METHODS, VTCCLS, Method, parse
from lvlm_fix.vision import VisionEncoding

STAGES = {"select", "negative_tokens", "logits"}


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
    assert set(METHODS.values()) == set(Method.__subclasses__())
    assert list(METHODS.values()) == [DAMRO, VTCCLS]


def test_stages_are_those_that_a_method_overrides():
    assert DAMRO.stages() == ("negative_tokens", "logits")
    assert VTCCLS.stages() == ("select",)
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


@given(keep=st.floats(1e-6, 1e6), start_layer=st.integers(-50, 50))
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
        ("dammro", "unknown method 'dammro': the methods are damro, vtc_cls"),
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
    with pytest.raises(ValueError, match=r"DAMRO\(.*alpha must be at least 0, beta in 0..1 and topk"):
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
