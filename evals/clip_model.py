"""Loads OpenCLIP models from local files, and nothing else: whatever would need a download is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import DataError, read_json
from .sources import file_hash

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PREFIX = "A photo depicts"  # what the paper, section 3, puts before every caption
CONFIG = "open_clip_config.json"
_PARTS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model")


@dataclass(frozen=True, eq=False)
class Clip:
    """An OpenCLIP model with its preprocessing, its tokenizer, and what it puts before a caption."""

    name: str
    sha256: str
    prefix: str
    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[..., Tensor]

    def images(self, pictures: Sequence[str | Path | Image.Image]) -> Tensor:
        """Features (pictures, width), normalised, float32."""
        import torch

        from lvlm_fix import open_picture

        pixels = torch.stack([self.preprocess(open_picture(picture)) for picture in pictures])
        with torch.inference_mode():
            return self.model.encode_image(pixels.to(_device(self.model)), normalize=True).float().cpu()

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Features (captions, width), normalised, float32, and which captions were cut."""
        import torch

        ids = self.tokenizer(list(captions))
        # A caption that was cut has room for one more token where there is room for one more.
        wider = self.tokenizer(list(captions), context_length=ids.shape[1] + 1)
        padding = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        cut = (wider != padding).sum(1) > (ids != padding).sum(1)
        with torch.inference_mode():
            features = self.model.encode_text(ids.to(_device(self.model)), normalize=True)
        return features.float().cpu(), cut.tolist()


@lru_cache(maxsize=2)
def clip_of_folder(folder: str, sha256: str) -> Clip:
    """The model in a folder. Keyed by what the folder holds, too: a changed one is loaded anew.

    Raises `DataError` where open_clip cannot load it, or would have to fetch a part.
    """
    import open_clip

    try:
        config = read_json(Path(folder) / CONFIG)
    except DataError as error:
        raise _unusable(folder, error) from None
    prefix = _prefix(config, folder)
    _refuse_fetched(config.get("model_cfg") if isinstance(config, dict) else None, folder, ("hf_model_name",))
    try:
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        tokenizer(["a"])
    except Exception as error:  # whatever open_clip, torch or the tokenizer make of a foreign folder
        raise _unusable(folder, error) from error
    return Clip(Path(folder).resolve().name, sha256, prefix, model.eval(), preprocess, tokenizer)


def clip_of_file(architecture: str, file: str) -> Clip:
    """A model of an architecture that open_clip knows by name, with weights from a file.

    Raises `FileNotFoundError` where there is no such file, and `DataError` as `clip_of_folder` does.
    """
    import open_clip

    place, path = f"{architecture}:{file}", Path(file).expanduser()
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise DataError(
            f"{place}: open_clip {open_clip.__version__} knows no architecture {architecture!r}; check --clip against "
            "open_clip.list_models()"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{place}: there is no file {path} of weights; check --clip")
    _refuse_fetched(config, place, ("hf_model_name", "hf_tokenizer_name"))
    if (
        "siglip" in architecture.lower()
    ):  # open_clip fetches its tokenizer, though the configuration names none
        raise _fetched(place, "a tokenizer")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=str(path))
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # as above
        raise _unusable(place, error) from error
    name = f"{architecture}:{path.name}"
    return Clip(name, file_hash(path), PREFIX, model.eval(), preprocess, tokenizer)


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of weights, configuration and tokenizer files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _PARTS):
        total.update(f"{path.name}\n{file_hash(path)}\n".encode())
    return total.hexdigest()


def _prefix(config: Any, folder: str) -> str:
    own = config.get("clipscore", {}) if isinstance(config, dict) else {}
    prefix = own.get("prefix", PREFIX) if isinstance(own, dict) else None
    if not isinstance(prefix, str):
        raise DataError(
            f'{Path(folder) / CONFIG}: "clipscore" names no "prefix" that is a string; correct it, or check --clip'
        )
    return prefix


def _refuse_fetched(config: Any, place: str, names: Sequence[str]) -> None:
    """Refuse parts that open_clip knows by their name on the hub alone."""
    text = config.get("text_cfg") if isinstance(config, dict) else None
    if not isinstance(text, dict):
        return
    for name in names:
        if text.get(name) and not Path(str(text[name])).is_dir():
            raise _fetched(
                place, f"the text tower {text[name]}" if "model" in name else f"the tokenizer {text[name]}"
            )


def _fetched(place: str, what: str) -> DataError:
    return DataError(
        f"{place}: open_clip would fetch {what} from the hub, and nothing is downloaded here; name another OpenCLIP "
        "model with --clip"
    )


def _unusable(place: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(
        f"{place}: holds no OpenCLIP model that can be loaded ({reason}); save it again, or check --clip"
    )


def _device(model: Any) -> Any:
    return next(model.parameters()).device
