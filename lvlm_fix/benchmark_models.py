"""Models and prompts to time: the embedded LVLM, a local one, or a true architecture with random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.clip import CLIPVisionConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llava import LlavaConfig
from transformers.models.llava_next import LlavaNextConfig

from lvlm_fix.errors import PromptError
from lvlm_fix.loading import EMBEDDED, embedded_folder, load
from lvlm_fix.models import family_of
from lvlm_fix.prompting import model_inputs

QUESTION = "Describe the image."
RANDOM = ("random:tiny", "random:llava-1.5-7b", "random:llava-next-7b")
SPARE = 1.25
"""Memory that a model takes in use, relative to its weights: activations, caches and what libraries keep."""


@dataclass(frozen=True)
class Subject:
    """A model to time; `processor` is None where its weights are random, and `crops` is what a picture is cut into."""

    name: str
    model: Any
    processor: Any
    crops: int | None = None


def subject(name: str, device: str | None = None, dtype: str = "auto") -> Subject:
    """Load `embedded`, a folder or hub id, or build one of `RANDOM` on the device.

    Raises:
        ValueError: an unknown random model, dtype or device, or one too large for the device.
        OSError: a model that cannot be loaded.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"cannot use device {device}: torch sees no GPU here; leave --device out")
    if not name.startswith("random:"):
        model, processor = load(name, dtype=dtype)
        return Subject(name, model.to(place), processor)  # type: ignore[arg-type]
    if name not in RANDOM:
        raise ValueError(f"there is no random model {name!r}: give one of {', '.join(RANDOM)}")
    usual = "float32" if place.type == "cpu" else "float16"
    kind = getattr(torch, usual if dtype == "auto" else dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}: give auto, float32, bfloat16 or float16")
    config = _config(name)
    _require_room(name, config, kind, place)
    with torch.device(place):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=kind).eval()
    model.generation_config.pad_token_id = 0
    return Subject(name, model, None, 5 if "next" in name else None)


def _config(name: str) -> Any:
    if name == "random:tiny":
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=72,
            patch_size=12,
        )
        text = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        return LlavaConfig(vision_config=vision, text_config=text, image_token_index=255, image_seq_length=36)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    if name == "random:llava-1.5-7b":
        return LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=576
        )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        image_grid_pinpoints=[[672, 672]],
    )


def _require_room(name: str, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    with torch.device("meta"):
        parameters = sum(one.numel() for one in AutoModelForImageTextToText.from_config(config).parameters())
    needed = int(parameters * dtype.itemsize * SPARE)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    if needed > free:
        raise ValueError(
            f"{name} needs about {needed / 2**30:.0f} GiB in {str(dtype).removeprefix('torch.')} and {device} has "
            f"{free / 2**30:.0f} GiB free: use a larger device, or random:tiny"
        )


def _available() -> int:
    """Bytes of memory that can be had; of free pages alone, a machine that has read files has few."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))


def inputs_of(subject: Subject, rows: int, prompt_tokens: int | None = None) -> dict[str, Any]:
    """What `generate` takes: `rows` pictures with the same question, made longer to `prompt_tokens` tokens in all.

    Raises:
        PromptError: the pictures alone are longer than that.
    """
    inputs = dict(_random(subject, rows) if subject.processor is None else _real(subject, rows))
    length = inputs["input_ids"].shape[1]
    if prompt_tokens is None or prompt_tokens == length:
        return inputs
    if prompt_tokens < length:
        raise PromptError(
            f"a prompt of {prompt_tokens} tokens has no room for its picture and question, which take {length}: "
            f"give --prompt-tokens of at least {length}"
        )
    return _longer(subject, inputs, prompt_tokens - length)


def _real(subject: Subject, rows: int) -> Mapping[str, Any]:
    samples = sorted((embedded_folder().parent / "samples").glob("*.png"))
    pictures = [[Image.open(samples[row % len(samples)]).convert("RGB")] for row in range(rows)]
    return model_inputs(subject.model, subject.processor, pictures, [QUESTION] * rows)


def _random(subject: Subject, rows: int) -> dict[str, Any]:
    model, drawn = subject.model, torch.Generator().manual_seed(0)
    side = model.config.vision_config.image_size
    shape = (rows, 3, side, side) if subject.crops is None else (rows, subject.crops, 3, side, side)
    inputs: dict[str, Any] = {
        "pixel_values": torch.randn(shape, generator=drawn).to(model.device, model.dtype)
    }
    if subject.crops is not None:
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * rows, device=model.device)
    family = family_of(model)
    with torch.inference_mode():
        # How many tokens a picture takes is the model's own to say: newlines and unpadding come on top of the patches.
        features = family.features(family.encoder(model).get_image_features(**inputs))
    words = torch.randint(3, 100, (1, 20), generator=drawn)
    pictures = torch.full((1, len(features[0])), model.config.image_token_id)
    ids = torch.cat([torch.ones(1, 1, dtype=torch.long), words[:, :4], pictures, words[:, 4:]], dim=1)
    ids = ids.repeat(rows, 1).to(model.device)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _longer(subject: Subject, inputs: dict[str, Any], missing: int) -> dict[str, Any]:
    """The prompt's last words once more and once more, after the picture."""
    ids: Tensor = inputs["input_ids"]
    is_image = ids == family_of(subject.model).image_token_id(subject.model)
    after = int(is_image.any(0).nonzero().max()) + 1
    rows, length = ids.shape
    words = (
        torch.arange(length - after, device=ids.device).repeat(-(-missing // (length - after)))[:missing]
        + after
    )
    columns = torch.cat([torch.arange(after, device=ids.device), words])
    columns = torch.cat([columns, torch.arange(after, length, device=ids.device)])
    return {
        name: value[:, columns] if isinstance(value, Tensor) and value.shape == (rows, length) else value
        for name, value in inputs.items()
    }


__all__ = ["EMBEDDED", "QUESTION", "RANDOM", "Subject", "inputs_of", "subject"]
