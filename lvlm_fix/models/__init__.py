"""One file a model family. `FAMILIES` lists them once."""

from __future__ import annotations

from typing import Any

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.base import Family
from lvlm_fix.models.idefics3 import Idefics3
from lvlm_fix.models.instructblip import InstructBlip
from lvlm_fix.models.internvl import InternVL
from lvlm_fix.models.llava import Llava
from lvlm_fix.models.llava_next import LlavaNext
from lvlm_fix.models.llava_onevision import LlavaOnevision
from lvlm_fix.models.qwen_vl import QwenVL

FAMILIES: tuple[Family, ...] = (
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    Idefics3(),
    InternVL(),
    QwenVL(),
    InstructBlip(),
)


def family_of(model: Any) -> Family:
    """The family of a loaded model.

    Raises:
        UnsupportedModelError: the model is of none; the message names those that are supported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types and hasattr(model, "generate"):
            return family
    supported = ", ".join(f"{family.name} (model_type {'/'.join(family.model_types)})" for family in FAMILIES)
    raise UnsupportedModelError(
        f"cannot attach to {type(model).__name__} (model_type {model_type}): supported are {supported}"
    )
