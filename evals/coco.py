"""Reading annotation files in COCO's format, and the objects of each image that CHAIR takes for true."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chair import Rule, mentioned
from .records import DataError, Faults, Record, read_json
from .vocabulary import category_of


@dataclass(frozen=True)
class Annotations:
    """Which objects each image shows, by an `instances` file."""

    files: dict[str, str]  # image id -> file name of the image
    objects: dict[str, tuple[str, ...]]  # image id -> its distinct categories, in alphabetical order


def read_instances(path: str | Path, faults: Faults | None = None) -> Annotations:
    """Read a COCO `instances_*.json` file (or .json.gz): `images`, `categories`, `annotations`.

    Raises `OSError`, and `DataError` for a fault unless `faults` skips it.
    """
    return _instances(_top(path), path, faults or Faults())


def read_objects(
    paths: Iterable[str | Path],
    wanted: Collection[str] | None = None,
    rule: Rule = "reference",
    faults: Faults | None = None,
) -> dict[str, set[str]]:
    """The true objects of each image, image id -> COCO categories, as the CHAIR metric defines them.

    Each path is a folder of `instances_*.json` and `captions_*.json`, or a single file: instances,
    reference captions, or a plain `{image id: [object, ...]}`. What several of them say of an image adds
    up, so a folder gives the metric's definition: the instances' categories together with the objects that
    the reference captions mention (read by `rule`). With `wanted`, only those images are looked at.

    Raises `OSError`, and `DataError` for a fault unless `faults` skips it, or for a folder that lacks
    either kind of file.
    """
    faults = faults or Faults()
    truth: dict[str, set[str]] = {}
    for path in _files(paths):
        for image, objects in _file_objects(path, wanted, rule, faults):
            truth.setdefault(image, set()).update(objects)
    return truth


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        for kind in ("instances", "captions"):
            found = sorted([*path.glob(f"{kind}_*.json"), *path.glob(f"{kind}_*.json.gz")])
            if not found:
                raise DataError(
                    f"{path}: holds no {kind}_*.json, and CHAIR's ground truth is instances and captions "
                    "together; add it, or name the files to use one by one"
                )
            yield from found


def _file_objects(
    path: Path, wanted: Collection[str] | None, rule: Rule, faults: Faults
) -> Iterator[tuple[str, Collection[str]]]:
    top = _top(path)
    if "annotations" not in top:
        yield from _plain(top, path, wanted, faults)
    elif "categories" in top:
        for image, objects in _instances(top, path, faults).objects.items():
            if wanted is None or image in wanted:
                yield image, _known(objects, f"{path}, image {image}", faults)
    else:
        for image, caption in _captions(top, path, faults):
            if wanted is None or image in wanted:
                yield image, {mention.category for mention in mentioned(caption, rule)}


def _top(path: str | Path) -> dict[str, Any]:
    top = read_json(path)
    if not isinstance(top, dict):
        raise DataError(f"{path}: is not a JSON object; give COCO annotations or a table of objects")
    return top


def _plain(
    top: dict[str, Any], path: Path, wanted: Collection[str] | None, faults: Faults
) -> Iterator[tuple[str, Collection[str]]]:
    for image, objects in top.items():
        if wanted is None or image in wanted:
            where = f"{path}, image {image}"
            usable = isinstance(objects, list) and all(isinstance(name, str) for name in objects)
            if usable:
                yield image, _known(objects, where, faults)
            else:
                with faults.tolerated():
                    raise DataError(f"{where}: is not a list of object names; give one")


def _known(names: Iterable[str], where: str, faults: Faults) -> set[str]:
    known = set()
    for name in names:
        with faults.tolerated():
            category = category_of(name)
            if category is None:
                raise DataError(f"{where}: CHAIR knows no object {name!a}; use a COCO category")
            known.add(category)
    return known


def _instances(top: dict[str, Any], path: str | Path, faults: Faults) -> Annotations:
    files: dict[str, str] = {}
    for record in _entries(top, "images", path, faults):
        with faults.tolerated():
            image = record.id("id")
            if image in files:
                raise record.error(f"image {image} is listed twice; keep one")
            files[image] = record.text("file_name")
    names: dict[str, str] = {}
    for record in _entries(top, "categories", path, faults):
        with faults.tolerated():
            names[record.id("id")] = record.text("name").strip()
            if not names[record.id("id")]:
                raise record.error('"name" is empty; give one')
    objects: dict[str, set[str]] = {image: set() for image in files}
    for record in _entries(top, "annotations", path, faults):
        with faults.tolerated():
            image, category = record.id("image_id"), record.id("category_id")
            if image not in files:
                raise record.error(f"image {image} is not under images; add it there")
            if category not in names:
                raise record.error(f"category {category} is not under categories; add it there")
            objects[image].add(names[category])
    return Annotations(files, {image: tuple(sorted(found)) for image, found in objects.items()})


def _captions(top: dict[str, Any], path: Path, faults: Faults) -> Iterator[tuple[str, str]]:
    for record in _entries(top, "annotations", path, faults):
        found = None
        with faults.tolerated():
            found = record.id("image_id"), record.text("caption")
        if found:
            yield found


def _entries(top: dict[str, Any], key: str, path: str | Path, faults: Faults) -> Iterator[Record]:
    entries = top.get(key)
    if not isinstance(entries, list):
        raise DataError(f'{path}: has no list "{key}"; give COCO annotations')
    for index, entry in enumerate(entries):
        where = f"{path}, {key}[{index}]"
        if isinstance(entry, dict):
            yield Record(entry, where)
        else:
            with faults.tolerated():
                raise DataError(f"{where}: is not a JSON object; correct it")
