"""What the methods did in a prefill, as plain numbers when someone asks: nothing is copied to the host before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_fix.encoding import Encoded
from lvlm_fix.methods.base import Method, Told, made
from lvlm_fix.packed_bytes import bytes_by_row
from lvlm_fix.packed_layer import PackedLayer
from lvlm_fix.passes import Pass


@dataclass
class Gate:
    """For how many of the tokens so far a contrast ran, by prompt; rows of a batch that have ended are counted on."""

    ran: Tensor
    tokens: int = 0

    def count(self, ran: Tensor) -> None:
        self.ran, self.tokens = self.ran + ran, self.tokens + 1

    def entry(self, prompt: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "tokens": lambda: self.tokens,
            "contrasted": lambda: int(self.ran[prompt]),
        }


class Report:
    """Entries by method name: one an image for stages that look at images, one a prompt for the decoder's.

    Every entry names its `prompt`, the row of the batch as the caller passed it; beams do not count.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.entries: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
        self.copies = 1
        self.prompts: dict[int, int] = {}
        self.gates: dict[str, Gate] = {}

    def begin(self, images: list[Encoded], rows: list[int], copies: int | None = None) -> None:
        """Learn in which row each image stands.

        Args:
            images, rows: the images in reading order, and the row of each.
            copies: how often `generate` repeats a prompt, for beams or several answers; None where it is not known:
                an image that stands in several rows is then there for as many beams.
        """
        self.copies = copies or max(1, sum(image is images[0] for image in images))
        for image, row in zip(images, rows, strict=True):
            self.prompts.setdefault(id(image), row // self.copies)

    def image(self, method: Method, image: Encoded, **values: Any) -> None:
        where = {"prompt": self.prompts[id(image)], "grid": image.vision.grid, "source": image.vision.source}
        self.entries[method.name].append(values | where)

    def attention(self, methods: Sequence[Method], this: Pass) -> None:
        """What the decoder's stages told in a prefill of the positive branch."""
        held = _bytes(this)
        for prompt in range(len(this.real) // self.copies):
            row = prompt * self.copies
            for method in methods:
                told = this.told.get(method.name)
                if told:
                    self.entries[method.name].append(_of_row(told, row, prompt, this, held))

    def contrasted(self, method: Method, unsure: Tensor) -> None:
        """Note for which rows (R,) of one more token the contrast ran; beams of a prompt count as one."""
        known = self.gates.get(method.name)
        if known is not None and len(unsure) != len(known.ran) * self.copies:
            return  # rows of the cache were chosen or repeated since: whose they are is not told
        ran = unsure.unflatten(0, (-1, self.copies)).any(1)
        if method.name not in self.gates:
            gate = self.gates[method.name] = Gate(torch.zeros_like(ran, dtype=torch.long))
            self.entries[method.name] += [gate.entry(prompt) for prompt in range(len(ran))]
        self.gates[method.name].count(ran)

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        return {
            name: [{key: _plain(value) for key, value in entry.items()} for entry in entries]
            for name, entries in self.entries.items()
        }


def _of_row(
    told: list[tuple[int, dict[str, Told]]],
    row: int,
    prompt: int,
    this: Pass,
    held: dict[str, Callable[[], Tensor]],
) -> dict[str, Any]:
    entry: dict[str, Any] = {"prompt": prompt, "layers": [layer for layer, _ in told]}
    for key in told[0][1]:
        entry[key] = functools.partial(_by_layer, [values[key] for _, values in told], row)
    if "sinks" in entry:
        # By number among the row's own tokens, and among those of its images: padding counts nowhere.
        for name, among in (("sinks", this.real[row]), ("image_sinks", this.image_mask[row])):
            entry[name] = functools.partial(_among, [values["sinks"] for _, values in told], row, among)
    if "ratios" in entry:
        entry |= {name: functools.partial(_number, counted, row) for name, counted in held.items()}
    return entry


def _bytes(this: Pass) -> dict[str, Callable[[], Tensor]]:
    """Of each row (R,): bytes of its tokens in packed layers, and of all of them as they were; {} without such layers.

    These layers will hold more, so what they hold now is noted; it is counted if somebody asks.
    """
    packed = [layer for layer in (this.cache.layers if this.cache else []) if isinstance(layer, PackedLayer)]
    if not packed:
        return {}
    rows, columns = this.real.shape
    full = sum(layer.full_nbytes for layer in packed) // (rows * columns)
    shares, real = [share for layer in packed for share in layer.shares()], this.real
    return {
        "bytes": functools.cache(lambda: bytes_by_row(shares)),
        "full_bytes": functools.cache(lambda: real.sum(1) * full),
    }


def _number(counted: Callable[[], Tensor], row: int) -> int:
    return int(counted()[row])


def _among(masks: list[Told], row: int, among: Tensor) -> list[list[int]]:
    """Where a row of each mask (R, T) is True, counted over the columns that `among` (T,) has."""
    rows = [made(mask)[row] for mask in masks]
    return [mask[among.to(mask.device)].nonzero()[:, 0].tolist() for mask in rows]


def _by_layer(values: list[Told], row: int) -> list[Any]:
    """A row's numbers as they are; of masks, where they are True."""
    rows = [made(value)[row] for value in values]
    return [value.item() if value.ndim == 0 else value.nonzero()[:, 0].tolist() for value in rows]


def _plain(value: Any) -> Any:
    return value() if callable(value) else value.tolist() if isinstance(value, Tensor) else value
