"""Scenes as arrays, rendered once by several processes and kept beside the checkpoints."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lvlm_fix.assets.recipe import scenes
from lvlm_fix.assets.recipe.world import CATEGORIES, THEMES

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's own
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
MOST = 6  # objects a scene holds at the most
CHUNK = 500


@dataclass(frozen=True)
class Scenes:
    """`images` (S, 144, 144, 3) uint8; `patches` (S, 144) uint8; `objects` (S, 6) category indices, the largest
    first, -1 where there is none; `hidden` (S, 6) bool; `themes` (S,) indices."""

    images: np.ndarray
    patches: np.ndarray
    objects: np.ndarray
    hidden: np.ndarray
    themes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def names(self, index: int) -> list[str]:
        """Categories of one scene, the largest object first."""
        return [CATEGORIES[i] for i in self.objects[index] if i >= 0]

    def pixels(self, indices: np.ndarray) -> torch.Tensor:
        """Normalised pictures (len(indices), 3, 144, 144), float32, as the processor makes them."""
        batch = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float() / 255
        return (batch - MEAN) / DEVIATION


def _chunk(first: int, count: int) -> dict[str, np.ndarray]:
    made = [scenes.training_scene(seed) for seed in range(first, first + count)]
    objects = np.full((count, MOST), -1, dtype=np.int8)
    hidden = np.zeros((count, MOST), dtype=bool)
    for row, scene in enumerate(made):
        for column, thing in enumerate(scene.things):
            objects[row, column] = CATEGORIES.index(thing.category)
            hidden[row, column] = thing.category in scene.hidden
    return {
        "images": np.stack([np.asarray(scene.image) for scene in made]),
        "patches": np.stack([scene.patches.reshape(-1) for scene in made]),
        "objects": objects,
        "hidden": hidden,
        "themes": np.array([list(THEMES).index(scene.theme) for scene in made], dtype=np.int8),
    }


def _end_with_parent() -> None:
    """Have a worker end soon after what started it: where that is killed, the worker would wait for scenes for good."""
    parent = os.getppid()  # not always the recipe itself: Python 3.14 starts workers from a server

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def render(first: int, count: int, folder: Path, label: str) -> Scenes:
    """Training scenes `first .. first + count - 1`, from the folder where they are rendered already."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scenes-{first}-{count}.npz"
    if not path.exists():
        starts = range(first, first + count, CHUNK)
        sizes = [min(CHUNK, first + count - start) for start in starts]
        workers = min(16, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            bar = tqdm(pool.map(_chunk, starts, sizes), total=len(sizes), desc=label, unit=f"x{CHUNK} scenes")
            parts = list(bar)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        partial_path = path.with_suffix(".partial.npz")
        np.savez(partial_path, **arrays)  # type: ignore[arg-type]
        partial_path.replace(path)
    with np.load(path) as stored:
        return Scenes(**{name: stored[name] for name in stored.files})


def order(seed: int, step: int, size: int, batch: int) -> np.ndarray:
    """The batch of a step: shuffled epochs, a pure function of seed and step, so that a resumed run is the same."""
    picks = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, size)
        picks.append(_epoch(seed, epoch, size)[place])
    return np.array(picks)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([5, seed, epoch]).permutation(size)
