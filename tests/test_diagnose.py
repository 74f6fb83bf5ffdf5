"""Premises: what is planted in a model is told by `diagnose`, warned of by `attach`, and decides what "auto" takes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import noise_picture
from PIL import Image
from test_family_llava_next import loaded as llava_next  # noqa: F401, a fixture

from lvlm_fix import DAMRO, LVLM, VAR, VTCCLS, AttachError, PremiseWarning, ZipVL, attach, diagnose
from lvlm_fix.diagnosis import sample_pictures
from lvlm_fix.errors import PictureError
from lvlm_fix.methods import METHODS
from lvlm_fix.models import family_of
from lvlm_fix.premises import Seen, damro, local_detail, var, vtc_cls, zipvl
from lvlm_fix.prompting import model_inputs
from lvlm_fix.vision import VisionEncoding

GRID = 12
FLAT = [row * GRID + column for row, column in ((1, 1), (3, 2), (6, 4), (9, 1), (10, 3))]
BUSY = [token + GRID // 2 for token in FLAT]
DIM = 17


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(embedded):
    return copy.deepcopy(embedded[0])


@pytest.fixture(scope="session")
def halves():
    """Pictures that are flat on the left and noise on the right."""
    pictures = []
    for seed in range(3):
        pixels = np.full((144, 144, 3), 90 + 20 * seed, dtype=np.uint8)
        pixels[:, 72:] = np.random.default_rng(seed).integers(0, 255, (144, 72, 3))
        pictures.append(Image.fromarray(pixels))
    return pictures


@contextmanager
def hooked(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plant_cls_attention(model, tokens):
    """CLS attends to these patches: their keys are its own query, in the layers before the last."""
    handles = []
    for layer in model.model.vision_tower.encoder.layers[4:7]:
        asked = {}

        def remember(module, given, made, asked=asked):
            asked["cls"] = made[:, :1]

        def answer(module, given, made, asked=asked):
            made = made.clone()
            made[:, [token + 1 for token in tokens]] = 3 * asked["cls"]
            return made

        handles.append(layer.self_attn.q_proj.register_forward_hook(remember))
        handles.append(layer.self_attn.k_proj.register_forward_hook(answer))
    return hooked(*handles)


def plant_norms(model, tokens):
    """The feature layer puts these patches out with six times the norm."""

    def enlarge(module, given, made):
        states = (made[0] if isinstance(made, tuple) else made).clone()
        states[:, [token + 1 for token in tokens]] *= 6
        return (states, *made[1:]) if isinstance(made, tuple) else states

    return hooked(model.model.vision_tower.encoder.layers[6].register_forward_hook(enlarge))


def plant_bos_sink(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[1, DIM] = 1000.0


def plant_image_sinks(model, tokens):
    def enlarge(module, given, made):
        made = made.clone()
        made[:, tokens, DIM] += 300.0
        return made

    return hooked(model.model.multi_modal_projector.register_forward_hook(enlarge))


def plant_concentration(model, tokens):
    """All heads of the decoder attend to these columns, by a dimension that rotary positions hardly turn."""
    handles, heads = [], model.config.text_config.num_attention_heads
    width = model.config.text_config.head_dim
    for layer in model.get_decoder().layers:

        def ask(module, given, made):
            made = torch.zeros_like(made).unflatten(-1, (heads, width))
            made[..., width // 2 - 1] = 12.0
            return made.flatten(-2)

        def answer(module, given, made):
            made = torch.zeros_like(made).unflatten(-1, (heads, width))
            if made.shape[1] > 1:
                made[:, tokens, :, width // 2 - 1] = 12.0
            return made.flatten(-2)

        handles.append(layer.self_attn.q_proj.register_forward_hook(ask))
        handles.append(layer.self_attn.k_proj.register_forward_hook(answer))
    return hooked(*handles)


def spread_cls_attention(model):
    """CLS attends to every patch alike."""
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()


def holding(diagnosis):
    return {name for name, premise in diagnosis.premises.items() if premise.holds}


# -- the embedded model, whose card tells the answer


@pytest.fixture(scope="module")
def embedded_diagnosis(embedded):
    return diagnose(*embedded, sample_pictures())


def test_of_the_embedded_model_only_the_premise_of_vtc_cls_holds(embedded_diagnosis):
    assert holding(embedded_diagnosis) == {"vtc_cls"}
    assert embedded_diagnosis.methods == embedded_diagnosis.chosen == (VTCCLS(),)
    assert embedded_diagnosis.sinks.dims == ()


def test_numbers_agree_with_the_model_card(embedded_diagnosis):
    numbers = {name: premise.numbers for name, premise in embedded_diagnosis.premises.items()}
    assert numbers["damro"]["in_background"] == 0  # 99.95 % of the ten highest lie on objects
    assert numbers["damro"]["largest_norm_over_median"] == pytest.approx(1.45, abs=0.3)
    assert numbers["zipvl"]["needed"] == pytest.approx(0.81, abs=0.03)
    assert len(numbers["zipvl"]["needed_by_layer"]) == len(numbers["var"]["image_sinks_by_layer"]) == 8
    assert set(numbers["var"]["image_sinks_by_layer"]) == {0}
    assert numbers["vtc_cls"]["attention_in_highest_third"] > 0.85


@torch.inference_mode()
def test_tokens_needed_are_those_of_the_attention_itself(embedded, ask, sample_pictures):
    """A prompt of at most 128 tokens would be probed whole; here the probes are picked out of eager attention."""
    model, processor = embedded
    question = "Describe the image."
    found = diagnose(model, processor, [sample_pictures["office"]], question=question)
    inputs = model_inputs(model, processor, [[sample_pictures["office"]]], [question])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attention = eager(**inputs, output_attentions=True).attentions
    rows = ZipVL().probes(inputs["attention_mask"].bool())[0]
    for weights, needed in zip(attention, found.premises["zipvl"].numbers["needed_by_layer"], strict=True):
        columns = weights[0, :, rows].mean(0).sum(0).sort(descending=True).values
        count = int((columns.cumsum(0) < 0.975 * columns.sum()).sum()) + 1
        assert needed == pytest.approx(count / len(columns), abs=1.01 / len(columns))
    image = inputs["input_ids"][0] == model.config.image_token_id
    shares = [(w[0, :, -1, image].sum(-1) >= 0.2).float().mean() for w in attention]
    told = found.premises["var"].numbers["image_heads_by_layer"]
    assert told == pytest.approx([float(share) for share in shares])


def test_it_reads_as_text_and_as_json(embedded_diagnosis):
    text = str(embedded_diagnosis)
    assert text.startswith("embedded, 5 pictures\n") and text.endswith("attaches vtc_cls")
    rows = embedded_diagnosis.table().splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["damro", "fails"],
        ["var", "fails"],
        ["vtc_cls", "holds"],
        ["zipvl", "fails"],
    ]
    told = json.loads(json.dumps(embedded_diagnosis.to_dict()))
    assert told["auto"] == ["vtc_cls"] and told["pictures"] == 5
    assert {name: premise["holds"] for name, premise in told["methods"].items()} == {
        name: name == "vtc_cls" for name in METHODS
    }


def test_the_model_says_the_same_afterwards(model, embedded, ask, sample_pictures):
    inputs = ask(embedded[1], ([sample_pictures["kitchen"]], "What is in the image?"))
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    diagnose(model, embedded[1], [sample_pictures["kitchen"]])
    again = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert hooks == again and "forward" not in vars(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), plain)


# -- planted premises


@pytest.mark.parametrize(("tokens", "holds"), [(FLAT, True), (BUSY, False)], ids=["flat", "busy"])
def test_cls_outliers_make_damro_hold_where_the_picture_is_flat(model, embedded, halves, tokens, holds):
    with plant_cls_attention(model, tokens):
        found = diagnose(model, embedded[1], halves)
    numbers = found.premises["damro"].numbers
    assert found.premises["damro"].holds is holds
    assert numbers["outliers"] == numbers["cls_outliers"] == len(tokens)
    assert numbers["in_background"] == float(holds)
    assert all(
        set(torch.topk(view.seen.vision.feature_scores, 5).indices.tolist()) == set(tokens)
        for view in found.views
    )


def test_norm_outliers_are_counted_where_they_are(model, embedded, halves):
    with plant_norms(model, FLAT):
        found = diagnose(model, embedded[1], halves)
    assert found.premises["damro"].numbers["norm_outliers"] == len(FLAT)
    assert diagnose(model, embedded[1], halves).premises["damro"].numbers["norm_outliers"] == 0


def test_image_sinks_make_var_hold(model, embedded, halves):
    plant_bos_sink(model)
    alone = diagnose(model, embedded[1], halves)
    assert alone.sinks.dims == (DIM,) and not alone.premises["var"].holds
    assert set(alone.premises["var"].numbers["image_sinks_by_layer"]) == {0}
    with plant_image_sinks(model, FLAT):
        found = diagnose(model, embedded[1], halves)
    assert found.premises["var"].holds and VAR() in found.methods
    assert found.premises["var"].numbers["image_sinks_by_layer"] == [len(FLAT)] * 8


def test_image_sinks_in_a_dimension_that_is_none_do_not(model, embedded, halves):
    with plant_image_sinks(model, FLAT):
        assert not diagnose(model, embedded[1], halves).premises["var"].holds


def test_concentrated_attention_makes_zipvl_hold(model, embedded, halves):
    with plant_concentration(model, [0, 5, 20]):
        found = diagnose(model, embedded[1], halves)
    assert found.premises["zipvl"].holds and ZipVL() in found.methods
    assert all(share < 0.05 for share in found.premises["zipvl"].numbers["needed_by_layer"])


def test_evenly_spread_cls_attention_makes_vtc_cls_fail(model, embedded, halves):
    spread_cls_attention(model)
    found = diagnose(model, embedded[1], halves)
    assert not found.premises["vtc_cls"].holds
    assert found.premises["vtc_cls"].numbers["attention_in_highest_third"] == pytest.approx(1 / 3, abs=0.01)


# -- the judgments, on numbers


def seen(scores, detail=None, norms=None, crops=None, source="cls"):
    row = torch.tensor(scores, dtype=torch.float32)
    tensors = [None if values is None else torch.tensor(values) for values in (detail, norms, crops)]
    vision = VisionEncoding(row.expand(4, -1), row, (1, len(row)), tensors[2], source)
    return Seen(vision, tensors[0], tensors[1])


def test_damro_needs_a_look_and_a_background():
    peak, flat = [1.0] * 19 + [100.0], [1.0] * 20
    low, high = [9.0] * 19 + [0.1], [0.1] * 15 + [0.5] * 4 + [9.0]
    assert damro([seen(peak, low)]).holds
    assert not damro([seen(peak, high)]).holds
    assert not damro([seen(flat, low)]).holds
    assert not damro([seen(peak)]).holds  # where they lie is unknown
    assert damro([seen(peak, low)]).numbers["cls_outliers"] == 1


def test_norm_outliers_count_only_where_cls_looks():
    norms, detail = [1.0] * 19 + [8.0], [9.0] * 19 + [0.1]
    looked_at, ignored = [1.0] * 19 + [2.0], [1.0] * 19 + [0.5]
    assert damro([seen(looked_at, detail, norms)]).holds
    assert not damro([seen(ignored, detail, norms)], DAMRO(topk=4)).holds


def test_crops_are_judged_by_themselves_and_newlines_not_at_all():
    scores = [1.0] * 19 + [100.0] + [0.0] + [0.01] * 19 + [1.0]
    detail = [9.0] * 19 + [0.1] + [0.0] + [9.0] * 19 + [0.1]
    crops = [0] * 20 + [-1] + [1] * 20
    found = damro([seen(scores, detail, crops=crops)])
    assert found.numbers["crops"] == 2 and found.numbers["cls_outliers"] == 1 and found.holds
    whole = vtc_cls([seen([1.0] * 6 + [0.0] * 4, crops=[0] * 6 + [-1] * 4)])
    assert whole.numbers["attention_in_highest_third"] == pytest.approx(1 / 3)


def test_what_stands_for_cls_attention_is_named():
    assert "received attention" in vtc_cls([seen([1.0, 2.0, 3.0], source="received attention")]).sentence


def test_var_needs_dimensions_image_sinks_and_heads():
    layers = range(2, 7)
    assert var((3,), [1.0] * 8, [0.5] * 8, layers).holds
    assert not var((), [1.0] * 8, [0.5] * 8, layers).holds
    assert not var((3,), [9.0, 9.0, 0, 0, 0, 0, 1.0, 9.0], [0.5] * 8, layers).holds
    assert not var((3,), [1.0] * 8, [1.0, 1.0, 0, 0, 0.1, 0, 0, 1.0], layers).holds


def test_zipvl_needs_few_tokens():
    assert zipvl([0.5, 0.7]).holds and not zipvl([0.5, 0.8]).holds


def test_detail_is_the_deviation_of_the_pixels_below_a_token(embedded, halves):
    model, processor = embedded
    inputs = processor(images=halves[0], text="<image>", return_tensors="pt")
    pixels = inputs["pixel_values"]
    (detail,) = local_detail(model, family_of(model), {"pixel_values": pixels})
    cells = pixels[0].double().reshape(3, GRID, 12, GRID, 12).permute(1, 3, 0, 2, 4).flatten(3)
    expected = cells.std(-1, unbiased=False).mean(-1).flatten()
    torch.testing.assert_close(detail.double(), expected, rtol=0, atol=2e-3)
    assert detail[FLAT].max() < 0.01 < 1 < detail[BUSY].min()


# -- a family whose pictures are cut in crops


CHAT = (
    "{% for message in messages %}USER : {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} ASSISTANT :{% endfor %}"
)


def test_crops_are_looked_at_one_by_one(request, tmp_path):
    model, processor = copy.deepcopy(request.getfixturevalue("llava_next"))
    processor.chat_template = CHAT
    picture = noise_picture(1, (100, 50))
    norms = []
    layer = model.model.vision_tower.encoder.layers[2]
    with hooked(layer.register_forward_hook(lambda module, given, made: norms.append(made))):
        found = diagnose(model, processor, [picture], question="what is it ?")
    (states,) = norms
    patches = states[:, 1:].norm(dim=-1)
    numbers = found.premises["damro"].numbers
    assert numbers["crops"] == len(patches) > 1
    # A crop loses tokens to unpadding at most, and the first, the whole picture, none.
    torch.testing.assert_close(found.views[0].seen.norms, patches[0])
    assert found.views[0].grid == (3, 3) and found.views[0].seen.detail.min() > 0
    found.picture(tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as image:
        assert image.format == "PNG"


# -- asking wrongly


def test_no_picture_a_bad_picture_and_an_attached_model_are_refused(embedded, tmp_path, halves):
    with pytest.raises(ValueError, match="at least one picture"):
        diagnose(*embedded, [])
    with pytest.raises(PictureError, match="no such file"):
        diagnose(*embedded, [tmp_path / "none.png"])
    with attach(embedded[0], VTCCLS()), pytest.raises(AttachError, match="already carries"):
        diagnose(*embedded, halves)


# -- the picture


def test_the_picture_shows_what_was_found(embedded_diagnosis, model, embedded, halves, tmp_path):
    embedded_diagnosis.picture(tmp_path / "embedded.png")
    plant_bos_sink(model)
    with plant_norms(model, FLAT), plant_image_sinks(model, FLAT):
        diagnose(model, embedded[1], halves).picture(tmp_path / "planted.png")
    blue = {}
    for name in ("embedded", "planted"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and 800 < image.width < 2000 and 600 < image.height < 2000
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert len(np.unique(pixels @ (1, 256, 65536))) > 1000
        pictures = pixels[370:590]  # the row of attention maps, where norm outliers are rings
        blue[name] = int((np.abs(pictures - (0x00, 0x72, 0xB2)).sum(-1) < 30).sum())
    assert blue["planted"] > 15 * len(FLAT) and blue["embedded"] == 0


# -- warnings


@contextmanager
def premise_warnings():
    """Names of the methods that were warned of, as they come."""
    names: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield names
    for warning in caught:
        if issubclass(warning.category, PremiseWarning):
            message = str(warning.message)
            assert "lvlm-fix diagnose" in message and "\n" not in message
            names += [name for name in METHODS if f"expect {name} " in message]


@pytest.fixture
def inputs(embedded, ask, sample_pictures):
    return ask(embedded[1], ([sample_pictures["kitchen"]], "What is in the image?"))


def says(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": 3, "do_sample": False} | options)


def test_a_premise_that_fails_is_warned_of_once_an_attachment(embedded, inputs):
    model = embedded[0]
    for _ in range(2):
        with premise_warnings() as names, attach(model, DAMRO(), VAR(), ZipVL()):
            says(model, inputs)
            says(model, inputs, num_beams=2)
        assert sorted(names) == ["damro", "var", "zipvl"]


def test_a_premise_that_holds_is_not(embedded, inputs):
    with premise_warnings() as names, attach(embedded[0], VTCCLS()):
        says(embedded[0], inputs)
    assert names == []


def test_planted_premises_are_not_warned_of(model, embedded, ask, halves):
    plant_bos_sink(model)
    inputs = ask(embedded[1], (halves[:1], "What is in the image?"))
    planted = plant_cls_attention(model, FLAT), plant_image_sinks(model, BUSY)
    with planted[0], planted[1], premise_warnings() as names, attach(model, DAMRO(), VAR()):
        says(model, inputs)
    assert names == []
    with plant_concentration(model, [0, 5, 20]), premise_warnings() as names, attach(model, ZipVL()):
        says(model, inputs)
    assert names == []
    spread_cls_attention(model)
    with premise_warnings() as names, attach(model, VTCCLS()):
        says(model, inputs)
    assert names == ["vtc_cls"]


@pytest.mark.parametrize("method", [DAMRO(), ZipVL()], ids=["damro", "zipvl"])
def test_the_first_prompt_with_a_picture_counts(embedded, inputs, ask, method):
    model, processor = embedded
    with premise_warnings() as names, attach(model, method):
        says(model, ask(processor, ([], "What is in the image?")))
        assert names == []
        says(model, inputs)
    assert names == [method.name]


def test_a_wrapper_warns_once_for_all_that_it_is_asked(embedded, sample_pictures):
    lvlm = LVLM(*embedded)
    with premise_warnings() as names:
        for picture in ("kitchen", "street"):
            lvlm.ask(sample_pictures[picture], "What is in the image?", fix=[DAMRO()], max_new_tokens=2)
            lvlm.ask(
                sample_pictures[picture], "Is there a dog?", fix=[DAMRO(alpha=2.0), VAR()], max_new_tokens=2
            )
    assert names == ["damro", "var"]


# -- "auto"


def test_auto_attaches_what_holds(embedded, inputs):
    model = embedded[0]
    with premise_warnings() as names, attach(model, "auto") as fix:
        assert fix.methods == (VTCCLS(),)
        says(model, inputs)
        assert list(fix.report) == ["vtc_cls"]
    assert names == [] and "forward" not in vars(model)


def test_auto_decides_once_a_model_object(model):
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(1))
    attach(model, "auto").detach()
    count = len(seen)
    attach(model, "auto").detach()
    assert count == len(sample_pictures()) == len(seen)


def test_auto_with_nothing_that_holds_changes_nothing(model, inputs):
    spread_cls_attention(model)
    plain = says(model, inputs)
    with (
        pytest.warns(PremiseWarning, match="no method's premise holds") as caught,
        attach(model, "auto") as fix,
    ):
        assert fix.methods == () and fix.report == {} and "forward" not in vars(model)
        assert torch.equal(says(model, inputs), plain)
        assert fix.report == {}
    assert len(caught) == 1
    fix.detach()


def test_auto_looks_at_the_pictures_it_is_given_and_prefers_damro_to_vtc_cls(model, embedded, halves):
    with plant_cls_attention(model, FLAT):
        assert holding(diagnose(model, embedded[1], halves)) == {"damro", "vtc_cls"}
        with attach(model, "auto", processor=embedded[1], images=halves) as fix:
            assert fix.methods == (DAMRO(),)
    with attach(model, "auto", images=halves) as fix:
        assert fix.methods == (VTCCLS(),)


def test_the_wrapper_takes_auto(embedded, sample_pictures):
    answer = LVLM(*embedded).ask(sample_pictures["kitchen"], fix=["auto"], max_new_tokens=3)
    assert list(answer.report) == ["vtc_cls"]


def test_auto_without_a_processor_says_what_to_do(random_llava):
    model = copy.deepcopy(random_llava[0])
    with pytest.raises(AttachError, match="pass it, attach"):
        attach(model, "auto")
    model.config._name_or_path = model.name_or_path = "no/such-model"
    with pytest.raises(AttachError, match="no/such-model"):
        attach(model, "auto")


def test_auto_stands_alone(embedded):
    with pytest.raises(AttachError, match="alone"):
        attach(embedded[0], "auto", VTCCLS())
    with pytest.raises(AttachError, match="not a method"):
        attach(embedded[0], "automatic")
    with attach(embedded[0], VTCCLS()), pytest.raises(AttachError, match="already carries"):
        attach(embedded[0], "auto")


# -- the command line


def typed(*words):
    command = [sys.executable, "-m", "lvlm_fix", "diagnose", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "110"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_person_reads_the_verdicts(tmp_path, embedded_diagnosis):
    done = typed("--picture", tmp_path / "found.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:5] == str(embedded_diagnosis).splitlines()[:5]
    with Image.open(tmp_path / "found.png") as image:
        assert image.format == "PNG"


@pytest.fixture
def entered(monkeypatch, capfd):
    """The entry point in this process, torch imported already: (exit code, stdout, stderr)."""
    from lvlm_fix.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lvlm-fix", "diagnose", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_json_is_one_object(entered):
    kitchen, street = (path for path in sample_pictures() if path.stem in ("kitchen", "street"))
    code, out, err = entered(kitchen, street, "--json")
    told = json.loads(out)
    assert (code, err) == (0, "") and told["pictures"] == 2 and told["auto"] == ["vtc_cls"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nothing.png",), "there is no such file"),
        (("--picture", "no/such/folder/found.png"), "there is no folder no/such/folder"),
        (("--model", "nothing-here"), "cannot load model nothing-here"),
        (("--question", ""), "the question is empty"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(entered, words, says):
    code, out, err = entered(*words)
    assert (code, out) == (1, "") and err.startswith("lvlm-fix: ") and err.count("\n") == 1 and says in err
