"""What the methods did in a prefill, as plain numbers when someone asks: nothing is copied to the host before."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lvlm_fix.attention import Pass
from lvlm_fix.encoding import Encoded
from lvlm_fix.methods.base import Method
from lvlm_fix.packed_layer import PackedLayer


class Report:
    """Entries by method name: one an image for stages that look at images, one a prompt for the decoder's.

    Every entry names its `prompt`, the row of the batch as the caller passed it; beams do not count.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.entries: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
        self.copies = 1
        self.prompts: dict[int, int] = {}

    def begin(self, images: list[Encoded], rows: list[int]) -> None:
        """Learn in which row each image stands; an image that stands in several is there for as many beams."""
        self.copies = max(1, sum(image is images[0] for image in images))
        for image, row in zip(images, rows, strict=True):
            self.prompts.setdefault(id(image), row // self.copies)

    def image(self, method: Method, image: Encoded, **values: Any) -> None:
        where = {"prompt": self.prompts[id(image)], "grid": image.vision.grid, "source": image.vision.source}
        self.entries[method.name].append(values | where)

    def attention(self, methods: Sequence[Method], this: Pass) -> None:
        """What the decoder's stages told in a prefill of the positive branch."""
        for prompt in range(len(this.real) // self.copies):
            row = prompt * self.copies
            for method in methods:
                told = this.told.get(method.name)
                if told:
                    self.entries[method.name].append(_of_row(told, row, prompt, this))

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        return {
            name: [{key: _plain(value) for key, value in entry.items()} for entry in entries]
            for name, entries in self.entries.items()
        }


def _of_row(told: list[tuple[int, dict[str, Tensor]]], row: int, prompt: int, this: Pass) -> dict[str, Any]:
    entry: dict[str, Any] = {"prompt": prompt, "layers": [layer for layer, _ in told]}
    for key in told[0][1]:
        entry[key] = functools.partial(_by_layer, [values[key][row] for _, values in told])
    if "sinks" in entry:
        image = this.image_mask[row]
        entry["image_sinks"] = functools.partial(
            _by_layer, [values["sinks"][row][image.to(values["sinks"].device)] for _, values in told]
        )
    packed = [layer for layer in (this.cache.layers if this.cache else []) if isinstance(layer, PackedLayer)]
    if packed and "ratios" in entry:
        entry["bytes"] = sum(layer.nbytes for layer in packed) // len(this.real)
        entry["full_bytes"] = sum(layer.full_nbytes for layer in packed) // len(this.real)
    return entry


def _by_layer(values: list[Tensor]) -> list[Any]:
    """Numbers as they are; of masks, where they are True."""
    return [value.item() if value.ndim == 0 else value.nonzero()[:, 0].tolist() for value in values]


def _plain(value: Any) -> Any:
    return value() if callable(value) else value.tolist() if isinstance(value, Tensor) else value
