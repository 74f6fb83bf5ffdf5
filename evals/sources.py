"""Where pictures and annotations are, and hashes that tell whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from .records import DataError

if TYPE_CHECKING:
    from .tasks import Item


def scenes_folder() -> Path:
    """Folder of the evaluation scenes that ship with the package."""
    return Path(str(files("lvlm_fix.assets"))) / "scenes"


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pictures_hash(items: Iterable[Item]) -> str:
    """SHA-256 over the names and bytes of the pictures that are asked about."""
    total = hashlib.sha256()
    for name, path in sorted({(item.image, item.path) for item in items}):
        total.update(f"{name}\n{file_hash(path)}\n".encode())
    return total.hexdigest()


def find_scenes(
    images: str | Path | None, annotations: str | Path | None, statistics: str | Path | None
) -> tuple[Path, Path, Path | None]:
    """Folder of pictures, instances file and statistics; the embedded scenes' where not given."""
    scenes = scenes_folder()
    if annotations is None:
        if statistics is None and (scenes / "statistics.json").is_file():
            statistics = scenes / "statistics.json"
        instances = scenes / "instances_scenes.json"
    else:
        instances = Path(annotations)
        if images is None:
            raise ValueError("annotations of your own need their pictures; give --images too")
    if instances.is_dir():
        found = sorted(instances.glob("instances_*.json*"))
        if not found:
            raise DataError(f"{instances}: holds no instances_*.json; name the file to use")
        instances = found[0]
    folder = Path(images) if images is not None else scenes / "images"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of pictures; check --images")
    return folder, instances, Path(statistics) if statistics else None
