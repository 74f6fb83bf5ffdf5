"""Intervals and tests for metrics that are ratios of counts.

Everything starts from a table of counts with one row an image. Questions about one image, and several draws
of its caption, hang together; so images are resampled, never questions, and all settings are resampled alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Metrics = Callable[[Array], Mapping[str, Array]]

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BLOCK = 2_000_000  # weights held at a time


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A metric's change between two settings, its interval, and the two-sided probability of no change."""

    p: float


class Bootstrap:
    """Metrics of several settings on the same resamples of the same images.

    Args:
        counts: (settings, splits, images, columns), whole numbers; zeros for an image not in a split.
        metrics: from (..., columns) of summed counts to metrics by name, each (...).
        resamples: how often images are drawn, with replacement.
        seed: of the draw.

    Raises `ValueError` where there is no image or setting.

    >>> table = np.array([[[[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]]])
    >>> boot = Bootstrap(table, lambda counts: {"accuracy": counts[..., 0] / counts[..., 1]})
    >>> boot.estimate("accuracy", setting=0, split=0)
    Estimate(value=0.75, low=0.25, high=1.0)
    """

    def __init__(self, counts: NDArray, metrics: Metrics, resamples: int = RESAMPLES, seed: int = 0) -> None:
        if counts.ndim != 4 or 0 in counts.shape:
            raise ValueError(f"counts have the shape {counts.shape}; give settings, splits, images, columns")
        self.counts, self.metrics = counts.astype(np.float64), metrics
        images = counts.shape[2]
        self.values = {name: np.asarray(value) for name, value in metrics(self.counts.sum(axis=2)).items()}
        flat = self.counts.transpose(2, 0, 1, 3).reshape(images, -1)
        sums = np.concatenate([weights @ flat for weights in _resampled(images, resamples, seed)])
        drawn = metrics(sums.reshape(-1, *counts.shape[:2], counts.shape[3]))
        self.samples = {name: np.asarray(value) for name, value in drawn.items()}

    def estimate(self, metric: str, setting: int, split: int | None) -> Estimate:
        """A metric of a setting on a split; with None the plain mean over splits, as papers print it."""
        value, sample = self._of(metric, setting, split)
        return Estimate(value, *_interval(sample))

    def difference(self, metric: str, setting: int, other: int, split: int | None) -> Difference:
        """By how much `setting` lies above `other`.

        `p` is twice the share of resamples on the wrong side of zero. Few images can make that absurdly
        small, so it is held above what any test on so many pairs could give: the images of which an exchange of
        the two settings changes this metric.
        """
        value, sample = self._of(metric, setting, split)
        base, base_sample = self._of(metric, other, split)
        change = sample - base_sample
        wrong = min((change <= 0).sum(), (change >= 0).sum())
        pairs = self._pairs(metric, setting, other, split)
        p = min(1.0, max(2 * (wrong + 1) / (len(change) + 1), 2.0 ** (1 - pairs)))
        return Difference(value - base, *_interval(change), p=float(p))

    def _pairs(self, metric: str, setting: int, other: int, split: int | None) -> int:
        """How many images change the metric's difference when the settings exchange their counts of one."""
        own, others = self.counts[setting], self.counts[other]
        # Added as one step, for nothing else is exactly nothing where the counts are the same.
        step = (others - own)[None] * np.array([1.0, -1.0])[:, None, None, None]
        whole = np.stack([own, others]).sum(axis=2, keepdims=True)
        before, after = (np.asarray(self.metrics(counts)[metric]) for counts in (whole, whole + step))
        change = np.diff(after - before, axis=0)[0]  # (splits, images)
        change = change.mean(axis=0) if split is None else change[split]
        return int((np.abs(change) > 1e-12 * max(1.0, float(np.abs(before).max()))).sum())

    def _of(self, metric: str, setting: int, split: int | None) -> tuple[float, Array]:
        values, samples = self.values[metric][setting], self.samples[metric][:, setting]
        if split is None:
            return float(values.mean()), samples.mean(axis=1)
        return float(values[split]), samples[:, split]


def mcnemar(right: Sequence[bool], other_right: Sequence[bool]) -> float:
    """Exact two-sided McNemar test: the probability of so unequal a split of the answers that changed.

    Raises `ValueError` for sequences of unequal length.

    >>> mcnemar([True] * 6, [False] * 6)
    0.03125
    """
    pairs = list(zip(right, other_right, strict=True))
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    changed, fewer = won + lost, min(won, lost)
    term, tail = 1, 0
    for k in range(fewer + 1):
        tail += term
        term = term * (changed - k) // (k + 1)
    return min(1.0, 2 * tail / 2**changed)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities corrected for being several, in the given order (Holm's step-down procedure).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    corrected = [0.0] * len(order)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * probabilities[index]))
        corrected[index] = largest
    return corrected


def ratio(part: Array, whole: Array) -> Array:
    """`part / whole`, and 0 where there is nothing below the line, as the scores of this package have it."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def _resampled(images: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each image is drawn, (some resamples, images) at a time."""
    chance = np.random.default_rng(seed)
    block = max(1, _BLOCK // images)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = chance.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def _interval(sample: Array) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sample, [tail, 1 - tail])
    return float(low), float(high)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation, of one value 0.

    >>> spread([1.0, 3.0]), spread([5.0])
    (1.4142135623730951, 0.0)
    """
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
