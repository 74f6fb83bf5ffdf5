"""Finds the pictures that a run was asked about, and makes them small enough for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .mme import Mme
from .report_runs import Run
from .tasks import Item, pictures_hash, scenes_folder

SIDES = (320, 240, 160, 112, 80)  # longest side in pixels, the first that keeps a page within the budget
QUALITY = 80
_OPTIONS = ("--images", "--data")  # of `lvlm-fix eval`, which the manifest repeats


class Thumbnail(NamedTuple):
    """A picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


def find_pictures(run: Run, folders: Sequence[Path] = ()) -> dict[str, Path] | None:
    """Where the pictures of a run are, by the name that its lines give them; None where they are not found.

    Looked for in `folders`, where the run's command line says, and among the scenes that ship. A folder
    counts only if the hash over its pictures is the manifest's: a report must not show other pictures than
    the model saw.
    """
    names = sorted({row["image"] for row in run.rows[run.names[0]].values()})
    wanted = (run.manifest.get("data") or {}).get("images")
    if any(_leads_out(name) for name in names):
        return None
    for folder in (*folders, *_named_in(run), scenes_folder() / "images"):
        paths = {name: path for name in names if (path := _picture(folder, name, run)).is_file()}
        if len(paths) == len(names) and wanted == pictures_hash(
            Item(name, name, path, "", "") for name, path in paths.items()
        ):
            return paths
    return None


def thumbnails(paths: Mapping[str, Path], budget: int) -> dict[str, Thumbnail]:
    """Small WebP copies, by the same names, that take no more than `budget` bytes together if that can be.

    Raises `PictureError` for a damaged picture.
    """
    from lvlm_fix import open_picture

    pictures = {name: open_picture(path) for name, path in paths.items()}
    small: dict[str, Thumbnail] = {}
    for side in SIDES:
        for name, picture in pictures.items():
            copy = picture.copy()
            copy.thumbnail((side, side))
            data = io.BytesIO()
            copy.save(data, "WEBP", quality=QUALITY, method=4)
            uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
            small[name] = Thumbnail(uri, *copy.size)
        if sum(len(one.uri) for one in small.values()) <= budget:
            break
    return small


def _leads_out(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def _named_in(run: Run) -> list[Path]:
    """The folders that the command line names, as options are spelt: `--images DIR` or `--images=DIR`."""
    words = [str(word) for word in run.manifest.get("command") or ()]
    pairs = [
        *pairwise(words),
        *(tuple(word.split("=", 1)) for word in words if "=" in word),
    ]
    return [Path(value).expanduser() for option, value in pairs if option in _OPTIONS]


def _picture(folder: Path, name: str, run: Run) -> Path:
    path = folder / name
    if run.task is Mme and not path.is_file():  # some subsets keep them in a folder of their own
        return path.parent / "images" / path.name
    return path
