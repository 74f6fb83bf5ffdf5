"""CLIPScore: how well a caption suits its picture in the eyes of a CLIP model (Hessel et al., 2021, arXiv 2104.08718).

The reference-free score, `2.5 * max(cos(picture, caption), 0)`, of any OpenCLIP model in a local folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .clip_model import CONFIG, Clip, clip_of_file, clip_of_folder, folder_hash
from .statistics import Array, ratio
from .tasks import Chair

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

WEIGHT = 2.5  # the paper's w, "to stretch the range": cosines of a ViT-B/32 hardly pass 0.4


class ClipScore(NamedTuple):
    """A caption's score, 0 to 2.5, and whether the model read only its beginning."""

    score: float
    truncated: bool


def embedded_clip() -> Path:
    """Folder of the small OpenCLIP model that ships with the package; it knows the embedded scenes' world alone."""
    return Path(str(files("lvlm_fix.assets"))) / "clip"


def load_clip(folder: str | Path | None = None, prefix: str | None = None) -> Clip:
    """Load an OpenCLIP model from a local folder as `open_clip` saves it, or a file; nothing is downloaded for it.

    Args:
        folder: holds `open_clip_config.json`, the weights, and the tokenizer's files where the model has a tokenizer
            of its own (otherwise it is CLIP's, which comes with open_clip). Or the name by which open_clip knows the
            architecture and a file of weights, such as `ViT-B-32:weights.safetensors`, read with CLIP's tokenizer and
            preprocessing. By default the embedded model.
        prefix: put before every caption; by default what the folder's configuration names under `clipscore`, as the
            embedded model's does ("", for it learnt captions as they stand), or else the paper's "A photo depicts".

    Raises:
        FileNotFoundError: no such folder or file, or no configuration in it.
        DataError: a folder that does not hold what `open_clip` can load without a download.
    """
    place = embedded_clip() if folder is None else Path(folder).expanduser()
    if not place.is_dir() and ":" in str(place):
        clip = clip_of_file(*str(place).split(":", 1))
    elif not place.is_dir():
        raise FileNotFoundError(f"{place}: there is no such folder of an OpenCLIP model; check --clip")
    elif not (place / CONFIG).is_file():
        raise FileNotFoundError(
            f"{place}: holds no {CONFIG}, so it is no OpenCLIP model; check --clip, or name architecture and weights, "
            "as ViT-B-32:weights.safetensors"
        )
    else:
        clip = clip_of_folder(str(place), folder_hash(place))
    if prefix is None or prefix == clip.prefix:
        return clip
    return replace(clip, prefix=prefix)


def clip_scores(
    model: str | Path | Clip | None,
    pairs: Iterable[tuple[str | Path | Image.Image, str]],
    *,
    prefix: str | None = None,
    batch_size: int = 64,
) -> list[ClipScore]:
    """CLIPScore of each (picture, caption), in the given order.

    Pictures and captions that occur several times are encoded once. On a GPU if there is one, in float32.

    Args:
        model: what `load_clip` takes, None for the embedded one, or what it returns.
        pairs: pictures (paths or Pillow images) and captions.
        prefix: as `load_clip` takes it; of a loaded model its own.
        batch_size: pictures, or captions, encoded at once.

    Raises:
        OSError, DataError: as `load_clip`; `PictureError` for a picture that cannot be read.

    >>> from PIL import Image
    >>> [score] = clip_scores(None, [(Image.new("RGB", (144, 144)), "The image shows a zebra.")])
    >>> 0 <= score.score <= 2.5, score.truncated
    (True, False)
    """
    import torch

    clip = model if isinstance(model, Clip) else load_clip(model, prefix)
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

    clip: Clip = field(kw_only=True)

    metrics_shown: ClassVar[tuple[str, ...]] = (*Chair.metrics_shown, "clipscore")
    better: ClassVar[Mapping[str, int]] = {**Chair.better, "clipscore": 1}
    late: ClassVar[tuple[str, ...]] = ("clipscore", "clipscore_truncated")
    columns: ClassVar[tuple[str, ...]] = (*Chair.columns, "clipscore_total", "truncated_captions")

    @classmethod
    def of(cls, task: Chair, folder: str | Path | None = None, prefix: str | None = None) -> ClipScoredChair:
        """`task` with CLIPScore; the model is loaded now, so that a faulty folder is known before any answer.

        Raises `OSError` and `DataError` as `load_clip` does.
        """
        own = {one.name: getattr(task, one.name) for one in fields(Chair)}
        return cls(**own, clip=load_clip(folder, prefix))

    @property
    def late_options(self) -> dict[str, Any]:
        import open_clip

        clip = self.clip
        own = {"name": clip.name, "sha256": clip.sha256, "prefix": clip.prefix, "weight": WEIGHT}
        return {"clipscore": {**own, "open_clip": open_clip.__version__}}

    def late_columns(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        paths = {item.id: item.path for item in self.items}
        pairs = [(paths[row["id"]], row["answer"]) for row in rows]
        scores = clip_scores(self.clip, pairs)
        return [{"clipscore": round(one.score, 6), "clipscore_truncated": one.truncated} for one in scores]

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        total = sum(row["clipscore"] for row in rows)
        return [*super().counts(rows), total, sum(row["clipscore_truncated"] for row in rows)]

    def metrics(self, counts: Array) -> dict[str, Array]:
        captions, total = counts[..., 0], counts[..., -2]
        return {**super().metrics(counts[..., :-2]), "clipscore": 100 * ratio(total, captions)}


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
