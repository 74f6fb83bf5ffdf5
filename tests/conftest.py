"""Shared by all tests: offline, deterministic, and small models of the true architecture."""

from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Two workers of one thread each take two thirds of the time of one with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Sink dimensions are neither read from nor left in the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def embedded():
    """The LVLM that ships: model and processor."""
    from lvlm_fix import load

    return load()


@pytest.fixture(scope="session")
def random_llava():
    """A LLaVA of random weights with sharpened attention, so that tokens differ in CLS attention."""
    from transformers import LlavaForConditionalGeneration

    from lvlm_fix.assets.recipe.architecture import PRESETS, build_config, build_processor, build_tokenizer

    torch.manual_seed(7)
    tokenizer = build_tokenizer()
    # VAR changes the layers between the first two and the last.
    deep = replace(PRESETS["smoke"], decoder_layers=4, decoder_width=64)
    model = LlavaForConditionalGeneration(build_config(deep, tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, build_processor(tokenizer)


def noise_picture(seed: int, size: tuple[int, int] = (144, 144)) -> Image.Image:
    """A picture of coarse coloured noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize(size)


@pytest.fixture(scope="session")
def sample_pictures() -> dict[str, Image.Image]:
    """The pictures that ship, by name."""
    return {
        path.stem: Image.open(path).convert("RGB")
        for path in sorted((ROOT / "assets" / "samples").glob("*.png"))
    }


@pytest.fixture(params=["embedded", "random_llava"])
def llava(request):
    """Each of the two models in turn: model and processor."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def ask():
    """Model inputs from a processor and rows of (pictures, question); shorter rows are padded on the left."""

    def build(processor, *rows):
        texts = [f"USER: {'<image>' * len(pictures)}\n{question} ASSISTANT:" for pictures, question in rows]
        pictures = [list(pictures) for pictures, _ in rows if pictures]
        return processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")

    return build
