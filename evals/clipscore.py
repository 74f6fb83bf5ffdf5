"""CLIPScore: how well a caption suits its picture in the eyes of a CLIP model (Hessel et al., 2021, arXiv 2104.08718).

The reference-free score, `2.5 * max(cos(picture, caption), 0)`, of any OpenCLIP model in a local folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .records import DataError, read_json
from .statistics import Array, ratio
from .tasks import Chair, file_hash

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

WEIGHT = 2.5  # the paper's w, "to stretch the range": cosines of a ViT-B/32 hardly pass 0.4
PREFIX = "A photo depicts"  # what the paper, section 3, puts before every caption
CONFIG = "open_clip_config.json"
_PARTS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model")


class ClipScore(NamedTuple):
    """A caption's score, 0 to 2.5, and whether the model read only its beginning."""

    score: float
    truncated: bool


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


def embedded_clip() -> Path:
    """Folder of the small OpenCLIP model that ships with the package; it knows the embedded scenes' world alone."""
    return Path(str(files("lvlm_fix.assets"))) / "clip"


def load_clip(folder: str | Path | None = None, prefix: str | None = None) -> Clip:
    """Load an OpenCLIP model from a local folder as `open_clip` saves it; nothing is downloaded for it.

    Args:
        folder: holds `open_clip_config.json`, the weights, and the tokenizer's files where the model has a tokenizer
            of its own (otherwise it is CLIP's, which comes with open_clip). By default the embedded one.
        prefix: put before every caption; by default what the folder's configuration names under `clipscore`, as the
            embedded model's does ("", for it learnt captions as they stand), or else the paper's "A photo depicts".

    Raises:
        FileNotFoundError: no such folder, or no configuration in it.
        DataError: a folder that does not hold what `open_clip` can load.
    """
    place = embedded_clip() if folder is None else Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: there is no such folder of an OpenCLIP model; check --clip")
    if not (place / CONFIG).is_file():
        raise FileNotFoundError(f"{place}: holds no {CONFIG}, so it is no OpenCLIP model; check --clip")
    clip = _load(str(place), _folder_hash(place))
    if prefix is None or prefix == clip.prefix:
        return clip
    return Clip(**{field.name: getattr(clip, field.name) for field in fields(Clip)} | {"prefix": prefix})


def clip_scores(
    model_folder: str | Path | None,
    pairs: Iterable[tuple[str | Path | Image.Image, str]],
    *,
    prefix: str | None = None,
    batch_size: int = 64,
) -> list[ClipScore]:
    """CLIPScore of each (picture, caption), in the given order.

    Pictures and captions that occur several times are encoded once. On a GPU if there is one, in float32.

    Args:
        model_folder: as `load_clip` takes it; None is the embedded model.
        pairs: pictures (paths or Pillow images) and captions.
        prefix: as `load_clip` takes it.
        batch_size: pictures, or captions, encoded at once.

    Raises:
        OSError, DataError: as `load_clip`; `PictureError` for a picture that cannot be read.

    >>> from PIL import Image
    >>> [score] = clip_scores(None, [(Image.new("RGB", (144, 144)), "The image shows a zebra.")])
    >>> 0 <= score.score <= 2.5, score.truncated
    (True, False)
    """
    import torch

    clip = load_clip(model_folder, prefix)
    pairs = list(pairs)
    keys = [str(picture) if isinstance(picture, str | Path) else id(picture) for picture, _ in pairs]
    pictures = dict(zip(keys, (picture for picture, _ in pairs), strict=True))
    start = f"{clip.prefix.rstrip()} " if clip.prefix.strip() else ""
    captions = list(dict.fromkeys(start + caption for _, caption in pairs))
    clip.model.to("cuda" if torch.cuda.is_available() else "cpu")
    seen: dict[str | int, Tensor] = {}
    for part in _parts(list(pictures), batch_size):
        seen |= zip(part, clip.images([pictures[key] for key in part]), strict=True)
    read: dict[str, tuple[Tensor, bool]] = {}
    for part in _parts(captions, batch_size):
        read |= zip(part, zip(*clip.texts(part), strict=True), strict=True)
    scores = []
    for key, (_, caption) in zip(keys, pairs, strict=True):
        feature, cut = read[start + caption]
        scores.append(ClipScore(WEIGHT * max(float(seen[key] @ feature), 0.0), bool(cut)))
    return scores


@dataclass(frozen=True)
class ClipScoredChair(Chair):
    """CHAIR, and besides it CLIPScore of the same captions: its mean, times 100 as tables print it."""

    clip: str | None = None  # folder; None is the embedded one
    prefix: str | None = None

    metrics_shown: ClassVar[tuple[str, ...]] = (*Chair.metrics_shown, "clipscore")
    better: ClassVar[Mapping[str, int]] = {**Chair.better, "clipscore": 1}
    columns: ClassVar[tuple[str, ...]] = (*Chair.columns, "clipscore_total", "truncated_captions")

    @classmethod
    def of(cls, task: Chair, folder: str | Path | None = None, prefix: str | None = None) -> ClipScoredChair:
        """`task` with CLIPScore; the model is loaded now, so that a faulty folder is known before any answer.

        Raises `OSError` and `DataError` as `load_clip` does.
        """
        load_clip(folder, prefix)
        own = {field.name: getattr(task, field.name) for field in fields(Chair)}
        return cls(**own, clip=None if folder is None else str(folder), prefix=prefix)

    @property
    def late_options(self) -> dict[str, Any]:
        import open_clip

        clip = load_clip(self.clip, self.prefix)
        own = {"name": clip.name, "sha256": clip.sha256, "prefix": clip.prefix, "weight": WEIGHT}
        return {"clipscore": {**own, "open_clip": open_clip.__version__}}

    def late_columns(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        paths = {item.id: item.path for item in self.items}
        pairs = [(paths[row["id"]], row["answer"]) for row in rows]
        scores = clip_scores(self.clip, pairs, prefix=self.prefix)
        return [{"clipscore": round(one.score, 6), "clipscore_truncated": one.truncated} for one in scores]

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        total = sum(row["clipscore"] for row in rows)
        return [*super().counts(rows), total, sum(row["clipscore_truncated"] for row in rows)]

    def metrics(self, counts: Array) -> dict[str, Array]:
        captions, total = counts[..., 0], counts[..., -2]
        return {**super().metrics(counts[..., :-2]), "clipscore": 100 * ratio(total, captions)}


@lru_cache(maxsize=2)
def _load(folder: str, sha256: str) -> Clip:
    """Keyed by what the folder holds, too: a changed one is loaded anew."""
    import open_clip

    try:
        config = read_json(Path(folder) / CONFIG)
        prefix = config.get("clipscore", {}).get("prefix", PREFIX)
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        tokenizer(["a"])
    except Exception as error:  # whatever open_clip, torch or the tokenizer make of a foreign folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{folder}: holds no OpenCLIP model that can be loaded ({reason}); save it again, or check --clip"
        ) from error
    return Clip(Path(folder).resolve().name, sha256, str(prefix), model.eval(), preprocess, tokenizer)


def _folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of weights, configuration and tokenizer files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _PARTS):
        total.update(f"{path.name}\n{file_hash(path)}\n".encode())
    return total.hexdigest()


def _device(model: Any) -> Any:
    return next(model.parameters()).device


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
