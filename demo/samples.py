"""The pictures that ship, and what is known to be in them."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

from PIL import Image

from lvlm_fix.diagnosis import sample_pictures
from lvlm_fix.pictures import open_picture

TRUTH = "objects.json"


@dataclass(frozen=True)
class Sample:
    """A picture that ships: file name, the picture, and the objects in it."""

    file: str
    image: Image.Image
    objects: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name as in a share link, such as `living_room`."""
        return self.file.removesuffix(".png")

    @property
    def alt(self) -> str:
        """What a person who does not see it is told."""
        return f"{self.name.replace('_', ' ')}: a drawing of {', '.join(self.objects)}"


@functools.cache
def samples() -> dict[str, Sample]:
    """By name."""
    paths = sample_pictures()
    truth = json.loads((paths[0].parent / TRUTH).read_text(encoding="utf-8"))
    found = [Sample(path.name, open_picture(path), tuple(truth[path.name])) for path in paths]
    return {one.name: one for one in found}


@functools.cache
def _by_pixels() -> dict[str, Sample]:
    return {_fingerprint(one.image): one for one in samples().values()}


def sample_of(image: Image.Image) -> Sample | None:
    """The sample that has exactly these pixels, whichever way it came here."""
    return _by_pixels().get(_fingerprint(image))


def truth_of(image: Image.Image) -> tuple[str, ...] | None:
    """The objects in a picture, where they are known.

    >>> truth_of(samples()["safari"].image)
    ('backpack', 'zebra', 'bear')
    """
    found = sample_of(image)
    return None if found is None else found.objects


def _fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
