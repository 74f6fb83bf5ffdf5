"""`load`: the embedded model, folders and hub ids; no surprise code, no riddles when it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from lvlm_fix import load
from lvlm_fix.loading import embedded_folder

QUESTION: list[Any] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}
]


def copy_of_embedded(folder: Path, without: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    for file in embedded_folder().iterdir():
        if file.name not in without:
            shutil.copy(file, folder / file.name)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal_of(place: object, **options: object) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(OSError) as error:
        load(place, **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith(f"cannot load model {place}: ") and "\n" not in message and len(message) < 500
    return message


def test_plain_transformers_loads_the_embedded_model_alike(embedded) -> None:
    model, processor = embedded
    plain = AutoModelForImageTextToText.from_pretrained(embedded_folder())
    assert type(plain) is type(model) is LlavaForConditionalGeneration
    assert plain.dtype == model.dtype == torch.float32
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert type(AutoProcessor.from_pretrained(embedded_folder())) is type(processor)
    assert not model.training and processor.tokenizer.padding_side == "left"


def test_the_embedded_model_is_small_and_complete(embedded) -> None:
    weights = embedded_folder() / "model.safetensors"
    assert weights.stat().st_size < 40e6
    with safe_open(weights, "pt") as stored:
        names = list(stored.keys())
        assert all(torch.isfinite(stored.get_tensor(name)).all() for name in names)
    assert len(names) == len(embedded[0].state_dict())
    assert not [
        file.name for file in embedded_folder().iterdir() if file.suffix in (".bin", ".pt", ".pkl", ".py")
    ]


def test_the_chat_template_and_the_image_tokens(embedded) -> None:
    model, processor = embedded
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert text == "USER: <image>\nWhat do you see? ASSISTANT:"
    told = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    assert processor.apply_chat_template(told).endswith("ASSISTANT: A cat.</s>")
    inputs = processor(images=Image.new("RGB", (50, 90)), text=text, return_tensors="pt")
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert tokens >= 144
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
        features = getattr(features, "pooler_output", features)
    assert features[0].shape == (tokens, model.config.text_config.hidden_size)


def test_any_text_survives_the_tokenizer(embedded) -> None:
    tokenizer = embedded[1].tokenizer
    for text in ("Is there a dog in the image?", "Größe: 3 µm, 日本 🙂", "tabs\tand\nlines"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_local_folder_as_text_path_or_from_home(embedded, tmp_path: Path, monkeypatch) -> None:
    folder = copy_of_embedded(tmp_path / "model")
    weight = embedded[0].lm_head.weight
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (folder, str(folder), "~/model"):
        assert torch.equal(load(place)[0].lm_head.weight, weight)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_the_dtype_is_the_callers(dtype) -> None:
    model: Any
    model, processor = load(dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (144, 144)), text=text, return_tensors="pt").to(
        "cpu", model.dtype
    )
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float99': give auto"):
        load(dtype="float99")


def test_a_device_map_is_followed() -> None:
    model, _ = load(device_map={"": "cpu"})
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    model, _ = load(device_map={"": "meta"})
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("place", ["nothing-here", "./nothing", "/nothing/at/all", "~/nothing-here"])
def test_a_missing_folder_is_named(place: str) -> None:
    assert "there is no such folder" in refusal_of(place)


def test_a_hub_id_that_cannot_be_had_offline_says_so() -> None:
    assert "connect to" in refusal_of("nobody/no-such-model")


def test_pickled_weights_are_loaded_only_when_asked_for(embedded, tmp_path: Path) -> None:
    folder = copy_of_embedded(tmp_path / "pickled", without=("model.safetensors",))
    torch.save(embedded[0].state_dict(), folder / "pytorch_model.bin")
    assert "use_safetensors=False" in refusal_of(folder)
    model, _ = load(folder, use_safetensors=False)
    assert torch.equal(model.lm_head.weight, embedded[0].lm_head.weight)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = copy_of_embedded(tmp_path / "bare", without=("model.safetensors",))
    assert "model.safetensors" in refusal_of(folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    for name, model_type in (("unknown", "made_up"), ("known", "llava")):
        folder, trace = copy_of_embedded(tmp_path / name), tmp_path / f"{name}.ran"
        auto_map = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
        edit_config(folder, model_type=model_type, auto_map=auto_map)
        (folder / "code.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
        if name == "known":  # transformers' own class is used
            assert type(load(folder)[0]) is LlavaForConditionalGeneration
        else:
            assert "trust_remote_code=True" in refusal_of(folder)
        assert not trace.exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = copy_of_embedded(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "damaged or cut short" in refusal_of(folder)
    weights.write_bytes(b"")
    assert "damaged or cut short" in refusal_of(folder)
    (folder / "config.json").write_text('{"model_type": ')
    assert "JSON file in it is damaged" in refusal_of(folder)


def test_a_model_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    folder = copy_of_embedded(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))
    assert "LlamaConfig" in refusal_of(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "Unrecognized" in refusal_of(empty)
