"""The model for lmms-eval: its own registry, evaluator and base class where they are installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from lvlm_fix import LVLM, VTCCLS
from lvlm_fix.evals import lmms_eval_model
from lvlm_fix.evals.lmms_eval_model import FixedModel, cut, decoding
from lvlm_fix.methods import parse

ROOT = Path(__file__).parents[1]
SAMPLES = sorted((ROOT / "assets" / "samples").glob("*.png"))
FIX = "vtc_cls(keep=48,start_layer=-3)"
QUESTIONS = ("Is there a knife in the image?", "Describe the image.", "Is there a zebra in the image?")
installed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)


class Request(NamedTuple):
    """What `generate_until` reads of lmms-eval's `Instance`."""

    args: tuple


def pictures(doc: dict) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]


@pytest.fixture(scope="module")
def model() -> FixedModel:
    made = FixedModel(fix=FIX, batch_size=2)
    docs = [{"pictures": [path]} for path in SAMPLES[:3]]
    made.task_dict = {"own": {"test": [*docs, {"pictures": []}, {"pictures": ["clip.mp4"]}]}}
    return made


def requests(*given: tuple[str, dict, int]) -> list[Request]:
    return [Request((text, kwargs, pictures, doc, "own", "test")) for text, kwargs, doc in given]


def test_answers_are_those_of_the_wrapper_in_the_order_of_the_requests(model) -> None:
    short, long = {"max_new_tokens": 4, "until": ["\n\n"]}, {"max_new_tokens": 20, "temperature": 0}
    given = [
        (question, long if question.startswith("Describe") else short, doc)
        for doc in range(3)
        for question in QUESTIONS
    ]
    answers = model.generate_until(requests(*given))
    for (question, kwargs, doc), answer in zip(given, answers, strict=True):
        alone = model.lvlm.ask(SAMPLES[doc], question, parse(FIX), kwargs["max_new_tokens"])
        assert answer == alone.text
    described = model.lvlm.ask(SAMPLES[0], QUESTIONS[1], (), 20).text
    assert answers[1] != described, "the methods change nothing, so nothing shows that they are attached"


def test_the_answer_ends_where_the_task_says(model) -> None:
    whole, ended = model.generate_until(
        requests(
            (QUESTIONS[1], {"max_new_tokens": 20}, 0),
            (QUESTIONS[1], {"max_new_tokens": 20, "until": " a"}, 0),
        )
    )
    assert ended == whole[: whole.index(" a")] != whole
    assert cut("one two", []) == cut("one two", ["three", ""]) == "one two"


def test_sampling_is_as_the_task_says(model) -> None:
    import torch

    kwargs = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0, "top_p": 1.0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn += model.generate_until(requests((QUESTIONS[1], kwargs, 0)))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        (
            {"temperature": 0, "do_sample": True, "top_p": 0.9},
            {"max_new_tokens": 1024, "do_sample": False},
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "num_beams": 1, "max_new_tokens": 8},
            {"max_new_tokens": 8, "do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 0.9},
        ),
        ({"do_sample": True, "max_new_tokens": 8}, {"max_new_tokens": 8, "do_sample": True}),
        ({"do_sample": False, "temperature": 0.7}, {"max_new_tokens": 1024, "do_sample": False}),
    ],
)
def test_generation_arguments(given, expected) -> None:
    assert decoding(given) == ([], expected)


@pytest.mark.parametrize(
    ("text", "kwargs", "doc", "says"),
    [
        ("Hello", {}, 3, "has no picture"),
        ("Look at <image> and say.", {}, 0, "in the midst of its text"),
        ("Hello", {"typical_p": 0.5}, 0, "'typical_p'"),
    ],
)
def test_what_cannot_be_asked_is_told(model, text, kwargs, doc, says) -> None:
    with pytest.raises(ValueError, match=says):
        model.generate_until(requests((text, kwargs, doc)))


def test_videos_are_told(model) -> None:
    request = Request(("Hello", {}, lambda doc: doc["pictures"], 4, "own", "test"))
    with pytest.raises(ValueError, match="question 4 of own has a str"):
        model.generate_until([request])


def test_places_of_pictures_at_the_beginning_are_those_of_the_prompt(model) -> None:
    kwargs = {"max_new_tokens": 6}
    bare, marked = model.generate_until(
        requests((QUESTIONS[1], kwargs, 0), (f"<image>\n{QUESTIONS[1]}", kwargs, 0))
    )
    assert bare == marked


def test_likelihoods_conversations_and_bad_arguments_are_refused(model) -> None:
    with pytest.raises(NotImplementedError, match="no loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="single questions"):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match="unknown method 'magic'"):
        FixedModel(fix="magic")
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        FixedModel(batch_size="auto")


def test_without_lmms_eval_it_says_how_to_get_it() -> None:
    script = (
        "import sys; sys.modules['lmms_eval'] = None\n"
        "from lvlm_fix.evals import lmms_eval_model as m\n"
        "for get in (m.manifest, lambda: m.LvlmFix):\n"
        "    try: get()\n"
        "    except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.count("run pip install 'lvlm-fix[lmms-eval]'") == 2, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = lmms_eval_model.Other


def entry_point() -> EntryPoint:
    """As an installer reads it in this working tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    return EntryPoint(name, value, "lmms_eval.models")


@installed
def test_its_registry_makes_the_model_from_the_text_of_the_command_line() -> None:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for manifest in registry._coerce_payload_to_manifests(entry_point().load()):
        registry.register_manifest(manifest)
    made = registry.get_model_class("lvlm_fix").create_from_arg_string(
        'pretrained=embedded,dtype=float32,fix="damro(alpha=0.5,topk=4),var"',
        {"batch_size": 4, "max_batch_size": None, "device": "cpu"},
    )
    assert isinstance(made, lmms) and made.batch_size == 4 and (made.rank, made.world_size) == (0, 1)
    assert made.fix == parse("damro(alpha=0.5,topk=4),var")


TASK = """\
task: own_pope
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function own.pictures
doc_to_text: !function own.text
doc_to_target: label
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false, until: ["\\n\\n"]}
process_results: !function own.judge
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """\
from PIL import Image
def pictures(doc): return [Image.open(doc["picture"]).convert("RGB")]
def text(doc): return doc["question"]
def judge(doc, results): return {"right": float(results[0].lower().startswith(doc["label"]))}
"""


@installed
@pytest.mark.slow
def test_its_evaluator_runs_a_task_on_the_fixed_model(tmp_path, monkeypatch) -> None:
    """A task as its users write it, of pictures that ship, through `simple_evaluate`."""
    evaluator = pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    objects = json.loads((ROOT / "assets" / "samples" / "objects.json").read_text())
    docs = [
        {"picture": str(path), "question": f"Is there a {name} in the image?", "label": label}
        for path in SAMPLES
        for name, label in ((objects[path.name][0], "yes"), ("toilet", "no"))
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "own.yaml").write_text(TASK.replace("DATA", str(tmp_path / "docs.jsonl")))
    (tmp_path / "own.py").write_text(FUNCTIONS)
    for manifest in MODEL_REGISTRY_V2._coerce_payload_to_manifests(entry_point().load()):
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    results = evaluator.simple_evaluate(
        model="lvlm_fix",
        model_args=f'pretrained=embedded,fix="{FIX}"',
        tasks=["own_pope"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    lvlm = LVLM()
    expected = [
        lvlm.ask(doc["picture"], doc["question"], [VTCCLS(keep=48, start_layer=-3)], 4).text for doc in docs
    ]
    samples = sorted(results["samples"]["own_pope"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == expected
    right = [text.lower().startswith(doc["label"]) for text, doc in zip(expected, docs, strict=True)]
    assert results["results"]["own_pope"]["right,none"] == pytest.approx(sum(right) / len(right))
