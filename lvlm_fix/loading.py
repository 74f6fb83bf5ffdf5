"""Loading the embedded LVLM, a local folder or a hub id."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

EMBEDDED = "embedded"


def embedded_folder() -> Path:
    """Folder of the LVLM that ships with the package."""
    return Path(str(files("lvlm_fix.assets"))) / "model"


def load(
    model: str | Path = EMBEDDED,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load an LVLM and its processor, ready for `generate`.

    Args:
        model: `embedded`, a local folder in the Hugging Face layout, or a hub id.
        dtype: a torch dtype or its name; `auto` is the checkpoint's own.
        device_map: as in transformers, such as `auto`, for models larger than one device.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for.
        use_safetensors: load safetensors only; pass False to allow pickled weights, which can run code.

    Returns:
        The model in evaluation mode and its processor, padding on the left.

    Raises:
        OSError: no such checkpoint, one without safetensors, or one that is damaged or not an LVLM.
        ValueError: `dtype` is no torch dtype.

    >>> model, processor = load()
    >>> model.config.model_type
    'llava'
    """
    place = str(embedded_folder() if model == EMBEDDED else model)
    place = str(Path(place).expanduser()) if place.startswith("~") else place
    if (
        isinstance(dtype, str)
        and dtype != "auto"
        and not isinstance(getattr(torch, dtype, None), torch.dtype)
    ):
        raise ValueError(f"unknown dtype {dtype!r}: give auto, float32, bfloat16 or float16")
    if model != EMBEDDED and _looks_local(place) and not Path(place).is_dir():
        raise OSError(
            f"cannot load model {model}: there is no such folder; give a folder, a hub id or 'embedded'"
        )
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(place, **common)
        loaded = AutoModelForImageTextToText.from_pretrained(
            place, dtype=dtype, device_map=device_map, use_safetensors=use_safetensors, **common
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"cannot load model {model}: {_reason(error, Path(place), use_safetensors)}") from error
    processor.tokenizer.padding_side = "left"
    return loaded.eval(), processor


def _reason(error: Exception, folder: Path, use_safetensors: bool) -> str:
    """One sentence of what transformers says in several, or says to those who know its insides."""
    if isinstance(error, SafetensorError):
        return f"a safetensors file in it is damaged or cut short ({error})"
    if isinstance(error, json.JSONDecodeError):
        return f"a JSON file in it is damaged ({error})"
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is run only if you pass trust_remote_code=True"
    if use_safetensors and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return (
            "its weights are pickled and could run code; pass use_safetensors=False to load them all the same"
        )
    return str(error).strip().splitlines()[0]


def _looks_local(place: str) -> bool:
    return place.startswith((".", "/", "~")) or place.count("/") > 1 or "/" not in place
